"""A checkpoint is data: whatever its genai_config.json names, no library of it is loaded, no program run and no file
written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_folders as folders
import onnxruntime_genai as og
import pytest

import sparsegate.runtime_onnx as runtime
from sparsegate.runtime_onnx.bench.folders import BenchTiming, bench
from sparsegate.runtime_onnx.genai_config import CONFIG, FIELDS, read_config
from sparsegate.runtime_onnx.library import LIBRARY
from sparsegate.runtime_onnx.untrusted import read_json

SOURCE = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { FILE *f = fopen(getenv("HOSTILE_MARK"), "w"); if (f) fclose(f); }
"""


@pytest.fixture(scope="session")
def hostile_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library that leaves a file as soon as it is loaded."""
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    place = tmp_path_factory.mktemp("hostile")
    (place / "hostile.c").write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", place / "hostile.so", place / "hostile.c"], check=True)
    return place / "hostile.so"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that shows that the library was loaded."""
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "loaded"))
    return tmp_path / "loaded"


@pytest.fixture
def folder(tmp_path: Path, hostile_library: Path, mark: Path) -> Path:
    """A sparse ONNX folder with the library beside the model."""
    copied = folders.copy(folders.sparse("gate"), tmp_path / "out" / "onnx")
    shutil.copyfile(hostile_library, copied / "evil.so")
    return copied


NAMED = {"session_options": {"custom_ops_library": "evil.so"}}


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], str]:
    """The text of a configuration with a value at a path, objects made on the way."""

    def change(config: dict[str, Any]) -> str:
        place = config
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
        return json.dumps(config)

    return change


def twice(*path: str, first: Any) -> Callable[[dict[str, Any]], str]:
    """The text of a configuration in which a key stands twice, `first` before what was there: Python keeps the last,
    genai reads both.
    """

    def change(config: dict[str, Any]) -> str:
        place = config
        for name in path[:-1]:
            place = place[name]
        items = list(place.items())
        place.clear()
        place["__first__"] = first
        place.update(items)
        return json.dumps(config).replace('"__first__"', json.dumps(path[-1]))

    return change


