"""The fuzz test's parts: folders to damage, who reads them, a child that damages and reads many, and the watchdog over
it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from forks import start
from fuzz_mutations import (
    PLACES,
    Mutation,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_text,
    mutate_yaml,
)
from fuzz_readers import READERS, REFERENCES, Fault, Stopped

SILENCE, SLOW, LARGE = 60.0, 15.0, 1 << 30
"""Seconds until a reader that says nothing hangs, seconds of CPU that no damaged file may take, bytes of memory."""
ADDRESSES = 6 << 30  # bytes of address space beyond the present that a child may map


@dataclass(frozen=True)
class Row:
    """A file below the fuzzed folders ("" for flags), how it is damaged, and who reads it then, in turns; `slow`
    readers take a second.
    """

    file: str
    mutate: Callable[[bytes, random.Random], Mutation]
    readers: tuple[str, ...]
    weight: int = 2
    slow: tuple[str, ...] = ()


ROWS = (
    Row("model/config.json", mutate_json, ("inspect", "dense", "dry"), 6),
    Row("model/model.safetensors", mutate_safetensors, ("inspect", "dense"), 5),
    Row("sharded/model.safetensors.index.json", mutate_json, ("inspect", "dense"), 3),
    Row("model/tokenizer.json", mutate_json, ("words",), 3),
    Row("model/tokenizer_config.json", mutate_json, ("words",), 3),
    Row("model/generation_config.json", mutate_json, ("inspect", "ends"), 2),
    Row("out/config.json", mutate_json, ("load", "text"), 3, ("judged",)),
    Row("out/sparsity/sparsity.safetensors", mutate_safetensors, ("load",), 5, ("judged",)),
    Row("out/manifest.json", mutate_json, ("files",), 3, ("judged",)),
    Row("out/onnx/genai_config.json", mutate_json, ("decoder", "generate", "link", "bench"), 5, ("judged",)),
    Row("out/onnx/model.onnx", mutate_bytes, ("decoder", "generate", "link", "bench"), 5, ("judged",)),
    Row("out/onnx/model.onnx.data", mutate_bytes, ("decoder", "bench"), 2, ("judged",)),
    Row("out/onnx/tokenizer.json", mutate_json, ("text", "generate"), 3, ("judged",)),
    Row("out/onnx/tokenizer_config.json", mutate_json, ("text", "generate"), 2),
    Row("out/onnx/chat_template.jinja", mutate_text, ("chat",), 1),
    Row("linked/sparsegate_link.json", mutate_json, ("unlink",), 1),
    Row("linked/genai_config.json", mutate_json, ("unlink",), 1),
    Row("powerinfer.gguf", mutate_bytes, ("gguf",), 4),
    Row("predictors/model_0.safetensors", mutate_safetensors, ("predictors",), 2),
    Row("predictors/config.json", mutate_json, ("predictors",), 1),
    Row("recipe.yaml", mutate_yaml, ("recipe", "recipe", "started"), 5),
    Row("text.txt", mutate_text, ("started",), 3),
    Row("", lambda data, drawn: Mutation("", False), ("flags",), 6),
)


@dataclass(frozen=True)
class Case:
    """One try: its seed, the row of ROWS and the reader."""

    seed: int
    row: int
    reader: str


@dataclass(frozen=True)
class Found:
    """What a case came to: `outcome` is refused, accepted, or a fault: traceback, lines, silent, half-written, slow,
    memory, hang, crash.
    """

    case: Case
    outcome: str
    mutation: str
    note: str
    seconds: float = 0.0


GOOD = ("refused", "accepted")


def undamaged() -> list[Case]:
    """Every reader of a file on folders as they were made: seed 0 damages nothing."""
    return list(
        {
            reader: Case(0, k, reader) for k, row in enumerate(ROWS) if row.file for reader in row.readers + row.slow
        }.values()
    )


def draw(count: int, seed: int, files: Sequence[str] | None = None, slow: bool = False) -> list[Case]:
    """`count` cases, rows by weight; with `slow` readers where asked."""
    drawn = random.Random(seed)
    rows = [k for k, row in enumerate(ROWS) if files is None or row.file in files]
    chosen = drawn.choices(rows, weights=[ROWS[k].weight for k in rows], k=count)
    return [
        Case(drawn.randrange(1, 1 << 40), k, drawn.choice(ROWS[k].readers + (ROWS[k].slow if slow else ())))
        for k in chosen
    ]


def make_folders(root: Path) -> Path:
    """A model, its shards, a sparse checkpoint with its graph and manifest, a PowerInfer file, predictors, a recipe and
    a text below `root`.
    """
    import torch
    from models import make_model, put_predictors
    from safetensors.torch import load_file, save_file
    from small_recipe import small_recipe

    from sparsegate.converter.arch.site import Site
    from sparsegate.converter.checkpoint.manifest import Manifest, list_files, write_manifest
    from sparsegate.converter.checkpoint.plan import SitePlan, Threshold
    from sparsegate.converter.checkpoint.source import INDEX, SINGLE, open_source
    from sparsegate.converter.checkpoint.writer import write_checkpoint
    from sparsegate.converter.onnx_export.export import export
    from sparsegate.converter.pipeline.recipe import make_recipe
    from sparsegate.converter.sources.powerinfer import write_powerinfer
    from sparsegate.converter.sources.predictors import predictors_beside
    from sparsegate.runtime_onnx import link

    model = make_model("llama", root / "model")
    shutil.copytree(model, root / "sharded")
    tensors = load_file(model / SINGLE)
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    (root / "sharded" / SINGLE).unlink()
    parts = {name: shards[number % 2] for number, name in enumerate(names)}
    for shard in shards:
        save_file(
            {name: tensors[name] for name in names if parts[name] == shard}, root / "sharded" / shard, {"format": "pt"}
        )
    (root / "sharded" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    out, source = root / "out", open_source(model)
    plan: Any = {
        Site(layer): SitePlan(
            gate=Threshold("gate", torch.rand(176, generator=torch.Generator().manual_seed(layer)), 0.5)
        )
        for layer in range(2)
    }
    out.mkdir()
    write_checkpoint(source, plan, out)
    export(out, out / "onnx", base=root / "base")
    shutil.copytree(out / "onnx", root / "linked")
    link(root / "linked")
    recipe = make_recipe({"model": "model"}).model_dump(mode="json")
    write_manifest(
        out,
        Manifest(
            fingerprint="0",
            source={},
            calibration={},
            recipe=recipe,
            seed=0,
            budget={},
            measured={"nll": 1.0, "kl": 0.1},
            versions={},
            files=list_files(out),
        ),
    )
    relu = open_source(put_predictors(make_model("llama", root / "relu", hidden_act="relu")))
    write_powerinfer(relu, predictors_beside(relu), root / "powerinfer.gguf", precision="fp32")
    (root / "predictors").mkdir()
    for layer in range(2):
        fc1, fc2 = torch.ones(3, 64), torch.ones(176, 3)
        save_file({"fc1.weight": fc1, "fc2.weight": fc2}, root / "predictors" / f"model_{layer}.safetensors")
    (root / "predictors" / "config.json").write_text('{"sparse_threshold": 0.0, "tap": "input"}')
    small_recipe("model", root)
    (root / "recipe.yaml").write_text((root / "recipe.yaml").read_text().replace(str(root / "text.txt"), "text.txt"))
    return root


# The watchdog


def run(
    cases: Sequence[Case], root: Path, place: Path, preamble: str = "", together: int = 100, silence: float = SILENCE
) -> list[Found]:
    """Every case in children of `together` cases each; `preamble` is Python run in each child first. A child that hangs
    or dies costs its case alone.
    """
    found: list[Found] = []
    place.mkdir()
    while len(found) < len(cases):
        waiting = cases[len(found) :][:together]
        number = len(found)
        order = place / f"{number}.json"
        order.write_text(
            json.dumps(
                {
                    "cases": [asdict(case) for case in waiting],
                    "root": str(root),
                    "place": str(place),
                    "preamble": preamble,
                }
            )
        )
        fork = start(place, order, call=f"{__file__}:child", name=f"said-{number}")
        lines, ended = _watch(fork, order.with_suffix(".found"), len(waiting), silence)
        found += [Found(case, *json.loads(line)) for case, line in zip(waiting, lines, strict=False)]
        if len(lines) < len(waiting):
            found.append(
                Found(
                    waiting[len(lines)],
                    "hang" if ended is None else "crash",
                    _about(order),
                    f"status {ended}: {fork.text[-500:]}",
                )
            )
    return found


def _watch(fork: Any, results: Path, count: int, silence: float) -> tuple[list[str], int | None]:
    """The lines of results that a child wrote, and how it ended; None where it had to be killed."""
    seen, since, lines = -1, time.monotonic(), list[str]()
    while len(lines) < count:
        lines = results.read_text().splitlines() if results.exists() else []
        if len(lines) > seen:
            seen, since = len(lines), time.monotonic()
        if time.monotonic() - since > silence:
            fork.kill()
            fork.wait()
            return lines, None
        if _is_gone(fork.process):
            lines = results.read_text().splitlines() if results.exists() else []
            break
        time.sleep(0.02)
    return lines, fork.wait()


def _is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _about(order: Path) -> str:
    begun = order.with_suffix(".begun")
    return begun.read_text() if begun.exists() else "before the first case"


# The child


def child(order: str) -> int:
    """Damage and read, case by case; a line of JSON each."""
    asked = json.loads(Path(order).read_text())
    results, begun = Path(order).with_suffix(".found"), Path(order).with_suffix(".begun")
    _shield()
    exec(asked["preamble"], {})
    root, place = Path(asked["root"]), Path(asked["place"])
    for number, fields in enumerate(asked["cases"]):
        case = Case(**fields)
        row, (mutation, drawn) = ROWS[case.row], mutation_of(case, root)
        here = place / f"{Path(order).stem}-{number}" / "a" / "b" / "c"
        _prepare(case, mutation, root, here)
        begun.write_text(f"{row.file}: {mutation.what}, read by {case.reader}")
        os.chdir(here)
        began, memory = time.process_time(), _memory()
        outcome, note = _judged(case, row, mutation, here, root, drawn)
        seconds, more = time.process_time() - began, _memory() - memory
        if outcome in GOOD and (seconds > SLOW or more > LARGE):
            outcome, note = (
                ("slow", f"{seconds:.0f} s: {note}") if seconds > SLOW else ("memory", f"{more >> 20} MiB: {note}")
            )
        os.chdir(place)
        shutil.rmtree(here.parents[2], ignore_errors=True)
        with open(results, "a") as file:
            file.write(
                json.dumps([outcome, f"{row.file}: {mutation.what}, read by {case.reader}", note, seconds]) + "\n"
            )
    return 0


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _shield() -> None:
    """No network, bounded memory, and no work behind the point where everything was read."""
    from sparsegate.converter.evaluation.speed import run as bench
    from sparsegate.converter.pipeline import auto, texts
    from sparsegate.converter.pipeline import convert as conversion
    from sparsegate.converter.training import stages as tuning
    from sparsegate.runtime_onnx.bench import folders

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    def stop(*_: Any, **__: Any) -> Any:
        raise Stopped

    socket.socket.connect = refuse  # type: ignore[method-assign]
    for module, name in (
        (conversion, "once"),
        (auto, "make"),
        (texts, "_write"),
        (tuning, "train_stages"),
        (folders, "rounds"),
        (bench, "random_folders"),
        (bench, "bench_op"),
    ):
        setattr(module, name, stop)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, mapped + ADDRESSES))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.alarm(1800)  # should nobody watch any more


def mutation_of(case: Case, root: Path) -> tuple[Mutation, random.Random]:
    """What a case does to its file of the undamaged folders, and where its random numbers are then."""
    row, drawn = ROWS[case.row], random.Random(case.seed)
    if not row.file:
        return Mutation("flags", False), drawn
    if not case.seed:
        return Mutation("nothing", True), drawn
    if drawn.random() < 0.04:
        name = drawn.choice(sorted(PLACES))
        return Mutation(name, "zeros" not in name, place=PLACES[name]), drawn
    return row.mutate((root / row.file).read_bytes(), drawn), drawn


def _prepare(case: Case, mutation: Mutation, root: Path, here: Path) -> None:
    """The folders at `here`, files as hard links, but for the damaged one."""
    shutil.copytree(root, here, copy_function=os.link, ignore=shutil.ignore_patterns("base", "relu"))
    file = ROWS[case.row].file
    if file and case.seed:
        (here / file).unlink()
        if mutation.place is None:
            (here / file).write_bytes(mutation.data)
        else:
            mutation.place(here / file)


def _judged(case: Case, row: Row, mutation: Mutation, here: Path, root: Path, drawn: random.Random) -> tuple[str, str]:
    before = _tree(here)
    try:
        value, note = READERS[case.reader](here, drawn)
    except Stopped:
        value, note = None, "stopped"
    except Fault as fault:
        return fault.args[0], fault.args[1]
    except BaseException as error:
        if _is_refusal(error):
            value, note = None, ""
            return _unchanged(before, here, "refused", str(error))
        return "traceback", "".join(traceback.format_exception(error))[-3000:]
    if note.startswith("refused"):
        return _unchanged(before, here, "refused", note)
    if (
        case.reader in REFERENCES
        and not _equal(value, _reference(case.reader, str(root)))
        and (mutation.keeps or not _named_by_files(here, row.file))
    ):
        return "silent", f"another result: {note}"
    return "accepted", note


def _unchanged(before: dict[str, int], here: Path, outcome: str, note: str) -> tuple[str, str]:
    after = _tree(here)
    odd = sorted(
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not name.startswith("o.work")
    )
    return ("half-written", f"{odd[:5]} after: {note}") if odd else (outcome, note)


def _tree(here: Path) -> dict[str, int]:
    return {
        path.relative_to(here).as_posix(): path.lstat().st_size
        for path in here.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def _is_refusal(error: BaseException) -> bool:
    from sparsegate.runtime_onnx.errors import InputError

    return isinstance(error, InputError)


def _named_by_files(here: Path, file: str) -> bool:
    """Whether `verify` would say that the damaged file is not as written; files outside of OUT have no manifest."""
    from sparsegate.converter.checkpoint.manifest import check_files, read_manifest

    if not file.startswith("out/"):
        return True
    return any(
        line.startswith(file.removeprefix("out/")) for line in check_files(here / "out", read_manifest(here / "out"))
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and a.shape == b.shape and bool(np.allclose(a, b, atol=1e-5))
    return bool(a == b)


@cache
def _reference(reader: str, root: str) -> Any:
    return READERS[reader](Path(root), random.Random(0))[0]
