"""The executor's choice, sessions and the KV-cache loop: kernel, body and a float64 reference agree; everything else
gets one line.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_folders as folders
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import sparsegate.runtime_onnx as runtime
from sparsegate.runtime_onnx.library import DENSE, VARIANTS, has_cuda, supports, variants
from sparsegate.runtime_onnx.ops.gated_mlp import Variant, active, reference
from sparsegate.runtime_onnx.session import choose

IDS = list(np.random.default_rng(2).integers(2, folders.VOCABULARY, 40))
FUTURE = "GatedMLP.1/swish9/gate/float/x=float32,w=float32,p=float32/w_gate+w_up+w_down+tau"


def teacher(folder: Path) -> tuple[np.ndarray, float]:
    """Logits [T, vocabulary] of the torch model whose MLPs are the op's float64 reference on the folder's own tensors,
    and the mean share of kept neurons.
    """
    import torch
    from transformers import AutoModelForCausalLM

    file = onnx.load(str(folder / "model.onnx"))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    variant = Variant.parse(variants(folder)[0])
    model = AutoModelForCausalLM.from_pretrained(folders.torch_folder())
    shares = []

    def mlp(layer: int, x: torch.Tensor) -> torch.Tensor:
        roles = {role: tensors[f"layers.{layer}.ffn.{role}"] for role in variant.inputs}
        shares.append(active(variant, x[0].numpy(), roles).mean())
        return torch.from_numpy(reference(variant, x.numpy(), roles)).to(x.dtype)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.forward = lambda x, number=number: mlp(number, x)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy(), float(np.mean(shares))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference of logits."""
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("score", ["gate", "predictor"])
def test_kernel_body_and_reference_agree(score: str) -> None:
    """Prefill in one call and token by token give the reference's logits either way; about half of the neurons is
    dropped, and that matters.
    """
    folder = folders.sparse(score)
    expected, share = teacher(folder)
    assert 0.3 < share < 0.7
    for library in (True, False):
        decoder = runtime.Decoder(folder, library=library)
        assert difference(decoder(IDS), expected) < 1e-4
        assert decoder.length == len(IDS)
        decoder.reset()
        assert difference(np.concatenate([decoder([token]) for token in IDS]), expected) < 1e-4
    assert difference(runtime.Decoder(folders.dense())(IDS), expected) > 0.1


def test_one_neuron_more_is_seen(tmp_path: Path) -> None:
    """Control: the bound of 1e-4 notices a single neuron that is dropped from one layer."""
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    expected = runtime.Decoder(folder, library=False)(IDS)
    model = onnx.load(str(folder / "model.onnx"))
    tau = next(tensor for tensor in model.graph.initializer if tensor.name == "layers.1.ffn.tau")
    values = numpy_helper.to_array(tau).copy()
    values[5] = np.inf
    tau.CopyFrom(numpy_helper.from_array(values, tau.name))
    onnx.save(model, str(folder / "model.onnx"))
    for library in (True, False):
        assert difference(runtime.Decoder(folder, library=library)(IDS), expected) > 1e-4


