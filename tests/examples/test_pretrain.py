"""The pretraining script: its splits, its 5-gram baseline against a direct count, and a training that resumes to the
same weights.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "converter" / "bundled"
sys.path.insert(0, str(ROOT / "examples"))
import pretrain  # noqa: E402


def direct_five_gram(train: list[int], heldout: list[int], vocabulary: int) -> float:
    """Witten-Bell by dictionaries: bits of `heldout`."""
    counts: list[dict] = [defaultdict(lambda: defaultdict(int)) for _ in range(5)]
    for at, token in enumerate(train):
        for order in range(min(at, 4) + 1):
            counts[order][tuple(train[at - order : at])][token] += 1
    bits = 0.0
    for at, token in enumerate(heldout):
        probability = 1.0 / vocabulary
        for order in range(min(at, 4) + 1):
            seen = counts[order].get(tuple(heldout[at - order : at]))
            if seen:
                probability = (seen.get(token, 0) + len(seen) * probability) / (sum(seen.values()) + len(seen))
        bits -= math.log2(probability)
    return bits


def test_five_gram_equals_a_direct_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "VOCAB", 8)
    random = np.random.default_rng(0)
    train, heldout = (np.minimum(random.geometric(0.4, size), 8).astype(np.uint16) - 1 for size in (400, 60))
    assert pretrain.five_gram_bits(train, heldout) == pytest.approx(
        direct_five_gram(train.tolist(), heldout.tolist(), 8), rel=1e-12
    )


def test_splits_depend_on_the_path_alone() -> None:
    names = [f"package/module_{k}.py" for k in range(5000)]
    shares = {
        split: sum(pretrain.split_of(name) == split for name in names) / 5000 for split in ("heldout", "calibration")
    }
    assert all(0.01 < share < 0.03 for share in shares.values())
    assert pretrain.split_of("os.py") == pretrain.split_of("os.py")


def test_the_bundled_model_is_the_record_s() -> None:
    record = json.loads((BUNDLED / "training.json").read_text())
    assert (BUNDLED / "model.safetensors").stat().st_size < 9e6
    assert 2e6 <= record["parameters"] <= 5e6
    assert record["heldout_bits_per_byte"] < record["five_gram_bits_per_byte"]
    assert record["curve"][-1]["step"] == record["steps"]


@pytest.mark.slow
def test_the_bundled_model_reaches_its_bits_per_byte() -> None:
    from sparsegate.converter.checkpoint.source import open_source
    from sparsegate.converter.modeling.gated import load_dense

    text = (BUNDLED / "heldout.txt").read_text()[:60000]
    ids = np.array(open_source(BUNDLED).tokenizer()(text)["input_ids"], dtype=np.uint16)
    bits = pretrain.heldout_bits(load_dense(BUNDLED), ids, len(text.encode()))
    record = json.loads((BUNDLED / "training.json").read_text())
    assert abs(bits - record["heldout_bits_per_byte"]) < 0.25  # a part of the held-out modules
    assert bits < record["five_gram_bits_per_byte"]


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / "pretrain.py"), *arguments],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    run("prepare", "--work", str(tmp_path))
    run("train", "--work", str(tmp_path), "--steps", "6")
    whole = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    (tmp_path / "checkpoint.pt").unlink()
    run("train", "--work", str(tmp_path), "--steps", "6", "--minutes", "0.02")
    assert 0 < torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < 6
    run("train", "--work", str(tmp_path), "--steps", "6")
    resumed = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())
    run("export", "--work", str(tmp_path), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 9e6
