"""Models with swapped activations: torch, the op's body and its kernel, in ONNX Runtime and onnxruntime-genai, on
checkpoints that were written and read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from gated_torch import BOUND, TOKENS, library, put_plan, run, widest_gap
from torch import Tensor

from sparsegate.converter.arch import Arch, load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Exact, Plan, Predictor, SitePlan, Swap, Threshold, uniform_tau
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.evaluation.speed.run import dense_beside
from sparsegate.converter.modeling.gated import apply_plan, load, load_dense, recording, remove_plan
from sparsegate.converter.onnx_export.base_graph import check_base, load_stock, onnx_logits
from sparsegate.converter.onnx_export.emit import emissions
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.onnx_export.float_graph import float_graph
from sparsegate.converter.onnx_export.gated_graph import gate_graph
from sparsegate.converter.onnx_export.matmul_nbits import open_float
from sparsegate.converter.onnx_export.precision import PRECISIONS
from sparsegate.converter.onnx_export.rounded import round_model
from sparsegate.runtime_onnx import library as native_library
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.generate import load as load_genai
from sparsegate.runtime_onnx.ops.gated_mlp import Variant

D, N, R = 64, 176, 12
EACH = ("drelu", "relu", "relu2", "fatrelu(0.01)", "shifted_relu(0.01)")
PER_LAYER = ("drelu", "fatrelu(0.01)")
CASES = [("llama", (activation,) * 2) for activation in EACH] + [
    ("llama", PER_LAYER),
    ("phi", ("relu", "relu")),
    ("phi3", ("drelu", "drelu")),
]


@dataclass(frozen=True)
class Swapped:
    """A tiny model with swapped activations: its exact checkpoint, its base graph, and the plans that keep by gate and
    predictor.
    """

    checkpoint: Path
    base: Path
    arch: Arch
    plans: dict[str, Plan]

    @property
    def config(self) -> Any:
        return open_source(self.checkpoint).config

    def export(
        self, kind: str, out: Path, precision: str = "fp32", base: Path | None = None, target: str = "cpu"
    ) -> Path:
        export(put_plan(self.checkpoint, self.plans[kind], out), out, precision, target, base or self.base)
        return out


@torch.no_grad()
def inputs(model: Any, name: str) -> Tensor:
    """What the module `name` reads on TOKENS: [T, d]."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    model(torch.from_numpy(TOKENS))
    hook.remove()
    return found[0].flatten(0, 1)


def predictors(model: Any, arch: Arch, exact: Plan) -> Plan:
    """Random predictors, layer after layer in the gated model, whose thresholds lie in the widest gap and keep about
    half.
    """
    generator = torch.Generator().manual_seed(1)
    plan: Plan = {}
    for site, entry in exact.items():
        x = inputs(apply_plan(model, plan, arch, arch.activation(model.config)), arch.ffn_module(site.layer))
        remove_plan(model)
        fc1, fc2 = torch.randn(R, D, generator=generator) / D**0.5, torch.randn(N, R, generator=generator)
        tau = widest_gap(torch.relu(x @ fc1.T) @ fc2.T, 0.45, 0.65)
        plan[site] = replace(entry, gate=Predictor(fc1, fc2, tau, 0.5))
    return plan


@pytest.fixture(scope="module")
def swapped(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Swapped]:
    root = tmp_path_factory.mktemp("swapped")

    bases: dict[str, Path] = {}  # of one type: the weights are the same, and so is the base's activation

    @cache
    def make(model_type: str, activations: tuple[str, ...]) -> Swapped:
        arch = load_arch(model_type)
        exact: Plan = {
            Site(layer): SitePlan((Swap(activation),), Exact(0.3, 0.5)) for layer, activation in enumerate(activations)
        }
        checkpoint = root / f"{model_type}_{len(list(root.iterdir()))}"
        checkpoint.mkdir()
        write_checkpoint(open_source(tiny_model(model_type)), exact, checkpoint)
        if model_type not in bases:
            bases[model_type] = float_graph(open_source(checkpoint), root / f"{model_type}_base")
        nothing = Threshold("gate", uniform_tau(0.0, N), 0.5)
        gate: Plan = {site: replace(entry, gate=nothing) for site, entry in exact.items()}
        return Swapped(
            checkpoint,
            bases[model_type],
            arch,
            {"exact": exact, "gate": gate, "predictor": predictors(load_dense(checkpoint), arch, exact)},
        )

    return make


