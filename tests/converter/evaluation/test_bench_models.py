"""bench of shapes: the models' own sizes, GGUF files of the same, a random model that keeps the asked share, tables and
plots that say what the JSON says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsegate.converter.evaluation.speed import gguf_file
from sparsegate.converter.evaluation.speed import model as model_module
from sparsegate.converter.evaluation.speed import run as run_module
from sparsegate.converter.evaluation.speed.peers import OPENERS, Runtime
from sparsegate.converter.evaluation.speed.run import BenchRequest, bench
from sparsegate.converter.evaluation.speed.shapes import SHAPES, Shape
from sparsegate.converter.report import speed as tables
from sparsegate.converter.report.roofline import plot, points
from sparsegate.converter.report.speed_files import write_speed
from sparsegate.runtime_onnx.bench import op as op_module
from sparsegate.runtime_onnx.bench import op_timer, samples, stream
from sparsegate.runtime_onnx.errors import InputError

BILLIONS = {
    "llama-1b": 1.236,
    "llama-3b": 3.213,
    "llama-8b": 8.030,
    "mistral-7b": 7.248,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "phi-3.5-mini": 3.821,
}
"""Parameters that the models' cards state."""
TINY = Shape("tiny", "llama", 64, 96, 2, 4, 2, 32, 320, True)


def meta(shape: Shape, layers: int | None = None) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **shape.config(layers)))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_models_parameters(name: str) -> None:
    assert set(BILLIONS) == set(SHAPES)
    assert sum(value.numel() for value in meta(SHAPES[name]).parameters()) / 1e9 == pytest.approx(
        BILLIONS[name], rel=2e-3
    )


@pytest.mark.parametrize("name", SHAPES)
def test_gguf_names_as_many_parameters(name: str) -> None:
    shape = SHAPES[name]
    assert sum(math.prod(size) for _, size in gguf_file.tensors(shape, 2)) == sum(
        value.numel() for value in meta(shape, 2).parameters()
    )


