"""What a model card quotes from outside is shown as it is: rendered, it makes no HTML, no link, no picture and no code
of its own.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_report import REPORT, front_matter, make_base, make_report

from sparsegate.converter import report as reporting
from sparsegate.converter.report.card import read_base_card
from sparsegate.converter.report.markdown import code, fenced, inline, target

markdown_it = pytest.importorskip("markdown_it")

HOSTILE = (
    "a](javascript:alert(1)) <img src=x onerror=alert(1)> ![p](http://evil/x.png) `b` ``c`` [d]: http://evil "
    "*e* "
    "| f \\| <script>g()</script> &lt;h ~~i~~"
)
HOSTILE += "\n\n# heading\n- item\n```\nfence\n\x1b[31m\u202e"


class Page(HTMLParser):
    """Elements with their links, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert not any(name.startswith("on") for name in values), values
        self.elements.append((tag, values.get("href") or values.get("src")))

    def handle_data(self, data: str) -> None:
        self.text += data


def render(markdown: str) -> Page:
    return Page(
        markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    )


def card(folder: Path, report: reporting.Report, base: Path) -> tuple[dict[str, Any], Page]:
    folder.mkdir()
    text = reporting.write_card(folder, report, read_base_card(base)).read_text(encoding="utf-8")
    return front_matter(text), render(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))


def test_a_card_of_hostile_names_has_the_elements_of_a_plain_one(tmp_path: Path) -> None:
    def changed(name: str) -> reporting.Report:
        rows = (
            [REPORT["rows"][0] | {"note": name}, *REPORT["rows"][1:]] if "note" in REPORT["rows"][0] else REPORT["rows"]
        )
        return make_report(
            model=f"/home/x/{name}",
            revision=None,
            command=f"sparsegate convert {name}",
            rows=rows,
            machine=REPORT["machine"] | {"cpu": name, "os": name},
            calibration=REPORT["calibration"] | {"name": name},
            evaluation=REPORT["evaluation"] | {"name": name},
            recipe=REPORT["recipe"] | {"model": name},
            versions={name: name},
            speed=REPORT["speed"] | {"runtime": name, "executor": name, "commit": name, "command": name},
            time_notes=[name],
            checks=[check | {"name": name, "note": name} for check in REPORT["checks"]],
        )

    def front(name: str) -> str:
        lines = "".join(f"  {line}\n" for line in name.replace("\x1b", "").replace("\u202e", "").splitlines())
        return f"---\nlicense: other\nlicense_name: |\n{lines}license_link: 'javascript:alert(1)'\n---\n"

    _, plain = card(tmp_path / "a", changed("name"), make_base(tmp_path / "plain", front("name")))
    data, hostile = card(tmp_path / "b", changed(HOSTILE), make_base(tmp_path / "hostile", front(HOSTILE)))
    assert hostile.elements == plain.elements
    assert not [
        link for _, link in hostile.elements if link and not link.startswith(("https://", "http://", "report/"))
    ]
    assert "alert" in hostile.text and "evil" in hostile.text, "the names are shown"
    assert "license_link" not in data
    assert not [repr(line) for line in hostile.text.splitlines() if "\x1b" in line or "\u202e" in line]


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "`", "``", "a`", "`a", "<b>", "[a](b)", "![a](b)", "a|b", "https://x/<y>", "&amp;", "*a*", "\\", "", " "],
)
def test_every_form_shows_the_text_itself(text: str) -> None:
    shown = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    for form, tags in ((inline, {"p"}), (code, {"p", "code"})):
        page = render(f"x {form(text)} y")
        assert {tag for tag, _ in page.elements} <= tags, (form, page.elements)
        if shown:
            assert " ".join(page.text.split()) == f"x {shown} y"
    page = render(f"before\n\n{fenced(text, 'yaml')}\n\nafter")
    assert [tag for tag, _ in page.elements] == ["p", "pre", "code", "p"] and page.text.rstrip().endswith("after")


def test_where_a_link_may_lead() -> None:
    assert target("https://example.org/a?b=c#d") == "https://example.org/a?b=c#d" and target(None) is None
    assert (
        target("LICENSE", ("LICENSE",)) == "LICENSE" and target("LI (CENSE.md", ("LI (CENSE.md",)) == "LI%20%28CENSE.md"
    )
    for link in (
        "javascript:alert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "//evil",
        "https://a b",
        "https://a)(b",
        "LICENSE",
        "https://a\n",
        "ftp://x",
    ):
        assert target(link) is None, link
