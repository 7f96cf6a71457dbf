"""A site's offset: what it may stand behind, how it is stored, and that every reader adds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsegate.converter.arch import Arch, Site, load_arch
from sparsegate.converter.checkpoint.plan import (
    Exact,
    Plan,
    Predictor,
    SitePlan,
    Swap,
    Threshold,
    check_plan,
    load_plan,
    save_plan,
)
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.sparsity import KEY, encode, read_key, read_sparsity
from sparsegate.converter.checkpoint.stage import Header
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import apply_plan, load, load_dense, remove_plan
from sparsegate.converter.onnx_export.emit import emissions
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.untrusted import read_json

D, N, R = 64, 176, 6


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="plan")
def _plan() -> Plan:
    """A threshold and a predictor with offsets."""
    gate = Threshold("gate", drawn(N, seed=1).abs() * 0.05, 0.5)
    predictor = Predictor(drawn(R, D, seed=2), drawn(N, R, seed=3), drawn(N, seed=4), 0.5)
    return {
        Site(0): SitePlan(gate=gate, offset=drawn(D, seed=5)),
        Site(1): SitePlan(gate=predictor, offset=drawn(D, seed=6)),
    }


def bare(plan: Plan) -> Plan:
    return {site: replace(entry, offset=None) for site, entry in plan.items()}


def logits(model: Any, plan: Plan, arch: Arch) -> Tensor:
    tokens = torch.arange(3, 23)[None]
    apply_plan(model, plan, arch, arch.activation(model.config))
    try:
        with torch.no_grad():
            return model(input_ids=tokens).logits
    finally:
        remove_plan(model)


def test_a_plan_and_a_checkpoint_keep_it(plan: Plan, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    (tmp_path / "plan").mkdir()
    save_plan(tmp_path / "plan", plan, Header(format="plan"))
    (tmp_path / "checkpoint").mkdir()
    write_checkpoint(source, plan, tmp_path / "checkpoint")
    for read in (load_plan(tmp_path / "plan"), read_sparsity(tmp_path / "checkpoint")[0]):
        for site, entry in plan.items():
            found = read[site].offset
            assert found is not None and entry.offset is not None and torch.equal(found, entry.offset)
    key = read_json(tmp_path / "checkpoint" / "config.json", "config.json")[KEY]
    assert key["version"] == 3 and all(fields["offset"] is True for fields in key["sites"].values())
    without, _ = encode(bare(plan), "silu")
    assert without["version"] == 1 and "offset" not in without["sites"]["layers.0.ffn"], "as before where there is none"
    arch, dense = load_arch("llama"), load_dense(source.folder)
    expected = logits(dense, plan, arch)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "checkpoint")(input_ids=torch.arange(3, 23)[None]).logits, expected)
    assert float((logits(dense, bare(plan), arch) - expected).abs().max()) > 0.1, "and it does something"


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_have_none(version: int) -> None:
    key = {"version": version, "sites": {"layers.0.ffn": {"score": "gate", "activation": "silu", "density": 0.5}}}
    key |= {"base_activation": "silu"} if version == 2 else {}
    read_key(key)
    key["sites"]["layers.0.ffn"]["offset"] = True  # type: ignore[index]
    with pytest.raises(InputError, match=f"in sparsity version {version}, got .*offset"):
        read_key(key)


@pytest.mark.parametrize(
    ("site", "entry"),
    [
        (Site(0), SitePlan((Swap("relu"),), Exact(), offset=torch.zeros(D))),
        (Site(0, kind="linear:q_proj"), SitePlan(gate=Threshold("input", torch.ones(D), 0.5), offset=torch.zeros(D))),
    ],
)
def test_what_it_cannot_stand_behind(site: Site, entry: SitePlan) -> None:
    with pytest.raises(InputError, match="offset of .* must stand behind skipped neurons"):
        check_plan({site: entry})


@pytest.mark.parametrize("offset", [torch.zeros(D, 1), torch.zeros(D + 1)])
def test_an_offset_of_another_shape(offset: Tensor, plan: Plan, tiny_model: Callable[[str], Path]) -> None:
    model, arch = load_dense(tiny_model("llama")), load_arch("llama")
    wrong = {**plan, Site(1): replace(plan[Site(1)], offset=offset)}
    with pytest.raises(InputError, match=r"layers\.1\.ffn\.offset must have shape"):
        apply_plan(model, wrong, arch, "silu")


def test_it_is_the_ops_bias_of_the_down_projection(plan: Plan, tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model("llama"))
    for site, emission in emissions(plan, source.arch, source.config).items():
        offset = plan[site].offset
        assert offset is not None and (emission.tensors["b_down"] == offset.numpy()).all()
