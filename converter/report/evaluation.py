"""Tables of what `eval` measured on a finished checkpoint."""

from __future__ import annotations

from ..evaluation.records import Evaluation
from .tables import ABSENT, Cells, Number, nats, percent


def executor_cells(evaluation: Evaluation) -> Cells:
    """What is compared with first, then one row per executor."""
    dense = [
        evaluation.against,
        _count(evaluation.text.tokens),
        nats(evaluation.nll_dense),
        ABSENT,
        ABSENT,
        nats(0.0),
        percent(1.0),
        ABSENT,
        "",
    ]
    body = [dense]
    for row in evaluation.executors:
        change = None if row.nll is None or row.nll_dense is None else row.nll - row.nll_dense
        cells = [
            ABSENT if value is None else nats(value, small=True) for value in (row.nll, change, row.nll_error, row.kl)
        ]
        off = (
            ABSENT
            if row.nll is None or row.nll_torch is None or row.executor == "torch"
            else nats(row.nll - row.nll_torch, small=True)
        )
        body.append(
            [row.executor, _count(row.tokens) if row.tokens else ABSENT, *cells, percent(row.agreement), off, row.note]
        )
    header = [
        "executor",
        "tokens",
        "NLL",
        "change",
        "± of its change",
        f"KL to {_word(evaluation)}",
        "agreement",
        "NLL off torch",
        "note",
    ]
    stored = {
        "change": any(row.nll_dense is not None for row in evaluation.executors),
        "± of its change": any(row.nll_error is not None for row in evaluation.executors),
        "note": any(row.note for row in evaluation.executors),
    }
    keep = [k for k, name in enumerate(header) if stored.get(name, True)]
    return [header[k] for k in keep], [[row[k] for k in keep] for row in body]


def answer_cells(evaluation: Evaluation) -> Cells:
    """BLEU and equal answers, by what was masked."""
    answers = evaluation.answers
    return ["answers", f"BLEU against {_word(evaluation)}", "equal answers"], [
        [_word(evaluation), Number(f"{answers.bleu_dense:.2f}", answers.bleu_dense), percent(1.0)],
        [
            f"prompt and first token {'ungated' if evaluation.against != 'dense torch' else 'dense'}",
            Number(f"{answers.bleu:.2f}", answers.bleu),
            percent(answers.equal),
        ],
        [
            "everything masked",
            Number(f"{answers.bleu_all_masked:.2f}", answers.bleu_all_masked),
            percent(answers.equal_all_masked),
        ],
    ]


def sparsity_cells(evaluation: Evaluation) -> Cells:
    """Realised sparsity by what is counted, then the costs."""
    sparsity = evaluation.sparsity
    body = [
        ["skipped of the gated weights, held-out windows", percent(sparsity.windows)],
        ["skipped in answers after a dense prompt", percent(sparsity.answers)],
        ["the same, the prompt counted", percent(sparsity.answers_and_prompt)],
        ["skipped in answers, everything masked", percent(sparsity.masked_answers)],
        ["the same, the prompt counted", percent(sparsity.masked_answers_and_prompt)],
        ["gated share of all parameters", percent(sparsity.gated_share)],
        ["bytes touched, MLPs", percent(evaluation.cost)],
        ["of these, predictors and residuals", percent(evaluation.predictor_cost)],
        ["bytes touched, all linear maps of the blocks", percent(evaluation.block_cost)],
    ]
    return ["share", "value"], body


def site_cells(evaluation: Evaluation) -> Cells:
    """Density and cost by site."""
    return ["site", "density", "cost"], [
        [key, percent(value), percent(evaluation.site_cost[key])] for key, value in evaluation.site_density.items()
    ]


def task_cells(evaluation: Evaluation) -> Cells:
    """lm-eval's metrics, dense beside sparse."""
    body = []
    for task, metrics in evaluation.tasks.items():
        for metric, values in metrics.items():
            body.append(
                [
                    task,
                    metric,
                    *(
                        Number(f"{values[side]:.4g}", values[side]) if side in values else ABSENT
                        for side in ("dense", "sparse")
                    ),
                ]
            )
    return ["task", "metric", "dense", "sparse"], body


def _word(evaluation: Evaluation) -> str:
    """`dense`, or `ungated` where that is no dense model."""
    return evaluation.against.partition(" ")[0]


def _count(value: int) -> Number:
    return Number(str(value), value)