def with_plan(one: Swapped, kind: str, folder: Path) -> Any:
    """The torch model of a checkpoint that holds one of the plans, written on top of the exact one and read again."""
    if kind == "exact":
        return load(one.checkpoint)
    folder.mkdir()
    write_checkpoint(open_source(one.checkpoint), one.plans[kind], folder)
    return load(folder)


@torch.no_grad()
def torch_logits(model: Any) -> np.ndarray:
    return model(torch.from_numpy(TOKENS)).logits.numpy()


def compared(model: Any) -> np.ndarray:
    """bool [N, S]: positions without a score near a threshold, or a gate near fatrelu's jump, at them or before."""
    with recording(model) as record:
        torch_logits(model)
    near = torch.zeros(TOKENS.shape, dtype=torch.bool)
    for flags in record.near.values():
        near |= flags.view(TOKENS.shape)
    return (near.cumsum(1) == 0).numpy()


def genai_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [S, V] of one row, token by token."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = load_genai(folder)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + 1)
    generator = genai.Generator(model, parameters)
    found = []
    for token in tokens:
        generator.append_tokens(np.array([token], np.int32))
        found.append(np.array(generator.get_logits(), np.float32)[0, -1])
    return np.stack(found)


@pytest.mark.parametrize("kind", ["exact", "gate", "predictor"])
@pytest.mark.parametrize(("model_type", "activations"), CASES)
def test_executors_agree(
    swapped: Callable[..., Swapped], tmp_path: Path, model_type: str, activations: tuple[str, ...], kind: str
) -> None:
    one = swapped(model_type, activations)
    model = with_plan(one, kind, tmp_path / "checkpoint")
    expected, good = torch_logits(model), compared(model)
    assert good.mean() >= 0.8
    out = one.export(kind, tmp_path / "onnx")
    names = [Variant.parse(name) for name in native_library.variants(out)]
    assert sorted({variant.activation for variant in names}) == sorted(set(activations)) and {
        variant.score for variant in names
    } == {kind}
    body, kernel = run(out), run(out, native=library())
    assert library() and native_library.executor(out).kernel
    assert np.abs(body - expected)[good].max() < BOUND and np.abs(kernel - expected)[good].max() < BOUND
    row = genai_logits(out, TOKENS[0])
    assert np.abs(row - expected[0])[good[0]].max() < BOUND
    dropped = torch_logits(without_one(model, one))
    for found in (body, kernel):
        assert np.abs(found - dropped)[good].max() > 10 * BOUND
    assert np.abs(row - dropped[0])[good[0]].max() > 10 * BOUND
    assert np.abs(kernel - torch_logits(load_stock(one.checkpoint))).max() > 100 * BOUND, (
        "the base's activation is another function"
    )


