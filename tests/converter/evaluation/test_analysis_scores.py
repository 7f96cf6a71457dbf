"""Scores in the analysis executor: thresholds against the plan executor, ranks, and the leak test over every one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from analysis_loops import Make, by_hand, check, every_score, tiny, windows
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.bundled import BUNDLED, CALIBRATION_TEXT, HELDOUT_TEXT
from sparsegate.converter.checkpoint.plan import SitePlan, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.evaluation.analysis import ranks
from sparsegate.converter.evaluation.analysis.executor import analyse, analyse_all
from sparsegate.converter.evaluation.analysis.ranks import rank_correlations, spearman
from sparsegate.converter.evaluation.analysis.selectors import quantile_tau, top_k
from sparsegate.converter.evaluation.analysis.setting import Outcome, Setting
from sparsegate.converter.evaluation.quality import measure_quality
from sparsegate.converter.modeling.gated import apply_plan, load_dense, remove_plan
from sparsegate.converter.modeling.gradients import attribute
from sparsegate.converter.modeling.taps import Fields, tapped
from sparsegate.converter.scores import SCORES, Context, load_score
from sparsegate.converter.text.windows import make_batches, read_text
from sparsegate.runtime_onnx.errors import InputError


def test_thresholds_equal_the_plan_executor(tiny_model: Make) -> None:
    """Gate thresholds from calibration windows: the same numbers as the same plan in the torch executor of
    checkpoints.
    """
    model, arch = tiny(tiny_model)
    batches, calibration = windows(2), windows(3)
    outcome = analyse(model, arch, batches, Setting("gate", 0.4, selector="threshold"), calibration)
    gates: dict[Site, Tensor] = {}
    with (
        torch.no_grad(),
        tapped(
            model, arch, ["ffn"], lambda site, fields: gates.__setitem__(site, fields["gate"].abs()[calibration.mask])
        ),
    ):
        model(input_ids=calibration.tokens)
    plan = {
        site: SitePlan(gate=Threshold("gate", uniform_tau(quantile_tau(scores, 0.4), 176), 0.4))
        for site, scores in gates.items()
    }
    quality = measure_quality(apply_plan(model, plan, arch, "silu"), plan, batches)
    remove_plan(model)
    for name in ("nll_dense", "nll", "kl", "agreement"):
        assert getattr(outcome, name) == pytest.approx(getattr(quality, name), rel=1e-4, abs=1e-6)
    assert outcome.density["ffn"] == pytest.approx(np.mean(list(outcome.sites.values())))
    again = analyse(model, arch, calibration, Setting("gate", 0.4, selector="threshold", masks="dense"), calibration)
    assert again.density["ffn"] == pytest.approx(0.4, abs=1e-3), (
        "on its own windows a threshold keeps what it was made for"
    )


def test_chess_sees_the_calibration_windows(tiny_model: Make) -> None:
    model, arch = tiny(tiny_model)
    batches, calibration = windows(2), windows(3)
    moments: dict[Site, Tensor] = {}
    with (
        torch.no_grad(),
        tapped(
            model,
            arch,
            ["ffn"],
            lambda site, fields: moments.__setitem__(site, fields["up"][calibration.mask].square().mean(0)),
        ),
    ):
        model(input_ids=calibration.tokens)

    def see(site: Site, fields: Fields) -> Tensor:
        return top_k(fields["gate"].abs() * moments[site].sqrt(), 0.3)

    with torch.no_grad(), tapped(model, arch, ["ffn"], see):
        sparse = model(input_ids=batches.tokens).logits.log_softmax(-1)
    scored = batches.mask[:, 1:]
    nll = -sparse[:, :-1].gather(-1, batches.tokens[:, 1:, None])[..., 0][scored].mean()
    chess, gate = analyse_all(model, arch, batches, [Setting("chess", 0.3), Setting("gate", 0.3)], calibration)
    assert chess.nll == pytest.approx(float(nll), abs=1e-4) and abs(chess.nll - gate.nll) > 1e-3
    plain, plain_arch = tiny(tiny_model, "phi")
    chess, gate = analyse_all(plain, plain_arch, batches, [Setting("chess", 0.3), Setting("gate", 0.3)], calibration)
    assert chess.nll == gate.nll, "a plain network has no up"


def test_griffin_uses_only_the_prompt(tiny_model: Make) -> None:
    """The same neurons for every later token of a window, chosen from its prompt; other tokens after the prompt change
    nothing in the choice.
    """
    model, arch = tiny(tiny_model)
    batches = windows(padded=False)
    setting = Setting("griffin", 0.5, positions="prefill", prompt=8)
    outcome = analyse(model, arch, batches, setting)
    z: dict[Site, Tensor] = {}
    with torch.no_grad(), tapped(model, arch, ["ffn"], lambda site, fields: z.__setitem__(site, fields["z"])):
        model(input_ids=batches.tokens)

    def keep(row: int, layer: int, values: Tensor) -> Tensor:
        prompt = z[Site(layer)][row, :8]
        statistic = torch.stack(
            [sum((prompt[t, i] / prompt[t].norm()) ** 2 for t in range(8)) ** 0.5 for i in range(176)]
        )  # type: ignore[arg-type]
        chosen = statistic >= statistic.sort().values[88]
        return chosen | (torch.arange(len(values)) < 8)[:, None]

    check(outcome, by_hand(model, arch, batches, keep, 8), 3 * 11)
    assert outcome.density == {"ffn": 0.5} and outcome.density_all["ffn"] == pytest.approx(1 - 0.5 * 12 / 20)
    assert not outcome.oracle


def test_other_selectors(tiny_model: Make) -> None:
    """The paper's cut counts as top-k without ties; a global pool shifts units between layers at the same total;
    nonzero keeps a SiLU network whole.
    """
    model, arch = tiny(tiny_model)
    batches = windows()
    names = ("top_k", "paper_cut", "global_pool", "nonzero")
    outcomes = {name: analyse(model, arch, batches, Setting("magnitude", 0.5, selector=name)) for name in names}
    assert outcomes["top_k"].nll == outcomes["paper_cut"].nll
    pooled = outcomes["global_pool"]
    assert pooled.density["ffn"] == pytest.approx(0.5) and abs(pooled.sites["layers.0.ffn"] - 0.5) > 0.01
    floored = analyse(model, arch, batches, Setting("magnitude", 0.5, selector="global_pool", floor=0.5))
    assert floored.nll == outcomes["top_k"].nll
    assert outcomes["nonzero"].sparsity == 0 and outcomes["nonzero"].kl < 1e-6


def test_ranks_and_spearman() -> None:
    """Mean ranks of ties; against Pearson's correlation of ranks counted in a loop."""
    assert ranks(torch.tensor([[3.0, 1, 3, 2]])).tolist() == [[3.5, 1, 3.5, 2]]
    a, b = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).mul(3).round()
    for row, found in enumerate(spearman(a, b).tolist()):
        x, y = (
            [sum(w < v for w in r) + (sum(w == v for w in r) + 1) / 2 for v in r]
            for r in (a[row].tolist(), b[row].tolist())
        )
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert bool(spearman(torch.ones(1, 3), torch.randn(1, 3)).isnan().all())


