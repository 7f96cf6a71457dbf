"""Fixtures shared by all tests. pytest puts this folder on sys.path, so `from models import make_model` works
everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from models import make_model
from test_layers import summary

from sparsegate.converter.pipeline import time_budget
from sparsegate.converter.pipeline.probe import Rates

# Tiny models: a second thread only costs, and threads that spin for one another make a busy machine ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples in every run: a test that fails once can be run again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


RATES = Rates(
    forward=1e-7,
    calibrate=2e-7,
    store=1e-4,
    train={"predictor": 1e-6, "trained_gate": 1e-6, "trained_input": 1e-6},
    head=1e-6,
    train_head=5e-6,
    prefill=1e-7,
    decode=1e-6,
    onnx_head=1e-6,
    onnx_head_alone=1e-5,
    write=1e-9,
    hash=1e-9,
)
"""A machine on which a tiny model's trainings always fit."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The house in one line, under every run."""
    terminalreporter.write_line(summary())


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is decides nothing in a test."""
    monkeypatch.setattr(time_budget, "measure", lambda *_, **__: RATES)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model type -> folder of its tiny model, made once per session; copy it before changing anything in it."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda model_type: make_model(model_type, root / model_type))


@pytest.fixture(scope="session", autouse=True)
def _no_references() -> Iterator[None]:
    """Conversions leave out the dense models of fewer bits, a second each; test_references.py measures them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsegate.converter.pipeline.convert.measure_references", lambda *_: [])
        yield
