"""Models of real sizes and random weights, dense and with predictors whose thresholds force a density, or with gates
that biases open by force: speed without weights.

1. The weights are normal with variance 1 / inputs, so that activations stay of one size.
2. A predictor is random too. Its thresholds are quantiles, per neuron, of its scores on what the random model itself
   feeds its MLPs, so about the asked share is kept and other neurons for every token.
3. With a ReLU activation the sparse graphs' gates, and dReLU's ups, have biases (8 bytes a neuron, counted), quantiles
   likewise. So the shares of open gates and of products that are not zero are the asked ones. The dense graph has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ....runtime_onnx.bench.graphs import set_density, set_opening
from ...arch import Arch, load_arch
from ...arch.site import Site
from ...checkpoint.plan import Exact, Plan, Predictor, SitePlan, Swap
from ...checkpoint.stage import atomic_folder, write_tensors
from ...modeling.taps import ffn_inputs
from ...onnx_export.base_graph import MODEL, build_base
from ...onnx_export.emit import emissions
from ...onnx_export.gated_graph import export_dense, gate_graph, save_graph
from ...onnx_export.precision import PRECISIONS
from ...onnx_export.product import find_product
from .shapes import Shape

SEED = 11
SETTLING = (5, 96)
"""Rows and tokens on which a finished graph's thresholds are set again: rows about as long as what is timed, as a
random model's states drift with position.
"""
CALIBRATION = (5, 96)
"""Rows and tokens of the random text that thresholds are taken from."""


def make_checkpoint(shape: Shape, folder: Path, layers: int | None = None) -> Path:
    """Writes a Hugging Face folder with random bfloat16 weights, one file per block, and a tokenizer of bytes; returns
    `folder`. Holds one block at a time.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.for_model(shape.model_type, **shape.config(layers), dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, do_sample=False).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    prefix = load_arch(shape.model_type).block.partition("{layer}")[0]
    files: dict[str, dict[str, Tensor]] = {}
    for name, value in model.named_parameters():  # tied weights come once
        block = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else name
        files.setdefault(block, {})[name] = value
    generator, index, total = torch.Generator().manual_seed(SEED), {}, 0
    for number, entries in enumerate(files.values()):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        made = {name: _random(name, value, generator) for name, value in entries.items()}
        write_tensors(folder / file, made, {"format": "pt"})
        index |= dict.fromkeys(made, file)
        total += sum(value.nbytes for value in made.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8"
    )
    return folder


