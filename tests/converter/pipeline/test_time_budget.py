"""Time: what stages take by given rates, which trainings fit into a budget, what is said, and a decision that outlives
the run that made it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from small_recipe import call_cli, small_recipe

from sparsegate.converter.arch import load_arch
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.stage import read_header, write_header, write_json
from sparsegate.converter.methods.tune import Tune
from sparsegate.converter.pipeline import candidates, time_budget
from sparsegate.converter.pipeline import convert as conversion
from sparsegate.converter.pipeline.configs import method_configs
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.inspect import inspect
from sparsegate.converter.pipeline.probe import Rates, measure
from sparsegate.converter.pipeline.recipe import Flags, Recipe, compile_recipe, make_recipe, parse_duration
from sparsegate.converter.pipeline.time_budget import LEAST, Decision, choose, decided, header, keep, stored, within
from sparsegate.converter.pipeline.timing import Sizes, Timing, TrainingTime, statistics, timing, tunes, whole
from sparsegate.converter.pipeline.verify import verify
from sparsegate.runtime_onnx.errors import InputError

RATES = Rates(
    forward=1e-5,
    calibrate=2e-5,
    store=0.01,
    train={"predictor": 1e-4, "trained_gate": 1e-4, "trained_input": 1e-4},
    head=1e-4,
    train_head=5e-4,
    prefill=1e-5,
    decode=1e-4,
    onnx_head=1e-4,
    onnx_head_alone=1e-3,
    write=1e-9,
    hash=1e-9,
)
SIZES = Sizes(
    layers=10,
    hidden=64,
    units=176,
    vocabulary=1000,
    parameters=10**6,
    source_bytes=4 * 10**6,
    graph_bytes=4 * 10**6,
    windows=128,
    length=256,
    characters=10**6,
)
STAGES = [
    "open",
    "text",
    "base graph",
    "calibrate",
    "plan",
    "quality",
    "export",
    "agreement",
    "speed",
    "dense references",
    "report",
]


def recipe(
    method: str = "auto", budget: dict[str, float] | None = None, time: str | None = None, **stage: Any
) -> Recipe:
    config = {} if budget else {"sparsity": 0.5}
    return make_recipe(
        {
            "model": "m",
            "stages": [{"method": method, "config": config, **stage}],
            "budget": budget or {},
            "time_budget": time,
        }
    )


def of(made: Recipe, rates: Rates = RATES, exact: bool = False, model_type: str = "llama") -> Timing:
    return timing(SIZES, rates, made, method_configs(made, exact), load_arch(model_type))


def cheap(**trainings: TrainingTime) -> Timing:
    """100 seconds of stages, 1 for each method's quality. The best candidate has one of the trained forms."""
    each = {name: {"quality": 1.0} for name in ("first", *trainings)}
    later = {f"best for {name}": (name,) for name in trainings}
    return Timing({"open": 100.0}, each, trainings, later)


# Times in words


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1h", 3600), ("0.5h", 1800), ("1h2m3s", 3723)]
)
def test_times_that_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert within(recipe(), text, named=False).time_budget == text == recipe(time=text).time_budget


@pytest.mark.parametrize("text", ["", "20", "m", "20 m", "30m1h", "0s", "-5m", "20min", "1h30", "1e3s", "nans", "infh"])
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(InputError) as error:
        within(recipe(), text, named=False)
    line = str(error.value)
    assert line.startswith("--time-budget must be a time such as 90s, 20m or 1h30m, got ") and "\n" not in line
    assert ("Write 20m for minutes" in line) == (text == "20")
    with pytest.raises(InputError, match="time_budget must be valid, got"):
        recipe(time=text)


def test_a_recipe_covers_the_flag() -> None:
    with pytest.raises(InputError, match="--recipe must stand without the flags that it covers, got --time-budget"):
        within(recipe(), "20m", named=True)
    assert within(recipe(time="5m"), None, named=True) == recipe(time="5m")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.2, "3 seconds"), (99, "99 seconds"), (150, "2 minutes"), (5000, "83 minutes"), (8400, "2 h 20 min")],
)
def test_times_that_are_said(seconds: float, words: str) -> None:
    assert whole([seconds]) == words


