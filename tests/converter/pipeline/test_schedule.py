"""Whole rounds on a tiny model: joined methods, the budget search of every method, predictors from files, and training
that is broken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plan_checks import gates
from plan_checks import same as same_site
from safetensors.torch import save_file
from small_recipe import small_recipe
from torch import Tensor

from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.cost import block_cost
from sparsegate.converter.checkpoint.manifest import read_manifest
from sparsegate.converter.checkpoint.plan import Plan, Predictor, Threshold, load_plan
from sparsegate.converter.checkpoint.source import Source, open_source
from sparsegate.converter.checkpoint.stage import RECORD, write_json
from sparsegate.converter.methods import AUTO
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.pipeline import candidates, schedule, shares
from sparsegate.converter.pipeline import texts as texts_module
from sparsegate.converter.pipeline.allocation import allocate, evolve
from sparsegate.converter.pipeline.configs import method_configs, training_windows
from sparsegate.converter.pipeline.conversion import Conversion
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.families import Family
from sparsegate.converter.pipeline.recipe import read_recipe
from sparsegate.converter.pipeline.schedule import once
from sparsegate.converter.pipeline.search import Judge
from sparsegate.converter.pipeline.texts import Texts, make_texts
from sparsegate.converter.pipeline.verify import verify
from sparsegate.converter.text import generated as generated_module
from sparsegate.converter.training.selection import SelectionObjective
from sparsegate.runtime_onnx.errors import InputError

D, N = 64, 176
TUNE = {"steps": 3, "data": 16, "windows": 2, "precision": "fp32"}
BUDGET = {"max_kl": 0.05}


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


@pytest.fixture(scope="module", name="source")
def _source(tiny_model: Callable[[str], Path]) -> Source:
    return open_source(tiny_model("llama"))


@contextmanager
def few_searched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "SEARCH_WINDOWS", 16)
        yield


def stages(method: str, **config: Any) -> list[dict[str, Any]]:
    return [{"method": method, "config": config}]


EVERY = stages("auto", tune=TUNE, rank=4, greedy=False)


def run(source: Source, folder: Path, work: Path | None = None, **changes: Any) -> tuple[dict[str, Plan], Texts]:
    """One round below `work`; the recipe's texts."""
    folder.mkdir(exist_ok=True)
    recipe = read_recipe(small_recipe(source.folder, folder, **changes))
    configs = method_configs(recipe)
    with few_searched():
        texts = make_texts(source, recipe, training_windows(configs))
    made = once(Conversion(source, texts, recipe, work or folder / "work"), configs)
    return {name: each.plan for name, each in made.items()}, texts


def same(one: Plan, other: Plan) -> bool:
    return list(one) == list(other) and all(same_site(one[site], other[site]) for site in one)


@pytest.mark.slow
def test_neurons_and_inputs_together(source: Source, tmp_path: Path) -> None:
    recipe = small_recipe(source.folder, tmp_path, stages=stages("chess+teal", sparsity=0.4))
    result = convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    plan = load_plan(tmp_path / "out.work" / "plan" / "chess+teal")
    assert [site.kind for site in plan] == 2 * [
        "ffn",
        "linear:q_proj",
        "linear:k_proj",
        "linear:v_proj",
        "linear:o_proj",
    ]
    sizes = {"q": D * D, "k": D * D // 2, "v": D * D // 2, "o": D * D}
    for layer in range(2):
        kept = sum(plan[Site(layer, kind=f"linear:{x}_proj")].gating.density * size for x, size in sizes.items())
        assert kept / sum(sizes.values()) == pytest.approx(0.6, abs=0.01), (
            "the asked share is that of the linears that are left"
        )
    assert len({float(tau) for tau in plan[Site(0)].gating.tau}) == N, "a threshold for every neuron is chess"
    assert len({float(tau) for tau in plan[Site(0, kind="linear:q_proj")].gating.tau}) == 1, (
        "one for all channels is teal"
    )
    assert verify(tmp_path / "out", calibration=tmp_path / "text.txt").passed
    assert result.report is not None
    (row,) = (row for row in result.report.rows if row.method == "chess+teal")
    assert (
        row.selected
        and row.block_cost is not None
        and row.block_cost < 0.85
        and row.cost == pytest.approx((1 + 2 * 0.6) / 3, abs=0.05)
    )


def test_an_oracle_for_neurons_beside_inputs(source: Source, tmp_path: Path) -> None:
    """Statistics of gradients and of one forward come from two passes, over different sites."""
    config = {
        "sparsity": 0.4,
        "loss": "cross_entropy",
        "score": "corrected_gxo",
        "steps": 10,
        "rank": 4,
        "greedy": False,
    }
    plans, _ = run(source, tmp_path, stages=stages("predictor+teal", **config))
    kinds = {site.kind: type(entry) for site, entry in gates(plans["predictor+teal"]).items()}
    assert kinds == {"ffn": Predictor} | {f"linear:{x}_proj": Threshold for x in "qkvo"}


@pytest.fixture(scope="module", name="searched")
def _searched(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Plan], Texts, Path]:
    """What every method of `auto` finds within BUDGET."""
    folder = tmp_path_factory.mktemp("searched")
    return *run(source, folder, stages=EVERY, budget=BUDGET), folder