def _random(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if value.dim() < 2:
        return (
            torch.zeros(value.shape, dtype=torch.bfloat16)
            if name.endswith("bias")
            else torch.ones(value.shape, dtype=torch.bfloat16)
        )
    return (torch.randn(value.shape, generator=generator) / value.shape[1] ** 0.5).bfloat16()


def _tokenizer() -> Any:
    """A tokenizer of single bytes: nothing here is ever turned into text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@torch.no_grad()
def mlp_inputs(folder: Path, arch: Arch, config: Any) -> dict[Site, Tensor]:
    """What a checkpoint feeds its MLPs on random tokens: x [T, d] by site. The model is held in bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
    tokens = torch.randint(
        2, arch.size(config, "vocab"), CALIBRATION, generator=torch.Generator().manual_seed(SEED + 1)
    )
    with ffn_inputs(model, arch, arch.sites(config)) as inputs:
        model.base_model(tokens)
    return {site: x.float().flatten(0, -2) for site, (x,) in inputs.items()}


def random_plan(inputs: dict[Site, Tensor], neurons: int, rank: int, density: float) -> Plan:
    """A predictor of this rank at every site that keeps about `density` of its neurons on inputs like these."""
    plan: Plan = {}
    for number, (site, x) in enumerate(inputs.items()):
        generator = torch.Generator().manual_seed(SEED + 2 + number)
        fc1 = torch.randn(rank, x.shape[1], generator=generator) / x.shape[1] ** 0.5
        fc2 = torch.randn(neurons, rank, generator=generator) / rank**0.5
        fc2 -= fc2.mean(
            1, keepdim=True
        )  # relu(fc1 x) has a mean: without this the selections of two tokens would overlap
        ranked = (torch.relu(x @ fc1.T) @ fc2.T).sort(0).values
        cut = min(round((1 - density) * len(ranked)), len(ranked) - 1)
        tau = (ranked[cut - 1] + ranked[cut]) / 2 if cut else torch.full((neurons,), -1e30)
        plan[site] = SitePlan(gate=Predictor(fc1, fc2, tau, density))
    return plan


def relu_plan(plan: Plan, activation: str, score: str) -> Plan:
    """The plan of the same sites with an activation that has zeros, kept exactly or by the plan's predictors."""
    swap = (Swap(activation),)
    return {site: SitePlan(swap, entry.gate if score == "predictor" else Exact()) for site, entry in plan.items()}


def add_biases(model: ir.Model, arch: Arch, config: Any) -> None:
    """Gives every gate and up product of a base graph a bias of zeros, where it has none."""
    n = arch.size(config, "units")
    for site in arch.sites(config):
        for role in ("gate", "up"):
            name = arch.ffn.onnx[role].format(layer=site.layer)
            product = find_product(model.graph, site.layer, name, (arch.size(config, "hidden"), n))
            if product.bias is not None:
                continue
            bias = ir.Value(name=f"{name}.bias", shape=ir.Shape([n]), type=ir.TensorType(ir.DataType.FLOAT))
            bias.const_value = ir.tensor(np.zeros(n, np.float32), name=bias.name)
            model.graph.register_initializer(bias)
            added = ir.Value(name=f"{name}.biased", shape=product.out.shape, type=product.out.type)
            ir.convenience.replace_all_uses_with(product.out, added)
            node = ir.Node(
                "", "Add", [product.out, bias], outputs=[added], name=f"/model/layers.{site.layer}/mlp/{role}_proj/Add"
            )
            model.graph.insert_after(product.nodes[-1], node)


def default_rank(shape: Shape) -> int:
    """A multiple of 32 at a sixteenth of the hidden size, at least 32: the size at which a trained predictor takes a
    few per cent of the MLP's bytes.
    """
    return max(32, shape.hidden // 16 // 32 * 32)


def build_sparse(
    base: Path, plan: Plan, arch: Arch, config: Any, out: Path, precision: str, opened: float | None = None
) -> None:
    """Writes the sparse ONNX folder of a plan; `base` is the fp32 graph. The folder appears finished or not at all. Not
    by `export`: biases that open gates by force are no checkpoint's.

    What is skipped changes what the later layers see, and rounding does, too: so the thresholds are set anew, twice, on
    what the graph itself feeds its MLPs, and with `opened`, the share of open gates, biases of gates and ups before
    them.
    """
    with atomic_folder(out) as partial:
        model = ir.load(base / MODEL)
        if opened is not None:
            add_biases(model, arch, config)
        gate_graph(model, emissions(plan, arch, config), arch, config, precision)
        save_graph(model, base, partial)
        density = next(iter(plan.values())).gating.density
        for turn in range(2):
            generator = torch.Generator().manual_seed(SEED + 1000 + turn)
            rows = torch.randint(2, arch.size(config, "vocab"), SETTLING, generator=generator).tolist()
            if opened is not None:
                set_opening(partial, rows, opened)
            set_density(partial, rows, density)


def build_dense(checkpoint: Path, precision: str, work: Path) -> Path:
    """Writes the fp32 graph of a checkpoint to `work`/base, and for an integer precision the dense graph of that
    precision to `work`/dense; returns the last.

    Floats of 16 bits are compared with fp32: ONNX Runtime's CPU products are not faster in them.
    """
    base = build_base(checkpoint, work / "base")
    if PRECISIONS[precision].bits is None:
        return base
    export_dense(base, work / "dense", precision)
    return work / "dense"
