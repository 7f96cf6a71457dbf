"""Tiny models with their base graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from gated_torch import (
    Tiny,
    open_tiny,
)


@pytest.fixture(scope="session")
def tiny(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """model type -> Tiny; one base graph per type for the whole session."""
    root = tmp_path_factory.mktemp("bases")

    def make(model_type: str) -> Tiny:
        return open_tiny(model_type, tiny_model(model_type), root / model_type)

    return cache(make)