RUNS = {
    "the decoder's library": put("model", "decoder", "session_options", "custom_ops_library", value="evil.so"),
    "a library elsewhere": put("model", "decoder", "session_options", "custom_ops_library", value="./evil.so"),
    "a pipeline": put("model", "decoder", "pipeline", value=[{"stage": {"filename": "model.onnx", **NAMED}}]),
    "a vision model": put("model", "vision", value={"filename": "model.onnx", **NAMED}),
    "an encoder": put("model", "encoder", value={"filename": "model.onnx", **NAMED}),
    "an embedding": put("model", "embedding", value={"filename": "model.onnx", **NAMED}),
    "session_options twice": twice("model", "decoder", "session_options", first=NAMED["session_options"]),
    "the decoder twice": twice("model", "decoder", first={"filename": "model.onnx", "head_size": 16, **NAMED}),
    "the model twice": twice("model", first={"decoder": {"filename": "model.onnx", **NAMED}}),
    "run_options": put("model", "decoder", "run_options", value={"custom_ops_library": "evil.so"}),
    "a provider's library": put(
        "model", "decoder", "session_options", "provider_options", value=[{"QNN": {"backend_path": "evil.so"}}]
    ),
    "a provider's option": put(
        "model", "decoder", "session_options", "provider_options", value=[{"cuda": {"gpu_external_alloc": "1"}}]
    ),
    "a profile to write": put("model", "decoder", "session_options", "enable_profiling", value="written"),
    "a graph to write": put("model", "decoder", "session_options", "optimized_model_filepath", value="written.onnx"),
    "a session's entry": put("model", "decoder", "session_options", "ep.context_file_path", value="written"),
    "a graph elsewhere": put("model", "decoder", "filename", value="../../model.onnx"),
    "a printf format": put("model", "decoder", "inputs", "past_key_names", value="%s%n"),
    "an engine": put("engine", value={"dynamic_batching": {"block_size": 16}}),
    "a number too large": put("search", "max_length", value=1 << 40),
    "text for a number": put("model", "context_length", value="256"),
    "a bool for a number": put("model", "vocab_size", value=True),
}
ENTRANCES: dict[str, Callable[[Path], object]] = {
    "load": lambda folder: runtime.load(folder),
    "load without the library": lambda folder: runtime.load(folder, library=False),
    "generate": lambda folder: runtime.generate(folder, folders.PROMPT, 2),
    "link": runtime.link,
    "unlink": runtime.unlink,
    "Decoder": lambda folder: runtime.Decoder(folder),
    "end_tokens": lambda folder: runtime.end_tokens(folder),
    "bench": lambda folder: bench(folder, folder, BenchTiming(2, 1, 1), runtime="onnxruntime-genai"),
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("way", ["the decoder's library", "session_options twice"])
def test_plain_genai_runs_it(folder: Path, mark: Path, way: str) -> None:
    """The control: these folders are hostile."""
    (folder / CONFIG).write_text(RUNS[way](json.loads((folder / CONFIG).read_text())))
    code = "import sys, onnxruntime_genai as og; og.Model(sys.argv[1])"
    subprocess.run([sys.executable, "-P", "-c", code, str(folder)], env=os.environ, capture_output=True, timeout=120)
    assert mark.exists()


@pytest.mark.parametrize("way", RUNS)
def test_nothing_of_a_checkpoint_runs(
    folder: Path, mark: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / CONFIG).write_text(RUNS[way](json.loads((folder / CONFIG).read_text())))
    before = content(folder)
    for name, enter in ENTRANCES.items():
        with pytest.raises(ValueError, match=r"got .*\. ") as error:
            enter(folder.parent)
        assert "\n" not in str(error.value) and str(folder / CONFIG) in str(error.value), name
        assert not mark.exists() and content(folder) == before, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_library_of_our_name_is_not_taken(
    folder: Path, mark: Path, hostile_library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the model it is left alone, and named in the configuration it is refused: it is not the installed one."""
    shutil.copyfile(hostile_library, folder / LIBRARY)
    expected = list(runtime.generate(folders.sparse("gate"), folders.PROMPT, 4))
    assert list(runtime.generate(folder, folders.PROMPT, 4)) == expected and not mark.exists()
    (folder / CONFIG).write_text(
        put("model", "decoder", "session_options", "custom_ops_library", value=LIBRARY)(
            json.loads((folder / CONFIG).read_text())
        )
    )
    for function in (runtime.load, runtime.link):
        with pytest.raises(ValueError, match="must be"):
            function(folder)
    runtime.session(folder)
    assert not mark.exists()


def test_genai_reads_a_configuration_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """genai is given another folder with what was understood, which goes with the model."""
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    (folder / CONFIG).write_text("\n\n" + (folder / CONFIG).read_text().replace(" ", "  "))
    opened, seen = og.Config, []

    def config(path: str) -> og.Config:
        seen.append((Path(path), json.loads((Path(path) / CONFIG).read_text()), sorted(os.listdir(path))))
        return opened(path)

    monkeypatch.setattr(og, "Config", config)
    model = runtime.load(folder, options={"intra_op_num_threads": 1})
    ((path, given, names),) = seen
    assert path != folder and folder not in path.parents and LIBRARY not in names
    decoder = read_config(folder)["model"]["decoder"]
    assert given["model"]["decoder"] == decoder | {
        "session_options": decoder["session_options"] | {"intra_op_num_threads": 1, "custom_ops_library": LIBRARY}
    }
    assert og.Tokenizer(model).encode("a").size and path.exists()
    del model
    assert not path.exists()


def test_the_vocabulary_has_what_the_export_writes_and_no_path() -> None:
    """A field that names a file would be a way out; the graph's own name is the one exception, and stays in
    its folder.
    """
    read_json(folders.dense() / CONFIG, CONFIG)
    assert read_config(folders.dense()) == json.loads((folders.dense() / CONFIG).read_text())

    def names(fields: Any) -> set[str]:
        if isinstance(fields, list):
            return names(fields[0])
        return {
            name
            for key, value in fields.items()
            for name in ({key} | (names(value) if isinstance(value, dict | list) else set()))
        }

    known = {
        name
        for name in names(FIELDS)
        if any(word in name for word in ("path", "file", "library", "dir", "lib", "program"))
    }
    assert known == {"filename", "custom_ops_library"}
    for wrong in ("../model.onnx", "/model.onnx", "a/model.onnx", "", ".", "..", "C:model.onnx", "a\\b"):
        assert not FIELDS["model"]["decoder"]["filename"](wrong), wrong


@pytest.mark.parametrize("place", ["../outside.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*", "a/../../outside.bin", ""])
@pytest.mark.parametrize("where", ["an initialiser", "a constant", "a function"])
def test_weights_lie_beside_the_graph(tmp_path: Path, place: str, where: str) -> None:
    """A graph names the file of its weights, too; one name means an address in memory to onnxruntime."""
    folder = folders.copy(folders.sparse("gate"), tmp_path / "out" / "onnx")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    if where == "an initialiser":
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    else:
        node = onnx.helper.make_node(
            "Constant", [], ["unused"], value=onnx.numpy_helper.from_array(np.zeros(4, np.float32))
        )
        nodes = model.graph.node if where == "a constant" else model.functions[0].node
        nodes.append(node)
        tensor = nodes[-1].attribute[0].t
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="")
    next(entry for entry in tensor.external_data if entry.key == "location").value = place
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    for function in (runtime.session, runtime.load, runtime.link):
        with pytest.raises(ValueError, match="must name files inside its own folder") as error:
            function(folder)
        assert "\n" not in str(error.value)