# Stages


LATER = ["train trained_gate", "quality trained"]
"""Stages of `auto` after "quality"."""


def test_every_stage_has_seconds() -> None:
    found = of(recipe()).seconds({})
    assert list(found) == [*STAGES[:6], *LATER, *STAGES[6:]]
    assert all(math.isfinite(value) and value >= 0 for value in found.values()) and found["calibrate"] > 0
    named = of(recipe("predictor")).seconds({})
    assert list(named) == [*STAGES[:4], "train predictor", *STAGES[4:]]
    searched = of(recipe("predictor", budget={"max_kl": 0.1})).seconds({})
    assert searched["train predictor"] > 2 * named["train predictor"], "through several densities"
    stages = [{"method": "exact", "config": {"activation": "drelu"}, "tune": {"steps": 100}}, {"method": "exact"}]
    assert "train" in of(make_recipe({"model": "m", "stages": stages})).seconds({})
    turned = of(recipe("teal").model_copy(update={"rotate": True})).seconds({})
    assert list(turned)[:4] == ["open", "text", "rotate", "base graph"] and turned["rotate"] > 0


def test_what_is_made_later_is_that_of_one_candidate() -> None:
    timed = of(recipe(budget={"max_kl": 0.1}), exact=True)
    assert timed.later == {
        **dict.fromkeys(("gate", "chess", "cett", "chess+teal"), ("trained_gate",)),
        "teal": ("teal-rotated", "trained_input"),
        "wina": ("wina-rotated", "trained_input"),
        "exact": ("predictor",),
    }
    first = {f"search {name}" for name in timed.later}
    after_gate, after_teal = timed.seconds({}, "gate"), timed.seconds({}, "teal")
    assert {name for name in after_gate if "search" in name} == first | {"search trained_gate"}
    assert list(after_teal)[list(after_teal).index("quality") :][:8] == [
        "quality",
        "rotate",
        "calibrate rotated",
        "search teal-rotated",
        "quality rotated",
        "train trained_input",
        "search trained_input",
        "quality trained",
    ]
    every = [timed.seconds({}, best) for best in timed.later]
    assert timed.seconds({}) == max(every, key=lambda seconds: sum(seconds.values())), "the longest may come"
    assert timed.seconds({"trained_gate": 0}, "gate").keys() == after_gate.keys() - {
        "train trained_gate",
        "search trained_gate",
        "quality trained",
    }
    assert of(recipe(budget={"max_kl": 0.1}), model_type="gemma2").later["teal"] == ("trained_input",)
    kept = of(recipe(budget={"max_kl": 0.1}).model_copy(update={"rotate": True})).later["teal"]
    assert kept == ("trained_input",), "it is rotated already"
    assert of(recipe(), exact=True).later["exact"] == (), "it loses nothing that a training could win back"
    assert of(recipe("teal", budget={"max_kl": 0.1})).later == {}


@pytest.mark.parametrize("name", [field.name for field in fields(Rates) if field.name != "train"])
def test_every_rate_counts(name: str) -> None:
    made = recipe()
    slower = replace(RATES, **{name: 10 * getattr(RATES, name)})
    assert sum(of(made, slower).seconds({}).values()) > sum(of(made).seconds({}).values())


