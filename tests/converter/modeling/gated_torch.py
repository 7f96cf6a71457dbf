"""What the export tests compare with: tiny models with their base graphs, and a gated torch forward written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsegate.converter.arch import load_arch
from sparsegate.converter.arch.site import Site
from sparsegate.converter.checkpoint.plan import Plan, Predictor, Residual, SitePlan, Threshold
from sparsegate.converter.checkpoint.source import open_source
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.modeling.gated import apply_plan, remove_plan
from sparsegate.converter.onnx_export.base_graph import onnx_logits
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.onnx_export.float_graph import float_graph

BOUND = 1e-4
D, N, R = 64, 176, 8
TOKENS = np.random.default_rng(0).integers(3, 290, (2, 40))  # longer than the sliding windows of 24


@dataclass
class Tiny:
    """A tiny model: its checkpoint, its base graph, the torch model."""

    model_type: str
    checkpoint: Path
    base: Path
    model: torch.nn.Module

    @property
    def arch(self):
        return load_arch(self.model_type)

    @property
    def config(self):
        return self.model.config

    def export(
        self, plan: Plan, out: Path, precision: str = "fp32", base: Path | None = None, target: str = "cpu"
    ) -> Path:
        """The ONNX folder of this model with a plan."""
        export(put_plan(self.checkpoint, plan, out), out, precision, target, base or self.base)
        return out


def put_plan(checkpoint: Path, plan: Plan, beside: Path) -> Path:
    """A folder named after `beside` with a model's checkpoint that holds a plan."""
    folder = beside.with_name(f"{beside.name}.checkpoint")
    folder.mkdir(exist_ok=True)
    write_checkpoint(open_source(checkpoint), plan, folder)
    return folder


def open_tiny(model_type: str, checkpoint: Path, base: Path) -> Tiny:
    return Tiny(
        model_type,
        checkpoint,
        float_graph(open_source(checkpoint), base),
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(),
    )


# The gated forward, by hand


def act(model_type: str, value: Tensor) -> Tensor:
    return F.gelu(value, approximate="tanh") if model_type in ("gemma2", "phi") else F.silu(value)


def parts(mlp: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, torch.nn.Module]:
    """(What the activation is applied to, up or None, the down projection) of any of the nine MLPs."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        return gate, up, mlp.down_proj
    if hasattr(mlp, "gate_proj"):
        return mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    return mlp.fc1(x), None, mlp.fc2


def widest_gap(scores: Tensor, low: float, high: float) -> Tensor:
    """Thresholds [n] in the middle of the widest gap between the `low` and `high` quantiles of scores [T, n]."""
    ranked = scores.sort(dim=0).values
    middle = ranked[int(low * len(ranked)) : int(high * len(ranked))]
    widest = middle.diff(dim=0).argmax(dim=0, keepdim=True)
    return (middle.gather(0, widest) + middle.gather(0, widest + 1))[0] / 2


@dataclass
class Gate:
    """Replaces an MLP's forward. The first call sets a missing tau: per neuron, in the widest gap of its middle scores,
    so that about half are kept.
    """

    model_type: str
    mlp: torch.nn.Module
    predictor: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    fc1: Tensor | None = None  # what the residual reads where there is no predictor
    tau: Tensor | None = None
    z: Tensor = field(default_factory=lambda: torch.empty(0))
    keep: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, x: Tensor) -> Tensor:
        gate, up, down = parts(self.mlp, x)
        activated = act(self.model_type, gate)
        fc1 = self.predictor[0] if self.predictor else self.fc1
        hidden = x if fc1 is None else torch.relu(x @ fc1.T)
        scores = hidden @ self.predictor[1].T if self.predictor else activated.abs()
        if self.tau is None:
            self.tau = widest_gap(scores.reshape(-1, N), 1 / 3, 2 / 3)
        self.keep = scores > self.tau
        self.z = activated if up is None else activated * up
        y = down(torch.where(self.keep, self.z, 0.0))
        return y if self.residual is None else y + hidden @ self.residual

    @property
    def entry(self) -> SitePlan:
        assert self.tau is not None
        residual = None if self.residual is None else Residual(self.residual, self.fc1)
        if self.predictor is None:
            return SitePlan(gate=Threshold("gate", self.tau, 0.5), residual=residual)
        return SitePlan(gate=Predictor(*self.predictor, self.tau, 0.5), residual=residual)


class Gated:
    """A torch model with Gate in every layer, calibrated on TOKENS; `logits` runs it."""

    def __init__(self, tiny: Tiny, kind: str, residual: bool = False):
        generator = torch.Generator().manual_seed(1)
        self.tiny, self.gates = tiny, []
        for layer in tiny.model.model.layers:
            predictor = (
                (torch.randn(R, D, generator=generator) / D**0.5, torch.randn(N, R, generator=generator))
                if kind == "predictor"
                else None
            )
            extra = torch.randn(R, D, generator=generator) / R**0.5 if residual else None
            fc1 = torch.randn(R, D, generator=generator) / D**0.5 if residual and predictor is None else None
            self.gates.append(Gate(tiny.model_type, layer.mlp, predictor, extra, fc1))
        self.dense_difference = np.abs(
            self.logits() - tiny.model(torch.from_numpy(TOKENS)).logits.detach().numpy()
        ).max()

    @torch.no_grad()
    def logits(self, tokens: np.ndarray = TOKENS, skip: int | None = None) -> np.ndarray:
        """Logits [N, S, V]; `skip` is a neuron of the last layer that is left out besides."""
        layers = self.tiny.model.model.layers
        original = [layer.mlp.forward for layer in layers]
        gates = list(self.gates)
        if skip is not None:
            gates[-1] = replace(gates[-1], tau=gates[-1].tau.index_fill(0, torch.tensor(skip), float("inf")))
        try:
            for layer, gate in zip(layers, gates, strict=True):
                layer.mlp.forward = gate
            return self.tiny.model(torch.from_numpy(tokens)).logits.numpy()
        finally:
            for layer, forward in zip(layers, original, strict=True):
                layer.mlp.forward = forward

    def active_neuron(self) -> int:
        """A neuron of the last layer that is kept for some tokens: the median one by its strongest activation."""
        strongest = torch.where(self.gates[-1].keep, self.gates[-1].z.abs(), 0.0).amax(dim=(0, 1))
        kept = [int(i) for i in strongest.argsort() if strongest[i] > 0]
        return kept[len(kept) // 2]

    @property
    def plan(self) -> Plan:
        return {Site(index): gate.entry for index, gate in enumerate(self.gates)}


# Linear sites, over the torch executor


@torch.no_grad()
def seen(model: torch.nn.Module, name: str) -> Tensor:
    """What the module `name` reads on TOKENS: rows [T, d_in]."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        model(torch.from_numpy(TOKENS))
    finally:
        hook.remove()
    return found[0].flatten(0, 1)


