"""Conversions without the timing of their candidates."""

from __future__ import annotations

import pytest

from sparsegate.converter.pipeline import candidates


@pytest.fixture
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
