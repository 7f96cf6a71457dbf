"""Tables of stored benchmarks, in markdown: nothing is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tables import table

SpeedResult = Mapping[str, Any]
SpeedRow = Mapping[str, Any]
TARGETS = {
    "fp32": {0.5: 1.7, 0.2: 3.8, 0.1: 6.5},
    "fp16": {0.5: 2.7, 0.2: 5.5, 0.1: 9.0},
    "bf16": {0.5: 2.7, 0.2: 5.5, 0.1: 9.0},
    "int8": {0.5: 1.65, 0.2: 3.2, 0.1: 4.7},
    "int4": {0.5: 1.05, 0.2: 1.9, 0.1: 2.8},
}
"""Speed against the dense op of the same precision that the project set itself, by format and density."""


def page(result: SpeedResult) -> str:
    """The table of one result with a line on where it comes from."""
    return "\n\n".join([*_PAGES[result["kind"]](result), f"Written by {commands(result)}."]) + "\n"


def commands(result: SpeedResult) -> str:
    """The commands that made a result, as code."""
    return ", ".join(f"`{command}`" for command in result.get("commands", [result["command"]]))


def conditions(result: SpeedResult) -> str:
    """Machine, versions, commit and date in one line."""
    machine, versions = result["machine"], result["versions"]
    names = ("onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch")
    others = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_bytes'] / 2**30:.0f} GiB, {result['isa']} "
        f"kernels; {others}; "
        f"commit {versions.get('commit') or 'unknown'}, {result['time'][:10]}"
    )


def ratio(row: SpeedRow) -> str:
    """A ratio with its quartiles; at 1 or below it is called not faster."""
    low, high = row["quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f}-{high:.2f}){', not faster' if row['verdict'] == 'not faster' else ''}"


def op_rows(result: SpeedResult) -> list[SpeedRow]:
    """The rows that were run against something."""
    return [row for row in result["rows"] if row["status"] == "run" and row.get("dense")]


def op_table(result: SpeedResult) -> str:
    """Every row of an op: the op, each dense product or peer beside it, bytes per second and their share of
    the stream.
    """
    header = [
        "weights",
        "tokens",
        "kept",
        "against",
        "dense ms",
        "sparse ms",
        "speed against dense",
        "GB/s",
        "share of stream",
    ]
    cells = []
    for row in result["rows"]:
        if row["status"] != "run":
            cells.append(
                [row["format"], str(row["tokens"]), f"{row['asked']:.0%}", row["status"], "-", "-", "-", "-", "-"]
            )
        for place, dense in enumerate(row.get("dense", [])):
            speed = (
                [f"{row['gb_per_s']:.1f}", f"{row['share_of_stream']:.0%} of {row['stream_gb_per_s']:.1f}"]
                if place == 0
                else ["", ""]
            )
            kept = "all, no predictor" if row["score"] == "all" else f"{row['density']:.0%}"
            if "nonzero" in row:
                kept = f"{row['score']}: {kept}, {row['opened']:.0%} open, {row['nonzero']:.0%} not zero"
            cells.append(
                [
                    row["format"],
                    str(row["tokens"]),
                    kept,
                    dense["name"],
                    f"{dense['ms']:.2f}",
                    f"{row['ms']:.2f}",
                    ratio(dense),
                    *speed,
                ]
            )
    return table((header, cells)).rstrip("\n")


def nothing_line(result: SpeedResult) -> str:
    """What a call costs that keeps nothing, weights warm."""
    rows = [row for row in result["rows"] if row["score"] == "nothing" and row["status"] == "run"]
    if not rows:
        return ""
    return (
        "With nothing selected, weights warm: "
        + ", ".join(f"{row['format']} {row['warm_ms']:.3f} ms" for row in rows)
        + "."
    )


def target_table(result: SpeedResult) -> str:
    """One token, by format: measured beside the target."""
    header = ["weights", "against", *(f"{share:.0%}" for share in (0.5, 0.2, 0.1)), "all, no predictor"]
    cells = []
    for name, wanted in TARGETS.items():
        rows = {
            row["asked"]: row
            for row in op_rows(result)
            if row["format"] == name and row["tokens"] == 1 and row["score"] != "all"
        }
        everything = next(
            (row for row in op_rows(result) if row["format"] == name and row["tokens"] == 1 and row["score"] == "all"),
            None,
        )
        if not rows:
            continue
        for place, dense in enumerate(next(iter(rows.values()))["dense"]):
            line = [name, dense["name"]]
            for share, target in wanted.items():
                line.append(
                    f"{rows[share]['dense'][place]['ratio']:.2f}{f' (target {target:g})' if place == 0 else ''}"
                    if share in rows
                    else "-"
                )
            cells.append([*line, "-" if everything is None else f"{everything['dense'][place]['ratio']:.2f}"])
    return table((header, cells)).rstrip("\n")


def prefill_table(result: SpeedResult) -> str:
    """Speed against the dense product of the same precision, formats and densities down, tokens per call across."""
    rows = [row for row in op_rows(result) if row["tokens"] > 1]
    counts = sorted({row["tokens"] for row in rows})
    groups = list(dict.fromkeys((row["format"], row["asked"], row["score"]) for row in rows))
    cells = []
    for name, kept, score in groups:
        by = {row["tokens"]: row for row in rows if (row["format"], row["asked"], row["score"]) == (name, kept, score)}
        first = next(iter(by.values()))["dense"][0]["name"]
        ratios = [f"{by[count]['dense'][0]['ratio']:.2f}" if count in by else "-" for count in counts]
        cells.append([name, "all, no predictor" if score == "all" else f"{kept:.0%}", first, *ratios])
    return table((["weights", "kept", "against", *(f"T = {count}" for count in counts)], cells)).rstrip("\n")


def worst(result: SpeedResult) -> dict[str, SpeedRow]:
    """By format the row of several tokens with the lowest ratio against the dense product of the same precision."""
    slowest: dict[str, SpeedRow] = {}
    for row in op_rows(result):
        if row["tokens"] > 1 and (
            row["format"] not in slowest or row["dense"][0]["ratio"] < slowest[row["format"]]["dense"][0]["ratio"]
        ):
            slowest[row["format"]] = row
    return slowest


def model_table(result: SpeedResult) -> str:
    """Every model of a run: tokens per second, bytes per second, memory, and the sparse model's speed against it."""
    header = [
        "model",
        "runtime",
        "prefill tok/s",
        "decode tok/s",
        "GB/s",
        "share of stream",
        "peak memory",
        "sparse / this, prefill",
        "sparse / this, decode",
    ]
    sparse = next((row["role"] for row in result["models"] if row["role"].startswith("sparse")), None)
    cells = []
    for row in result["models"]:
        if row["status"] != "run":
            cells.append([row["role"], row["runtime"], row["status"], *["-"] * 6])
            continue
        against = next(
            (entry for entry in result["ratios"] if entry["role"] == sparse and entry["against"] == row["role"]), None
        )
        name = f"{row['role']}, {row['density']:.1%} kept" if "density" in row else row["role"]
        memory = row.get("peak_bytes")
        cells.append(
            [
                f"{name} ({row['format']})",
                row["runtime"],
                f"{row['prefill_tokens_per_s']:.1f}",
                f"{row['decode_tokens_per_s']:.2f}",
                f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "-",
                f"{row['share_of_stream']:.0%}" if "gb_per_s" in row else "-",
                f"{memory / 1e9:.2f} GB" if memory else "-",
                *(ratio(against[phase]) if against else "-" for phase in ("prefill", "decode")),
            ]
        )
    return table((header, cells)).rstrip("\n")


