"""Progress: what a terminal and a file get, seconds by stage, shares of nested loops, and libraries that
are as before.
"""

from __future__ import annotations

import io
import logging
import re
import time
from pathlib import Path

import pytest
from huggingface_hub import utils as hub
from transformers.utils import logging as switches

from sparsegate.converter import progress
from sparsegate.converter.progress import display, libraries, timing


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that a person sees at the end: what follows the last carriage return of each."""
        return [line.rpartition("\r")[2].rstrip() for line in self.getvalue().split("\n")]


def run(
    stream: io.StringIO, level: progress.Level = "normal", expected: dict[str, float] | None = None
) -> progress.Job:
    with progress.shown(level, stream), progress.job(expected) as job:
        with progress.stage("calibrate"):
            for _ in progress.track(range(4), unit="block"):
                time.sleep(0.02)
        with progress.stage("train predictor"):
            for step in range(3):
                progress.update(step + 1, 3, f"loss {1 / (step + 1):.2f}")
        progress.resumed("export")
    return job


def test_a_file_gets_one_line_a_stage() -> None:
    stream = io.StringIO()
    job = run(stream)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line.split("  ")[0] for line in lines] == ["calibrate", "train predictor", "export"]
    assert re.fullmatch(r"calibrate +0\.[01] s", lines[0]) and lines[2].endswith("resumed")
    assert list(job.seconds) == ["calibrate", "train predictor", "export"]
    assert 0.08 <= job.seconds["calibrate"] < 5 and job.seconds["export"] == 0


def test_a_terminal_gets_a_live_line_and_keeps_one_a_stage() -> None:
    stream = Terminal()
    run(stream, expected={"calibrate": 0.1, "train predictor": 0.3})
    assert len([line for line in stream.screen() if line]) == 3
    assert "\r" in stream.getvalue() and re.search(r"calibrate +.*job \d+%, \d+ s left", stream.getvalue())


def test_the_live_line_shows_the_loop_and_the_stage_alone_without_expectations() -> None:
    stream = Terminal()
    with progress.shown("normal", stream), progress.stage("calibrate"):
        for _ in progress.track(range(10), unit="block"):
            time.sleep(0.12)
            progress._work.display.tick(progress._work.stages[-1])
    drawn = stream.getvalue().split("\r")
    assert any("50%; 5/10 block" in line for line in drawn) or any("40%; 4/10 block" in line for line in drawn)
    assert any(re.search(r"\d s left", line) for line in drawn) and "job" not in stream.getvalue()


def test_quiet_shows_nothing_and_still_counts() -> None:
    for stream in (io.StringIO(), Terminal()):
        job = run(stream, "quiet")
        assert stream.getvalue() == "" and job.seconds["calibrate"] > 0


def test_the_second_process_of_several_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    run(stream)
    assert stream.getvalue() == ""


def test_an_inner_stage_is_a_part_and_one_apart_stops_the_clock() -> None:
    stream = io.StringIO()
    with progress.shown("normal", stream), progress.job() as job, progress.stage("plan"):
        with progress.stage("quality"):
            time.sleep(0.02)
        with progress.stage("train gate", apart=True):
            time.sleep(0.3)
            with progress.stage("quality"):
                pass
    assert list(job.seconds) == ["train gate", "plan"]
    assert job.seconds["plan"] < 0.2 < job.seconds["train gate"]
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["train gate", "plan"]


def test_a_job_inside_a_job_is_the_outer_one() -> None:
    with progress.shown("quiet"), progress.job() as outer:
        with progress.job() as inner, progress.stage("x"):
            pass
        assert inner is outer and "x" in outer.seconds


def test_a_long_stage_gives_a_line_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "EVERY", 0.2)
    monkeypatch.setattr(progress, "_TICK", 0.02)
    stream = io.StringIO()
    with progress.shown("normal", stream), progress.stage("calibrate"):
        for _ in progress.track(range(10), unit="block"):
            time.sleep(0.05)
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 4 and re.match(r"calibrate +\d+%; \d/10 block; \d s so far; \d s left", lines[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_terminal_clean(error: type[BaseException]) -> None:
    stream = Terminal()
    with pytest.raises(error), progress.shown("normal", stream), progress.job() as job:
        with progress.stage("calibrate"):
            for _ in progress.track(range(10), unit="block"):
                time.sleep(0.15)
                raise error
    assert stream.getvalue() and not any(stream.screen())
    assert "calibrate" in job.seconds and not progress._work.stages and progress._work.job is None


def test_nested_loops_are_parts_of_a_pass() -> None:
    shares = []
    with progress.shown("quiet"), progress.stage("quality"):
        running = progress._work.stages[-1]
        for _ in progress.track(range(2), unit="method"):
            for _ in progress.track(range(4), unit="window"):
                shares.append(running.share)
        assert running.share == 1.0 and running.loops == []
    assert shares == [None, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


def test_a_loop_that_counts_itself_holds_loops_inside() -> None:
    with progress.shown("quiet"), progress.stage("train"):
        running = progress._work.stages[-1]
        progress.update(1, 4, "loss 2")
        for _ in progress.track(range(2)):
            assert running.counts().startswith("1/4 step, loss 2")
        progress.update(4, 4)
        assert running.loops == [] and running.share == 1.0


def test_outside_of_a_stage_loops_run_and_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter("abc"))) == ["a", "b", "c"]
    progress.update(1, 2)
    progress.resumed("x")
    assert capsys.readouterr().err == ""


def test_work_that_was_found_done_is_not_compared_with_what_was_expected() -> None:
    with progress.shown("quiet"), progress.job({"graph": 9.0, "plan": 5.0, "text": 1.0, "export": 2.0}) as job:
        progress.resumed("graph")
        progress.resumed("export")
        for name in ("graph", "plan", "text"):
            with progress.stage(name):
                if name == "plan":
                    progress.partly()
                time.sleep(0.01)
        progress.resumed("text")  # made in this job, and asked for again
    assert (job.resumed, job.partly) == ({"export"}, {"graph", "plan"})
    assert {name: expected for name, expected, _ in job.rows()} == {
        "graph": None,
        "export": None,
        "plan": None,
        "text": 1.0,
    }


def test_time_left_follows_the_pace_so_far() -> None:
    job = progress.Job({"a": 10.0, "b": 10.0, "c": 20.0})
    assert job.outlook([]) == (0.0, 40.0)
    job.seconds["a"] = 30.0  # three times as slow
    share, left = job.outlook([])  # type: ignore[misc]
    assert share == 0.25 and 2.0 * 30 < left < 3.0 * 30
    running = timing.RunningStage("b", before=10.0, share=0.5)
    share, left = job.outlook([running])  # type: ignore[misc]
    assert share == pytest.approx(15 / 40) and left > 10.0
    job.seconds["b"] = 0.0
    job.resumed.add("b")
    assert job.outlook([])[0] == 0.5  # type: ignore[index]


def test_log_lines_do_not_break_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, root = Terminal(), logging.getLogger()
    monkeypatch.setattr("sys.stderr", stream)
    handler = logging.StreamHandler(stream)
    root.addHandler(handler)
    try:
        with progress.stage("calibrate"):
            logging.getLogger("test.progress").warning("one line")
        assert handler in root.handlers
    finally:
        root.removeHandler(handler)
    assert "one line" in stream.screen()


def test_another_process_is_followed(tmp_path: Path) -> None:
    place = tmp_path / "progress"
    progress.follow(place)
    with progress.relayed(place):
        progress.update(3, 12, "loss 1", "step")
    with progress.shown("quiet"), progress.stage("train"):
        progress.follow(place)
        assert progress._work.stages[-1].counts() == "3/12 step, loss 1"


@pytest.mark.parametrize("active", [True, False])
def test_libraries_are_as_before(active: bool) -> None:
    level, bars, hidden = switches.get_verbosity(), switches.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    try:
        (switches.enable_progress_bar if active else switches.disable_progress_bar)()
        switches.set_verbosity_info()
        with pytest.raises(KeyError), progress.shown("normal", io.StringIO()), progress.job():
            assert (
                switches.get_verbosity() == logging.ERROR
                and not switches.is_progress_bar_enabled()
                and hub.are_progress_bars_disabled()
            )
            raise KeyError
        assert switches.get_verbosity() == logging.INFO
        assert switches.is_progress_bar_enabled() is active and hub.are_progress_bars_disabled() is not active
        with libraries.silenced(bars=True):
            assert hub.are_progress_bars_disabled() is not active and not switches.is_progress_bar_enabled()
        with progress.shown("verbose", io.StringIO()), progress.job():
            assert switches.get_verbosity() == logging.INFO
    finally:
        switches.set_verbosity(level)
        (switches.enable_progress_bar if bars else switches.disable_progress_bar)()
        (hub.disable_progress_bars if hidden else hub.enable_progress_bars)()


def test_the_pace_of_a_loop_that_goes_on_leaves_out_what_was_done_before() -> None:
    with progress.shown("quiet"), progress.stage("train"):
        running = progress._work.stages[-1]
        progress.update(50, 100)
        running.since -= 10.0
        assert running.left() is None
        progress.update(75, 100)
        assert running.left() == pytest.approx(10.0, abs=0.5)


def test_the_longer_a_stage_takes_the_rarer_are_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log, running = display.LineDisplay(stream, lambda _: ""), timing.RunningStage("train")
    running.resume()
    log.begin(running)
    for _ in range(36000):
        now[0] += 1.0
        log.tick(running)
    lines = stream.getvalue().splitlines()
    assert 20 <= len(lines) <= 30 and [line.split()[1:3] for line in lines[:3]] == [
        ["60", "s"],
        ["2", "min"],
        ["3", "min"],
    ]