@pytest.mark.parametrize("precision", gguf_file.FORMATS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
def test_gguf_is_read_back(model_type: str, precision: str, tmp_path: Path) -> None:
    """By gguf's own reader: shapes, formats, and weights of variance 1 / inputs."""
    import gguf

    shape = Shape("t", model_type, 64, 96, 2, 4, 4 if model_type == "phi3" else 2, 32, 320, False)
    reader = gguf.GGUFReader(gguf_file.write_gguf(shape, tmp_path / "t.gguf", precision))
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = dict(gguf_file.tensors(shape, 2))
    assert {name: tuple(int(size) for size in tensor.shape)[::-1] for name, tensor in found.items()} == wanted
    form = gguf_file.FORMATS[precision]
    assert {tensor.tensor_type.name for name, tensor in found.items() if len(wanted[name]) == 2} == {form.name}
    values = gguf.quants.dequantize(found["blk.0.ffn_down.weight"].data, found["blk.0.ffn_down.weight"].tensor_type)
    assert values.shape == (64, 96) and values.std() * 96**0.5 == pytest.approx(1, abs=0.1)
    assert reader.fields["general.architecture"].contents() == gguf_file.ARCHITECTURES[model_type]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the tiny shape's models in int4."""
    folder = tmp_path_factory.mktemp("bench")
    run_module.random_folders(TINY, "int4", [0.5, 0.25], None, folder)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet machine, a small buffer, and the tiny shape among the shapes."""
    monkeypatch.setattr(samples, "waited", lambda: 0.0)
    for module in (op_timer, model_module):
        monkeypatch.setattr(module, "MemoryStream", lambda threads: stream.MemoryStream(threads, 1 << 16))
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def fake_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp as if it were not installed: whether it is must not decide what a test sees."""
    monkeypatch.setitem(
        OPENERS,
        "llama.cpp",
        Runtime((("no_such_module", "llama-cpp-python"),), "llama_decode", OPENERS["llama.cpp"].open),
    )


def test_a_shape(folders: Path, small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dense, two sparse models, torch, and a peer that is missing, in one run; the numbers follow from the samples."""
    fake_peers(monkeypatch)
    monkeypatch.setattr(model_module, "peak", lambda *_: 12345)
    out, done = tmp_path / "m.json", []
    given: dict[str, Any] = {
        "density": "50%,0.25",
        "prompt_tokens": 8,
        "new_tokens": 4,
        "pairs": 2,
        "threads": 1,
        "work": folders,
    }
    result = bench(BenchRequest(shape="tiny", **given), out, "the command", lambda *now: done.append(now))
    assert json.loads(out.read_text()) == json.loads(json.dumps(result)) and done == [(1, 2), (2, 2)]
    models = {row["role"]: row for row in result["models"]}
    assert list(models) == ["dense", "sparse 0.5", "sparse 0.25", "llama.cpp Q4_0", "torch bf16"]
    assert models["llama.cpp Q4_0"]["status"] == "not installed: llama-cpp-python"
    for role, share in (("sparse 0.5", 0.5), ("sparse 0.25", 0.25)):
        assert models[role]["density"] == pytest.approx(share, abs=0.06) and "native kernel" in models[role]["executor"]
        assert (
            models[role]["precision"]["matmul_nbits"] == ["int4"]
            and "int4_g32" in models[role]["precision"]["variants"][0]
        )
        assert models[role]["peak_bytes"] == 12345
    assert (
        models["dense"]["precision"]["variants"] == []
        and models["sparse 0.25"]["token_bytes"] < models["sparse 0.5"]["token_bytes"]
    )
    seconds = sorted(entry["seconds"]["dense"][1] for entry in result["samples"])
    assert models["dense"]["decode_tokens_per_s"] == pytest.approx(4 / (sum(seconds) / 2))
    assert len(result["ratios"]) == 4 and {row["against"] for row in result["ratios"]} == {"dense", "torch bf16"}
    for row in result["amdahl"]:
        expected = 1 / (1 - row["mlp_share"] + row["mlp_share"] / row["op_ratio"])
        assert row["status"] == "run" and row["expected"] == pytest.approx(expected) and row["op"]["format"] == "int4"
        assert row["measured_to_expected"] == pytest.approx(row["measured"] / expected) and row["op"]["tokens"] == 1
    write_speed(out, result)
    text = out.with_suffix(".md").read_text()
    assert (
        "not installed: llama-cpp-python" in text
        and "CUDA: not run" in text
        and "Amdahl" in text
        and "`the command`" in text
    )
    with pytest.raises(InputError, match="--work must be a folder of the same shape, layers, precision and activation"):
        bench(BenchRequest(shape="tiny", precision="fp32", work=folders))


def test_peers_are_run_where_they_are(folders: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "peak", lambda *_: None)
    request = BenchRequest(shape="tiny", density="0.5", prompt_tokens=8, new_tokens=4, pairs=1, threads=1, work=folders)
    result = bench(request)
    found = {row["role"]: row["status"] for row in result["models"]}
    there = all(find_spec(module) is not None for module in ("llama_cpp", "gguf"))
    assert (
        found["llama.cpp Q4_0"] == ("run" if there else "not installed: llama-cpp-python")
        and found["torch bf16"] == "run"
    )


@pytest.mark.slow
def test_peak_memory(folders: Path) -> None:
    """A process of its own that opens the model: more than the interpreter, less than the machine."""
    from sparsegate.converter.evaluation.speed.memory import peak

    found = peak("onnxruntime", folders / "dense", 1, "int4", [2, 3], [4])
    assert found is not None and 3e7 < found < 4e9
    assert peak("onnxruntime", folders / "nothing", 1, "int4", [2, 3], [4]) is None


def test_an_op_goes_on_where_it_stopped(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "op.json"
    given: dict[str, Any] = {
        "op": "gated_mlp",
        "shape": "tiny",
        "tokens": "1,2",
        "pairs": 2,
        "threads": 1,
        "density": "0.5",
    }
    bench(BenchRequest(precision="fp32", **given), out, "first")
    first = json.loads(out.read_text())
    result = bench(BenchRequest(precision="fp32,int4", **given), out, "second")
    assert result["rows"][: len(first["rows"])] == first["rows"] and len(result["rows"]) == 2 * len(first["rows"])
    assert result["commands"] == ["first", "second"] and {row["format"] for row in result["rows"]} == {"fp32", "int4"}
    assert [dense["name"] for dense in result["rows"][0]["dense"]] == ["ONNX Runtime MatMul fp32", "torch fp32"]
    write_speed(out, result)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and "| int4 |" in out.with_suffix(".md").read_text()
    monkeypatch.setattr(op_module.library, "isa", lambda: "another")
    with pytest.raises(InputError, match="must hold rows of the same .* got another isa. Move the file away"):
        bench(BenchRequest(precision="bf16", **given), out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))


def row(asked: float, ratio: float, tokens: int = 1, score: str = "predictor", form: str = "int8") -> dict[str, Any]:
    dense = {
        "name": "D",
        "ms": 2.0,
        "ratio": ratio,
        "quartiles": [ratio, ratio],
        "verdict": "faster" if ratio > 1 else "not faster",
        "pairs": 15,
        "dropped": 0,
    }
    return {
        "format": form,
        "tokens": tokens,
        "asked": asked,
        "score": score,
        "status": "run",
        "density": asked,
        "union": asked,
        "ms": 1.0,
        "bytes": 1e6,
        "operations": 4e6,
        "gb_per_s": 1.0,
        "stream_gb_per_s": 2.0,
        "share_of_stream": 0.5,
        "gflop_per_s": 4.0,
        "dense": [dense],
        "nmse": 0.0,
    }


STORED: dict[str, Any] = {
    "kind": "op",
    "time": "2026-01-02T03:04",
    "machine": {"cpu": "C", "cpus": 2, "memory_bytes": 2**34},
    "versions": {"onnxruntime": "1.2", "commit": "abc"},
    "command": "c",
    "isa": "avx2",
    "cuda": "not run: no CUDA device",
    "settings": {"op": "gated_mlp", "d": 64, "n": 96, "r": 32, "threads": 2},
    "roofs": {"stream_gb_per_s": {"or": 10.0}, "gemm_gflop_per_s": 100.0},
    "rows": [
        row(0.5, 1.5),
        row(0.2, 0.9),
        row(1.0, 0.97, score="all"),
        row(0.5, 0.8, 8),
        row(0.5, 0.7, 16),
        row(0.2, 0.75, 16, form="int4"),
        {"format": "bf16", "tokens": 1, "asked": 0.5, "score": "predictor", "status": "not run: no kernel"},
    ],
}


def test_tables_say_what_is_stored() -> None:
    text = tables.page(STORED)
    assert (
        "0.90 (0.90-0.90), not faster" in text
        and "1.50 (1.50-1.50) |" in text
        and "not run: no kernel" in text
        and "CUDA: not run" in text
    )
    assert "| int8 | D | 1.50 (target 1.65) | 0.90 (target 3.2) | - | 0.97 |" in tables.target_table(STORED)
    assert {name: found["tokens"] for name, found in tables.worst(STORED).items()} == {"int8": 16, "int4": 16}
    lines = tables.prefill_table(STORED).splitlines()
    assert (
        lines[0].endswith("| T = 8 | T = 16 |")
        and "| int8 | 50% | D | 0.80 | 0.70 |" in lines
        and "| int4 | 20% | D | - | 0.75 |" in lines
    )


def test_roofline_points(tmp_path: Path) -> None:
    found = points([STORED])
    sparse, dense = ([point for point in found if point["kind"] == kind] for kind in ("sparse", "dense"))
    assert len(sparse) == 6 and all((point["x"], point["y"]) == (4.0, 4.0) for point in sparse)
    (only,) = dense
    assert only["x"] == pytest.approx(2 / 1.125) and only["y"] == pytest.approx(6 * 64 * 96 / 2e-3 / 1e9)
    assert plot(tmp_path / "r.png", [STORED]).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "bench must get DENSE and DIR, one DIR, --shape or --op, got 0 folders"),
        ({"models": ["a", "b", "c"]}, "got 3 folders"),
        ({"models": ["a"], "shape": "llama-1b"}, "Folders must not be given with --shape or --op"),
        ({"models": ["a"], "density": "0.5"}, "--density must not be given for existing folders"),
        ({"shape": "llama-2b"}, "--shape must be one of llama-1b, .*got 'llama-2b'"),
        ({"shape": "llama-1b", "tokens": "1"}, "--tokens must not be given for a shape"),
        ({"shape": "llama-1b", "precision": "int3"}, "--precision must be one of fp32, .*got 'int3'"),
        ({"shape": "llama-1b", "layers": 17}, "--layers must be 1 to 16 for llama-1b, got 17"),
        ({"shape": "llama-1b", "density": "0"}, "--density must lie above 0"),
        ({"shape": "llama-1b", "runtime": "x"}, "--runtime must be onnxruntime or onnxruntime-genai, got 'x'"),
        ({"op": "conv"}, "--op must be gated_mlp or sparse_linear, got 'conv'"),
        ({"op": "gated_mlp", "layers": 1}, "--layers must not be given for an op"),
        ({"op": "gated_mlp", "density": "half"}, "--density must be numbers with commas between them, got 'half'"),
        ({"op": "gated_mlp", "output": Path("x.txt")}, "--output must be a .json file"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        output = arguments.pop("output", None)
        bench(BenchRequest(**arguments), output)


def test_the_dense_graph_of_a_checkpoint(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The precision is read off the graph's variants; the dense graph is in the same one and has no op of ours."""
    from sparsegate.runtime_onnx.bench.folders import precision

    name = "GatedMLP.1/silu/gate/{}/x=float32,w={},p=float32/w_gate+w_up+w_down+tau"
    monkeypatch.setattr(run_module, "model_file", lambda path: path / "model.onnx")
    for weights, w, bits in (
        ("int4_g32", "float32", ["int4"]),
        ("float", "float16", []),
        ("int8_row", "float32", ["int8"]),
    ):
        monkeypatch.setattr(run_module, "variants", lambda _, words=(weights, w): [name.format(*words)])
        found = precision(run_module.dense_beside(tiny_model("llama"), tmp_path / weights))
        assert (found["variants"], found["matmul_nbits"]) == ([], bits)


def test_a_shape_with_both_signs(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gates and ups open by force: the asked shares are realised in a graph of random weights, exact and with a
    predictor, in int4; dense has no biases.
    """
    monkeypatch.setattr(model_module, "peak", lambda *_: None)
    given: dict[str, Any] = {
        "activation": "drelu",
        "density": "0.07",
        "peers": False,
        "prompt_tokens": 80,
        "new_tokens": 4,
        "pairs": 1,
        "threads": 1,
    }
    result = bench(BenchRequest(shape="tiny", work=tmp_path / "work", **given))
    models = {row["role"]: row for row in result["models"]}
    assert (
        list(models) == ["dense", "sparse exact 0.07", "sparse predictor 0.07"]
        and result["settings"]["activation"] == "drelu"
    )
    for role, score in (("sparse exact 0.07", "exact"), ("sparse predictor 0.07", "predictor")):
        row, exact = models[role], score == "exact"
        assert row["density"] == pytest.approx(0.07 if exact else 0.14, abs=0.03) and row["nonzero"] == pytest.approx(
            0.07, abs=0.03
        )
        assert row["opened"] == pytest.approx(0.07**0.5 if exact else 0.14 * 0.5**0.5, abs=0.05)
        (name,) = row["precision"]["variants"]
        assert (
            name.startswith(f"GatedMLP.1/drelu/{score}/int4_g32/")
            and "b_gate+b_up" in name
            and "native kernel" in row["executor"]
        )
        assert row["token_bytes"] < models["dense"]["token_bytes"]
    assert models["dense"]["precision"]["variants"] == []
    assert {row["role"]: row["op"]["score"] for row in result["amdahl"]} == {
        "sparse exact 0.07": "exact",
        "sparse predictor 0.07": "predictor",
    }
    again = run_module.random_folders(TINY, "int4", [0.07], None, tmp_path / "work", "drelu")
    assert again["sparse exact 0.07"] == tmp_path / "work" / "sparse_exact_0.07"
    for wrong, words in (
        ({"density": "0.6"}, "at most 0.5, got 0.6"),
        ({"activation": "gelu"}, "must have exact zeros .*, got gelu"),
    ):
        with pytest.raises(InputError, match=words):
            bench(BenchRequest(shape="tiny", **given | wrong))
    with pytest.raises(InputError, match="--activation must not be given for existing folders, got drelu"):
        bench(BenchRequest(["a", "b"], activation="drelu"))