def linear_plan(tiny: Tiny, names: dict[int, list[tuple[str, ...]]], gated: tuple[int, ...] = ()) -> Plan:
    """Thresholds for a layer's linears, set one after the other in the gated model, each in the widest gap: one value
    for all channels as in TEAL, divided by the channels' norms as in WINA for o_proj and down_proj. Linears of one
    tuple share their thresholds; layers in `gated` get a threshold on the gate too.
    """
    plan: Plan = {}
    arch, prefix = tiny.arch, tiny.arch.block_prefix
    for layer, groups in names.items():
        for number, group in enumerate(groups):
            module = prefix(layer) + arch.linears()[group[0]][0]
            with gating(tiny, plan) as model:
                size = seen(model, module).abs()
            norm = torch.ones(size.shape[1])
            if group[0] in ("o_proj", "down_proj"):
                norm = tiny.model.get_submodule(module).weight.detach().norm(dim=0)
            # the quantiles differ, so that no two linears have the same threshold by chance
            tau = widest_gap((size * norm).reshape(-1, 1), 0.3 + 0.05 * number, 0.4 + 0.05 * number) / norm
            plan |= {Site(layer, kind=f"linear:{name}"): SitePlan(gate=Threshold("input", tau, 0.6)) for name in group}
        if layer in gated:
            with gating(tiny, plan) as model:
                mlp = model.get_submodule(arch.ffn_module(layer))
                scores = act(tiny.model_type, parts(mlp, seen(model, arch.ffn_module(layer)))[0]).detach().abs()
            plan[Site(layer)] = SitePlan(gate=Threshold("gate", widest_gap(scores, 1 / 3, 2 / 3), 0.5))
    return plan


@contextmanager
def gating(tiny: Tiny, plan: Plan) -> Iterator[torch.nn.Module]:
    """The torch model with a plan applied."""
    try:
        yield apply_plan(tiny.model, plan, tiny.arch, tiny.arch.activation(tiny.config))
    finally:
        remove_plan(tiny.model)


@torch.no_grad()
def sparse_logits(tiny: Tiny, plan: Plan, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with gating(tiny, plan) as model:
        return model(torch.from_numpy(tokens)).logits.numpy()


def library() -> str | None:
    """The native library, where it is installed."""
    try:
        from sparsegate.runtime_onnx.library import library_path

        return str(library_path())
    except (ImportError, ValueError):
        return None


def run(folder: Path, tokens: np.ndarray = TOKENS, native: str | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if native:
        options.register_custom_ops_library(native)
    return onnx_logits(
        onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"]), tokens
    )


def generate(folder: Path, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy tokens from onnxruntime-genai, up to `count` or the end token."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt.tolist())
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


# Base graph and regions