def test_rank_correlations(tiny_model: Make) -> None:
    model, arch = tiny(tiny_model)
    batches = windows()
    for kind in ("ffn", "attn"):
        found = rank_correlations(model, arch, batches, ["snip", "fisher", "abs_z", "gradient"], kind=kind)
        assert set(found) == {Site(0, kind=kind), Site(1, kind=kind)}
        sites = attribute(
            model,
            arch,
            batches.tokens,
            labels=torch.where(batches.mask, model(input_ids=batches.tokens).logits.argmax(-1), -100),
        ).sites
        for site, matrix in found.items():
            torch.testing.assert_close(matrix, matrix.T)
            assert (
                matrix.diagonal().tolist() == pytest.approx([1] * 4)
                and float(matrix[0, 1]) == pytest.approx(1)
                and abs(float(matrix[2, 3])) < 0.6
            )
            value, grad, _ = sites[site]
            fields = Context(z=value, grad=grad, o=value, o_grad=grad)
            scores = [
                (load_score(n).score if kind == "ffn" else load_score(n).score_heads)(fields)[batches.mask]
                for n in ("abs_z", "gradient")
            ]
            assert float(matrix[2, 3]) == pytest.approx(float(spearman(*scores).mean()), abs=1e-3)
    with pytest.raises(InputError, match="Rank correlations"):
        rank_correlations(model, arch, batches, ["griffin"])


DENSITY = 0.3
REFERENCE = (0.3, 0.2, 0.12, 0.08, 0.05, 0.02)
Leaks = tuple[dict[str, Outcome], dict[str, Outcome], list[Outcome]]


@pytest.fixture(scope="module")
def leaks() -> Leaks:
    """On the bundled model: every score with the second choice as label, every score with the greedy label, and
    magnitude over more densities.
    """
    source = open_source(BUNDLED)
    model, tokenizer = load_dense(BUNDLED), source.tokenizer()
    batches, calibration = (
        make_batches(tokenizer, read_text(text)[:60_000], 4, 56, 0) for text in (HELDOUT_TEXT, CALIBRATION_TEXT)
    )
    second = [every_score(name, DENSITY, "second", prompt=24) for name in SCORES]
    greedy = [replace(setting, label="greedy") for setting in second]
    magnitude = [Setting("magnitude", density) for density in REFERENCE]
    found = analyse_all(model, source.arch, batches, [*second, *greedy, *magnitude], calibration, steps=1)
    count = len(SCORES)
    return dict(zip(SCORES, found, strict=False)), dict(zip(SCORES, found[count:], strict=False)), found[2 * count :]


def excess(outcome: Outcome, magnitude: list[Outcome]) -> float:
    """How much more often the second choice wins than under magnitude doing the same damage (KL): damage by itself
    turns predictions to the second choice.
    """
    curve = sorted((o.kl, o.second_choice) for o in magnitude)
    return outcome.second_choice - float(np.interp(outcome.kl, [kl for kl, _ in curve], [rate for _, rate in curve]))


def test_f07_leak_test(leaks: Leaks) -> None:
    """Exactly the scores that name `label`, or that bring the second choice out when it is their label, are oracles.
    Every row of SCORES is judged.
    """
    second, _, magnitude = leaks
    assert [outcome.setting.score for outcome in second.values()] == list(SCORES)
    caught = {name for name, outcome in second.items() if excess(outcome, magnitude) > 0.05}
    needs = {name for name in SCORES if "label" in load_score(name).NEEDS}
    assert {name for name in SCORES if load_score(name).PHASE == "oracle"} == caught | needs
    assert {"gxo", "integrated_gradients", "corrected_gxo"} <= caught, "the test must catch a leak by its effect alone"
    assert second["corrected_gxo"].second_choice > second["magnitude"].second_choice + 0.15, "at equal density too"
    assert second["gate"].second_choice < second["magnitude"].second_choice + 0.1


def test_f07_only_oracles_depend_on_the_label(leaks: Leaks) -> None:
    second, greedy, _ = leaks
    for name in SCORES:
        assert (second[name].nll != greedy[name].nll) == (load_score(name).PHASE == "oracle"), name