def amdahl_lines(result: SpeedResult) -> list[str]:
    """Measured against expected, for every sparse model."""
    lines = []
    for row in result.get("amdahl", []):
        if row["status"] != "run":
            lines.append(f"Expectation of {row['role']}: {row['status']}.")
            continue
        lines.append(
            f"The MLP takes {row['mlp_share']:.0%} of a dense token; the op alone is {row['op_ratio']:.2f} times as "
            f"fast at {row['density']:.1%} "
            f"kept, so Amdahl's law gives {row['expected']:.2f} for {row['role']}. Measured: {row['measured']:.2f}, "
            f"which is {row['measured_to_expected']:.2f} of that."
        )
    return lines


def _op_page(result: SpeedResult) -> list[str]:
    settings = result["settings"]
    sizes = f"{settings['op']}, d = {settings['d']}, n = {settings['n']}" + (
        f", predictor of rank {settings['r']}" if settings["op"] == "gated_mlp" else ""
    )
    roofs = result["roofs"]
    head = (
        f"{sizes}; {settings['threads']} threads, weights from memory, a new selection at every call; "
        f"{conditions(result)}. A dense fp32 product of 512 rows: "
        f"{roofs['gemm_gflop_per_s']:.0f} Gflop/s. CUDA: {result['cuda']}."
    )
    return [part for part in (head, op_table(result), nothing_line(result)) if part]


def _model_page(result: SpeedResult) -> list[str]:
    settings = result["settings"]
    head = (
        f"{settings['shape']}, random weights, {settings['layers']} layers, {settings['prompt_tokens']} tokens of "
        f"prompt and {settings['new_tokens']} decoded "
        f"one at a time, the same random ids for all; {settings['threads']} threads, median of {settings['rounds']} "
        "rounds in turns; "
        f"stream {result['stream_gb_per_s']:.1f} GB/s; {conditions(result)}. CUDA: {result['cuda']}."
    )
    return [head, model_table(result), *amdahl_lines(result)]


_PAGES: dict[str, Callable[[SpeedResult], Sequence[str]]] = {"op": _op_page, "model": _model_page}
