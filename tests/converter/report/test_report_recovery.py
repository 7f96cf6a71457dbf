"""The record of a recovery: what it refuses, golden tables, and its parts of card, page and pictures, with everything
in it or as little as may be.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from pydantic import ValidationError
from test_curves import HOSTILE, Page, numbers
from test_report import make_base, write
from test_report import make_report as report_of

from sparsegate.converter import report as reporting
from sparsegate.converter.report.recovery import (
    before_after_cells,
    before_after_table,
    heldout_cells,
    spent_table,
    zeros_table,
)
from sparsegate.runtime_onnx.errors import InputError


def sites(*shares: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"site": f"layers.{k}.ffn", "density": density, "opened": opened} for k, (density, opened) in enumerate(shares)
    ]


RECORD: dict[str, Any] = {
    "version": 1,
    "activation": "drelu",
    "text": {
        "name": "own samples",
        "windows": 4096,
        "tokens": 1048576,
        "sampled": True,
        "seconds": 93.0,
        "hash": "a" * 64,
    },
    "settings": {"steps": 2000, "rate": 0.002, "losses": {"distill": 1.0}},
    "tokens_trained": 4096000,
    "seconds": 1234.5,
    "cpu_seconds": 2400.0,
    "machine": {"cpu": "Test CPU", "cores": 2, "os": "Linux 6", "gpu": "Test GPU"},
    "versions": {"torch": "2.13.0"},
    "curve": [
        {
            "step": 10,
            "tokens": 20480,
            "seconds": 6.2,
            "loss": 2.5,
            "kl": 2.25,
            "lm": 3.5,
            "hidden": 0.75,
            "penalty": 0.55,
            "density": 0.26,
            "predicted": 0.4,
        },
        {"step": 2000, "tokens": 4096000, "seconds": 1234.5, "loss": 0.15, "kl": 0.053, "density": 0.07},
    ],
    "heldout": [
        {
            "step": 500,
            "tokens": 1024000,
            "nll": 2.3,
            "nll_dense": 2.01,
            "kl": 0.3,
            "agreement": 0.7,
            "density": 0.11,
            "predicted": 0.21,
        },
        {"step": 2000, "tokens": 4096000, "nll": 2.11},
    ],
    "dense": {"nll": 2.0, "tokens": 4096},
    "swapped": {
        "nll": 9.6,
        "kl": 7.7,
        "agreement": 0.031,
        "density": 0.2604,
        "opened": 0.51,
        "cost": 0.6,
        "sites": sites((0.27, 0.5), (0.25, 0.52)),
    },
    "recovered": {
        "nll": 2.08,
        "kl": 0.0512,
        "agreement": 0.871,
        "density": 0.0675,
        "opened": 0.2,
        "predicted": 0.14,
        "cost": 0.29,
        "sites": [
            site | {"predicted": share}
            for site, share in zip(sites((0.0813, 0.22), (0.0537, 0.18)), (0.15, 0.13), strict=True)
        ],
    },
    "evaluation": {"tokens": 4096, "name": "held-out text", "hash": "e" * 64},
}
LEAST = {key: value for key, value in RECORD.items() if key not in ("version", "curve", "heldout")} | {
    "text": {"name": "a.txt", "windows": 2, "tokens": 512, "sampled": False, "seconds": 0},
    "tokens_trained": 0,
    "seconds": 0,
    "cpu_seconds": 0,
    "settings": {},
    "swapped": {key: value for key, value in RECORD["swapped"].items() if key != "sites"},
    "recovered": {key: value for key, value in RECORD["recovered"].items() if key not in ("sites", "predicted")},
    "evaluation": {"tokens": 4096},
}

BEFORE_AFTER = """\
| model | NLL | change | perplexity | KL to dense | agreement | density | gate open | predicted | cost |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| dense | 2.0000 | - | 7.389 | 0.0000 | 100.0 % | 100.0 % | 100.0 % | - | 100.0 % |
| drelu, before recovery | 9.6000 | +380.0 % | 1.476e+04 | 7.7000 | 3.1 % | 26.0 % | 51.0 % | - | 60.0 % |
| drelu, recovered | 2.0800 | +4.0 % | 8.004 | 0.0512 | 87.1 % | 6.8 % | 20.0 % | 14.0 % | 29.0 % |
"""
SPENT = """\
| recovery | spent |
| --- | ---: |
| text | own samples |
| tokens of it | 1,048,576 in 4096 windows |
| minutes to make it | 1.6 |
| tokens trained on | 4,096,000 |
| minutes of training | 20.6 |
| CPU minutes of training | 40.0 |
| tokens per second | 3318 |
| machine | Test CPU, 2 cores, Linux 6, Test GPU |
"""
ZEROS = """\
| site | zeros before | zeros recovered | closed gates | predicted closed |
| --- | ---: | ---: | ---: | ---: |
| layers.0.ffn | 73.0 % | 91.9 % | 78.0 % | 85.0 % |
| layers.1.ffn | 75.0 % | 94.6 % | 82.0 % | 87.0 % |
"""


def make(**changes: Any) -> reporting.RecoveryRecord:
    return reporting.RecoveryRecord.model_validate(json.loads(json.dumps(RECORD)) | changes)


def least(**changes: Any) -> reporting.RecoveryRecord:
    return reporting.RecoveryRecord.model_validate(json.loads(json.dumps(LEAST)) | changes)


def test_tables_have_the_golden_text() -> None:
    assert before_after_table(make()) == BEFORE_AFTER and spent_table(make()) == SPENT and zeros_table(make()) == ZEROS
    assert math.isclose(make().rise, 0.04)
    header, body = heldout_cells(make())
    assert header == ["step", "tokens", "NLL", "dense", "KL to dense", "agreement", "density", "predicted"]
    assert body == [
        ["500", "1,024,000", "2.3000", "2.0100", "0.3000", "70.0 %", "11.0 %", "21.0 %"],
        ["2,000", "4,096,000", "2.1100", *["-"] * 5],
    ]
    header, body = before_after_cells(least())
    assert "predicted" not in header and [row[-1] for row in body] == ["100.0 %", "60.0 %", "29.0 %"]
    assert "| text | a.txt |" in spent_table(least()) and "| tokens per second | - |" in spent_table(least())
    assert heldout_cells(least()) == (
        ["step", "tokens", "NLL", "dense", "KL to dense", "agreement", "density", "predicted"],
        [],
    )
    wild = make(swapped=RECORD["swapped"] | {"nll": 1e4})
    assert "1.014e+304" in before_after_table(wild)  # as much as a float shows


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"version": 2}, "version"),
        ({"faster": True}, "Extra"),
        ({"curve": [RECORD["curve"][1], RECORD["curve"][0]]}, "curve must go forward"),
        ({"curve": [RECORD["curve"][0]] * 2}, "curve must go forward"),
        ({"heldout": [RECORD["heldout"][0], {"step": 600, "tokens": 5, "nll": 2.0}]}, "heldout must go forward"),
        ({"swapped": RECORD["swapped"] | {"sites": sites((0.2, 0.5))}}, "same sites"),
        ({"recovered": RECORD["recovered"] | {"density": 1.01}}, "less than or equal to 1"),
        ({"dense": {"nll": float("nan"), "tokens": 4}}, "finite"),
        ({"text": RECORD["text"] | {"windows": 0}}, "greater than or equal to 1"),
        ({"seconds": -1}, "greater than or equal to 0"),
    ],
)
def test_records_that_cannot_be_are_refused(change: dict[str, Any], sign: str) -> None:
    make()
    with pytest.raises(ValidationError, match=sign):
        reporting.RecoveryRecord.model_validate({**RECORD, **change})


def test_a_record_is_stored_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / reporting.RECOVERY
    make().save(path)
    assert reporting.RecoveryRecord.load(path) == make()
    stored = json.loads(path.read_text())
    del stored["dense"]["nll"]
    path.write_text(json.dumps(stored))
    with pytest.raises(
        InputError, match=r"record of the recovery must have the form of version 1, got .*dense\.nll: Field required"
    ):
        reporting.RecoveryRecord.load(path)


def stored(folder: Path, record: reporting.RecoveryRecord, **changes: Any) -> Path:
    record.save(folder / reporting.RECOVERY)
    report_of(**changes).save(folder / reporting.RESULTS)
    return folder


def test_the_page_shows_every_number_and_escapes(tmp_path: Path) -> None:
    hostile = make(
        text=RECORD["text"] | {"name": HOSTILE},
        machine=RECORD["machine"] | {"gpu": HOSTILE},
        settings={"file": "<b>bold"},
    )
    written = reporting.render(stored(tmp_path, hostile))
    assert [path.name for path in written] == [
        "candidates.png",
        "layers.png",
        "recovery.png",
        "zeros.png",
        "index.html",
    ]
    text = (tmp_path / reporting.PAGE).read_text(encoding="utf-8")
    page, visible = Page(text), Page(text.split("<details>")[0])
    assert page.open == [] and visible.text.count(HOSTILE) == 2 and "file: <b>bold" in visible.text
    assert not {tag for tag, _ in page.tags} & {"script", "a", "b", "link"}
    assert sum(tag == "img" for tag, _ in page.tags) == 4
    for number in numbers(json.loads((tmp_path / reporting.RECOVERY).read_text())):
        assert repr(number) in page.text, number
    shown = {float(value) for value in visible.values}
    for part in ("swapped", "recovered"):
        quality = {key: value for key, value in RECORD[part].items() if key != "sites"}
        assert set(map(float, numbers(quality))) <= shown and math.exp(RECORD[part]["nll"]) in shown
        assert {1 - site["density"] for site in RECORD[part]["sites"]} <= shown
    assert {1 - site[key] for site in RECORD["recovered"]["sites"] for key in ("opened", "predicted")} <= shown
    assert {2.0, 2.08 / 2 - 1, 9.6 / 2 - 1, 20.575, 40.0, 1.55, 4096000.0, 1048576.0, 2.3, 2.01, 2.11} <= shown
    assert 'class="dense"' in text.split("Recovery training")[1] and "The networks&#39; activation became drelu" in text


def test_the_page_with_as_little_as_may_be_and_without_a_record(tmp_path: Path) -> None:
    assert [path.name for path in reporting.render(stored(tmp_path, least()))] == [
        "candidates.png",
        "layers.png",
        "index.html",
    ]
    text = (tmp_path / reporting.PAGE).read_text(encoding="utf-8")
    section = text.split("Recovery training")[1].split("<h2>")[0]
    assert (
        "4096 tokens of held-out text" in section
        and "None" not in section
        and "img" not in section
        and "by site" not in section
    )
    (tmp_path / reporting.RECOVERY).unlink()
    reporting.render(tmp_path)
    assert "Recovery" not in (tmp_path / reporting.PAGE).read_text(encoding="utf-8")


def test_the_card_tells_of_the_recovery(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make().save(out / reporting.RECOVERY)
    (out / "config.json").write_text(json.dumps({"model_type": "sparsegate_llama"}))
    base = make_base(tmp_path / "base")
    data, card = write(tmp_path, report_of(), base)
    assert data["base_model_relation"] == "finetune"
    section = card.split("### Recovery training")[1].split("## How it was measured")[0]
    assert BEFORE_AFTER in section and SPENT in section and ZEROS in section
    assert (
        "activation became `drelu`" in section
        and "On 4096 tokens of held-out text, the same" in section
        and "that a predictor opens" in section
    )
    assert (
        "of the type `sparsegate_llama`" in card
        and "ordinary transformers checkpoint" not in card
        and "(the dense model)" not in card
    )
    assert "import sparsegate.converter\nfrom transformers" in card
    assert "\n\nsparsegate.converter.register()  # makes sparsegate_llama known\nmodel = " in card
    assert "\n\n\n" not in card
    _, plain = write(tmp_path, report_of(), base)
    least().save(out / reporting.RECOVERY)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    _, card = write(tmp_path, report_of(), base)
    section = card.split("### Recovery training")[1].split("## How it was measured")[0]
    assert (
        "On 4096 tokens, the same" in section
        and "None" not in section
        and "per layer</summary>" not in section
        and "predictor opens" not in section
    )
    assert (
        "ordinary transformers checkpoint of the dense model" in card
        and "sparsegate.converter.register()" not in card
        and plain != card
    )
    (out / reporting.RECOVERY).unlink()
    data, card = write(tmp_path, report_of(), base)
    assert "Recovery" not in card and data["base_model_relation"] == "quantized"


def test_everything_is_written_beside_a_record(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make().save(out / reporting.RECOVERY)
    reporting.write_report(out, report_of(), reporting.read_base_card(make_base(tmp_path / "base"), "org/base-1B"))
    card = (out / "README.md").read_text()
    assert "(report/recovery.png)" in card and "(report/zeros.png)" in card and (out / "report" / "zeros.png").is_file()


def ink(path: Path, colour: str) -> int:
    """Pixels of one of matplotlib's default colours."""
    wanted = {
        "blue": (0x1F, 0x77, 0xB4),
        "orange": (0xFF, 0x7F, 0x0E),
        "green": (0x2C, 0xA0, 0x2C),
        "red": (0xD6, 0x27, 0x28),
    }[colour]
    return int((np.abs(image.imread(path)[..., :3] * 255 - np.array(wanted)).max(-1) < 2).sum())


