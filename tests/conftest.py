"""Fixtures shared by all tests. pytest puts this folder on sys.path, so `from models import make_model` works everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from models import make_model

# Tiny models: a second thread only costs, and threads that spin for one another make a busy machine ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples in every run: a test that fails once can be run again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model type -> folder of its tiny model, made once per session; copy it before changing anything in it."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda model_type: make_model(model_type, root / model_type))
