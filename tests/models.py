"""Tiny random models of every supported architecture, as real Hugging Face folders: fp32 safetensors and a byte-level
BPE tokenizer.

Sizes differ from one another on purpose (hidden 64, intermediate 176, vocabulary 290, two grouped-query heads of four),
so that a transposed or swapped weight cannot pass. Weights are scaled so that gates, attention scores and logits spread
well away from zero. Norm weights and biases are random too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 290
TEXT = (
    "def add(first, second):\n    return first + second\n\nclass Counter:\n    def __init__(self, start=0):\n        "
    "self.value = start\n\n"
    "    def step(self):\n        self.value += 1\n        return self.value\n\nimport math\nfor index in range(10):\n "
    "   print(math.sqrt(index))\n"
    "while True:\n    try:\n        break\n    except ValueError as error:\n        raise RuntimeError(str(error)) "
    "from None\n"
) * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if "
    "add_generation_prompt %}assistant: {% endif %}"
)

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
# Half the rotary dimension must be a multiple of 8 and a sliding window shorter than max_position_embeddings: limits of
# onnxruntime-genai's builder.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 32, "sliding_window": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.5,
    },
    "phi3": {"original_max_position_embeddings": 256},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 24, "tie_word_embeddings": True},
    "phi": {"num_attention_heads": 2, "num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "olmo": {},
    "nemotron": {"head_dim": 32, "partial_rotary_factor": 0.5},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 176, "n_positions": 256},
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3", "gemma2", "phi")
OTHER_TYPES = ("olmo", "nemotron", "gpt2")
"""Types without an architecture file: two that onnxruntime-genai's builder knows, one that it does not."""


def write_text(folder: Path, pieces: int = 12) -> Path:
    """Write a text that a tiny model can be calibrated on, `pieces` of TEXT with a line of its own before each."""
    path = folder / "text.txt"
    path.write_text("".join(f"value_{k} = {k} * {k % 7}\n" + TEXT[k % 50 :] for k in range(pieces)), encoding="utf-8")
    return path


def make_model(model_type: str, folder: Path, seed: int = 0, **config_overrides: Any) -> Path:
    """Write a tiny random model of `model_type` and its tokenizer into `folder`, which is made; returns `folder`. Equal
    arguments give equal files.
    """
    shared = {} if model_type == "gpt2" else _SHARED
    fields = {
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shared,
        **_CONFIGS[model_type],
        **config_overrides,
    }
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    model.generation_config.do_sample = False
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


PREDICTOR_RANKS = (12, 5)
"""Ranks of the predictors that `put_predictors` puts beside the two layers."""


def put_predictors(folder: Path) -> Path:
    """Add random predictors [r, d], [n, r] beside the feed-forward weights of a tiny model, as TurboSparse publishes
    them; returns `folder`.
    """
    weights, hidden, units = (
        load_file(folder / "model.safetensors"),
        _SHARED["hidden_size"],
        _SHARED["intermediate_size"],
    )
    generator = torch.Generator().manual_seed(3)
    for layer, rank in enumerate(PREDICTOR_RANKS):
        weights[f"model.layers.{layer}.mlp.predictor.fc1.weight"] = (
            torch.randn(rank, hidden, generator=generator) / hidden**0.5
        )
        weights[f"model.layers.{layer}.mlp.predictor.fc2.weight"] = torch.randn(units, rank, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter a seeded value: matrices N(0, 1.5^2 / fan-in), untied embeddings N(0, 1), norm weights
    N(neutral, 0.2^2), biases N(0, 0.3^2).
    """
    tied = model.config.tie_word_embeddings
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if not tied and "embed_tokens" in name:
            parameter.copy_(noise)
        elif parameter.dim() == 2:
            fan_in = (
                parameter.shape[0] if name.startswith("transformer.h.") else parameter.shape[1]
            )  # gpt2 stores [in, out]
            parameter.copy_(noise * 1.5 / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        else:
            neutral = parameter.mean()  # 1, or 0 where the class adds the 1 itself
            parameter.copy_(neutral + 0.2 * noise)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly VOCAB tokens, with a chat template.

    `<|endoftext|>` is there because transformers adds it, beyond the vocabulary, to every qwen2 tokenizer without it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
