"""A stored evaluation with a different number in every field, for the page and for the command line."""

from __future__ import annotations

from typing import Any

EVALUATION: dict[str, Any] = {
    "model": "org/base-1B",
    "date": "2026-01-03",
    "command": "sparsegate eval out",
    "machine": {"cpu": "Test CPU", "cores": 2, "os": "Linux 6"},
    "versions": {"torch": "2.13.0"},
    "text": {"tokens": 4097, "name": "held-out text"},
    "nll_dense": 2.0078125,
    "executors": [
        {"executor": "torch", "tokens": 4097, "nll": 2.11, "nll_torch": 2.11, "kl": 0.0321, "agreement": 0.913},
        {"executor": "ONNX body", "tokens": 1021, "nll": 2.123, "nll_torch": 2.122, "kl": 0.0331, "agreement": 0.914},
        {"executor": "ONNX kernel", "note": "not run: no library"},
    ],
    "density": 0.4902,
    "cost": 0.5801,
    "block_cost": 0.7702,
    "predictor_cost": 0.0903,
    "site_density": {"layers.0.ffn": 0.4813, "layers.1.linear.q_proj": 0.5014},
    "site_cost": {"layers.0.ffn": 0.5715, "layers.1.linear.q_proj": 0.5014},
    "sparsity": {
        "windows": 0.5098,
        "answers": 0.5099,
        "answers_and_prompt": 0.3401,
        "masked_answers": 0.5111,
        "masked_answers_and_prompt": 0.5122,
        "gated_share": 0.6244,
    },
    "answers": {
        "prompts": 31,
        "empty": 1,
        "prompt_tokens": 1022,
        "answer_tokens": 2047,
        "max_new_tokens": 63,
        "name": "held-out text",
        "bleu": 54.89,
        "bleu_all_masked": 53.73,
        "bleu_dense": 99.5,
        "equal": 0.3125,
        "equal_all_masked": 0.375,
    },
    "tasks": {"hellaswag": {"acc": {"dense": 0.5011, "sparse": 0.4911}}},
}
