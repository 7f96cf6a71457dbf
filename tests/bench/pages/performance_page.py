"""Write docs/performance.md and its plot from the stored results.

python tests/bench/pages/performance_page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sparsegate.converter.report.roofline import plot
from sparsegate.converter.report.speed import (
    amdahl_lines,
    commands,
    conditions,
    model_table,
    nothing_line,
    op_rows,
    op_table,
    prefill_table,
    target_table,
    worst,
)
from sparsegate.converter.report.tables import table

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages.paragraphs import page_text
from records.folders import DOCS, RESULTS, repeatable

PAGE, PLOT = DOCS / "performance.md", DOCS / "roofline.png"
OP, PREFILL, NARROW, MODELS = "op_cpu.json", "prefill_cpu.json", "prefill_avx2.json", "model_*.json"
INTRODUCTION = """# Performance

Speed is a ratio against the dense model, measured back to back in one run; a ratio of 1 or less is called not faster.
Everything on this page is written by `python tests/bench/pages/performance_page.py` from the JSON files in
`tests/bench/results/`, which hold machine, versions, command, commit and every row.

How a number comes about: what is compared runs in turns, who goes first alternates, and a sample in which threads
waited for a CPU for more than 5 % of the time is dropped (Linux tells). An op is timed with cold weights (a buffer
larger than the caches is read before every call) and a new random selection at every call, at least 15 clean pairs; its
result is compared with the reference first. GB/s are the bytes really needed, predictor and scales included, never
those of the dense model, and their share is of the fastest of four ways of reading memory with all threads, before and
after the row."""


def load(name: str) -> dict[str, Any] | None:
    """A stored result, or None where it has not been measured."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def models() -> list[dict[str, Any]]:
    """The stored runs of whole models."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(MODELS))]


def losses(op: dict[str, Any] | None, prefill: dict[str, Any] | None, whole: list[dict[str, Any]]) -> list[str]:
    """Every measured case in which the sparse side is not faster, or is below what it was meant to reach."""
    found = []
    for result in (op, prefill):
        for row in op_rows(result) if result else ():
            for dense in row["dense"]:
                if dense["verdict"] == "not faster":
                    kept = "everything kept, no predictor" if row["score"] == "all" else f"{row['asked']:.0%} kept"
                    many = f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"
                    found.append(
                        f"{row['format']}, {many}, {kept}: {dense['ratio']:.2f} times {dense['name']}, not faster"
                    )
    for result in whole:
        for row in result["ratios"]:
            for phase in ("prefill", "decode"):
                if row[phase]["verdict"] == "not faster":
                    found.append(
                        f"{result['settings']['shape']}, {row['role']}, {phase}: {row[phase]['ratio']:.2f} times "
                        f"{row['against']}, not faster"
                    )
    return found


def narrow_table(result: dict[str, Any]) -> str:
    """Speed against the dense product of the same precision, formats and threads down, tokens per call across."""
    rows = {(row["format"], row["threads"], row["tokens"]): row["dense"][0] for row in op_rows(result)}
    counts = sorted({count for *_, count in rows})
    cells = []
    for name, threads in dict.fromkeys((name, threads) for name, threads, _ in rows):
        of = [rows.get((name, threads, count)) for count in counts]
        cells.append(
            [
                name,
                str(threads),
                next(dense["name"] for dense in of if dense),
                *(f"{dense['ratio']:.2f}" if dense else "-" for dense in of),
            ]
        )
    return table((["weights", "threads", "against", *(f"T = {count}" for count in counts)], cells))


def narrow_losses(result: dict[str, Any]) -> list[str]:
    """The cases with AVX2 alone in which the sparse side is not faster."""
    return [
        f"AVX2, {row['format']}, {row['tokens']} tokens, {row['threads']} threads, {row['asked']:.0%} kept: "
        f"{row['dense'][0]['ratio']:.2f} times "
        f"{row['dense'][0]['name']}, not faster"
        for row in op_rows(result)
        if row["dense"][0]["verdict"] == "not faster"
    ]


def narrow_models(result: dict[str, Any]) -> list[str]:
    """Prompts of a whole model with AVX2 alone, where they are stored."""
    if "models" not in result:
        return []
    rows = result["models"]["rows"]
    counts = sorted({row["tokens"] for row in rows})
    cells = [
        [name, *(f"{row['ratio']:.2f}" for row in rows if row["format"] == name)]
        for name in dict.fromkeys(row["format"] for row in rows)
    ]
    text = (
        f"A whole model, {result['models']['name']}, logits of every position, {rows[0]['threads']} threads, "
        "against the dense model of the same precision:"
    )
    return [text, table((["weights", *(f"prompt of {count}" for count in counts)], cells))]


def op_part(op: dict[str, Any]) -> list[str]:
    """The section on one token."""
    settings = op["settings"]
    return [
        "## One token through one MLP",
        f"d = {settings['d']}, n = {settings['n']}, predictor of rank {settings['r']} inside the op, "
        f"{settings['threads']} threads. {conditions(op)}. "
        "Speed against ONNX Runtime's dense product of the same precision: fp16 and bf16 stand against fp32, its "
        "CPU has none faster, with 8 bits beside.",
        target_table(op),
        nothing_line(op),
        "### Every row",
        op_table(op),
        f"![Roofline]({PLOT.name})",
    ]


def prefill_part(prefill: dict[str, Any]) -> list[str]:
    """The section on many tokens in one call."""
    low = "; ".join(
        f"{name} {row['dense'][0]['ratio']:.2f} at {row['tokens']} tokens, "
        + ("no predictor" if row["score"] == "all" else f"{row['asked']:.0%} kept")
        for name, row in worst(prefill).items()
    )
    return [
        "## Many tokens in one call",
        "Every token keeps neurons of its own, drawn independently, the worst case: the union soon holds all of them. "
        f"Speed against ONNX Runtime's dense product of the same precision. {conditions(prefill)}.",
        prefill_table(prefill),
        f"The lowest ratio of each format: {low}.",
    ]


def narrow_part(narrow: dict[str, Any]) -> list[str]:
    """The section on many tokens in one call with AVX2 alone."""
    settings = narrow["settings"]
    return [
        "## Many tokens in one call, AVX2 alone",
        f"d = {settings['d']}, n = {settings['n']} (SmolLM2-135M), score gate, {settings['density']:.0%} of the "
        "neurons kept by every token. Both sides are held to AVX2: sparsegate by its switch, ONNX Runtime by a copy "
        "whose `xgetbv` reports none of AVX-512 (`tests/bench/benchmarks/avx2_prefill.py`). Cold weights; a dash: too "
        f"few clean pairs. {conditions(narrow)}.",
        narrow_table(narrow),
        *narrow_models(narrow),
    ]


def model_part(result: dict[str, Any]) -> list[str]:
    """The section on a whole model."""
    settings = result["settings"]
    timed = {row["runtime"]: row["timed"] for row in result["models"]}
    return [
        f"## {settings['shape']}, {settings['precision']}, whole model",
        f"Random weights of the real sizes, {settings['layers']} layers; {settings['prompt_tokens']} tokens of prompt, "
        f"{settings['new_tokens']} decoded one at a time, the same random ids for all; {settings['threads']} threads "
        f"each, median of {settings['rounds']} rounds in turns; stream {result['stream_gb_per_s']:.1f} GB/s. "
        f"{conditions(result)}.",
        model_table(result),
        *amdahl_lines(result),
        "What is timed: " + "; ".join(f"{runtime}: {what}" for runtime, what in timed.items()) + ".",
    ]


def page() -> str:
    """The whole page."""
    op, prefill, narrow, whole = load(OP), load(PREFILL), load(NARROW), models()
    parts = [INTRODUCTION]
    for part, result in ((op_part, op), (prefill_part, prefill), (narrow_part, narrow)):
        parts += part(result) if result else []
    for result in whole:
        parts += model_part(result)
    everything = [result for result in (op, prefill, narrow, *whole) if result]
    lost = losses(op, prefill, whole) + (narrow_losses(narrow) if narrow else [])
    parts += [
        "## Where sparsegate loses",
        "\n".join(f"- {line}" for line in lost) if lost else "In none of the cases measured.",
        "## CUDA",
        "Kernels for CUDA are built, and an emulation on a CPU tests their arithmetic against the reference; on a GPU "
        f"they were {everything[0]['cuda'] if everything else 'not run'}.",
        "## How to repeat it",
        "\n".join(f"- {repeatable(commands(result))}" for result in everything),
        "The peers are optional: `pip install 'sparsegate[bench]'` brings llama-cpp-python and gguf; one that is not "
        "installed is named as such. `--shape` names the sizes of well-known models, `--layers` shortens them, and "
        "`sparsegate bench DENSE DIR` times two folders of your own.",
    ]
    return page_text(parts)


def write_page() -> None:
    """The page and its plot."""
    DOCS.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    drawn = [result for result in (load(OP), load(PREFILL)) if result]
    if drawn:
        plot(PLOT, drawn)


if __name__ == "__main__":
    write_page()
