"""`auto`: candidates without training, the best one on the rotated model, and its trained form alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conversions import TUNE, small_recipe

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.manifest import read_manifest
from sparsegate.converter.checkpoint.stage import CheckError
from sparsegate.converter.evaluation.checks import Check, Quality
from sparsegate.converter.pipeline import auto, candidates, finish, schedule
from sparsegate.converter.pipeline.auto import Rounds, Tried
from sparsegate.converter.pipeline.candidates import Candidate
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.conversion import Conversion, Made
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.recipe import Recipe, make_recipe
from sparsegate.converter.pipeline.verify import verify

BUDGET = {"max_kl": 0.1}
FREE = ("gate", "chess", "cett")
CHANNELS = ("teal", "wina", "chess+teal")


@dataclass
class Machine:
    """Plans and losses as they are said: what is made, and on which model, is written down. `losses` are a divergence
    and a share of the bytes by name; others have (1, 1). `unmet` keep the budget nowhere, `broken` only on the text
    that they were searched on.
    """

    losses: Mapping[str, tuple[float, float]]
    unmet: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    inexact: bool = False
    made: list[tuple[tuple[str, ...], str, str, tuple[str, ...]]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)

    def make(self, planning: Conversion, configs: Any, statistics: Any, later: Any = None) -> dict[str, Made]:
        source = cast("Any", planning.source)
        assert statistics.conversion is planning
        self.made.append((tuple(configs), source.label, statistics.folder, tuple(later or ())))
        return {name: Made({}, source) for name in configs if name not in self.unmet}

    def measure(
        self, conversion: Conversion, made: Mapping[str, Made], sparsities: Any, windows: int | None
    ) -> list[Candidate]:
        self.windows.append(windows)
        measured = []
        for name, each in made.items():
            kl, cost = self.losses.get(name, (1.0, 1.0))
            shares: dict[str, Any] = {"agreement": 1.0, "density": 0.5, "site_density": {}, "site_cost": {}}
            quality = Quality(tokens=1, nll_dense=1, nll=1, kl=kl, cost=cost, block_cost=cost, windows=17, **shares)
            checks = [Check(name="KL to dense", value=kl, bound=0.1, passed=name not in self.broken)]
            measured.append(Candidate(name, {}, None, quality, checks, each.source, each.updated, each.rotated))
        return measured

    def rotated(self, source: Any, calibration: Any, folder: Path, device: str) -> Any:
        assert folder.name == "rotated"
        if self.inexact:
            raise CheckError("The rotated model must have the model's logits.")
        return SimpleNamespace(label="turned", arch=source.arch)


def tried(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    budget: dict[str, float] | None = None,
    exact: bool = False,
    model_type: str = "llama",
    **changes: Any,
) -> tuple[Tried, list[str]]:
    """What `auto` tries, and what was expected after the first round."""
    for name in ("make", "measure", "rotated"):
        monkeypatch.setattr(auto, name, getattr(machine, name))
    recipe = recipe_of(budget, **changes)
    source = SimpleNamespace(label="named", arch=load_arch(model_type))
    conversion = Conversion(
        cast("Any", source), cast("Any", SimpleNamespace(calibration=None)), recipe, Path("nowhere")
    )
    expected: list[str] = []
    configs = method_configs(recipe, exact)
    return Rounds(conversion, recipe, configs, dict.fromkeys(configs)).run(expected.append), expected


def recipe_of(budget: dict[str, float] | None, steps: dict[str, int] | None = None, rotate: bool = False) -> Recipe:
    config = {} if budget else {"sparsity": 0.5}
    stages = [{"method": "auto", "config": config, "steps": steps or {}}]
    return make_recipe({"model": "m", "stages": stages, "budget": budget or {}, "rotate": rotate})


def names(found: Tried) -> list[str]:
    return [candidate.method for candidate in found.candidates]


# What is made


def test_the_trained_form_of_the_nearest_alone_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"gate": (0.3, 0.1), "chess": (0.2, 0.9), "trained_gate": (0.05, 1.0)})
    found, expected = tried(machine, monkeypatch)
    assert names(found) == [*FREE, "trained_gate"] and found.form == "trained_gate" and expected == ["chess"]
    assert machine.made == [(FREE, "named", "stats", ("trained_gate",)), (("trained_gate",), "named", "stats", ())], (
        "what it needs is collected in the first pass"
    )
    assert machine.windows == [None, 17], "on the windows of the first round"


def test_channels_are_tried_on_the_rotated_model_and_trained_there(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"gate": (0.01, 0.9), "teal": (0.09, 0.7), "teal-rotated": (0.1, 0.6), "trained_input-rotated": (0.1, 0.4)}
    machine = Machine(losses)
    found, expected = tried(machine, monkeypatch, BUDGET)
    assert names(found) == [*FREE, *CHANNELS, "teal-rotated", "trained_input-rotated"] and expected == ["teal"]
    assert machine.made == [
        ((*FREE, *CHANNELS), "named", "stats", ("trained_gate", "trained_input")),
        (("teal-rotated",), "turned", "stats_rotated", ("trained_input",)),
        (("trained_input-rotated",), "turned", "stats_rotated", ()),
    ]
    assert machine.windows == [None, 17, 17]
    assert [candidate.method for candidate in found.candidates if candidate.rotated] == names(found)[-2:]
    assert candidates.best_first(found.candidates, True)[0].method == "trained_input-rotated"


def test_a_rotation_that_does_not_pay_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"wina": (0.1, 0.5), "wina-rotated": (0.1, 0.55)})
    found, _ = tried(machine, monkeypatch, BUDGET)
    assert names(found)[-2:] == ["wina-rotated", "trained_input"] and machine.made[-1][1:3] == ("named", "stats")


@pytest.mark.parametrize("changes", [{"model_type": "gemma2"}, {"rotate": True}])
def test_what_cannot_be_rotated_or_is_already_is_not(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = tried(Machine({"teal": (0.1, 0.5)}), monkeypatch, BUDGET, **changes)
    assert names(found) == [*FREE, *CHANNELS, "trained_input"]


def test_a_rotation_off_its_bound_is_said_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, _ = tried(Machine({"teal": (0.1, 0.5)}, inexact=True), monkeypatch, BUDGET)
    assert names(found)[-2:] == ["chess+teal", "trained_input"]
    assert "teal-rotated is not tried: The rotated model must have" in caplog.text


@pytest.mark.parametrize(("best", "form"), [("chess+teal", "trained_gate"), ("exact", "predictor")])
def test_forms_of_joined_ones_and_of_zeros(best: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = tried(Machine({best: (0.1, 0.5)}), monkeypatch, BUDGET, exact=True)
    assert names(found) == [*FREE, *CHANNELS, "exact", form] and found.form == form


def test_zeros_that_lose_nothing_are_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = tried(Machine({"exact": (0.0, 0.9)}), monkeypatch, exact=True)
    assert names(found) == [*FREE, "exact"]


def test_a_training_without_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = tried(Machine({"chess": (0.2, 1.0)}), monkeypatch, steps={"trained_gate": 0})
    assert names(found) == list(FREE) and found.form == "trained_gate", "whose line is told"


def test_the_best_is_one_that_holds_the_budget_where_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"teal": (0.3, 0.2), "gate": (0.1, 0.8), "trained_gate": (0.1, 0.9)}
    found, expected = tried(Machine(losses, broken=("teal",)), monkeypatch, BUDGET)
    assert expected == ["gate"] and names(found)[-1] == "trained_gate"
    every = (*FREE, *CHANNELS, "teal-rotated")
    found, expected = tried(Machine(losses, unmet=("chess",), broken=every), monkeypatch, BUDGET)
    assert expected == ["teal"] and names(found)[-1] == "trained_input" and "chess" not in names(found)


# What is said


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        (
            None,
            "chess is the best, without training: it has a KL of 0.2000 nats, its trained form trained_gate 0.2500.",
        ),
        (
            BUDGET,
            "chess is the best, without training: it reads 0.8000 of the blocks' bytes, its trained form trained_gate "
            "0.9000.",
        ),
    ],
)
def test_a_training_that_lost_is_said_with_both_numbers(
    budget: dict[str, float] | None, line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine({"chess": (0.2, 0.8), "trained_gate": (0.25, 0.9)})
    tried(machine, monkeypatch, budget)
    assert [record.getMessage() for record in caplog.records] == [line]
    caplog.clear()
    tried(Machine({"chess": (0.2, 0.8), "trained_gate": (0.1, 0.7)}), monkeypatch, budget)
    tried(Machine({"chess": (0.2, 0.8), "trained_gate": (0.3, 0.9)}, broken=("trained_gate",)), monkeypatch, budget)
    assert caplog.text == "", "what breaks its budget is said where the choice is made"


def test_a_trained_form_that_keeps_no_budget_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, _ = tried(Machine({"chess": (0.1, 0.8)}, unmet=("trained_gate",)), monkeypatch, BUDGET)
    assert names(found) == [*FREE, *CHANNELS]
    assert "chess is the best: trained_gate, its trained form, keeps the budget at no density." in caplog.text
    found, _ = tried(Machine({"teal": (0.1, 0.8)}, unmet=("teal-rotated",)), monkeypatch, BUDGET)
    assert names(found)[-1] == "trained_input" and "teal-rotated keeps the budget at no density." in caplog.text


# Whole conversions


@pytest.mark.slow
@pytest.mark.usefixtures("no_speed")
@pytest.mark.parametrize("trains", [False, True])
def test_a_rotated_candidate_is_chosen_resumed_and_verified(
    trains: bool, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest name wins here, of equal ones the last. Runs are broken off in the training and before anything is
    written.
    """
    monkeypatch.setattr(candidates, "rank", lambda each, searches: (-len(each.method), each.method == "gate"))
    monkeypatch.setattr("sparsegate.converter.pipeline.configs.CANDIDATES", {True: ("gate", "teal")})
    monkeypatch.setattr(schedule, "LEVELS", (0.75, 0.5))
    config = {"tune": TUNE | {"updates": "low_rank"}, "greedy": False, "allocation": "uniform"}
    stages = [{"method": "auto", "config": config, "steps": {} if trains else {"trained_input": 0}}]
    recipe = small_recipe(tiny_model("llama"), tmp_path, stages=stages, budget={"max_kl": 0.3})
    work = tmp_path / "out.work"
    done: dict[Path, int] = {}
    for module, step in [(schedule, "train_plan")] * trains + [(finish, "write_report")]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            convert(recipe=recipe, output=tmp_path / "out")
        stages_before = {path: path.stat().st_mtime_ns for path in work.rglob("header.json")}
        assert done.items() <= stages_before.items(), "nothing is made again"
        done = stages_before
    made = {"gate", "teal", "teal-rotated", *(["trained_input-rotated"] if trains else [])}
    assert {path.name for path in (work / "plan").iterdir()} == made == {p.name for p in (work / "quality").iterdir()}
    result = convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "nothing is made again"
    report, manifest = result.report, read_manifest(tmp_path / "out")
    assert report is not None and {row.method for row in report.rows} == {"dense", *made}
    assert report.chosen.method == ("trained_input-rotated" if trains else "teal-rotated")
    assert (manifest.rotated, manifest.updated, report.rotated, report.updated) == (True, trains, True, trains)
    assert (
        not report.recipe["rotate"] and json.loads((tmp_path / "out" / "report" / "report.json").read_text())["rotated"]
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("Before that training the residual stream was rotated" in card) == trains
    assert ("weights are the model's after a rotation" in card) != trains
    checked = verify(tmp_path / "out", source=tiny_model("llama"), calibration=tmp_path / "text.txt")
    assert [check for check in checked.checks if not check.passed] == []
    assert {row.name for row in report.stages if row.expected_seconds is not None} >= {"open", "text"}