def test_what_is_left_out_takes_no_time() -> None:
    found = of(recipe())
    left = found.seconds({"trained_gate": 0})
    assert list(left) == STAGES
    half = found.seconds({"trained_gate": found.trainings["trained_gate"].steps // 2})
    assert 0 < half["train trained_gate"] < found.seconds({})["train trained_gate"]


# The choice


def test_everything_fits() -> None:
    found = choose(cheap(predictor=TrainingTime(1000, 1.0, 10.0)), recipe(time="1h"))
    assert (found.steps, found.notes, found.cut) == ({}, (), {}) and sum(found.seconds.values()) == 100 + 2 + 1010
    assert found.later == {"best for predictor": found.seconds}


def test_each_training_is_judged_as_if_it_alone_were_made() -> None:
    found = choose(
        cheap(predictor=TrainingTime(1000, 1.0, 10.0), trained_gate=TrainingTime(600, 1.0, 10.0)), recipe(time="612s")
    )
    assert found.steps == {"predictor": 500, "trained_gate": 500}
    assert all(sum(seconds.values()) == pytest.approx(612) for seconds in found.later.values())
    lines = [
        "predictor is trained for 500 of 1000 steps, to stay within 10 minutes; all take 17 minutes: give "
        "--time-budget 19m",
        "trained_gate is trained for 500 of 600 steps, to stay within 10 minutes; all take 10 minutes: give "
        "--time-budget 12m",
    ]
    assert list(found.cut.values()) == lines == found.shown()["notes"] and found.notes == ()
    assert found.said("trained_gate") == lines[1:] and found.said(None) == []


def test_one_is_left_out_below_the_least() -> None:
    timed = cheap(predictor=TrainingTime(1000, 10.0, 10.0), trained_gate=TrainingTime(200, 1.0, 10.0))
    found = choose(timed, recipe(time="10m"))
    assert found.steps == {"predictor": 0} and list(found.later["best for predictor"]) == ["open", "quality"]
    assert "train predictor" not in found.seconds and "train trained_gate" in found.seconds
    line = "left out: predictor would take 2 h 47 min; give --time-budget 2h49m or name it with --method predictor"
    assert found.said("predictor") == [line] and found.said("trained_gate") == []
    assert choose(timed, recipe(time="2h49m")).steps == {}, "what is said suffices"
    short = choose(timed, recipe(time="20s"))
    assert set(short.steps.values()) == {0} and short.notes[-1].startswith("this takes about 2 minutes")
    assert "more than the 20 seconds of its time budget: only trainings are cut" in short.notes[-1]


def test_time_for_the_rotated_model_is_left() -> None:
    each = {"teal": {"quality": 1.0}, "teal-rotated": {"quality rotated": 300.0}, "trained_input": {"plan": 1.0}}
    later = {"teal": ("teal-rotated", "trained_input"), "wina": ("trained_input",)}
    timed = Timing({"open": 98.0, "quality": 0.0}, each, {"trained_input": TrainingTime(1000, 1.0, 0.0)}, later)
    found = choose(timed, recipe(time="900s"))
    assert found.steps == {"trained_input": 500}
    assert sum(found.later["teal"].values()) == 900 == sum(found.seconds.values())
    assert sum(found.later["wina"].values()) == 600
    assert "train trained_input" not in choose(timed, recipe(time="800s")).seconds


def test_auto_has_half_an_hour() -> None:
    long = cheap(predictor=TrainingTime(1000, 10.0, 10.0))
    assert choose(long, recipe()).steps == {"predictor": 0} and choose(long, recipe(time="3h")).steps == {}
    assert choose(cheap(predictor=TrainingTime(1000, 1.0, 10.0)), recipe()).shown()["notes"] == []


def test_a_named_method_is_cut_only_when_asked() -> None:
    timed = Timing({"open": 100.0}, {"predictor": {"quality": 1.0}}, {"predictor": TrainingTime(1000, 3.0, 0.0)})
    free = choose(timed, recipe("predictor"))
    assert free.steps == {} and free.notes == (
        "this takes about 52 minutes on this machine; --time-budget 30m cuts the training",
    )
    assert choose(timed, recipe("predictor", time="30m")).steps == {"predictor": 566}
    with pytest.raises(InputError) as error:
        choose(timed, recipe("predictor", time="5m"))
    assert "--time-budget must be at least 27m for predictor on this machine, got 5m." in str(error.value)
    assert choose(timed, recipe("predictor", time="27m")).steps["predictor"] >= 1000 * LEAST


def test_steps_of_a_recipe_stay() -> None:
    timed = cheap(predictor=TrainingTime(900, 10.0, 10.0), trained_gate=TrainingTime(200, 1.0, 10.0))
    found = choose(timed, recipe(steps={"predictor": 900}, time="10m"))
    assert found.steps == {}, "trained_gate has time of its own"
    short = choose(timed, recipe(steps={"predictor": 900}, time="2m"))
    assert short.steps == {"trained_gate": 0} and "train predictor" in short.later["best for predictor"]


def test_decided_steps_are_the_configurations() -> None:
    made = decided(recipe(), Decision({"predictor": 0, "trained_gate": 77}, {}))
    assert made.stages[-1].steps == {"predictor": 0, "trained_gate": 77}
    configs = method_configs(made, exact=True)
    assert "predictor" not in configs and {"gate", "exact"} < set(configs)
    assert configs["trained_gate"]["trained_gate"].tune.steps == 77  # type: ignore[attr-defined]
    assert set(method_configs(recipe(steps={"trained_gate": 0}))) == {"gate", "chess", "cett"}
    assert decided(recipe(), Decision({}, {})) == recipe()
    with pytest.raises(InputError, match="steps must name some of the methods gate, .* got teal"):
        method_configs(recipe(steps={"teal": 3}))
    alone = dict.fromkeys(("gate", "chess", "cett"), 0)
    with pytest.raises(InputError, match="and leave one, got none left"):
        method_configs(recipe(steps=alone))
    with pytest.raises(InputError, match="and leave one, got none left"):
        method_configs(recipe("predictor", steps={"predictor": 0}))


def test_a_decision_is_kept_for_the_same_recipe(tmp_path: Path) -> None:
    made = recipe()
    found = Decision({"predictor": 12}, {"open": 1.5}, ("one line",), {"predictor": "cut"}, {"exact": {"open": 1.0}})
    assert stored(tmp_path, lambda: header("model", made)) is None
    keep(tmp_path, header("model", made), found)
    keep(tmp_path, header("model", made), Decision({}, {}))
    assert stored(tmp_path, lambda: header("model", made)) == found, "what was decided first"
    assert (
        stored(tmp_path, lambda: header("other", made)) is None
        and stored(tmp_path, lambda: header("model", recipe(time="9m"))) is None
    )
    older = {"steps": {"predictor": 0}, "seconds": {}, "notes": ["left out"]}
    write_json(tmp_path / "decision" / "decision.json", older)
    write_header(tmp_path / "decision", header("model", made))
    read = stored(tmp_path, lambda: header("model", made))
    assert read == Decision({"predictor": 0}, {}, ("left out",)) and read.said("trained_gate") == ["left out"]


# The probe


@pytest.mark.parametrize(
    "model_type",
    ["llama", "phi", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "phi3", "smollm3"))],
)
def test_the_probe_finds_positive_rates(tiny_model: Callable[[str], Path], model_type: str) -> None:
    source = open_source(tiny_model(model_type))
    configs = method_configs(compile_recipe(Flags(max_kl=0.1)), exact=True)
    rates = measure(source.arch, source.config, statistics(configs), tunes(configs), length=64)
    found = [
        *rates.train.values(),
        *(getattr(rates, field.name) for field in fields(rates) if field.name not in ("train", "store")),
    ]
    assert (
        set(rates.train) == {"trained_gate", "trained_input", "predictor"}
        and all(math.isfinite(value) and value > 0 for value in found)
        and rates.store >= 0
    )