@pytest.mark.parametrize(("library", "op_stays"), [(True, True), (None, True), (False, False)])
def test_the_op_stays_only_with_the_library(
    tmp_path: Path, library: bool | None, op_stays: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The graph that onnxruntime runs holds GatedMLP nodes with the library and standard ops without; one line says
    which.
    """
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    with caplog.at_level(logging.INFO, logger="sparsegate"):
        runtime.session(folders.sparse("gate"), session_options=options, library=library)
    names = [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx"), load_external_data=False).graph.node]
    assert names.count("GatedMLP") == (folders.LAYERS if op_stays else 0)
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO
    assert ("native kernel" if op_stays else "standard ONNX ops") in caplog.text


def test_executor_reads_no_weights(tmp_path: Path) -> None:
    """The choice needs model.onnx alone; a checkpoint folder, an ONNX folder and the file mean the same."""
    (tmp_path / "onnx").mkdir()
    file = tmp_path / "onnx" / "model.onnx"
    file.write_bytes((folders.sparse("predictor") / "model.onnx").read_bytes())
    for path in (tmp_path, str(tmp_path / "onnx"), file):
        assert runtime.executor(path).kernel, runtime.executor(path).reason
    assert variants(file) == [
        "GatedMLP.1/silu/predictor/float/x=float32,w=float32,p=float32/w_gate+w_up+w_down+tau+p1+p2"
    ]
    assert runtime.executor(folders.dense()) == runtime.Executor(False, DENSE)


def test_unknown_variant_runs_the_body(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file from a newer sparsegate: nothing is registered, a warning names the variant, the result is right, and
    demanding the library is an error.
    """
    expected = runtime.Decoder(folders.sparse("gate"), library=False)(IDS)
    folder = folders.copy(folders.sparse("gate"), tmp_path / "onnx")
    folders.rename_variant(folder, FUTURE)
    caplog.clear()
    found = runtime.Decoder(folder)(IDS)
    assert difference(found, expected) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and FUTURE in caplog.text
    assert not supports(FUTURE) and not supports(variants(folders.sparse("gate"))[0], "TensorrtExecutionProvider")
    with pytest.raises(ValueError, match="must support the model"):
        runtime.session(folder, library=True)


@pytest.mark.parametrize("text", ["not json", "{}", "[1]", "[]", '["a", "b"]'])
def test_wrong_metadata_runs_the_body(tmp_path: Path, text: str) -> None:
    """Metadata that does not name each variant of the file is no ground to register the library."""
    model = onnx.load(str(folders.sparse("gate") / "model.onnx"), load_external_data=False)
    assert model.metadata_props[0].key == VARIANTS
    model.metadata_props[0].value = text
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    chosen = runtime.executor(tmp_path)
    assert not chosen.kernel and "must name the 1 op variants" in chosen.reason


def test_missing_library_runs_the_body(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the library, or with a file that is none, the body runs; library_path says what is missing."""
    expected = runtime.Decoder(folders.sparse("gate"), library=False)([5, 6, 7])
    monkeypatch.setattr(runtime, "__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"libsparsegate_onnx\.so must lie in .*, got none .* pip install"):
        runtime.library_path()
    assert not runtime.executor(folders.sparse("gate")).kernel
    (tmp_path / "libsparsegate_onnx.so").write_bytes(b"no shared object")
    chosen = runtime.executor(folders.sparse("gate"))
    assert not chosen.kernel and "cannot be opened" in chosen.reason
    assert (runtime.Decoder(folders.sparse("gate"))([5, 6, 7]) == expected).all()


def test_options_hold_the_library_once() -> None:
    """The same SessionOptions serve two sparse models; a model that must run without the library refuses them."""
    options = ort.SessionOptions()
    for score in ("gate", "predictor"):
        runtime.session(folders.sparse(score), session_options=options)
    with pytest.raises(ValueError, match="session_options must be fresh"):
        runtime.session(folders.sparse("gate"), session_options=options, library=False)


def test_every_provider_must_be_supported() -> None:
    """CUDA without a CUDA kernel in the library means the body, also when the CPU could; other providers do
    not count.
    """
    folder = folders.sparse("gate")
    name = variants(folder)[0]
    both = supports(name, "CUDAExecutionProvider")
    chosen = choose(folder, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert chosen.kernel == both
    if not has_cuda():
        assert "was built without CUDA kernels" in chosen.reason and "cmake.define.SPARSEGATE_CUDA=ON" in chosen.reason
    assert choose(folder, ["TensorrtExecutionProvider", "CPUExecutionProvider"]).kernel


def test_bad_paths(tmp_path: Path) -> None:
    """One line each: nothing there, a folder without a model, another file, bytes that are no model, no
    genai_config.json.
    """
    for path, found in (
        (tmp_path / "none", "nothing there"),
        (tmp_path, "a folder without"),
        (Path(__file__), "another kind of file"),
    ):
        with pytest.raises(ValueError, match=f"must be an ONNX folder.*{found}"):
            runtime.session(path)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xfe garbage")
    with pytest.raises(ValueError, match="must be an ONNX model"):
        runtime.executor(tmp_path)
    with pytest.raises(ValueError, match="must have a genai_config.json"):
        runtime.Decoder(tmp_path)


def test_links_into_a_cache_are_explained(tmp_path: Path) -> None:
    """A model.onnx that is a link, with its data in another real folder, as in the Hub's cache: the error names the way
    out.
    """
    source = folders.sparse("gate")
    (tmp_path / "snapshot").mkdir()
    for number, name in enumerate(("model.onnx", "model.onnx.data")):
        (tmp_path / f"blob{number}").mkdir()
        blob = tmp_path / f"blob{number}" / "content"
        blob.write_bytes((source / name).read_bytes())
        (tmp_path / "snapshot" / name).symlink_to(blob)
    with pytest.raises(ValueError, match=r"must be a real file .*local_dir"):
        runtime.session(tmp_path / "snapshot")


def test_missing_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extras."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime must be installed.*sparsegate\[cpu\].*sparsegate\[gpu\]"):
        runtime.session(folders.sparse("gate"))
