"""What `benchmarks/recovery.py` keeps of trainings: records as they were written, curves and seconds of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import recovery

CURVE = [{"step": 10, "heldout_bits_per_byte": 2.5}]


def run_folder(work: Path, name: str) -> None:
    (work / name).mkdir()
    torch.save({"step": 10, "curve": CURVE}, work / name / "checkpoint.pt")


def test_runs_from_scratch_are_those_with_a_checkpoint(tmp_path: Path) -> None:
    for name in ("silu0", "drelu12", "other1"):
        run_folder(tmp_path, name)
    (tmp_path / "drelu3").mkdir()
    (tmp_path / "silu0.log").write_text("wall 12.0 cpu 90.5\n")
    (tmp_path / "drelu12.log").write_text("stopped\n")
    runs = recovery.scratch_runs(tmp_path)
    assert [(run["activation"], run["seed"], run["cpu_seconds"]) for run in runs] == [
        ("drelu", 12, None),
        ("silu", 0, 90.5),
    ]
    assert all(run["steps"] == 10 and run["curve"] == CURVE for run in runs)


def test_what_is_named_is_stored_and_the_page_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, results, written = tmp_path / "out", tmp_path / "results", []
    out.mkdir()
    results.mkdir()
    monkeypatch.setattr(recovery, "RESULTS", results)
    monkeypatch.setattr(recovery, "write_page", lambda: written.append(sorted(path.name for path in results.iterdir())))
    for name in (recovery.RECOVERY, recovery.REPORT):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(json.dumps({"from": name}))
    recovery.main(["--predictors", str(out)])
    assert written == [["recovered_predictors.json", "recovery_predictors.json"]]
    assert json.loads((results / "recovery_predictors.json").read_text()) == {"from": recovery.RECOVERY}
    recovery.main(["--take", str(out)])
    assert json.loads((results / "recovered.json").read_text()) == {"from": recovery.REPORT}