def test_pictures_repeat_and_show_what_is_there(tmp_path: Path) -> None:
    first, second = (reporting.plot_recovery(tmp_path / f"{k}.png", make()) for k in range(2))
    assert first and second and first.read_bytes() == second.read_bytes()
    fewer = reporting.plot_recovery(tmp_path / "fewer.png", make(heldout=[]))
    assert fewer and image.imread(first).shape[0] == 1.5 * image.imread(fewer).shape[0]  # three panels, two
    assert (
        reporting.plot_recovery(tmp_path / "none.png", least()) is None
        and reporting.plot_zeros(tmp_path / "none.png", least()) is None
    )
    alone = reporting.plot_recovery(tmp_path / "alone.png", least(heldout=RECORD["heldout"]))
    assert alone and image.imread(alone).shape[0] == image.imread(first).shape[0] / 3
    bare = reporting.plot_recovery(
        tmp_path / "bare.png", make(curve=[{"step": 1, "tokens": 5, "seconds": 1}], heldout=[])
    )
    assert bare and not ink(bare, "blue") and ink(first, "blue") and ink(first, "red")
    zeros = reporting.plot_zeros(tmp_path / "zeros.png", make())
    exact = reporting.plot_zeros(
        tmp_path / "exact.png", make(recovered=RECORD["recovered"] | {"sites": sites((0.0813, 0.22), (0.0537, 0.18))})
    )
    assert (
        zeros
        and exact
        and ink(zeros, "red")
        and not ink(exact, "red")
        and all(ink(exact, colour) for colour in ("blue", "orange", "green"))
    )
