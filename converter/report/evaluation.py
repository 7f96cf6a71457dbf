"""What `eval` measured on a finished checkpoint, as the one stored JSON, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ..artifact import VERSION
from .results import Machine, Strict, Text, read_stored
from .tables import ABSENT, Cells, Number, nats, percent

EVALUATION = "report/eval.json"
"""The evaluation's place in a checkpoint folder."""


class Measured(Strict):
    """One executor on `tokens` held-out tokens: NLL, and KL from dense torch to it, in nats per token, and the share of equal argmax to dense.

    On the same tokens, `nll_dense` is the NLL of what is compared with, `nll_error` the standard error of the paired difference to it (None: of one window, or
    not stored by an older version), and `nll_torch` the sparse torch model's NLL. `note` says why an executor did not run, its numbers being absent then.
    """

    executor: str
    tokens: int = 0
    nll: float | None = None
    nll_dense: float | None = None
    nll_error: float | None = Field(default=None, ge=0)
    nll_torch: float | None = None
    kl: float | None = None
    agreement: float | None = Field(default=None, ge=0, le=1)
    note: str = ""


class Answers(Strict):
    """Greedy answers of the sparse model against the dense model's own, mean over prompts of sacrebleu's corpus BLEU, 0 to 100.

    `bleu` keeps the prompt's pass dense, which yields the first answer token, and masks every later pass (arXiv 2406.06562, its released protocol);
    `bleu_all_masked` masks the prompt too. `bleu_dense` is the dense answers against themselves: below 100 where answers have fewer than four words.
    `equal` and `equal_all_masked` are shares of answers equal token by token. `empty` prompts, to which the dense model says nothing, are left out.
    """

    prompts: int
    empty: int = 0
    prompt_tokens: int
    answer_tokens: int
    max_new_tokens: int
    name: str
    bleu: float = Field(ge=0, le=100 + 1e-6)
    bleu_all_masked: float = Field(ge=0, le=100 + 1e-6)
    bleu_dense: float = Field(ge=0, le=100 + 1e-6)
    equal: float = Field(ge=0, le=1)
    equal_all_masked: float = Field(ge=0, le=1)


class Sparsity(Strict):
    """Share of weights skipped, each site counted by its parameters and only sites that are masked.

    `windows`: every position of the held-out windows. Of the answers with a dense prompt: `answers` on masked passes alone, `answers_and_prompt` with the
    prompt's positions counted as dense. The same with everything masked: `masked_answers`, `masked_answers_and_prompt`. `gated_share` is the part of the
    model's parameters that these sites hold.
    """

    windows: float
    answers: float
    answers_and_prompt: float
    masked_answers: float
    masked_answers_and_prompt: float
    gated_share: float = Field(ge=0, le=1)


class Evaluation(Strict):
    """Everything that `eval` measured. `cost` and `block_cost` are bytes touched per token relative to the dense MLPs, and to all linear maps of the blocks;
    `predictor_cost` is the part of `cost` that predictors and residuals add. `against` names what everything is compared with: the checkpoint's own dense
    model, the dense source where weights or activations were changed, or, without that one, the changed model with nothing masked. `tasks`: metrics of lm-eval
    by task and metric, dense torch and sparse ONNX.
    """

    version: Literal[1] = 1
    model: str
    tool: str = VERSION
    date: str
    command: str
    machine: Machine
    versions: dict[str, str]
    text: Text
    against: Literal["dense torch", "dense source", "ungated torch"] = "dense torch"
    nll_dense: float
    executors: list[Measured]
    density: float = Field(ge=0, le=1)
    cost: float = Field(ge=0)
    block_cost: float = Field(ge=0)
    predictor_cost: float = Field(ge=0)
    site_density: dict[str, float]
    site_cost: dict[str, float]
    sparsity: Sparsity
    answers: Answers
    tasks: dict[str, dict[str, dict[str, float]]] = {}

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read an evaluation. Raises InputError when the file is missing or has another form."""
        return read_stored(cls, path, "The evaluation", "Run sparsegate eval again.")


def executor_cells(found: Evaluation) -> Cells:
    """What is compared with first, then one row per executor."""
    dense = [found.against, _count(found.text.tokens), nats(found.nll_dense), ABSENT, ABSENT, nats(0.0), percent(1.0), ABSENT, ""]
    body = [dense]
    for row in found.executors:
        change = None if row.nll is None or row.nll_dense is None else row.nll - row.nll_dense
        cells = [ABSENT if value is None else nats(value, small=True) for value in (row.nll, change, row.nll_error, row.kl)]
        off = ABSENT if row.nll is None or row.nll_torch is None or row.executor == "torch" else nats(row.nll - row.nll_torch, small=True)
        body.append([row.executor, _count(row.tokens) if row.tokens else ABSENT, *cells, percent(row.agreement), off, row.note])
    header = ["executor", "tokens", "NLL", "change", "± of its change", f"KL to {_word(found)}", "agreement", "NLL off torch", "note"]
    stored = {
        "change": any(row.nll_dense is not None for row in found.executors),
        "± of its change": any(row.nll_error is not None for row in found.executors),
        "note": any(row.note for row in found.executors),
    }
    keep = [k for k, name in enumerate(header) if stored.get(name, True)]
    return [header[k] for k in keep], [[row[k] for k in keep] for row in body]


def answer_cells(found: Evaluation) -> Cells:
    """BLEU and equal answers, by what was masked."""
    answers = found.answers
    return ["answers", f"BLEU against {_word(found)}", "equal answers"], [
        [_word(found), Number(f"{answers.bleu_dense:.2f}", answers.bleu_dense), percent(1.0)],
        [
            f"prompt and first token {'ungated' if found.against != 'dense torch' else 'dense'}",
            Number(f"{answers.bleu:.2f}", answers.bleu),
            percent(answers.equal),
        ],
        ["everything masked", Number(f"{answers.bleu_all_masked:.2f}", answers.bleu_all_masked), percent(answers.equal_all_masked)],
    ]


def sparsity_cells(found: Evaluation) -> Cells:
    """Realised sparsity by what is counted, then the costs."""
    sparsity = found.sparsity
    body = [
        ["skipped of the gated weights, held-out windows", percent(sparsity.windows)],
        ["skipped in answers after a dense prompt", percent(sparsity.answers)],
        ["the same, the prompt counted", percent(sparsity.answers_and_prompt)],
        ["skipped in answers, everything masked", percent(sparsity.masked_answers)],
        ["the same, the prompt counted", percent(sparsity.masked_answers_and_prompt)],
        ["gated share of all parameters", percent(sparsity.gated_share)],
        ["bytes touched, MLPs", percent(found.cost)],
        ["of these, predictors and residuals", percent(found.predictor_cost)],
        ["bytes touched, all linear maps of the blocks", percent(found.block_cost)],
    ]
    return ["share", "value"], body


def site_cells(found: Evaluation) -> Cells:
    """Density and cost by site."""
    return ["site", "density", "cost"], [[key, percent(value), percent(found.site_cost[key])] for key, value in found.site_density.items()]


def task_cells(found: Evaluation) -> Cells:
    """lm-eval's metrics, dense beside sparse."""
    body = []
    for task, metrics in found.tasks.items():
        for metric, values in metrics.items():
            body.append([task, metric, *(Number(f"{values[side]:.4g}", values[side]) if side in values else ABSENT for side in ("dense", "sparse"))])
    return ["task", "metric", "dense", "sparse"], body


def _word(found: Evaluation) -> str:
    """`dense`, or `ungated` where that is no dense model."""
    return found.against.partition(" ")[0]


def _count(value: int) -> Number:
    return Number(str(value), value)
