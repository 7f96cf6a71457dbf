"""Write docs/real_model.md from the stored benchmark, and README's tables, whose first is of the same.

python tests/bench/pages/real_model_page.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from sparsegate.converter.evaluation.records import read_stored
from sparsegate.converter.report.tables import ABSENT, megabytes, nats, percent, ratio_text, table
from sparsegate.runtime_onnx.bench.samples import MAX_WAIT, compare

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import paragraphs
from records.folders import DOCS, README
from records.model_results import TextFile
from records.real_model_results import BASELINE, PLACE, PRECISIONS, RealModel, Row, Shipped, choose

PAGE = DOCS / "real_model.md"
_PHASES = ("prefill", "decode")
_BITS = {"fp32": 32, "F32": 32, "F16": 16, "BF16": 16, "int8": 8, "int4": 4}


def load() -> RealModel:
    """The stored benchmark."""
    return read_stored(
        RealModel, PLACE, "The benchmark of a real model", "Run python tests/bench/benchmarks/real_model.py again."
    )


# Cells


def change_text(found: Row | Shipped) -> str:
    """A rise in perplexity with its standard error, as `+3.1 % ± 0.2`."""
    change = found.change
    assert change.error is not None
    return f"{100 * change.value:+.1f} % ± {100 * change.error:.1f}"


def against(role: str, formats: dict[str, str]) -> str | None:
    """The dense model of the same number of bits, which a role's speed is a ratio to; None for a dense model itself and
    where there is none.
    """
    form = formats[role]
    bits = _BITS.get(form) or int(form.removeprefix("Q").partition("_")[0])
    name = next((precision for precision in PRECISIONS if _BITS[precision] == bits), None)
    return None if name is None or role == f"dense {name}" else f"dense {name}"


def ratio(speed: dict[str, Any], role: str, other: str, phase: str) -> dict[str, Any]:
    """How many times as fast as another a role is: a median over the rounds in which neither waited for a CPU, or over
    all, and then it is not `quiet`.
    """
    at, samples = _PHASES.index(phase), speed["samples"]
    quiet = [sample for sample in samples if all(sample["waits"][name] <= MAX_WAIT for name in (role, other))]
    kept = quiet or samples
    return compare(*([sample["seconds"][name][at] for sample in kept] for name in (other, role))) | {
        "quiet": bool(quiet)
    }


def ratio_cell(speed: dict[str, Any], role: str, formats: dict[str, str], phase: str) -> str:
    """A ratio to the dense model of the same precision; 1 for that model itself."""
    other = against(role, formats)
    if other is None:
        return "1" if role.startswith("dense ") else ABSENT
    found = ratio(speed, role, other, phase)
    return (
        ratio_text(found["ratio"])
        + (", not faster" if found["ratio"] <= 1 else "")
        + ("" if found["quiet"] else " (disturbed)")
    )


def pairs_cell(speed: dict[str, Any], role: str, formats: dict[str, str]) -> str:
    """How many rounds a ratio is the median of."""
    other = against(role, formats)
    return ABSENT if other is None else str(ratio(speed, role, other, "decode")["pairs"])


def role_name(role: str, result: RealModel) -> str:
    """A role for people: the method in place of `sparse`."""
    if result.chosen is None or not role.startswith("sparse "):
        return {"genai int8": "dense int8, genai's builder", "genai int4": "dense int4, genai's builder"}.get(
            role, role
        )
    precision, _, isa = role.removeprefix("sparse ").partition(" ")
    return f"{result.chosen.method} {result.chosen.density:g} {precision}" + (f", {isa} kernels" if isa else "")


# Tables


def quality_table(result: RealModel) -> str:
    """Every method at every density, in torch in fp32."""
    header = ["method", "density", "NLL", "perplexity", "change", "KL to dense", "agreement"]
    dense = result.rows[0].nll_dense
    body = [["dense", ABSENT, nats(dense), f"{math.exp(dense):.4g}", ABSENT, nats(0), *[percent(1)] * 4]]
    for row in result.rows:
        losses = [nats(row.nll), f"{math.exp(row.nll):.4g}", change_text(row), nats(row.kl)]
        shares = [percent(share) for share in (row.agreement, row.density, row.cost, row.block_cost)]
        body.append([row.method, f"{row.density_target:g}", *losses, *shares])
    return table(([*header, "realised", "cost", "block cost"], body))


def speed_table(result: RealModel) -> str:
    """Every model in its runtime: what it loses, its size and memory, and its speeds."""
    assert result.speed is not None
    models = {row["role"]: row for row in result.speed["models"]}
    formats = {role: row["format"] for role, row in models.items()}
    header = ["model", "runtime", "perplexity", "change", "size", "peak memory"]
    header += ["prefill tok/s", "decode tok/s", "prefill / dense", "decode / dense", "pairs"]
    body = []
    for role, row in models.items():
        if row["status"] != "run":
            body.append([role_name(role, result), row["runtime"], row["status"], *[ABSENT] * 8])
            continue
        loss = result.losses[role]
        memory = row.get("peak_bytes")
        body.append(
            [
                role_name(role, result),
                row["runtime"].partition(",")[0],
                f"{math.exp(loss.nll):.4g}",
                ABSENT if role == BASELINE else change_text(loss),
                megabytes(row["file_bytes"]),
                megabytes(memory) if memory else ABSENT,
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['decode_tokens_per_s']:.1f}",
                *(ratio_cell(result.speed, role, formats, phase) for phase in _PHASES),
                pairs_cell(result.speed, role, formats),
            ]
        )
    return table((header, body))


def compact(result: RealModel) -> str:
    """README's table: dense and best in three precisions, and the other runtimes at four bits."""
    assert result.speed is not None
    header = ["model", "perplexity", "change", "size", "prefill tok/s", "decode tok/s"]
    header.append("decode / dense of the same bits")
    models = {row["role"]: row for row in result.speed["models"]}
    formats = {role: row["format"] for role, row in models.items()}
    body = []
    for role, row in models.items():
        if row["status"] != "run" or role.endswith("AVX2") or role == "genai int8":
            continue
        loss = result.losses[role]
        body.append(
            [
                role_name(role, result),
                f"{math.exp(loss.nll):.4g}",
                ABSENT if role == BASELINE else change_text(loss),
                megabytes(row["file_bytes"]),
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['decode_tokens_per_s']:.1f}",
                ratio_cell(result.speed, role, formats, "decode"),
            ]
        )
    return table((header, body))


