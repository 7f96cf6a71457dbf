"""Compare scores of sparse activation on any model folder: metrics x sparsity, for the MLP, the attention heads and
both.

python examples/compare_scores.py [MODEL] [--windows 8] [--sparsity 0.3 0.5 0.7 0.8] [--kinds mlp attention both]
[--scores NAME ...] [--answers 0] [--questions FILE] [--out compare_scores]

The comparison of "Achieving Sparse Activation in Small Language Models" (arXiv 2406.06562) with its metrics and its
rule of selection (per token and layer), on held-out windows under teacher forcing, every position masked; beside its
metrics the gate scores that a deployed model can compute. Quality is KL(dense || sparse) and NLL in nats per token, and
agreement of the argmax. Rows marked "oracle" see the label (the dense model's own next token) and are nobody's result:
their agreement says how well they leak it, their KL what they cost. With --answers N, BLEU of N greedy answers against
the dense model's, prompt and first token dense, as the paper measures, and accuracy, the share of their tokens that
equal the dense answer's at the same place (needs sacrebleu: pip install 'sparsegate[eval]'). Prompts are the beginnings
of windows, or the lines of --questions in the model's chat template; examples/questions.txt has some.

Integrated gradients run later blocks anew for every layer and step. On a model of 30 blocks leave them out with
--scores; everything else takes minutes there.

Writes scores.json and scores.png into --out. Without MODEL the small model that sparsegate carries is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from sparsegate.converter.arch import Arch
from sparsegate.converter.bundled import BUNDLED, CALIBRATION_TEXT, HELDOUT_TEXT
from sparsegate.converter.checkpoint.source import end_tokens, open_source
from sparsegate.converter.evaluation.analysis.answers import sparse_answers
from sparsegate.converter.evaluation.analysis.executor import analyse_all
from sparsegate.converter.evaluation.analysis.setting import Outcome, Setting
from sparsegate.converter.evaluation.answers import import_sacrebleu
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.scores import score_title
from sparsegate.converter.text.windows import Batches, make_batches, read_text
from sparsegate.runtime_onnx.chat_template import render_all
from sparsegate.runtime_onnx.errors import InputError

KINDS = {"mlp": ("ffn",), "attention": ("attn",), "both": ("ffn", "attn")}
METRICS = ("abs_z", "magnitude", "gradient", "gxo", "snip", "fisher", "integrated_gradients", "corrected_gxo")
DEPLOYABLE = ("gate", "chess")
NEW, PROMPT = 32, 64
CELL = 26


def settings(kinds: str, sparsities: list[float], chosen: Sequence[str] = ()) -> list[Setting]:
    """Every metric, or the `chosen` ones, at every sparsity; heads have no second magnitude and no gate."""
    scores = (*DEPLOYABLE, *METRICS) if kinds == "mlp" else tuple(name for name in METRICS if name != "magnitude")
    scores = tuple(name for name in scores if not chosen or name in chosen)
    return [
        Setting(score, 1 - sparsity, selector="paper_cut", kinds=KINDS[kinds])
        for score in scores
        for sparsity in sparsities
    ]


def table(rows: list[dict[str, Any]], kinds: str, sparsities: list[float]) -> str:
    """One table: a row a metric, a cell KL / agreement (/ BLEU) a sparsity."""
    names = list(dict.fromkeys(row["score"] for row in rows if row["kinds"] == kinds))
    width = max(len(score_title(name)) for name in names)
    measures = "KL / agreement" + (" / BLEU / accuracy" if "bleu" in rows[0] else "")
    lines = [f"{kinds}: {measures}", " " * width + "".join(f"  {sparsity:>{CELL}.0%}" for sparsity in sparsities)]
    for name in names:
        cells = []
        for sparsity in sparsities:
            (row,) = (r for r in rows if (r["kinds"], r["score"], r["sparsity_target"]) == (kinds, name, sparsity))
            cells.append(
                f"{row['kl']:.3f} / {row['agreement']:.3f}"
                + (f" / {row['bleu']:.0f} / {row['accuracy']:.2f}" if "bleu" in row else "")
            )
        lines.append(score_title(name).ljust(width) + "".join(f"  {cell:>{CELL}}" for cell in cells))
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, Any]], model: str) -> None:
    """KL and agreement over sparsity, one column a kind; oracles dashed."""
    kinds = list(dict.fromkeys(row["kinds"] for row in rows))
    figure = Figure(figsize=(4.5 * len(kinds) + 2, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
    names = list(dict.fromkeys(row["score"] for row in rows))
    for column, kind in enumerate(kinds):
        for number, name in enumerate(names):
            own = sorted(
                (r for r in rows if (r["kinds"], r["score"]) == (kind, name)), key=lambda r: r["sparsity_target"]
            )
            style = {
                "color": f"C{number}",
                "marker": "o",
                "markersize": 3,
                "linestyle": "--" if own and own[0]["oracle"] else "-",
            }
            for panel, measure in zip(panels[:, column], ("kl", "agreement"), strict=True):
                panel.plot(
                    [r["sparsity_target"] for r in own], [r[measure] for r in own], label=score_title(name), **style
                )
        panels[0, column].set(title=kind, yscale="log", ylabel="KL (nats per token)" if column == 0 else None)
        panels[1, column].set(xlabel="sparsity", ylabel="agreement with dense" if column == 0 else None)
        for panel in panels[:, column]:
            panel.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(model)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def bleu(dense: list[str], sparse: list[str]) -> list[float]:
    """Corpus BLEU (0 to 100) of every answer against the dense one."""
    sacrebleu = import_sacrebleu()
    return [sacrebleu.corpus_bleu([a], [[b]]).score for a, b in zip(sparse, dense, strict=True)]


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]


def equal_share(dense: list[int], sparse: list[int]) -> float:
    """The share of the dense answer's tokens that stand at the same place of the sparse one, the first left out: it is
    dense in both.
    """
    pairs = list(zip_longest(dense[1:], sparse[1:]))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 1.0


def question_prompts(tokenizer: Any, questions: list[str]) -> list[Tensor]:
    """Every question as the tokens [P] of the model's chat template, or of the paper's form where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        shared = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": True}
        texts = render_all(template, shared, [[{"role": "user", "content": question}] for question in questions])
    else:
        texts = [f"Instruct: {question}\nOutput:" for question in questions]
    ids = tokenizer(texts, add_special_tokens=not isinstance(template, str))["input_ids"]
    return [torch.tensor(row, dtype=torch.int64) for row in ids]