def test_the_probe_measures_a_wide_block_in_part(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsegate.converter.pipeline import probe

    source = open_source(tiny_model("llama"))
    plain = probe._one_block(source.arch, source.config, "cpu")
    assert plain.scale == 1 and plain.parameters == sum(
        tensor.numel() for tensor in plain.model.model.layers[0].parameters()
    )
    monkeypatch.setattr(probe, "_PARAMETERS", 32_000)
    part = probe._one_block(source.arch, source.config, "cpu")
    assert part.parameters < plain.parameters and part.parameters * part.scale == pytest.approx(plain.parameters)


def test_the_probe_reads_no_weight(tiny_model: Callable[[str], Path]) -> None:
    source = open_source(tiny_model("qwen2"))
    for info in source.tensors.values():
        assert info.file.is_file()
    bare = replace(source, folder=Path("nowhere"), tensors={})
    assert measure(bare.arch, bare.config, ["histogram:gate"], {"predictor": Tune(steps=1)}, length=32).forward > 0


# Whole conversions


TUNE = {"steps": 40, "data": 16, "windows": 2, "precision": "fp32"}


@pytest.fixture
def without_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_speed", lambda base, onnx, texts: {})


def slow(monkeypatch: pytest.MonkeyPatch, train: float) -> None:
    """A machine on which a token and layer of a training take so many seconds."""
    rates = replace(RATES, forward=1e-7, calibrate=1e-7, head=1e-7, decode=1e-6, onnx_head_alone=1e-6, train_head=0.0)
    monkeypatch.setattr(
        time_budget, "measure", lambda *_, **__: replace(rates, train={"predictor": train, "trained_gate": train})
    )


def test_a_resumed_run_keeps_what_was_decided(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_speed: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """40 steps of 96 tokens through 2 layers take about 900 s and 90 s: the first machine has time for some of the
    steps, the second one for all.
    """
    stages = [{"method": "trained_gate", "config": {"sparsity": 0.4, "tune": TUNE, "residual": "none"}}]
    path, out = small_recipe(tiny_model("llama"), tmp_path, stages=stages, time_budget="600s"), tmp_path / "out"
    slow(monkeypatch, 0.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "once", _broken_off)
        convert(recipe=path, output=out)
    slow(monkeypatch, 0.01)
    found = convert(recipe=path, output=out, keep_stages=True)
    assert found.report is not None
    steps = found.report.recipe["stages"][-1]["steps"]["trained_gate"]
    assert 20 <= steps < 35 and f"trained for {steps} of 40 steps" in caplog.text and found.report.time_notes
    trained = read_header(tmp_path / "out.work" / "plan" / "trained_gate")
    assert trained is not None and trained.config["trained_gate"]["tune"]["steps"] == steps
    assert {row.name for row in found.report.stages if row.expected_seconds is not None} >= {
        "open",
        "train trained_gate",
        "quality",
    }
    assert f"trained for {steps} of 40 steps" in (out / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(time_budget, "measure", lambda *_, **__: pytest.fail("probed"))
    assert convert(recipe=path, output=out, keep_stages=True).up_to_date, "what the machine takes now does not matter"
    stored_recipe = make_recipe(found.report.recipe)
    assert method_configs(stored_recipe)["trained_gate"]["trained_gate"].tune.steps == steps  # type: ignore[attr-defined]
    assert verify(out, calibration=tmp_path / "text.txt").passed


def _broken_off(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_dry_run_says_what_every_stage_takes(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow(monkeypatch, 1.0)
    words = ["convert", str(tiny_model("llama")), "-o", str(tmp_path / "out"), "--dry-run"]
    done = call_cli(capsys, *words)
    assert done.status == 0 and not (tmp_path / "out.work").exists()
    lines = [line.split() for line in done.out.splitlines()]
    assert [" ".join(line[:-2]) for line in lines if line[-1:] == ["minutes"]] == STAGES
    assert (
        "left out: trained_gate would take " in done.out
        and "name it with --method trained_gate" in done.out
        and "expected time " in done.out
    )
    found = json.loads(call_cli(capsys, *words, "--json", "--time-budget", "999h").out)
    assert list(found["seconds"]) == [*STAGES[:6], *LATER, *STAGES[6:]] and found["notes"] == []
    assert call_cli(capsys, *words, "--time-budget", "20").err.count("\n") == 1


def test_inspect_says_what_every_stage_takes(tiny_model: Callable[[str], Path]) -> None:
    found = inspect(tiny_model("llama")).estimate
    assert found is not None and set(STAGES) < set(found.seconds) and not found.notes and found.download_bytes == 0