# Sentences


def named(result: RealModel, text: TextFile) -> str:
    """A text's file and the corpus that it is of, where that was said."""
    return text.file if result.corpus is None else f"{result.corpus}'s {text.file}"


def circumstances(result: RealModel) -> str:
    """Machine, versions, commit and date."""
    names = ("torch", "onnxruntime", "onnxruntime-genai", "llama-cpp-python")
    versions = dict(result.versions) | {k: v for k, v in (result.speed or {}).get("versions", {}).items() if v}
    details = [f"{result.speed['isa']} kernels"] if result.speed else []
    details.append(paragraphs.versions_text(versions, names))
    return paragraphs.machine_line(
        result, details, commit=versions.get("commit")
    )  # of the speeds, where they are measured


def training_lines(result: RealModel) -> str:
    """How long the trained methods were trained: each density from its own start, or all in one descending run."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        if row.training is not None:
            found.setdefault(row.method, []).append(row)
    lines = []
    for method, rows in found.items():
        last = min(rows, key=lambda row: row.density_target)
        one = last.training
        assert one is not None
        took = (
            f"{one.steps} steps of {one.tokens} tokens, {one.minutes:.0f} minutes of one core by what a step takes "
            "without a residual"
        )
        if len({row.training.steps for row in rows if row.training}) == 1:
            lines.append(f"{method} is trained without the weights, for every density anew: {took}.")
        else:
            lines.append(
                f"{method} is trained in one run through all densities, where `convert` trains for one: down to "
                f"{last.density_target:g} {took}."
            )
    return " ".join(lines)


def judgement(result: RealModel) -> str:
    """What the exported plan gains and loses in every precision, in words."""
    assert result.speed is not None and result.chosen is not None
    said, slower = [], []
    for precision in PRECISIONS:
        role, dense = f"sparse {precision}", f"dense {precision}"
        speeds = {phase: ratio(result.speed, role, dense, phase)["ratio"] for phase in _PHASES}
        rise = math.expm1(result.losses[role].nll - result.losses[dense].nll)
        said.append(
            f"{precision} decode {ratio_text(speeds['decode'])}, prefill {ratio_text(speeds['prefill'])}, perplexity "
            f"{100 * rise:+.1f} %"
        )
        slower += [f"{phase} in {precision}" for phase, value in speeds.items() if value <= 1]
    end = f" Not faster: {', '.join(slower)}." if slower else ""
    return (
        f"{result.chosen.method} at density {result.chosen.density:g} against the dense model of the same "
        f"precision: {'; '.join(said)}.{end}"
    )


def readme(result: RealModel) -> str:
    """README's first table with its line."""
    assert result.speed is not None and result.chosen is not None
    settings = result.speed["settings"]
    return (
        f"**{result.model}** ({result.parameters / 1e6:.0f} M parameters), {result.losses[BASELINE].tokens} held-out "
        f"tokens of {named(result, result.heldout)}, {settings['prompt_tokens']} tokens of prompt and "
        f"{settings['new_tokens']} decoded, {settings['threads']} threads, {circumstances(result)}:\n\n"
        f"{compact(result)}\n"
        f"Change is that of perplexity against dense fp32 with its standard error. {judgement(result)} "
        "Every method at every density, memory, other runtimes and what these weights are: [a real "
        "model](docs/real_model.md)."
    )


