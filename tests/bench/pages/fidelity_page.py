"""Write docs/fidelity.md and its pictures from the stored benchmark.

python tests/bench/pages/fidelity_page.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsegate.converter.evaluation.records import read_stored
from sparsegate.converter.report.tables import ABSENT, percent, table, without_absent
from sparsegate.converter.scores import score_title

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import paragraphs
from pages.fidelity_plots import draw, has_curves
from records.fidelity_results import PLACE, Fidelity, Kind, KindRow, Loss, ScoreRow, Scores
from records.folders import DOCS

PAGE = DOCS / "fidelity.md"
_DEAREST = 5
"""Blocks that are named as the dearest, and as the cheapest."""
CLAIM_SPARSITY, CLAIM_LOSS = 0.8, 0.05
"""What arXiv 2406.06562 claims for Corrected GxO: this sparsity for less than this loss of accuracy, which is BLEU
against the dense model's answers.
"""


def load() -> Fidelity:
    """The stored benchmark."""
    return read_stored(
        Fidelity, PLACE, "The benchmark of where the loss sits", "Run python tests/bench/benchmarks/fidelity.py again."
    )


# Cells


def signed(value: float, error: float) -> str:
    """A difference with its standard error, as `+0.053 ± 0.004`; both with as many decimals as the error needs."""
    digits = 3 if error >= 0.0005 or error == 0 else 4 if error >= 0.00005 else 5
    return f"{value:+.{digits}f} ± {error:.{digits}f}"


def plain(value: float, error: float) -> str:
    """A quantity with its standard error."""
    return signed(value, error).removeprefix("+")


def _nll(loss: Loss) -> str:
    return signed(loss.nll, loss.nll_error)


def _kl(loss: Loss) -> str:
    return plain(loss.kl, loss.kl_error)


def _place(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _ranges(names: Sequence[str]) -> list[str]:
    """Names with a number at their end joined to ranges, as `alone gate 3 to 5`."""
    runs: list[tuple[str, int, int]] = []
    plain_names = []
    for name in names:
        head, _, number = name.rpartition(" ")
        if not number.isdigit():
            plain_names.append(name)
        elif runs and runs[-1][0] == head and runs[-1][2] == int(number) - 1:
            runs[-1] = head, runs[-1][1], int(number)
        else:
            runs.append((head, int(number), int(number)))
    return [*plain_names, *(f"{head} {_place(first, last)}" for head, first, last in runs)]


def _words(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


# What follows


def cheapest(result: Fidelity, aim: float) -> KindRow:
    """The kind of the lowest KL at a cost."""
    return min((row for row in result.rows if row.aim == aim), key=lambda row: row.loss.kl)


def row_of(result: Fidelity, kind: str, aim: float) -> KindRow:
    """A kind at a cost."""
    return next(row for row in result.rows if (row.kind, row.aim) == (kind, aim))


def kinds_lines(result: Fidelity) -> list[str]:
    """Which kind of sparsity loses least at each cost."""
    lines = []
    for aim in dict.fromkeys(row.aim for row in result.rows):
        best, gate, channels = cheapest(result, aim), row_of(result, "gate", aim), row_of(result, "channels", aim)
        line = f"At cost {aim:g} gate thresholds lose {_nll(gate.loss)} nats, input channels {_nll(channels.loss)}."
        if best.kind not in ("gate", "channels"):
            line += f" The lowest KL has *{best.kind}*: {_kl(best.loss)} against {_kl(channels.loss)} of channels."
        lines.append(line)
    return lines


def share_of(kind: Kind, layers: Sequence[int]) -> float:
    """The share of some blocks in the sum of what all blocks cost alone, by KL."""
    total = sum(row.alone.kl for row in kind.blocks)
    return sum(row.alone.kl for row in kind.blocks if row.layer in layers) / total


def blocks_lines(kind: Kind, blocks: int) -> list[str]:
    """Which blocks cost most and least, and whether their losses add up where all are measured."""
    if not kind.blocks:
        return []
    name, ranked = kind.kind.capitalize(), kind.ranked
    dearest, least = ranked[:_DEAREST], ranked[len(ranked) // 2 :]
    named = _words([f"{row.layer} ({_kl(row.alone)})" for row in dearest])
    lines = [
        f"{name}: of {len(ranked)} blocks masked alone the dearest are {named}, in nats of KL. They are "
        f"{percent(share_of(kind, [row.layer for row in dearest]))} of the sum over these blocks; the cheaper half is "
        f"{percent(share_of(kind, [row.layer for row in least]))}."
    ]
    total = sum(row.alone.kl for row in kind.blocks)
    if kind.whole is not None and len(kind.blocks) == blocks:
        lines.append(
            f"{name}: what the blocks cost alone adds up to {total:.3f} nats of KL. All together cost "
            f"{_kl(kind.whole)}, {kind.whole.kl / total:.2f} times as much."
        )
    gains = sorted(((row.gain, row.layer) for row in kind.blocks if row.gain is not None), key=lambda pair: -pair[0].kl)
    if gains:
        named = _words([f"{layer} ({_kl(gain)})" for gain, layer in gains[:_DEAREST]])
        lines.append(f"{name}: with all others masked, most is gained by sparing block {named}.")
    return lines


def first_line(kind: Kind) -> str:
    """What masks everywhere cost at the first position and at the last ones."""
    first, last = kind.bands[0], kind.bands[-1]
    return (
        f"{kind.kind.capitalize()}: with masks everywhere the first position has a KL of "
        f"{plain(first.kl, first.kl_error)}, positions {_place(last.first, last.last)} have "
        f"{plain(last.kl, last.kl_error)}, {first.kl / last.kl:.1f} times less."
    )


def positions_lines(kind: Kind) -> list[str]:
    """What first and huge tokens cost."""
    losses = {row.positions: row for row in kind.positions}
    lines = [first_line(kind)]
    for name in ("the first", "the first four", "huge tokens"):
        only, spared = losses.get(f"only {name}"), losses.get(f"all but {name}")
        if only is not None and spared is not None and kind.whole is not None:
            lines.append(
                f"{kind.kind.capitalize()}: masks at {name} alone, {percent(only.share)} of the tokens, cost "
                f"{_kl(only.loss)} nats of KL. Sparing them lowers {_kl(kind.whole)} to {_kl(spared.loss)} "
                f"(NLL {_nll(kind.whole)} to {_nll(spared.loss)})."
            )
    return lines


def claims(scores: Scores) -> list[ScoreRow]:
    """The rows that the claim is about: Corrected GxO at its sparsity."""
    return [row for row in scores.rows if row.score == "corrected_gxo" and row.sparsity_target == CLAIM_SPARSITY]


def holds(row: ScoreRow) -> bool:
    """Whether BLEU against the dense answers falls by less than the claim allows."""
    return row.bleu is not None and 1 - row.bleu / 100 < CLAIM_LOSS


def claim_lines(result: Fidelity) -> list[str]:
    """Whether the claim holds here, for every kind of unit: by answers, and what it costs on text."""
    lines = []
    for row in claims(result.answers) if result.answers is not None else []:
        assert row.bleu is not None and row.bleu_error is not None
        lines.append(
            f"Corrected GxO (oracle) at {percent(row.sparsity_target)} of {_units(row.kinds)} has BLEU "
            f"{row.bleu:.1f} ± {row.bleu_error:.1f} against the dense answers and {percent(row.accuracy)} of their "
            f"tokens: the claim of a loss below {100 * CLAIM_LOSS:.0f} % "
            f"{'holds' if holds(row) else 'does not hold'} for the oracle."
        )
    scores = result.scores
    for row in claims(scores) if scores is not None else []:
        error = math.sqrt(row.agreement * (1 - row.agreement) / scores.tokens)
        lines.append(
            f"Corrected GxO (oracle) at {percent(row.sparsity_target)} of {_units(row.kinds)}, on {scores.tokens} "
            f"tokens of text: {100 * (1 - row.agreement):.1f} % ± {100 * error:.1f} of the argmax are no longer the "
            "dense model's, which is its label (tokens taken as independent), where the claim is a loss below "
            f"{100 * CLAIM_LOSS:.0f} %; perplexity rises by {_rise(row)}."
        )
    return lines


def _units(kinds: str) -> str:
    return {"mlp": "the neurons", "attention": "the heads", "both": "neurons and heads"}[kinds]


def _rise(row: ScoreRow) -> str:
    ratio = math.exp(row.nll - row.nll_dense)
    if ratio > 10:
        return f"{ratio:.0f} times"
    return f"{100 * (ratio - 1):+.1f} % ± {100 * ratio * (row.nll_error or 0.0):.1f}"


# Tables


def kinds_table(result: Fidelity) -> str:
    """Every kind at every cost."""
    header = ["kind", "kept shares", "cost", "NLL over dense", "KL", "agreement"]
    body = []
    for row in result.rows:
        names = {"ffn": "neurons", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
        shares = ", ".join(f"{names[name]} {share:.2f}" for name, share in row.shares.items())
        body.append([row.kind, shares, percent(row.cost), _nll(row.loss), _kl(row.loss), percent(row.loss.agreement)])
    return table((header, body))


def blocks_table(result: Fidelity) -> str:
    """Every block that is measured, under every kind."""
    header = ["block"]
    for kind in result.kinds:
        header += [f"{kind.kind}: KL alone", "NLL alone", "KL gained by sparing it"]
    body = []
    for layer in range(result.blocks):
        cells = []
        for kind in result.kinds:
            row = next((row for row in kind.blocks if row.layer == layer), None)
            gain = row.gain if row is not None else None
            cells += [ABSENT] * 2 if row is None else [_kl(row.alone), _nll(row.alone)]
            cells.append(ABSENT if gain is None else _kl(gain))
        if set(cells) != {ABSENT}:
            body.append([str(layer), *cells])
    return table(without_absent(header, body))


def positions_table(result: Fidelity) -> str:
    """Masks at some positions."""
    body = [
        [kind.kind, row.positions, percent(row.share), _nll(row.loss), _kl(row.loss)]
        for kind in result.kinds
        for row in kind.positions
    ]
    return table((["kind", "masked positions", "share", "NLL over dense", "KL"], body))


def bands_table(result: Fidelity) -> str:
    """KL by position, and the largest entries of hidden states there."""
    header = ["position, from 0", *(f"{kind.kind}: KL" for kind in result.kinds), "largest entry, median", "largest"]
    body = []
    for bands in zip(*(kind.bands for kind in result.kinds), strict=True):
        peak = next((row for row in result.peaks if row.first == bands[0].first), None)
        cells = [_place(bands[0].first, bands[0].last), *(plain(band.kl, band.kl_error) for band in bands)]
        body.append([*cells, *([ABSENT] * 2 if peak is None else [f"{peak.median:.0f}", f"{peak.largest:.0f}"])])
    return table((header, body))


def scores_table(scores: Scores, kinds: str) -> str:
    """A score a row, a sparsity a column: KL and rise of perplexity, or BLEU and accuracy of answers."""
    rows = [row for row in scores.rows if row.kinds == kinds]
    targets = sorted({row.sparsity_target for row in rows})
    body = []
    for name in dict.fromkeys(row.score for row in rows):
        cells = []
        for target in targets:
            (row,) = (row for row in rows if (row.score, row.sparsity_target) == (name, target))
            if row.bleu is None:
                cells.append(f"{plain(row.kl, row.kl_error or 0.0)}; {_rise(row)}; {percent(row.agreement)}")
            else:
                cells.append(f"{row.bleu:.1f} ± {row.bleu_error or 0:.1f}; {percent(row.accuracy)}")
        body.append([score_title(name), *cells])
    return table(([_units(kinds), *(f"sparsity {target:g}" for target in targets)], body))


# The page


def page(result: Fidelity) -> str:
    """The whole page."""
    details = [paragraphs.versions_text(result.versions, ["torch", "transformers"])]
    parts = [
        f"# Where the loss sits: {result.model}",
        paragraphs.written_line("fidelity_page.py", PLACE),
        "Nothing is trained here. Thresholds are quantiles of the dense model on "
        f"{result.calibration.tokens} tokens of {paragraphs.text_name(result.calibration)}, with equal shares in all "
        "blocks. Losses are of "
        f"{result.heldout.windows} windows of {result.length} tokens of {paragraphs.text_name(result.heldout)}, in "
        f"fp32, dense NLL {result.dense_nll:.4f}; "
        f"single blocks and positions on the first {result.short} tokens of {result.kinds[0].windows} of them. NLL is "
        "the rise over dense and KL that from the dense model, in nats per token; ± are standard errors over windows. "
        "Cost is the share of the networks' weights that a token touches.",
        f"{result.blocks} blocks; {paragraphs.machine_line(result, details)}.",
        *paragraphs.missing_part(_ranges(result.missing)),
        "## What follows",
        "\n".join(f"- {line}" for line in lines(result)),
        *_kinds_part(result),
        *_blocks_part(result),
        *_positions_part(result),
        *_scores_part(result),
        *paragraphs.repeat_part(result),
    ]
    return paragraphs.page_text(parts)


def lines(result: Fidelity) -> list[str]:
    """What follows, a sentence or two each."""
    found = kinds_lines(result)
    for kind in result.kinds:
        found += blocks_lines(kind, result.blocks)
    for kind in result.kinds:
        found += positions_lines(kind)
    return found + claim_lines(result)


def _kinds_part(result: Fidelity) -> list[str]:
    return [
        "## Kinds of sparsity at equal bytes",
        "*gate* skips neurons by |act(gate)|: the gate matrix is read in full. *channels* skips inputs of gate, up and "
        "down by their own size (TEAL). *both* skips inputs of the gate matrix, and neurons by the gate that these "
        "give. *fewer of down* keeps fewer inputs of the down matrix and more of the others; under *both* they are "
        "those of the neurons that stay.",
        kinds_table(result),
        "![loss against cost](fidelity_kinds.png)",
    ]


def _blocks_part(result: Fidelity) -> list[str]:
    if not any(kind.blocks for kind in result.kinds):
        return []
    return [
        f"## Blocks, at cost {result.kinds[0].aim:g} of a masked block",
        "Alone: the block is masked and all others are dense. Gained: what all masked blocks cost, less what all but "
        "this one cost, token by token.",
        blocks_table(result),
        "![loss by block](fidelity_blocks.png)",
    ]


def _positions_part(result: Fidelity) -> list[str]:
    others = _words([f"`{text!r}` ({count})" for text, count in result.huge_tokens.items()])
    named = f" After the first position they are {others}." if others else " There is none after the first position."
    return [
        f"## First and huge tokens, at cost {result.kinds[0].aim:g}",
        "A token is huge where, in front of any block, the largest entry of its hidden state is more than "
        f"{result.huge:g} times that of the median token. "
        f"{percent(result.huge_share)} of all tokens are, and {percent(result.huge_first)} of the first ones.{named}",
        *([positions_table(result)] if any(kind.positions for kind in result.kinds) else []),
        "All blocks masked everywhere, by position of the token that predicts, and the dense model's hidden states:",
        bands_table(result),
        "![loss and hidden states by position](fidelity_positions.png)",
    ]


def _scores_part(result: Fidelity) -> list[str]:
    parts = ["## The comparison of scores of arXiv 2406.06562"] if result.scores or result.answers else []
    if result.scores is not None:
        parts += [
            f"`examples/compare_scores.py MODEL {result.scores.command}`: {result.scores.tokens} tokens of "
            f"{result.heldout.file}, every position masked, each token and layer by itself. A cell is KL; rise of "
            "perplexity; agreement of the argmax. Rows marked oracle see the dense model's next token and rows marked "
            "post every activation; neither can be deployed.",
            *(scores_table(result.scores, kinds) for kinds in dict.fromkeys(row.kinds for row in result.scores.rows)),
            *(["![KL by score](fidelity_scores.png)"] if has_curves(result.scores) else []),
        ]
    if result.answers is not None:
        parts += [
            f"Greedy answers to {result.answers.answers} questions in the model's chat template, the prompt and the "
            "first token dense as in the paper. A cell is BLEU against the dense answer, with its standard error over "
            "answers; accuracy, the share of equal tokens at equal places.",
            *(scores_table(result.answers, kinds) for kinds in dict.fromkeys(row.kinds for row in result.answers.rows)),
        ]
    return parts


def write_page() -> None:
    """The page and its pictures."""
    result = load()
    PAGE.write_text(page(result), encoding="utf-8")
    draw(DOCS, result)


if __name__ == "__main__":
    write_page()
