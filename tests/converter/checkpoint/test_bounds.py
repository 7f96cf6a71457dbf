"""Small files that would cost minutes or gigabytes, and values that no reader may pass on: one line each, before
anything is built.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from models import make_model, put_predictors

from sparsegate.converter.checkpoint.config_bounds import LEAST_POSITIONS, MOST, check_counts, check_graph
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.pipeline.inspect import inspect
from sparsegate.converter.pipeline.recipe import read_recipe
from sparsegate.converter.sources.powerinfer import import_powerinfer, write_powerinfer
from sparsegate.converter.sources.powerinfer_file import MAGIC
from sparsegate.converter.sources.predictors import predictors_beside
from sparsegate.converter.sources.published import is_published, normal_config
from sparsegate.converter.text.windows import LARGEST_TEXT, read_text
from sparsegate.runtime_onnx.errors import InputError

CONFIG = {"model_type": "bamboo", "hidden_act": "relu"}


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and "got" in text and len(text) < 1000, text
    return text


# counts


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_hidden_layers", value) for value in (1 << 31, 10_000_000, 4000, 22, 0, -1, 2.0, True, "2", [2])],
        *[
            (name, value)
            for name in ("num_labels", "vocab_size", "hidden_size", "intermediate_size", "head_dim")
            for value in (1 << 31, 0, [])
        ],
        *[("max_position_embeddings", value) for value in (0, -1, 1 << 40, "x")],
        *[("num_attention_heads", value) for value in (0, 1 << 20, 3, "four")],
        ("num_key_value_heads", 3),
        ("no_rope_layer_interval", 0),
        ("model_type", []),
        ("hidden_act", []),
        ("hidden_act", {"a": 1}),
    ],
)
def test_a_count_that_the_weights_cannot_back(name: str, value: Any, model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {name: value}))
    began = time.process_time()
    found = inspect(model)
    assert not found.convertible and name.split("_")[0] in found.reason and "\n" not in found.reason, found.reason
    assert time.process_time() - began < 10


@pytest.mark.parametrize(("name", "value"), [(name, most + 1) for name, most in MOST.items()])
def test_every_count_has_a_bound_of_its_own(name: str, value: int) -> None:
    with pytest.raises(
        InputError, match=f"{name} in config.json must be a whole number from 1 to {value - 1}, got {value}"
    ) as error:
        check_counts({name: value})
    one_line(error)
    check_counts({name: value - 1})
    check_counts({name: None})


def test_counts_of_a_published_model_have_bounds_without_weights() -> None:
    for value in (10_000_000, -1):
        with pytest.raises(InputError, match="num_hidden_layers in config.json must be a whole number"):
            normal_config(CONFIG | {"num_hidden_layers": value})


def test_a_model_type_that_is_no_name() -> None:
    assert not is_published({"model_type": []}) and not is_published({"model_type": {}}) and is_published(CONFIG)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("llama", {"head_dim": 8}, "got 8 and 8"),
        ("llama", {"head_dim": 24}, "got 24 and 24"),
        ("llama", {"head_dim": 12}, "got 12 and 12"),
        ("phi", {"partial_rotary_factor": 0.25}, "got 32 and 8"),
        (
            "llama",
            {"max_position_embeddings": 17},
            f"max_position_embeddings must be at least {LEAST_POSITIONS} to be converted, got 17",
        ),
        ("llama", {"head_dim": 16, "max_position_embeddings": LEAST_POSITIONS}, ""),
        ("phi", {"partial_rotary_factor": 0.5}, ""),
    ],
)
def test_a_model_whose_graph_could_not_run_is_refused_by_inspect(
    kind: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """ONNX Runtime 1.22 to 1.32: heads of a multiple of 8, of which a multiple of 16 are rotated."""
    folder = make_model(kind, tmp_path / "model", **fields)
    found = inspect(folder)
    assert found.convertible == (not said) and said in found.reason, found.reason
    source = open_source(folder)
    if said:
        with pytest.raises(InputError) as error:
            check_graph(source.arch, source.config)
        one_line(error)


# texts


def test_calibration_is_a_regular_file_of_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    os.mkfifo(path)
    sparse = tmp_path / "large"
    with open(sparse, "wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    for given, said in (
        (path, "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (sparse, f"{LARGEST_TEXT + 1} bytes"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(InputError, match="must be a regular UTF-8 file of at most 1024 MiB") as error:
            read_text(given)
        assert said in one_line(error)
    with pytest.raises(InputError, match="Calibration text must be a regular"):
        read_text(Path("a\0b"))


def test_byte_order_marks_and_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\nd")
    assert read_text(tmp_path / "text") == "a\nb\nc\nd"


# recipes

LAUGH = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!int x", "invalid literal for int"),
        ("a: !!timestamp x", "NoneType"),
        ("a: !!binary x", "base64"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("[" * 5000, "too deep to read"),
        ("a: &a [*a]", "too deep to read"),
        (LAUGH, "more than 10000 values"),
        ("a: " + "1" * 5000, "digits"),
        ("a: 0x" + "f" * 10_000, "a number outside 64 bits"),
        ('model: "\\ud800"', "half of a surrogate pair"),
        ("\0", "unacceptable character"),
        ("model: x\nseed: 4294967296", "seed must be valid"),
        ("model: x\ncalibration: {length: 10000000}", "length must be valid"),
        ("model: x\ncalibration: {windows: 1000000000000}", "windows must be valid"),
    ],
)
def test_recipes_that_no_reader_may_pass_on(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        read_recipe(tmp_path / "r.yaml")
    one_line(error)


def test_a_recipe_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    for path in (tmp_path / "r.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match="The recipe must be a YAML file, got .*no regular file"):
            read_recipe(path)


# PowerInfer's files


@pytest.fixture(scope="module")
def powerinfer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("powerinfer")
    source = open_source(put_predictors(make_model("llama", folder / "m", hidden_act="relu")))
    return write_powerinfer(source, predictors_beside(source), folder / "m.gguf", precision="fp32")


def put(data: bytes, key: str, value: bytes) -> bytes:
    """The file with other bytes in the value of a metadata key; its type, 4 bytes, comes before."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + value + data[at + len(value) :]


