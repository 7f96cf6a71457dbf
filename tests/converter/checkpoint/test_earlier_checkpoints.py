"""Checkpoints of format versions 1 and 2 as earlier code wrote them: they load, compute the same and are written again
as they were.

`earlier/` holds one of each: a tiny llama with every score and residual, and one with swapped activations.
`expected.safetensors` beside it has tokens [2, 12] and the logits [2, 12, 290] of the code that wrote it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Predictor, Threshold
from sparsegate.converter.checkpoint.sparsity import KEY, TENSORS, read_sparsity, write_sparsity
from sparsegate.converter.modeling.gated import dense, load

EARLIER = Path(__file__).parent / "earlier"
VERSIONS = ("version_1", "version_2")


@pytest.mark.parametrize("version", VERSIONS)
def test_it_computes_the_same(version: str) -> None:
    model, expected = load(EARLIER / version), load_file(EARLIER / version / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
        with dense(model):
            ungated = model(input_ids=expected["tokens"]).logits
    assert float((ungated - expected["logits"]).abs().max()) > 1e-2, "the plan does something"


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_written_again_as_it_was(version: str, tmp_path: Path) -> None:
    before = json.loads((EARLIER / version / "config.json").read_text())
    shutil.copyfile(EARLIER / version / "config.json", tmp_path / "config.json")
    write_sparsity(tmp_path, read_sparsity(EARLIER / version)[0], "silu")
    assert json.loads((tmp_path / "config.json").read_text()) == before
    assert (tmp_path / TENSORS).read_bytes() == (EARLIER / version / TENSORS).read_bytes()


def test_what_the_sites_hold() -> None:
    plans = {version: read_sparsity(EARLIER / version)[0] for version in VERSIONS}
    first, second = plans["version_1"], plans["version_2"]
    assert [type(entry.gate) for entry in first.values()] == [Threshold, Threshold, Predictor]
    residuals = [entry.residual for entry in first.values()]
    assert residuals[0] is not None and residuals[0].fc1 is not None and residuals[1] is None
    assert residuals[2] is not None and residuals[2].fc1 is None
    assert not any(entry.edits for entry in first.values())
    assert [type(entry.gate) for entry in second.values()] == [Exact, Predictor]
    assert [entry.activation("silu") for entry in second.values()] == ["drelu", "fatrelu(0.01)"]
    sites = json.loads((EARLIER / "version_2" / "config.json").read_text())[KEY]["sites"]
    assert second[Site(0)].gate == Exact(sites["layers.0.ffn"]["density"], sites["layers.0.ffn"]["opened"])