@pytest.mark.slow
def test_every_found_plan_keeps_the_budget(searched: tuple[dict[str, Plan], Texts, Path], source: Source) -> None:
    plans, texts, folder = searched
    assert texts.search is not None and set(plans) <= set(AUTO[True])
    assert {"gate", "chess", "teal", "trained_gate", "chess+teal"} <= set(plans)
    dense, trained = load_dense(source.folder), set()
    for method, plan in plans.items():
        own = folder / "work" / "models" / method  # with the weights that were trained with the plan
        trained |= {method} if own.is_dir() else set()
        model = load_dense(own) if own.is_dir() else dense
        loss = Judge(model, source.arch, "silu", texts.search, reference_model=dense).loss(plan)
        assert loss.kl <= BUDGET["max_kl"] + 1e-6, method
        assert {site: gate.density for site, gate in gates(plan).items()} == pytest.approx(
            dict(loss.density), abs=1e-12
        ), "densities are the realised ones"
        if method in ("gate", "chess", "teal", "wina"):
            assert loss.kl > 0.8 * BUDGET["max_kl"], f"{method} uses its budget"
            assert block_cost(plan, source.arch, source.config) < 0.98
    assert trained >= {"trained_gate"}, "as it is by default"
    densities = [entry.density for entry in gates(plans["chess"]).values()]
    assert abs(densities[0] - densities[1]) > 1e-3, "layers find their own"


@pytest.mark.slow
def test_a_looser_budget_is_cheaper_and_one_that_nobody_meets_is_one_line(
    searched: tuple[dict[str, Plan], Texts, Path], source: Source, tmp_path: Path
) -> None:
    loose, _ = run(source, tmp_path, stages=stages("chess"), budget={"max_kl": 0.3})
    assert (
        block_cost(loose["chess"], source.arch, source.config)
        < block_cost(searched[0]["chess"], source.arch, source.config) - 0.02
    )
    with pytest.raises(
        InputError, match=r"The budget must be one that a method can meet, got none of gate within it\. Loosen it\.$"
    ):
        run(source, tmp_path / "b", stages=stages("gate"), budget={"max_kl": 0.0})
    with pytest.raises(
        InputError, match="none of gate within it"
    ):  # as fast the second time: that it was not met is stored
        run(source, tmp_path / "b", stages=stages("gate"), budget={"max_kl": 0.0})


