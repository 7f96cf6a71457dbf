"""convert on full disks, interrupted, or with a wrong graph: nothing half-written is ever left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conversions import TUNE, one_method, small_recipe

from sparsegate.converter.checkpoint import writer
from sparsegate.converter.methods import AUTO
from sparsegate.converter.onnx_export import float_graph
from sparsegate.converter.pipeline import finish
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.verify import verify
from sparsegate.runtime_onnx.errors import InputError

pytestmark = pytest.mark.usefixtures("no_speed")


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "copyfile", full)
        with pytest.raises(InputError, match="Disk space must suffice"):
            convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.partial-*"))
    plans = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.work" / "plan").rglob("header.json")}
    assert len(plans) == len(AUTO[False])
    convert(recipe=recipe, output=tmp_path / "out", keep_stages=True)
    assert {path: path.stat().st_mtime_ns for path in plans} == plans


def test_an_interruption_of_the_last_step_costs_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe=recipe, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = convert(recipe=recipe, output=tmp_path / "out").folder
    assert verify(out, calibration=tmp_path / "text.txt").passed
    assert all((out / name).stat().st_nlink == 1 for name in ("model.safetensors", "onnx/model.onnx.data"))
    (tmp_path / "out.work").mkdir()
    os.link(out / "config.json", tmp_path / "out.work" / "config.json")
    assert convert(recipe=recipe, output=out).up_to_date and (tmp_path / "out.work" / "config.json").exists(), (
        "no folder of ours"
    )


def run_cli(arguments: list[str], preamble: str = "") -> subprocess.Popen[str]:
    code = f"{preamble}\nimport sys\nfrom sparsegate.converter.cli import main\nmain(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_file_size_limit_ends_in_one_line(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small_recipe(tiny_model("llama"), tmp_path)
    limit = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, "
        "signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))"
    )
    child = run_cli(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")], limit)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 2
    assert "Traceback" not in errors
    assert "Disk space must suffice" in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial-*"))


def test_ctrl_c_leaves_nothing_half_written_and_the_next_run_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = small_recipe(
        tiny_model("llama"), tmp_path, stages=one_method("predictor", sparsity=0.4, tune=TUNE | {"steps": 100000})
    )
    terminal = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # whatever the caller ignores
    child = run_cli(["convert", "--recipe", str(recipe), "-o", str(tmp_path / "out")], terminal)
    finished = tmp_path / "out.work" / "stats" / "layers.1.ffn" / "header.json"
    deadline = time.time() + 90
    while not finished.exists() and child.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors and "Interrupted" in errors
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial-*"))
    stamp = finished.stat().st_mtime_ns
    small = small_recipe(tiny_model("llama"), tmp_path, stages=one_method("predictor", sparsity=0.4, tune=TUNE))
    convert(recipe=small, output=tmp_path / "out", keep_stages=True)
    assert finished.stat().st_mtime_ns == stamp


def test_a_wrong_base_graph_stops_the_conversion(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import make_model

    other = make_model("llama", tmp_path / "other", seed=5)
    built = float_graph.build_base
    monkeypatch.setattr(float_graph, "build_base", lambda _, out, *form: built(other, out, *form))
    with pytest.raises(InputError):
        convert(recipe=small_recipe(tiny_model("llama"), tmp_path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