def put_type(data: bytes, kind: int) -> bytes:
    """The file with another type of a matrix; before it stand the name, 4 bytes of the number of its dimensions, and 8
    of each.
    """
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda data: put(data, "llama.block_count", struct.pack("<I", 10_000_000)),
            "llama.block_count must be a whole number from 1 to",
        ),
        (
            lambda data: put(data, "llama.block_count", struct.pack("<I", 0)),
            "llama.block_count must be a whole number from 1 to",
        ),
        (lambda data: put(data, "llama.attention.head_count", struct.pack("<I", 3)), "must divide the 3 heads"),
        (
            lambda data: put(data, "llama.attention.head_count_kv", struct.pack("<I", 1 << 31)),
            "head_count_kv must be a whole number",
        ),
        (
            lambda data: put(data, "powerinfer.sparse_threshold", struct.pack("<f", float("nan"))),
            "must be a finite float, got nan",
        ),
        (lambda data: data.replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"\xffabcd", 1), "metadata"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "a damaged one"),
        (lambda data: data[: len(data) // 2], "it ends too early"),
        (lambda data: put_type(data, 99), "99.* is not a valid GGMLQuantizationType"),
        (lambda data: put_type(data, 24), "token_embd.weight of .* must run, got"),
    ],
)
def test_a_powerinfer_file_counts_what_it_holds(
    change: Callable[[bytes], bytes], said: str, powerinfer: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(change(powerinfer.read_bytes()))
    began = time.process_time()
    with pytest.raises(InputError, match=said) as error:
        import_powerinfer(tmp_path / "m.gguf", tmp_path / "out")
    one_line(error)
    assert time.process_time() - began < 10 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 3), (5, 5), (48, 48)])
def test_heads_that_do_not_share_out_the_rows(heads: int, kv_heads: int, powerinfer: Path, tmp_path: Path) -> None:
    data = put(powerinfer.read_bytes(), "llama.attention.head_count", struct.pack("<I", heads))
    (tmp_path / "m.gguf").write_bytes(put(data, "llama.attention.head_count_kv", struct.pack("<I", kv_heads)))
    with pytest.raises(InputError, match="must divide the|must share out the") as error:
        import_powerinfer(tmp_path / "m.gguf", tmp_path / "out")
    one_line(error)


def test_an_array_that_goes_on_behind_the_end(tmp_path: Path) -> None:
    """The package would read empty values 2^40 times."""
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_array("x.array", list(range(4)))
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = MAGIC + (tmp_path / "m.gguf").read_bytes()[4:]
    at = data.index(b"x.array") + 7 + 8
    (tmp_path / "m.gguf").write_bytes(data[:at] + struct.pack("<Q", 1 << 40) + data[at + 8 :])
    with pytest.raises(InputError, match="it ends too early"):
        import_powerinfer(tmp_path / "m.gguf", tmp_path / "out")