@pytest.mark.slow
def test_a_finished_round_is_read_and_a_part_made_again(
    searched: tuple[dict[str, Plan], Texts, Path], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, _, folder = searched
    assert not list((folder / "work").rglob("samples.*.safetensors")), "stored activations go"
    write_json(
        folder / "work" / RECORD, {"kind": "sparsegate folder", "version": 1}
    )  # a work folder of ours, in which a stage was damaged
    (folder / "work" / "plan" / "gate" / "header.json").unlink()
    made, plain = [], schedule._searched
    monkeypatch.setattr(schedule, "_searched", lambda run, name, config: made.append(name) or plain(run, name, config))
    again, _ = run(source, folder, stages=EVERY, budget=BUDGET)
    assert made == ["gate"] and list(again) == list(plans) and all(same(again[name], plans[name]) for name in plans)


def test_a_searched_conversion_is_verified(source: Source, tmp_path: Path) -> None:
    recipe = small_recipe(
        source.folder,
        tmp_path,
        stages=stages("teal", greedy=False, linears=["q_proj", "down_proj"]),
        budget={"max_kl": 0.3, "max_kl_long": 0.05},
    )
    with few_searched():
        result = convert(recipe=recipe, output=tmp_path / "out")
    assert result.report is not None and [row.method for row in result.report.rows] == ["dense", "teal"]
    found = verify(tmp_path / "out", calibration=tmp_path / "text.txt")
    checks = {check.name: check for check in found.checks}
    assert found.passed and "KL to dense" in checks
    manifest = read_manifest(tmp_path / "out")
    assert manifest.budget["searched"] and manifest.budget["sparsity"] is None and manifest.budget["max_kl"] == 0.3
    assert manifest.budget["max_kl_long"] == 0.05
    far = checks["KL to dense, far tokens of long windows"]
    assert 0.03 < far.value == found.quality.kl_long <= far.bound == pytest.approx(0.05 * 1.15), "it decided"
    assert checks["long quality as recorded"].value < 1e-6 and manifest.measured["kl_long"] == far.value
    long = result.report.long
    assert long is not None and long.far.kl == pytest.approx(far.value) and long.repetitions == []
    assert (manifest.measured["long_windows"], manifest.measured["long_length"]) == (long.windows, long.length)
    assert sum(row.tokens for row in long.positions) == long.windows * (long.length - 1)


def test_sites_weigh_what_they_gate(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network gated by thresholds weighs two of its three matrices, a linear its own; `greedy` shares the bytes of
    both parts.
    """
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(
        shares,
        "allocate",
        lambda curves, weights, mean: seen.append(dict(weights)) or allocate(curves, weights, mean),
    )
    plans, _ = run(source, tmp_path, stages=stages("chess+teal", sparsity=0.4, allocation="greedy"))
    sizes = {"q": D * D, "k": D * D // 2, "v": D * D // 2, "o": D * D}
    expected = {f"layers.{k}.ffn": 2 * D * N for k in range(2)}
    expected |= {f"layers.{k}.linear.{x}_proj": size for k in range(2) for x, size in sizes.items()}
    assert seen[0] == pytest.approx(expected)
    densities = {site.key: gate.density for site, gate in gates(plans["chess+teal"]).items()}
    kept = sum(expected[key] * densities[key] for key in expected) / sum(expected.values())
    assert kept == pytest.approx(0.6, abs=0.02)
    assert max(densities.values()) - min(densities.values()) > 0.05, "sites differ"


def test_evolution_starts_from_greedy_shares(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Mapping[str, float]] = []

    def once_evolved(family: Family, start: Mapping[str, float], loss: Any, seed: int) -> dict[str, float]:
        starts.append(dict(start))
        assert seed == 3 and loss(start) > 0
        return evolve(family, start, loss, seed, evaluations=6)

    monkeypatch.setattr(shares, "evolve", once_evolved)
    greedy, _ = run(source, tmp_path / "a", stages=stages("gate", sparsity=0.4, allocation="greedy"))
    evolved, _ = run(source, tmp_path / "b", stages=stages("gate", sparsity=0.4, allocation="evolution"))
    of = [{site.key: gate.density for site, gate in gates(plans["gate"]).items()} for plans in (greedy, evolved)]
    assert of[0] == pytest.approx(starts[0], abs=0.01) and sum(of[1].values()) == pytest.approx(1.2, abs=0.02)


# Predictors from files


def write_predictors(folder: Path, seed: int = 0) -> Path:
    """Two layers of rank 6 that keep about 70 %."""
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    for layer in range(2):
        fc1, fc2 = torch.randn(6, D, generator=g) / D**0.5, torch.randn(N, 6, generator=g)
        save_file({"fc1.weight": fc1, "fc2.weight": fc2}, folder / f"model_{layer}.safetensors")
    (folder / "config.json").write_text('{"sparse_threshold": -1.0, "tap": "input"}')
    return folder


def test_imported_predictors_convert_and_their_files_count(source: Source, tmp_path: Path) -> None:
    folder = write_predictors(tmp_path / "predictors")
    recipe = small_recipe(source.folder, tmp_path, stages=stages("imported", folder=str(folder)))
    result = convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    plan = load_plan(tmp_path / "out.work" / "plan" / "imported")
    for site, entry in gates(plan).items():
        assert isinstance(entry, Predictor) and entry.recall is not None and 0.5 < entry.density < 0.95
        assert result.report is not None
        (layer,) = (row for row in result.report.layers if row.site == site.key)
        assert layer.density_realised == pytest.approx(entry.density, abs=0.05) and layer.rank == 6
    assert verify(tmp_path / "out", calibration=tmp_path / "text.txt").passed
    assert read_manifest(tmp_path / "out").recipe["stages"][0]["config"]["folder"] == "predictors", (
        "no path of this machine"
    )
    assert convert(recipe=recipe, output=tmp_path / "out", keep_stages=True).up_to_date
    write_predictors(folder, seed=1)
    with pytest.raises(InputError, match="which holds another conversion"):
        convert(recipe=recipe, output=tmp_path / "out")
    again, _ = run(source, tmp_path, tmp_path / "out.work", stages=stages("imported", folder=str(folder)))
    assert not same(again["imported"], plan), "nor is the stage kept"


def test_imported_predictors_are_shifted_to_a_budget(source: Source, tmp_path: Path) -> None:
    folder = write_predictors(tmp_path / "predictors")
    plans, texts = run(source, tmp_path / "a", stages=stages("imported", folder=str(folder)), budget={"max_kl": 0.2})
    assert texts.search is not None
    plan = plans["imported"]
    assert 0.19 < Judge(load_dense(source.folder), source.arch, "silu", texts.search).loss(plan).kl <= 0.2 + 1e-6
    taus = {float(tau) for entry in gates(plan).values() for tau in entry.tau}
    assert len(taus) == 1 and taus != {-1.0}, "one shift for all"


# Texts


def test_up_to_date_means_the_same_text(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed text is another conversion even where no calibrated or measured window holds the change; a text that the
    model writes is not sampled to know.
    """
    recipe = small_recipe(
        source.folder,
        tmp_path,
        calibration={"generated": True, "file": str(tmp_path / "text.txt"), "windows": 24, "length": 48},
    )
    out = convert(recipe=recipe, output=tmp_path / "out").folder
    monkeypatch.setattr(generated_module, "self_generated", lambda *_: pytest.fail("sampled again"))
    assert convert(recipe=recipe, output=out).up_to_date and not (tmp_path / "out.work").exists()
    text = tmp_path / "text.txt"
    text.write_text("# new\n" + text.read_text())
    with pytest.raises(InputError, match="which holds another conversion"):
        convert(recipe=recipe, output=out)
    assert yaml.safe_load(recipe.read_text())["calibration"]["generated"] is True


# Training


def test_training_that_is_broken_off_goes_on_to_the_same_plan(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search of a trained method stops inside its third level; the first two are not trained again."""
    changes: dict[str, Any] = {"stages": stages("trained_gate", tune=TUNE), "budget": {"max_kl": 0.5}}
    plain, steps, cut = SelectionObjective.loss, [], 10**6

    def loss(self: SelectionObjective, tokens: Tensor, mask: Tensor, step: int) -> Tensor:
        steps.append(step)
        if len(steps) > cut:
            raise KeyboardInterrupt
        return plain(self, tokens, mask, step)

    monkeypatch.setattr(SelectionObjective, "loss", loss)
    monkeypatch.setattr(schedule, "LEVELS", (0.7, 0.5, 0.3))
    whole, _ = run(source, tmp_path / "a", **changes)
    total = len(steps)
    assert total >= 9 and total % 3 == 0, "three levels or more, of three steps"
    steps.clear()
    cut = 7
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b", **changes)
    assert steps == [0, 1, 2, 0, 1, 2, 0, 1] and not (tmp_path / "b" / "work" / "plan").exists()
    steps.clear()
    cut = 10**6
    resumed, _ = run(source, tmp_path / "b", **changes)
    assert len(steps) == total - 6
    assert same(resumed["trained_gate"], whole["trained_gate"])
    assert all(isinstance(entry, Threshold) for entry in gates(whole["trained_gate"]).values())
