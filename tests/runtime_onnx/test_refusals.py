"""What ONNX Runtime, onnxruntime-genai and tokenizers say of a damaged folder comes as our error with their text in it,
and numbers have bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_folders as folders
import pytest

import sparsegate.runtime_onnx as runtime
from sparsegate.runtime_onnx import Sampling
from sparsegate.runtime_onnx.bench.folders import BenchTiming, bench
from sparsegate.runtime_onnx.errors import InputError, explained
from sparsegate.runtime_onnx.untrusted import parse_json


def unknown_op(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "MatNul"


def other_shape(model: onnx.ModelProto) -> None:
    tensor = next(
        tensor for tensor in model.graph.initializer if tensor.name.startswith("lm_head") and len(tensor.dims) == 2
    )
    tensor.dims[:] = tensor.dims[::-1]


def no_logits(model: onnx.ModelProto) -> None:
    del model.graph.output[:1]


def flat_cache(model: onnx.ModelProto) -> None:
    cache = next(value for value in model.graph.input if value.name.startswith("past_key_values."))
    cache.type.tensor_type.shape.dim[1].dim_param = "heads"


def damaged(tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert type(error.value) is InputError and "\n" not in text and text.endswith("."), text
    return text


USES = {
    "session": lambda folder: runtime.Decoder(folder)([5, 6]),
    "genai": runtime.load,
    "generate": lambda folder: list(runtime.generate(folder, "x", 4)),
}


@pytest.mark.parametrize(
    ("change", "use", "said"),
    [
        *[(unknown_op, use, "MatNul") for use in USES],
        *[(other_shape, use, "MatMul") for use in USES],
    ],
)
def test_a_damaged_graph_is_our_error_with_the_runtimes_text(
    change: Callable[[onnx.ModelProto], None], use: str, said: str, tmp_path: Path
) -> None:
    folder = damaged(tmp_path, change)
    with pytest.raises(InputError, match="must run, got: ") as error:
        USES[use](folder)
    assert said in one_line(error) and str(folder) in str(error.value) and error.value.__cause__ is not None


@pytest.mark.parametrize("change", [no_logits, flat_cache])
def test_a_graph_that_is_no_decoder(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a decoder with input_ids, logits and a cache") as error:
        runtime.Decoder(damaged(tmp_path, change), library=False)
    one_line(error)


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    for use in (runtime.session, runtime.Decoder, runtime.load, lambda path: bench(path, path)):
        with pytest.raises(InputError, match="must run, got: ") as error:
            use(folder)
        one_line(error)


def test_the_boundary_lets_our_own_errors_through() -> None:
    with pytest.raises(InputError, match="^ours$"), explained("x"):
        raise InputError("ours")
    with pytest.raises(InputError, match="^x must run, got: a b. Fetch or convert it again.$"), explained("x"):
        raise RuntimeError("a\n  b")
    with pytest.raises(InputError, match="^x must run, got: RuntimeError. Do.$"), explained("x", "Do."):
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), explained("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampling": Sampling(seed=1 << 63)}, "seed must be from 0 to 2147483647"),
        ({"sampling": Sampling(seed=1 << 31)}, "seed must be from 0"),
        ({"sampling": Sampling(seed=-1)}, "seed must be from 0"),
        ({"sampling": Sampling(float("nan"))}, "temperature must be 0, or at least"),
        ({"sampling": Sampling(float("inf"))}, "temperature must be 0, or at least"),
        ({"sampling": Sampling(1e-300)}, "temperature must be 0, or at least"),
        ({"sampling": Sampling(top_p=float("nan"))}, "top_p must be in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        runtime.generate(folders.sparse("gate"), "x", **arguments)


def test_more_candidates_than_there_are_tokens_are_all_tokens() -> None:
    folder = folders.sparse("gate")
    texts = [
        "".join(runtime.generate(folder, "def", 8, Sampling(2.0, top_k=count, seed=3)))
        for count in (folders.VOCABULARY, 1 << 62)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "timing",
    [
        BenchTiming(threads=-1),
        BenchTiming(threads=1 << 40),
        BenchTiming(prompt_tokens=1 << 62),
        BenchTiming(new_tokens=0),
    ],
)
def test_numbers_of_bench(timing: BenchTiming) -> None:
    folder = folders.sparse("gate")
    with pytest.raises(ValueError, match="must be at least|must be at most|must fit the context"):
        bench(folder, folder, timing)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "too deep to read"),
        ("[" + "9" * 5000 + "]", "a number of thousands of digits"),
        (r'{"a": "\ud800"}', r"half of a surrogate pair in '\\ud800'"),
        (r'{"\udc00": 1}', "half of a surrogate pair"),
        (r'["\udc00\ud800"]', "half of a surrogate pair"),
        ('{"a": 1, "a": 2}', "the key 'a' twice in one object"),
    ],
)
def test_json_that_no_other_reader_takes(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_whole_pairs_and_large_numbers_are_read() -> None:
    assert parse_json(r'["\ud83d\ude00", "\\ud800"]') == ["\U0001f600", "\\ud800"]
    assert parse_json("1000000000000000019884624838656") == 1000000000000000019884624838656