def add_answers(
    rows: list[dict[str, Any]],
    prompts: list[Tensor],
    model: Any,
    arch: Arch,
    tokenizer: Any,
    asked: list[Setting],
    calibration: Batches,
    steps: int,
) -> None:
    """Put BLEU and accuracy of every setting's answers, and their standard errors, into its row. Prompts of one length
    are answered together.
    """
    answers: list[list[list[int]]] = [[] for _ in range(1 + len(asked))]
    for length in sorted({len(prompt) for prompt in prompts}):
        same = torch.stack([prompt for prompt in prompts if len(prompt) == length])
        dense, sparse = sparse_answers(model, arch, same, NEW, asked, calibration, steps)
        for kept, tokens in zip(answers, (dense, *sparse), strict=True):
            kept += [until_end(row, end_tokens(model)) for row in tokens.tolist()]
    texts = [[tokenizer.decode(tokens, skip_special_tokens=True) for tokens in kept] for kept in answers]
    for row, tokens, text in zip(rows, answers[1:], texts[1:], strict=True):
        same = [equal_share(*pair) for pair in zip(answers[0], tokens, strict=True)]
        for name, values in (("bleu", bleu(texts[0], text)), ("accuracy", same)):
            row[name] = mean(values)
            row[f"{name}_error"] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def measure(
    model: Any,
    arch: Arch,
    tokenizer: Any,
    batches: Batches,
    calibration: Batches,
    asked: list[tuple[str, Setting]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row a setting: what it was, its quality, and that of its answers where they are asked for."""
    outcomes: list[Outcome] = analyse_all(
        model, arch, batches, [setting for _, setting in asked], calibration, args.steps
    )
    rows = []
    for (kinds, setting), outcome in zip(asked, outcomes, strict=True):
        target = next(s for s in args.sparsity if abs(1 - s - setting.density) < 1e-9)
        rows.append({"kinds": kinds, "score": setting.score, "sparsity_target": target, **outcome.as_json()})
    if args.answers:
        if args.questions is None:
            prompts = list(batches.tokens[batches.mask.all(1)][: args.answers, :PROMPT])
        else:
            lines = [line for line in read_text(args.questions).splitlines() if line.strip()]
            prompts = question_prompts(tokenizer, lines[: args.answers])
        add_answers(rows, prompts, model, arch, tokenizer, [setting for _, setting in asked], calibration, args.steps)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "model", nargs="?", type=Path, default=BUNDLED, help="a transformers folder; default: the bundled model"
    )
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of --length tokens")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8], help="shares of units to drop"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=10, help="steps of integrated gradients")
    parser.add_argument(
        "--scores", nargs="+", choices=(*DEPLOYABLE, *METRICS), default=(), help="scores to compare; default: all"
    )
    parser.add_argument("--answers", type=int, default=0, help="also BLEU and accuracy of so many answers")
    parser.add_argument("--questions", type=Path, help="a question a line to answer, in place of continuing the text")
    parser.add_argument("--text", type=Path, default=HELDOUT_TEXT, help="the text to measure on")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT, help="the text for CHESS's moments")
    parser.add_argument("--out", type=Path, default=Path("compare_scores"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.answers:
        import_sacrebleu()
        if args.questions is None and args.length <= PROMPT:
            raise InputError(
                f"length must be at least {PROMPT + 1} for answers to prompts of {PROMPT} tokens, got {args.length}. "
                "Give a larger --length."
            )
    source = open_source(args.model)
    tokenizer = source.tokenizer()
    length = args.length
    batches = make_batches(tokenizer, read_text(args.text), args.windows, length, args.seed, "The text")
    calibration = make_batches(tokenizer, read_text(args.calibration), args.windows, length, args.seed)
    model = load_dense(args.model)
    asked = [(kinds, setting) for kinds in args.kinds for setting in settings(kinds, args.sparsity, args.scores)]
    rows = measure(model, source.arch, tokenizer, batches, calibration, asked, args)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "model": source.name,
        "windows": len(batches.tokens),
        "length": length,
        "tokens": rows[0]["tokens"],
        "seed": args.seed,
        "text_sha256": batches.sha256,
        "nll_dense": rows[0]["nll_dense"],
        "questions": None if args.questions is None else args.questions.name,
        "answers": args.answers,
        "rows": rows,
    }
    (args.out / "scores.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(args.out / "scores.png", rows, source.name)
    print(f"{source.name}: {rows[0]['tokens']} tokens, dense NLL {rows[0]['nll_dense']:.3f}")
    for kinds in args.kinds:
        print("\n" + table(rows, kinds, args.sparsity))
    print("\noracle: sees the label; post: sees every activation of the dense model; neither can be deployed")
    print(f"wrote {args.out / 'scores.json'} and {args.out / 'scores.png'}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