@torch.no_grad()
def without_one(model: Any, one: Swapped) -> Any:
    """The model without the neuron of the last layer whose weight by its activation is the median of the upper half."""
    module = model.get_submodule(one.arch.ffn_module(1))
    down = getattr(module, one.arch.ffn.down)
    z = inputs(model, f"{one.arch.ffn_module(1)}.{one.arch.ffn.down}").abs().amax(0)
    down.weight[:, int(z.argsort()[N * 3 // 4])] = 0
    return model


@pytest.mark.parametrize(("model_type", "activations"), CASES)
def test_exact_and_gate_first_are_one(
    swapped: Callable[..., Swapped], tmp_path: Path, model_type: str, activations: tuple[str, ...]
) -> None:
    """Bit for bit, in torch and in the kernel."""
    one = swapped(model_type, activations)
    model = with_plan(one, "gate", tmp_path / "checkpoint")
    assert np.array_equal(torch_logits(model), torch_logits(load(one.checkpoint)))
    exact, gate = (run(one.export(kind, tmp_path / kind), native=library()) for kind in ("exact", "gate"))
    assert np.array_equal(exact, gate)
    model = load(one.checkpoint)
    with recording(model) as record:
        torch_logits(model)
    share, opened = record.density()[Site(1)], record.opened_share()[Site(1)]
    assert 0.1 < share <= opened < 0.9
    assert (share < 0.75 * opened) == (activations[1] == "drelu")


@pytest.mark.parametrize("kind", ["exact", "predictor"])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize(
    ("model_type", "activations"), [("llama", ("drelu", "drelu")), ("llama", PER_LAYER), ("phi", ("relu", "relu"))]
)
def test_body_is_torch_with_the_rounded_weights(
    swapped: Callable[..., Swapped],
    tmp_path: Path,
    model_type: str,
    activations: tuple[str, ...],
    precision: str,
    kind: str,
) -> None:
    one = swapped(model_type, activations)
    out = one.export(kind, tmp_path / "onnx", precision)
    plain = load_dense(one.checkpoint)
    unrounded = torch_logits(apply_plan(plain, one.plans[kind], one.arch, one.arch.activation(plain.config)))
    model = round_model(plain, one.plans[kind], one.arch, precision)
    expected, good = torch_logits(model), compared(model)
    assert good.mean() >= 0.8
    got = onnx_logits(open_float(out), TOKENS)
    assert np.abs(got - expected)[good].max() < BOUND
    assert np.abs(got - unrounded)[good].max() > 5 * BOUND


@pytest.mark.parametrize(
    ("precision", "target"),
    [*((name, "cpu") for name in PRECISIONS), *((name, "cuda") for name in PRECISIONS if name != "fp32")],
)
def test_every_precision_has_the_op(
    swapped: Callable[..., Swapped], tmp_path: Path, precision: str, target: str
) -> None:
    one, form = swapped("llama", PER_LAYER), PRECISIONS[precision]
    for kind in one.plans:  # a graph for CUDA is built by the first
        out = one.export(kind, tmp_path / kind, precision, tmp_path / "base" if target == "cuda" else None, target)
        names = native_library.variants(out)
        found = [Variant.parse(name) for name in names]
        assert [(v.activation, v.score, v.weights, v.w) for v in found] == [
            (a, kind, form.weights, form.w) for a in PER_LAYER
        ]
        assert all(native_library.supports(name) for name in names)
        proto = onnx.load(out / "model.onnx", load_external_data=False)
        assert [function.overload for function in proto.functions if function.name == "GatedMLP"] == ["v0", "v1"]


def test_base_graph_is_checked_against_the_stock_class(swapped: Callable[..., Swapped]) -> None:
    one = swapped("llama", ("drelu", "drelu"))
    stock = load_stock(one.checkpoint)
    assert type(stock).__name__ == "LlamaForCausalLM" and check_base(one.base, stock, TOKENS) < BOUND
    with pytest.raises(InputError, match="must give torch's logits"):
        check_base(one.base, load_dense(one.checkpoint), TOKENS)


def test_a_stock_folder_is_its_own_stock(tiny_model: Callable[[str], Path]) -> None:
    assert np.array_equal(torch_logits(load_stock(tiny_model("llama"))), torch_logits(load_dense(tiny_model("llama"))))


def test_both_signs_need_a_gate(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny_model("phi"))
    graph = ir.load(float_graph(source, tmp_path / "base") / "model.onnx")
    emitted = emissions({Site(0): SitePlan((Swap("drelu"),), Exact())}, source.arch, source.config)
    with pytest.raises(InputError, match=r"layers.0.ffn, got: activation must not be drelu without w_gate"):
        gate_graph(graph, emitted, source.arch, source.config, "fp32")


def test_bench_stands_it_beside_its_base(swapped: Callable[..., Swapped], tmp_path: Path) -> None:
    """The dense graph of a swapped checkpoint: no op, the base's activation, so what the dense source costs."""
    one = swapped("llama", ("drelu", "drelu"))
    checkpoint = shutil.copytree(one.checkpoint, tmp_path / "checkpoint")
    one.export("exact", checkpoint / "onnx")
    dense = dense_beside(checkpoint, tmp_path)
    assert native_library.variants(dense) == []
    assert np.abs(run(dense) - torch_logits(load_stock(checkpoint))).max() < BOUND
