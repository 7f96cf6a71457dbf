"""Recipes of conversions that are as small as can be."""

from __future__ import annotations

from pathlib import Path

from small_recipe import small_recipe as write_recipe

SPEED = {
    "settings": {"threads": 1, "prompt_tokens": 4, "new_tokens": 4},
    "command": "c",
    "quiet": True,
    "decode": {"ratio": 2.0},
    "baseline": {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 3.0, "provider": "CPUExecutionProvider"},
    "candidate": {
        "prefill_tokens_per_s": 2.0,
        "decode_tokens_per_s": 6.0,
        "provider": "CPUExecutionProvider",
        "executor": "kernel",
    },
}
TUNE = {"steps": 3, "data": 16, "windows": 2, "precision": "fp32", "updates": "none", "offsets": False}
"""The weights stay: `test_trained_weights.py` has those that move."""


def small_recipe(model: Path, folder: Path, **changes: object) -> Path:
    """A recipe of every method, as small as can be."""
    stages = [{"method": "auto", "config": {"sparsity": 0.4, "tune": TUNE}}]
    return write_recipe(model, folder, **({"stages": stages} | changes))


def one_method(method: str, **config: object) -> list[dict[str, object]]:
    return [{"method": method, "config": config}]
