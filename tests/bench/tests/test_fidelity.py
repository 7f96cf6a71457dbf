"""The benchmark of where the loss sits, on a tiny model: its runs against whole ones and against the gated executor,
its sums against brute force, and the page that is the stored result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import write_text
from torch import Tensor
from torch.nn import functional as F

from benchmarks import fidelity, fidelity_parts
from benchmarks.fidelity_parts import KINDS, huge, places
from benchmarks.fidelity_runs import Masks, Runs, touched
from benchmarks.fidelity_summary import loss_of
from pages.fidelity_page import PAGE, holds, load, page
from records.fidelity_results import Fidelity, ScoreRow
from records.folders import DOCS
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.modeling.gated import load_dense, make_gates, switched
from sparsegate.runtime_onnx.errors import InputError

TAUS = {Site(0): 0.2, Site(1): 0.3, Site(0, kind="linear:down_proj"): 0.1, Site(1, kind="linear:up_proj"): 0.5}


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Path]) -> SimpleNamespace:
    folder = tiny_model("llama")
    model, arch = load_dense(folder), open_source(folder).arch
    tokens = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(model=model, arch=arch, tokens=tokens, runs=Runs(model, arch, tokens))


def joined(states: Any) -> Tensor:
    return torch.stack(states.last)


def test_runs_from_a_block_on_are_whole_runs(tiny: SimpleNamespace) -> None:
    for layer in range(2):
        here = {site: tau for site, tau in TAUS.items() if site.layer == layer}
        others = {site: tau for site, tau in TAUS.items() if site.layer != layer}
        found = {"alone": tiny.runs.alone(TAUS, layer), "but": tiny.runs.all_but(TAUS, layer, "these")}
        for name, taus in {"alone": here, "but": others}.items():
            whole = tiny.runs.run(Masks(taus))
            assert torch.equal(joined(found[name]), joined(whole)), name
            assert not torch.equal(joined(whole), joined(tiny.runs.dense)), name


@torch.no_grad()
@pytest.mark.parametrize("site", [Site(1), Site(0, kind="linear:gate_proj")])
def test_masks_are_those_of_the_gated_executor(tiny: SimpleNamespace, site: Site) -> None:
    units, score = (tiny.model.config.hidden_size, "input") if site.kind != "ffn" else (None, "gate")
    units = units or tiny.model.config.intermediate_size
    plan = {site: SitePlan(gate=Threshold(score, uniform_tau(0.4, units), 0.5))}
    gates = make_gates(tiny.model, plan, tiny.arch, "silu")
    with switched(tiny.model, gates):
        logits = tiny.model(input_ids=tiny.tokens).logits
    masks = Masks({site: 0.4})
    states = tiny.runs.run(masks)
    found = torch.stack([tiny.runs.halves.logits(hidden) for hidden in states.last])
    torch.testing.assert_close(found, logits[:, :-1], rtol=1e-5, atol=1e-5)
    assert 0.05 < masks.shares()[site] < 0.95


@torch.no_grad()
def test_losses_are_those_of_plain_softmaxes(tiny: SimpleNamespace) -> None:
    dense = tiny.model(input_ids=tiny.tokens).logits[:, :-1].double().log_softmax(-1)
    states = tiny.runs.run(Masks(TAUS))
    sparse = torch.stack([tiny.runs.halves.logits(hidden) for hidden in states.last]).double().log_softmax(-1)
    target = tiny.tokens[:, 1:]
    (losses,) = tiny.runs.losses([states])
    nll = F.nll_loss(sparse.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    kl = F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(losses[0].double(), nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[1].double(), kl, rtol=1e-3, atol=1e-5)
    assert torch.equal(losses[2] == 1, sparse.argmax(-1) == dense.argmax(-1))
    means = loss_of(losses)
    by_window = kl.mean(1)
    assert means.kl == pytest.approx(float(by_window.mean()), rel=1e-3)
    assert means.kl_error == pytest.approx(float(by_window.std() / 3**0.5), rel=1e-2)


def test_masks_at_some_positions_leave_those_before_as_they_are(tiny: SimpleNamespace) -> None:
    where = torch.zeros(tiny.tokens.shape, dtype=torch.bool)
    where[:, 5] = True
    masks = Masks(TAUS, where)
    moved = (joined(tiny.runs.run(masks)) - joined(tiny.runs.dense)).abs().amax(-1)
    assert float(moved[:, :5].max()) < 1e-5 and bool((moved[:, 5] > 1e-4).all()) and bool((moved[:, 6:] > 0).any())
    assert masks.seen[Site(0)] == 3 * tiny.model.config.intermediate_size


def test_cost_counts_every_matrix_by_what_it_reads() -> None:
    gate = {Site(0): 0.5, Site(1): 0.3}
    assert touched(gate, [0]) == pytest.approx(2 / 3) and touched(gate, [0, 1]) == pytest.approx((2 + 1.6) / 6)
    channels = {
        Site(0, kind=f"linear:{name}_proj"): share for name, share in (("gate", 0.4), ("up", 0.6), ("down", 0.2))
    }
    assert touched(channels, [0]) == pytest.approx(0.4)
    both = {Site(0): 0.5, Site(0, kind="linear:gate_proj"): 0.8, Site(0, kind="linear:down_proj"): 0.3}
    assert touched(both, [0]) == pytest.approx((0.8 + 0.5 + 0.3) / 3) and touched({}, [0]) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", [0.5, 0.8])
def test_kinds_cost_what_they_aim_at(kind: str, cost: float) -> None:
    shares = {
        Site(0) if name == "ffn" else Site(0, kind=f"linear:{name}"): share for name, share in KINDS[kind](cost).items()
    }
    assert touched(shares, [0]) == pytest.approx(cost)


def test_places_are_disjoint_halves_of_all() -> None:
    peaks = torch.ones(2, 3, 8)
    peaks[1, 0, 0] = peaks[0, 2, 6] = 10.1
    peaks[0, 1, 3] = 9.9
    assert huge(peaks).nonzero().tolist() == [[0, 0], [2, 6]]
    found = places(peaks)
    for name in ("the first", "the first four", "huge tokens"):
        assert torch.equal(found[f"only {name}"], ~found[f"all but {name}"])
    assert found["only huge tokens after the first"].nonzero().tolist() == [[2, 6]]


def test_the_claim_is_judged_by_bleu() -> None:
    rows = [ScoreRow.model_construct(bleu=bleu) for bleu in (95.1, 94.9)]
    assert [holds(row) for row in rows] == [True, False]


def test_page_is_that_of_the_stored_result() -> None:
    text, result = PAGE.read_text(encoding="utf-8"), load()
    assert page(result) == text, "run python tests/bench/pages/fidelity_page.py"
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert "fidelity_kinds.png" in pictures and "fidelity_positions.png" in pictures
    for picture in pictures:
        assert (DOCS / picture).read_bytes()[:4] == b"\x89PNG"
    assert [kind.kind for kind in result.kinds] == ["gate", "channels"] and len(result.rows) == 15
    shown = [line for line in text.splitlines() if "Corrected GxO" in line]
    assert all("Corrected GxO (oracle)" in line for line in shown)


@pytest.mark.slow
def test_a_run_is_stored_and_not_run_again(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fidelity,
        "SCORES",
        {"answers": "--windows 1 --length 40 --scores gate corrected_gxo --sparsity 0.8 --answers 2"},
    )
    words = [str(tiny_model("llama")), "--text", str(write_text(tmp_path)), "--work", str(tmp_path / "work")]
    words += ["-o", str(tmp_path / "r.json"), "--windows", "10", "--length", "32", "--calibration-windows", "8"]
    words += ["--short", "16", "--few", "3"]
    with pytest.raises(InputError, match="At least dense and kinds must be measured"):
        fidelity.run([*words, "--minutes", "0"])
    found = fidelity.run([*words, "--threads", "1"])
    assert (
        found.missing == ["scores"]
        and found.heldout.windows == 10
        and found.kinds[0].windows == 5
        and len(found.kinds[0].blocks) == 2
    )
    assert all(abs(row.cost - row.aim) < 0.05 and row.loss.kl > 0 for row in found.rows)
    assert all(row.gain is not None for kind in found.kinds for row in kind.blocks)
    assert found.answers is not None and {row.score for row in found.answers.rows} == {"gate", "corrected_gxo"}
    assert Fidelity.model_validate_json((tmp_path / "r.json").read_text()) == found

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(fidelity_parts, "Runs", refuse)
    again = fidelity.run([*words, "--threads", "1"])
    assert again.rows == found.rows and again.kinds == found.kinds and "What follows" in page(again)