def page(result: RealModel) -> str:
    """The whole page."""
    parts = [
        f"# {result.model}, measured",
        paragraphs.written_line("real_model_page.py", PLACE),
        f"{paragraphs.weights_line(result.parameters, result.origin)} Where a GGUF file was the source its values were "
        "read as fp32: llama.cpp on the very file loses nothing to rounding, and every other format of few bits rounds "
        "a second time.",
        f"Calibrated on {result.calibration.tokens} tokens of {_cited(result, result.calibration)}, trained on "
        f"{result.training.tokens} tokens of it, measured on {_cited(result, result.heldout)}, windows of "
        f"{result.length} tokens drawn at random. {circumstances(result)}.",
        *_quality_part(result),
        *_speed_part(result),
        *paragraphs.repeat_part(result),
    ]
    return paragraphs.page_text(parts)


def _cited(result: RealModel, text: TextFile) -> str:
    return paragraphs.text_name(text, named(result, text))


def _quality_part(result: RealModel) -> list[str]:
    first = result.rows[0]
    said = (
        f"In torch, in fp32, on {first.windows} windows, {first.tokens} tokens, the same for all. Change is the rise "
        "in perplexity with the standard error of the paired difference over windows; density the share of neurons "
        "(teal, wina: of input channels of all linear maps) that was asked for, realised the measured one; cost the "
        f"MLP bytes touched per token, block cost those of all linear maps. {training_lines(result)}"
    )
    return [
        "## What every method loses",
        said.rstrip(),
        quality_table(result),
        *paragraphs.missing_part(result.missing),
    ]


def _speed_part(result: RealModel) -> list[str]:
    if result.speed is None or result.chosen is None:
        return []
    settings, base = result.speed["settings"], result.losses[BASELINE]
    lowest = choose(result.rows, result.chosen.density)
    why = "the neuron method of the lowest NLL there"
    if lowest is not None and lowest.method != result.chosen.method:
        why = f"named when this was measured ({lowest.method} has the lowest NLL there)"
    return [
        "## Dense, sparse and other runtimes",
        f"{result.chosen.method} at density {result.chosen.density:g}, {why}, exported in every "
        "precision beside the dense graphs; the graphs of onnxruntime-genai's own builder; llama.cpp on GGUF files. "
        f"Losses on {base.windows} windows, {base.tokens} tokens, the same ids in every runtime, against dense fp32. "
        f"Speeds in one run: {settings['prompt_tokens']} tokens of held-out text as prompt, {settings['new_tokens']} "
        f"decoded one at a time, {settings['threads']} threads each, medians of {settings['rounds']} rounds in turns, "
        "rounds in which threads waited for a CPU left out; ratios are to the dense model of the same bits, medians "
        "over the pairs of rounds that are left (disturbed: none was, all count, not to be quoted). Peak memory is "
        "that of a process that opens the model and runs it once, mapped files included.",
        speed_table(result),
        judgement(result),
        "Rows with AVX2 kernels force sparsegate's kernels to AVX2, and those of ONNX Runtime use what the machine "
        "has: a lower bound, not a machine without AVX-512.",
    ]


def write_pages() -> None:
    """The page, and README's tables."""
    from pages.readme_tables import fill

    PAGE.write_text(page(load()), encoding="utf-8")
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_pages()
