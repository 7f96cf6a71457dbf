"""A tiny Llama, opened, and a calibration pass in small groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.stats import collect as walk


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several groups of windows, of two sizes, with and without padding. One thread: matrices this small lose more time
    in barriers than they gain.
    """
    monkeypatch.setattr(walk, "TOKENS_AT_ONCE", 160)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tiny_model: Callable[[str], Path]) -> Source:
    return open_source(tiny_model("llama"))
