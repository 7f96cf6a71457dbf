"""Tiny ONNX folders for the runtime's tests: a random Llama with a tokenizer, dense, and with GatedMLP ops that drop
about half of the neurons.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparsegate.runtime_onnx.ops.gated_mlp import DOMAIN, NAME, VERSION, Variant, function, scores

HIDDEN, NEURONS, RANK, LAYERS, VOCABULARY, CONTEXT = 64, 168, 8, 2, 300, 256
PROMPT = "def f(x):\n    return"


@cache
def root() -> Path:
    """A folder that goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="sparsegate-onnx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def torch_folder() -> Path:
    """The transformers checkpoint behind all others."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(os.__file__).read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor "
        "%}{% "
        "if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    folder = root() / "torch"
    model = LlamaForCausalLM(config)
    unprintable = [token for token in range(VOCABULARY) if not re.fullmatch(r"[ -~\n]+", tokenizer.decode([token]))]
    with torch.no_grad():
        model.lm_head.weight[unprintable] = 0  # never the likeliest: broken UTF-8 would be decoded in different ways
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@cache
def dense() -> Path:
    """The dense model as the onnxruntime-genai builder writes it, fp32."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    folder = root() / "dense"
    arguments = (None, str(torch_folder()), str(folder), "fp32", "cpu", str(root() / "cache"))
    create_model(*arguments, **parse_extra_options(*arguments, None))
    return folder


@cache
def sparse(score: str) -> Path:
    """The same with one GatedMLP per layer and tau [n] the median of each neuron's score on random text; score "gate",
    "predictor" or "all" (drops nothing).
    """
    source, folder = dense(), root() / score
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    model = onnx.load(str(source / "model.onnx"))
    inputs = mlp_inputs()
    extra = {"gate": ("tau",), "predictor": ("tau", "p1", "p2"), "all": ()}[score]
    variant = Variant("silu", score, "float", ("w_gate", "w_up", "w_down", *extra))
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    rng = np.random.default_rng(0)
    for layer in range(LAYERS):
        nodes = {node.name.split("/mlp/")[1]: node for node in model.graph.node if f"/layers.{layer}/mlp/" in node.name}
        old = {
            role: nodes[f"{name}/MatMul"]
            for role, name in (("w_gate", "gate_proj"), ("w_up", "up_proj"), ("w_down", "down_proj"))
        }
        weights = {role: numpy_helper.to_array(initializers[node.input[1]]) for role, node in old.items()}
        tensors = {"w_gate": weights["w_gate"].T, "w_up": weights["w_up"].T, "w_down": weights["w_down"]}
        if score == "predictor":
            tensors |= {
                "p1": rng.standard_normal((RANK, HIDDEN)).astype(np.float32),
                "p2": rng.standard_normal((NEURONS, RANK)).astype(np.float32),
            }
        if score != "all":
            tensors["tau"] = np.zeros(NEURONS, np.float32)
            tensors["tau"] = np.median(scores(variant, inputs[layer], tensors), axis=0).astype(np.float32)
        names = [f"layers.{layer}.ffn.{role}" for role in variant.inputs]
        node = helper.make_node(
            NAME,
            [old["w_gate"].input[0], *names],
            list(old["w_down"].output),
            name=f"/layers.{layer}/GatedMLP",
            domain=DOMAIN,
        )
        node.attribute.extend(helper.make_attribute(key, value) for key, value in variant.attributes().items())
        model.graph.node.insert(list(model.graph.node).index(old["w_gate"]), node)
        for gone in nodes.values():
            model.graph.node.remove(gone)
        for gone in old.values():
            model.graph.initializer.remove(initializers[gone.input[1]])
        for role, name in zip(variant.inputs, names, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(tensors[role]), name))
    del model.graph.value_info[:]
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    model.functions.append(function(variant, opset=opset))
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    helper.set_model_props(model, {"ai.sparsegate.variants": json.dumps([variant.name])})
    onnx.save(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=64
    )
    return folder


@cache
def mlp_inputs() -> list[np.ndarray]:
    """Inputs [T, d] of every layer's MLP on 200 random tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(torch_folder())
    found: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][0].numpy()))
    with torch.no_grad():
        model(torch.randint(2, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(1)))
    return found


def copy(source: Path, target: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(source, target)
    return target


def rename_variant(folder: Path, name: str) -> None:
    """Make the metadata of a model name another variant, as a file from a newer sparsegate would."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    model.metadata_props[0].value = json.dumps([name])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
