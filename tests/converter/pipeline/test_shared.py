"""What the steps of a conversion share: models in memory, float graphs by what they are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_recipe import small_recipe
from transformers import AutoModelForCausalLM

from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.onnx_export.float_graph import graph_header
from sparsegate.converter.pipeline.conversion import Conversion
from sparsegate.converter.pipeline.convert import convert
from sparsegate.converter.pipeline.graphs import Graphs, graph_of
from sparsegate.converter.pipeline.recipe import read_recipe
from sparsegate.converter.pipeline.texts import make_texts


@pytest.mark.usefixtures("no_speed")
def test_a_conversion_reads_the_whole_model_four_times(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder; the comparison of its graph with torch, and of that in integers; plans and their quality; and the
    checkpoint, whose executors must agree.
    """
    read: list[Path] = []
    plain = AutoModelForCausalLM.from_pretrained

    def counted(folder: Any, *given: Any, **named: Any) -> Any:
        read.append(Path(folder))
        return plain(folder, *given, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    model = tiny_model("llama")
    convert(recipe=small_recipe(model, tmp_path, export={"precision": "int8"}), output=tmp_path / "out")
    assert len(read) == 4 and read.count(model) >= 2 and read[-1].parent.name == "checkpoint"


def test_edited_weights_have_a_float_graph_of_their_own(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny_model("llama"))
    recipe = read_recipe(small_recipe(source.folder, tmp_path))
    conversion = Conversion(source, make_texts(source, recipe), recipe, tmp_path / "work")
    base = tmp_path / "work" / "base"
    base.mkdir(parents=True)
    (base / "header.json").write_text(graph_header(source).model_dump_json())
    edited = Path(shutil.copytree(source.folder, tmp_path / "edited"))
    tensors = load_file(edited / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, edited / "model.safetensors", {"format": "pt"})
    graphs = Graphs(base, base)
    assert graph_of(conversion, graphs, source.folder) == base
    other = graph_of(conversion, graphs, edited)
    assert other.parent == tmp_path / "work" / "bases" and other == graph_of(conversion, graphs, edited)
