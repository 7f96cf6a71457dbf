"""README: its tables are the stored results, its two commands stand where .ci/run looks for them, and what it names
exists.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsegate.converter.arch import supported
from sparsegate.converter.cli import VERBS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_stored_results() -> None:
    from pages.readme_tables import fill

    assert fill(TEXT) == TEXT, "run python tests/bench/pages/readme_tables.py"
    assert "| dense" in TEXT.split("## ")[0]
    assert fill(TEXT.replace("| dense", "| dance")) == TEXT


def test_both_commands_stand_in_the_first_screen() -> None:
    found = dict(re.findall(r"<!-- (main-job|tests) -->\n```bash\n(.+?)\n```", TEXT))
    assert "sparsegate convert" in found["main-job"] and "sparsegate generate" in found["main-job"]
    assert "pytest" in found["tests"]
    assert all("-c constraints.txt" in command for command in found.values())
    assert TEXT.index("<!-- tests -->") < TEXT.index("## ")


def test_what_it_names_exists() -> None:
    for name in re.findall(r"^\| `([a-z_/]+)` \|", TEXT, flags=re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    assert set(re.findall(r"^    sparsegate (\w+)", TEXT, flags=re.MULTILINE)) <= set(VERBS)
    named = re.search(r"^Supported: ([a-z0-9, ]+)\.", TEXT, flags=re.MULTILINE)
    assert named and sorted(named[1].split(", ")) == supported()


def test_the_page_on_security_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:converter|runtime_onnx)/[\w/]+\.py)`", page)
    assert len(named) > 10 and all((ROOT / name).is_file() for name in named)
    assert "(docs/security.md)" in TEXT
