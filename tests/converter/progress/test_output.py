"""What a whole run of the command line shows: lines of a log, --quiet and --verbose, a run that goes on, tensors that
nothing computes with.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe
from test_progress import Terminal

from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.cli import main
from sparsegate.converter.evaluation.records import RESULTS, Report
from sparsegate.converter.modeling.empty import unused_tensors
from sparsegate.converter.pipeline import candidates

STAGES = ["open", "text", "base graph", "calibrate", "plan", "quality", "export", "agreement"]


class Shown(NamedTuple):
    """What a command wrote to both streams."""

    out: str
    err: str


def shown(*words: str | Path, stream: io.StringIO | None = None) -> Shown:
    """Run the command line in this process with streams that are no terminal, or with `stream` as stderr."""
    out, err, root = io.StringIO(), stream or io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(err)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
    finally:
        root.removeHandler(handler)
    assert stop.value.code == 0, err.getvalue()
    return Shown(out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with two tensors that its class does not have, and a rotary table as old files hold it."""
    folder = tmp_path_factory.mktemp("unused") / "model"
    shutil.copytree(tiny_model("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    table, bias = weights["model.norm.weight"][:8].clone(), weights["model.layers.0.mlp.gate_proj.weight"][:, 0].clone()
    extra = {
        "model.layers.0.mlp.gate_proj.bias": bias,
        "model.layers.7.extra": table.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": table,
    }
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Shown]:
    """`convert --keep-stages` with stderr in a file: the recipe, OUT and what was shown."""
    folder = tmp_path_factory.mktemp("output")
    recipe = small_recipe(model, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_speed", lambda base, onnx, texts: {})
        return recipe, folder / "out", shown("convert", "--recipe", recipe, "-o", folder / "out", "--keep-stages")


def names(lines: list[str]) -> list[str]:
    """The stages of lines that end with seconds."""
    return [found[1].strip() for line in lines if (found := re.fullmatch(r"(.{24}) \d+\.\d s", line))]


def test_a_log_has_a_line_a_stage_and_nothing_of_libraries(run: tuple[Path, Path, Shown]) -> None:
    lines = run[2].err.splitlines()
    assert "\r" not in run[2].err
    assert names(lines) == [*STAGES, "report"]
    rest = [line for line in lines if not names([line])]
    assert rest == [
        "Not computed with, because llama has no such tensors: model.layers.0.mlp.gate_proj.bias, "
        "model.layers.7.extra. The report lists them."
    ]


def test_the_report_holds_the_seconds_and_convert_prints_them(run: tuple[Path, Path, Shown]) -> None:
    _, out, said = run
    report = Report.load(out / RESULTS)
    assert [stage.name for stage in report.stages] == STAGES
    assert all(stage.seconds > 0 for stage in report.stages)
    assert {stage.name for stage in report.stages if stage.expected_seconds} >= {
        "calibrate",
        "base graph",
        "quality",
        "export",
        "agreement",
    }
    whole = sum(stage.seconds for stage in report.stages)
    assert f"in all {whole:.1f} (" in " ".join(said.out.split()) and "seconds (expected): open " in said.out
    assert report.unused_tensors == ["model.layers.0.mlp.gate_proj.bias", "model.layers.7.extra"]


def test_expected_seconds_stand_beside(run: tuple[Path, Path, Shown]) -> None:
    from sparsegate.converter.evaluation.records import StageTime
    from sparsegate.converter.report.tables import stage_text

    report = Report.load(run[1] / RESULTS)
    report = report.model_copy(
        update={
            "stages": [StageTime(name="plan", seconds=2.0, expected_seconds=3.0), StageTime(name="export", seconds=1.5)]
        }
    )
    assert stage_text(report) == "seconds (expected): plan 2.0 (3.0), export 1.5, in all 3.5 (3.0)"
    done = [
        StageTime(name="calibrate", seconds=0, resumed=True),
        StageTime(name="base graph", seconds=1.5, resumed=True),
    ]
    report = report.model_copy(update={"stages": [*done, *report.stages]})
    wanted = (
        "calibrate found done, base graph 1.5 for the rest, plan 2.0 (3.0), export 1.5, in all 5.0, without what "
        "was found done 3.5 (3.0)"
    )
    assert stage_text(report, 200) == f"seconds (expected): {wanted}"


def test_older_reports_load(run: tuple[Path, Path, Shown], tmp_path: Path) -> None:
    stored = json.loads((run[1] / RESULTS).read_text(encoding="utf-8"))
    del stored["stages"], stored["unused_tensors"]
    (tmp_path / "report.json").write_text(json.dumps(stored), encoding="utf-8")
    assert Report.load(tmp_path / "report.json").stages == []


def test_quiet_prints_the_result_alone_and_a_resumed_run_says_so(run: tuple[Path, Path, Shown]) -> None:
    recipe, out, _ = run
    shutil.rmtree(out)
    again = shown("convert", "--recipe", recipe, "-o", out, "--keep-stages", "--quiet")
    assert again.err == "" and again.out.startswith(f"wrote {out}\n")
    stages = Report.load(out / RESULTS).stages
    times = {stage.name: stage.seconds for stage in stages}
    assert times.pop("open") > 0 and times.pop("text") > 0
    assert times == dict.fromkeys([*STAGES[2:], "speed"], 0.0)
    assert all(stage.resumed and stage.expected_seconds is None for stage in stages if stage.name in times), (
        "nothing to compare with what was expected"
    )
    assert "calibrate found done, " in again.out
    shutil.rmtree(out)
    resumed = [
        line.split("  ")[0]
        for line in shown("convert", "--recipe", recipe, "-o", out, "--keep-stages").err.splitlines()
        if line.endswith(" resumed")
    ]
    assert resumed == [*STAGES[2:], "speed"]


def test_verify_on_a_terminal_and_verbose(run: tuple[Path, Path, Shown]) -> None:
    stream = Terminal()
    shown("verify", run[1], stream=stream)
    assert "\r" in stream.getvalue() and names([line for line in stream.screen() if line]) == [
        "open",
        "quality",
        "agreement",
    ]
    loud = shown("verify", run[1], "--verbose")
    assert "runs with" in loud.err and logging.getLogger("sparsegate").level == logging.INFO
    assert "runs with" not in stream.getvalue()


def test_unused_tensors_are_none_of_an_ordinary_model(tiny_model: Callable[[str], Path]) -> None:
    for model_type in ("llama", "gemma2", "phi"):
        assert unused_tensors(open_source(tiny_model(model_type))) == []


@pytest.mark.slow
def test_the_log_of_the_main_job_is_short(tmp_path: Path) -> None:
    said = shown("convert", "-o", tmp_path / "out")
    lines = said.err.splitlines()
    assert len(lines) < 60 and {*STAGES, "train trained_gate", "quality trained", "speed", "report"} <= set(
        names(lines)
    )
