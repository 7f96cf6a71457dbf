"""Tables, plot and model card from one stored JSON: golden text, metadata read back, and no claim beyond
the numbers.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from pydantic import ValidationError

from sparsegate.converter import report as reporting
from sparsegate.converter.report.card import read_base_card, speed_sentence
from sparsegate.converter.report.tables import ratio_text, speed_cells, table
from sparsegate.runtime_onnx.errors import InputError

REPORT: dict[str, Any] = {
    "model": "org/base-1B",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "tool": "0.1.0",
    "date": "2026-01-02T03:04:05+00:00",
    "command": "sparsegate convert org/base-1B -o out",
    "machine": {"cpu": "Test CPU", "cores": 2, "os": "Linux 6", "memory_bytes": 8_000_000_000},
    "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
    "recipe": {"version": 1, "model": "org/base-1B", "stages": [{"method": "auto", "config": {"sparsity": 0.5}}]},
    "calibration": {"tokens": 32768, "hash": "c" * 64, "name": "text.txt"},
    "evaluation": {"tokens": 4096, "name": "held-out text of text.txt"},
    "speed": {
        "runtime": "onnxruntime",
        "precision": "fp32",
        "provider": "CPUExecutionProvider",
        "threads": 2,
        "prompt_tokens": 128,
        "new_tokens": 64,
        "executor": "native kernel",
        "commit": "abc123",
    },
    "rows": [
        {
            "method": "gate",
            "nll": 2.1,
            "perplexity": math.exp(2.1),
            "kl": 0.03215,
            "agreement": 0.912,
            "density": 0.5012,
            "cost": 0.6675,
            "prefill_tokens_per_second": 900.04,
            "decode_tokens_per_second": 41.0,
            "decode_ratio": 0.998,
        },
        {
            "method": "predictor",
            "nll": 2.2,
            "perplexity": math.exp(2.2),
            "kl": 0.00002,
            "nll_error": 0.004,
            "agreement": 0.87,
            "density": 0.4903,
            "cost": 0.58,
            "decode_tokens_per_second": 58.2,
            "decode_ratio": 1.4167,
            "selected": True,
        },
        {
            "method": "dense",
            "nll": 2.0,
            "perplexity": math.exp(2.0),
            "kl": 0,
            "agreement": 1,
            "density": 1,
            "cost": 1,
            "prefill_tokens_per_second": 1000,
            "decode_tokens_per_second": 41.08,
        },
    ],
    "layers": [
        {
            "site": "layers.0.ffn",
            "density_target": 0.5,
            "density_calibrated": 0.49,
            "density_realised": 0.481,
            "recall": 0.83,
            "rank": 16,
            "cost": 0.57,
        },
        {"site": "layers.1.ffn", "density_calibrated": 0.5, "density_realised": 0.4996},
    ],
    "checks": [
        {"name": "body logits", "value": 1.2e-6, "bound": 1e-4, "passed": True, "note": "95% of 512 | positions"}
    ],
}


def make_report(**changes: Any) -> reporting.Report:
    return reporting.Report.model_validate({**json.loads(json.dumps(REPORT)), **changes})


def without_speed(selected: str = "predictor") -> dict[str, Any]:
    rows = [
        {key: value for key, value in row.items() if "_per_second" not in key and key != "decode_ratio"}
        for row in REPORT["rows"]
    ]
    return {"speed": None, "rows": [{**row, "selected": row["method"] == selected} for row in rows]}


QUALITY = """\
| method | perplexity | change | KL | density | cost | decode / dense |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| dense | 7.389 | - | 0.0000 | 100.0 % | 100.0 % | baseline |
| gate | 8.166 | +10.5 % | 0.0321 | 50.1 % | 66.8 % | 0.998, not faster |
| predictor (selected) | 9.025 | +22.1 ± 0.5 % | 2.0e-05 | 49.0 % | 58.0 % | 1.42 |
"""
QUALITY_TEXT = """\
method                perplexity         change       KL  density     cost
--------------------  ----------  -------------  -------  -------  -------
dense                      7.389              -   0.0000  100.0 %  100.0 %
gate                       8.166        +10.5 %   0.0321   50.1 %   66.8 %
predictor (selected)       9.025  +22.1 ± 0.5 %  2.0e-05   49.0 %   58.0 %"""
DETAILS_TEXT = """\
method                   NLL  ± of its change  agreement
--------------------  ------  ---------------  ---------
dense                 2.0000                -    100.0 %
gate                  2.1000                -     91.2 %
predictor (selected)  2.2000           0.0040     87.0 %"""
SPEED_TEXT = """\
method                prefill tok/s  decode tok/s  decode / dense
--------------------  -------------  ------------  --------------
dense                        1000.0          41.1               -
gate                          900.0          41.0           0.998
predictor (selected)              -          58.2            1.42"""
LAYERS = """\
site          target  held-out  realised  recall  rank    cost
------------  ------  --------  --------  ------  ----  ------
layers.0.ffn  50.0 %    49.0 %    48.1 %  83.0 %    16  57.0 %
layers.1.ffn       -    50.0 %    50.0 %       -     -       -"""


def test_tables_have_the_golden_text() -> None:
    report = make_report()
    assert reporting.quality_table(report) == QUALITY
    assert reporting.quality_table(make_report(**without_speed()), "text") == QUALITY_TEXT
    assert reporting.detail_table(report, "text") == DETAILS_TEXT
    assert table(speed_cells(report), "text") == SPEED_TEXT
    assert reporting.layer_table(report, "text") == LAYERS
    assert (
        reporting.layer_table(report).splitlines()[2]
        == "| layers.0.ffn | 50.0 % | 49.0 % | 48.1 % | 83.0 % | 16 | 57.0 % |"
    )
    assert (
        reporting.check_table(report).splitlines()[2]
        == "| body logits | 1.2e-06 | ≤ 0.0001 | passed | 95% of 512 \\| positions |"
    )


def test_a_ratio_below_one_never_reads_as_one() -> None:
    assert [ratio_text(value) for value in (0.5, 0.998, 0.99999, 1.0, 1.001, 2.345)] == [
        "0.50",
        "0.998",
        "0.999",
        "1.00",
        "1.00",
        "2.35",
    ]


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"rows": REPORT["rows"][:2]}, "exactly one"),
        ({"rows": [*REPORT["rows"], REPORT["rows"][2]]}, "exactly one"),
        ({"rows": [{**row, "selected": True} for row in REPORT["rows"]]}, "at most one"),
        ({"rows": [{**REPORT["rows"][0], "method": "oracle-topk"}, REPORT["rows"][2]]}, "oracle"),
        ({"rows": [{**REPORT["rows"][0], "perplexity": 3.0}, REPORT["rows"][2]]}, "exp"),
        ({"rows": [{**REPORT["rows"][0], "density": 1.2}, REPORT["rows"][2]]}, "less than or equal to 1"),
        ({"rows": [{**REPORT["rows"][0], "kl": float("nan")}, REPORT["rows"][2]]}, "finite"),
        ({"speed": None}, "speed ratio"),
        ({"version": 2}, "1"),
        ({"faster": True}, "Extra"),
    ],
)
def test_reports_that_say_too_much_are_refused(change: dict[str, Any], sign: str) -> None:
    make_report()
    with pytest.raises(ValidationError, match=sign):
        reporting.Report.model_validate({**REPORT, **change})


def test_report_is_stored_and_read_back(tmp_path: Path) -> None:
    report = make_report()
    path = tmp_path / reporting.RESULTS
    report.save(path)
    assert reporting.Report.load(path) == report
    stored = json.loads(path.read_text())
    del stored["machine"]["cpu"]
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"machine\.cpu: Field required"):
        reporting.Report.load(path)


def test_everything_made_from_a_report_is_written(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LICENSE="the terms")
    (tmp_path / "out").mkdir()
    reporting.write_report(
        tmp_path / "out",
        make_report(machine=reporting.this_machine().model_dump()),
        reporting.read_base_card(base, "org/base-1B"),
    )
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "LICENSE",
        "report/report.json",
        "report/candidates.png",
        "report/layers.png",
        "report/index.html",
    }
    assert "(report/layers.png)" in (tmp_path / "out" / "README.md").read_text()
    assert reporting.this_machine().cores >= 1 and "torch" in reporting.installed_versions()


def test_plot_is_a_png_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    first = reporting.plot_layers(tmp_path / "a", make_report())
    second = reporting.plot_layers(tmp_path / "b", make_report())
    other = make_report(layers=[{**REPORT["layers"][0], "density_realised": 0.9}])
    assert (
        first
        and second
        and first.read_bytes() == second.read_bytes() != reporting.plot_layers(tmp_path / "c", other).read_bytes()
    )  # type: ignore[union-attr]
    assert first == tmp_path / "a" / "report" / "layers.png" and first.read_bytes().startswith(b"\x89PNG\r\n")
    assert reporting.plot_layers(tmp_path / "d", make_report(layers=[])) is None


BASE_README = """---
license: other
license_name: org-community
license_link: LICENSE
language:
- en
- no
tags: [ignored]
---
# base
"""


def make_base(folder: Path, readme: str | None = BASE_README, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in ({"README.md": readme} if readme is not None else {}).items() | files.items():
        (folder / name).write_text(text)
    return folder


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def write(tmp_path: Path, report: reporting.Report, base: Path, **options: Any) -> tuple[dict[str, Any], str]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    reporting.plot_layers(out, report)
    source = read_base_card(base, report.model if report.revision else None, report.revision)
    assert reporting.write_card(out, report, source, **options) == out / "README.md"
    card = (out / "README.md").read_text(encoding="utf-8")
    return front_matter(card), card


def test_card_metadata_and_licence(tmp_path: Path) -> None:
    base = make_base(
        tmp_path / "base",
        LICENSE="the terms",
        NOTICE="notice",
        **{"USE_POLICY.md": "policy", "training.txt": "no licence"},
    )
    data, card = write(tmp_path, make_report(), base, repo_id="ada/sparse")
    assert data == {
        "base_model": "org/base-1B",
        "base_model_relation": "quantized",
        "library_name": "sparsegate",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "org-community",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["onnx", "onnxruntime", "onnxruntime-genai", "sparse", "activation-sparsity"],
    }
    copied = {
        path.name: path.read_text()
        for path in (tmp_path / "out").iterdir()
        if path.is_file() and path.name != "README.md"
    }
    assert copied == {"LICENSE": "the terms", "NOTICE": "notice", "USE_POLICY.md": "policy"}
    assert (
        QUALITY in card
        and reporting.layer_table(make_report()) in card
        and reporting.check_table(make_report()) in card
    )
    for part in (
        "Test CPU, 2 cores",
        "c" * 64,
        "`sparsegate convert org/base-1B -o out`",
        "torch 2.13.0",
        "(report/layers.png)",
        "org-community ([text](LICENSE))",
    ):
        assert part in card, part
    assert 'snapshot_download("ada/sparse", local_dir="sparse")' in card and "OWNER/NAME" not in card
    assert "full dense cost" in card and "`sparsegate link sparse`" in card
    recipe = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert recipe and yaml.safe_load(recipe[1]) == REPORT["recipe"]
    assert "\n\n\n" not in card and not re.search(r"\{[{%]|None|nan", card)


def test_card_names_what_is_gated(tmp_path: Path) -> None:
    base, linear = (
        make_base(tmp_path / "base"),
        {"site": "layers.0.linear.q_proj", "density_calibrated": 0.5, "density_realised": 0.5},
    )
    for layers, units in (
        (REPORT["layers"], "feed-forward neurons"),
        ([linear], "input channels of linear maps"),
        ([linear, REPORT["layers"][1]], "feed-forward neurons and input channels of linear maps"),
    ):
        _, card = write(tmp_path, make_report(layers=layers), base)
        assert f"49.0 % of the gated {units} are computed" in card and "block cost" not in card
    rows = [{**row, "block_cost": 0.7654} for row in REPORT["rows"]]
    _, card = write(tmp_path, make_report(rows=rows), base)
    assert "all linear maps of the blocks" in card and "| 76.5 % |" in card


def test_card_examples_are_valid_python(tmp_path: Path) -> None:
    _, card = write(tmp_path, make_report(), make_base(tmp_path / "base"), repo_id="ada/sparse")
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 5
    for example in examples:
        compile(example, "card", "exec")


def test_card_of_a_local_model_without_a_card(tmp_path: Path) -> None:
    data, card = write(
        tmp_path, make_report(model="my model", revision=None), make_base(tmp_path / "base", readme=None)
    )
    assert not data.keys() & {"base_model", "base_model_relation", "license", "license_link", "language"}
    assert (
        "The base model states none." in card
        and "`my model` converted" in card
        and 'snapshot_download("OWNER/NAME", local_dir="NAME")' in card
    )


def test_licence_sources(tmp_path: Path) -> None:
    plain = read_base_card(make_base(tmp_path / "a", "---\nlicense: apache-2.0\nlanguage: no\n---\n"))
    assert (plain.license, plain.license_link, plain.language, plain.files) == ("apache-2.0", None, ("no",), ())
    bare = read_base_card(make_base(tmp_path / "b", "no front matter", **{"LICENSE.txt": "x"}))
    assert (bare.license, bare.license_link) == ("other", "LICENSE.txt")
    lost = read_base_card(make_base(tmp_path / "c"), "org/base", "f00d")
    assert lost.license_link == f"{constants.ENDPOINT}/org/base/blob/f00d/LICENSE"
    web = read_base_card(make_base(tmp_path / "d", BASE_README.replace("LICENSE", "https://example.org/terms")))
    assert web.license_link == "https://example.org/terms"
    broken = read_base_card(make_base(tmp_path / "e", "---\nlicense: [\n---\n"))
    assert broken.license is None


def test_what_the_card_says_about_speed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    faster = speed_sentence(make_report())
    assert faster.startswith(
        "Decoding ran at 1.42 times the speed of the dense model on this machine (Test CPU, 2 cores, 2 threads, fp32"
    )
    assert (
        "1.42 times the speed of this model's dense graph, with the stock activation and nothing skipped on"
        in speed_sentence(make_report(swapped=True))
    )
    rows = [{**row, "selected": row["method"] == "gate"} for row in REPORT["rows"]]
    slower = make_report(rows=rows)
    assert speed_sentence(slower).startswith("Not faster on this machine") and "0.998 times" in speed_sentence(slower)
    data, card = write(tmp_path, slower, base)
    assert speed_sentence(slower) in card and "- Speed: onnxruntime" in card
    _, card = write(tmp_path, make_report(**without_speed()), base)
    assert "Speed was not measured." in card and "tok/s" not in card and "faster" not in card and "- Speed:" not in card
    disturbed = make_report(speed={**REPORT["speed"], "disturbed": True, "threads": None})
    assert speed_sentence(disturbed).endswith("not to be quoted.") and "threads" not in speed_sentence(disturbed)
