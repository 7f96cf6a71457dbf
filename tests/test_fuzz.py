"""Nothing in a file or a flag is trusted: seeded damage to everything that is read, in forked children under a
watchdog.

Each case ends in a refusal of one line, or the damaged file is accepted and says what it said before. It never ends in
a crash, a hang, a traceback, more than seconds or a gigabyte, or in a folder that something was left in. The controls
take a check away, and the test sees what it held back.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from fuzz_cases import GOOD, ROWS, Found, draw, make_folders, mutation_of, run, undamaged

QUICK, SLOW = 96, 2400


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("fuzz"))


def faults(found: list[Found]) -> list[str]:
    return [
        f"{case.outcome}: {case.mutation} (seed {case.case.seed}): {case.note}"
        for case in found
        if case.outcome not in GOOD
    ]


def test_nothing_is_wrong_with_what_is_not_damaged(folders: Path, tmp_path: Path) -> None:
    """Else every refusal could be one of the folders themselves. `verify` alone refuses: the folders' measured loss is
    made up.
    """
    found = run(undamaged(), folders, tmp_path / "p")
    assert {case.case.reader for case in found if case.outcome != "accepted"} == {"judged"}, [
        case for case in found if case.outcome != "accepted"
    ]


def test_damaged_files_and_flags(folders: Path, tmp_path: Path) -> None:
    found = run(draw(QUICK, 20), folders, tmp_path / "p")
    assert not faults(found), "\n\n".join(faults(found))
    counts = Counter(case.outcome for case in found)
    assert sum(counts.values()) == QUICK and min(counts[outcome] for outcome in GOOD) > QUICK // 8, counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SLOW // 400))
def test_many_damaged_files_and_flags(seed: int, folders: Path, tmp_path: Path) -> None:
    found = run(draw(400, 1000 + seed, slow=True), folders, tmp_path / "p")
    assert not faults(found), "\n\n".join(faults(found))
    assert {ROWS[case.case.row].file for case in found} == {row.file for row in ROWS}


CONTROLS = {
    "a key twice": (
        "out/config.json",
        "from sparsegate.runtime_onnx import untrusted\nuntrusted._object = dict",
        "silent",
        "twice",
    ),
    "the runtime's errors": (
        "out/onnx/model.onnx",
        "import contextlib, importlib\ns = importlib.import_module('sparsegate.runtime_onnx.session')\ns.explained = "
        "lambda *_: contextlib.nullcontext()",
        "traceback",
    ),
    "values too deep": (
        "out/onnx/genai_config.json",
        "import json\nfrom sparsegate.runtime_onnx import genai_config\ngenai_config.load_json = lambda path: "
        "json.loads(path.read_text())",
        "traceback",
        "deep",
    ),
    "something left behind": (
        "model/config.json",
        "from sparsegate.converter.pipeline import inspect as i\ni.resolve = lambda *_: open('left', 'x').write('x') "
        "and i.open_source('/')",
        "half-written",
    ),
    "a waiting reader": (
        "predictors/config.json",
        "import time\nfrom sparsegate.converter.sources import predictors\npredictors.read_json = lambda *_: "
        "time.sleep(99)",
        "hang",
    ),
    "a reader that dies": (
        "predictors/config.json",
        "import os\nfrom sparsegate.converter.sources import predictors\npredictors.read_json = lambda *_: os.abort()",
        "crash",
    ),
}
"""Checks -> the file that they hold, Python that takes them away in the child, the outcome that the test must see then,
and perhaps a word of the damage.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_a_check_that_is_taken_away_is_missed(name: str, folders: Path, tmp_path: Path) -> None:
    file, preamble, outcome, *only = CONTROLS[name]
    cases = [
        case
        for case in draw(1000 if only else 60, 5, [file])
        if not only or only[0] in mutation_of(case, folders)[0].what
    ][:60]
    cases = cases[:2] if outcome in ("hang", "crash") else cases
    seen = {case.outcome for case in run(cases, folders, tmp_path / "p", preamble, silence=5)}
    assert outcome in seen, seen
    if outcome not in ("hang", "crash"):
        assert not faults(run(cases, folders, tmp_path / "whole"))
