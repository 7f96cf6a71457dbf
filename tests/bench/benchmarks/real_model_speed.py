"""A real model in every runtime: its graphs and GGUF files, each a stage below the work folder; what each loses on the
same token windows; and their speeds, in one run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.real_model_plans import Study
from records.real_model_results import BASELINE, PRECISIONS, Shipped
from sparsegate.converter.checkpoint.plan import Plan
from sparsegate.converter.checkpoint.stage import (
    Header,
    atomic_folder,
    hash_file,
    is_finished,
    read_header,
    write_header,
    write_json,
)
from sparsegate.converter.checkpoint.writer import write_checkpoint
from sparsegate.converter.evaluation.quality import clustered_error
from sparsegate.converter.evaluation.speed.model import TimedModel, bench_models
from sparsegate.converter.evaluation.speed.peers import OPENERS
from sparsegate.converter.modeling.gated import load_dense
from sparsegate.converter.onnx_export.base_graph import build_base, check_base
from sparsegate.converter.onnx_export.export import export
from sparsegate.converter.onnx_export.float_graph import float_graph
from sparsegate.converter.onnx_export.gated_graph import export_dense
from sparsegate.runtime_onnx.bench import folders
from sparsegate.runtime_onnx.errors import InputError
from sparsegate.runtime_onnx.session import Decoder
from sparsegate.runtime_onnx.untrusted import read_json

BUILDER_PRECISIONS = ("int8", "int4")
GENAI, GENAI_AVX2, LLAMA = "onnxruntime-genai", "onnxruntime-genai, AVX2", "llama.cpp"
Q4_0 = "Q4_0"


@dataclass(frozen=True)
class Timing:
    """Tokens of the prompt, tokens decoded, rounds, threads of every runtime, windows whose losses are measured, and
    whether peak memory is.
    """

    prompt: int = 128
    decoded: int = 32
    rounds: int = 11
    threads: int = 2
    windows: int = 32
    memory: bool = True


class Loss(BaseModel):
    """What one model loses: tokens and NLL (nats) of every window, in order."""

    tokens: list[int]
    nll: list[float]


def entries(study: Study, plan: Plan, plan_header: Header, gguf: Path | None) -> dict[str, TimedModel]:
    """The models by role, made where they are not there yet: dense and the plan in every precision, the plan with
    kernels forced to AVX2, the graphs of onnxruntime-genai's own builder, and llama.cpp's files where a GGUF file is
    there.
    """
    base = _base(study)
    found = {BASELINE: TimedModel(GENAI, base, "fp32")}
    for precision in PRECISIONS[1:]:
        path = _stage(
            study,
            f"dense_{precision}",
            base,
            {"precision": precision},
            lambda out, p=precision: export_dense(base, out, p),
        )
        found[f"dense {precision}"] = TimedModel(GENAI, path, precision)
    for precision in PRECISIONS:
        path = _stage(
            study,
            f"sparse_{precision}",
            base,
            {"plan": plan_header.fingerprint, "precision": precision},
            lambda out, p=precision: _sparse(study, base, plan, out, p),
        )
        found[f"sparse {precision}"] = TimedModel(GENAI, path, precision)
    for precision in PRECISIONS:
        found[f"sparse {precision} AVX2"] = TimedModel(GENAI_AVX2, found[f"sparse {precision}"].path, precision)
    for precision in BUILDER_PRECISIONS:
        path = _stage(
            study,
            f"genai_{precision}",
            base,
            {"builder": precision},
            lambda out, p=precision: build_base(study.folder, out, p) and None,
        )
        found[f"genai {precision}"] = TimedModel(GENAI, path, precision)
    if gguf is not None:
        found |= {
            f"llama.cpp {form}": TimedModel(LLAMA, path, form) for form, path in _llama_files(study, gguf).items()
        }
    return found


def _base(study: Study) -> Path:
    def check(graph: Path) -> None:
        check_base(graph, load_dense(study.folder), study.heldout.tokens[:2, :32])

    return float_graph(study.source, study.work / "graphs" / "base", check=check)


def _stage(study: Study, name: str, base: Path, config: dict[str, Any], make: Callable[[Path], None]) -> Path:
    parent = read_header(base)
    assert parent is not None
    folder, header = (
        study.work / "graphs" / name,
        Header(format="graph", parents={"base": parent.fingerprint}, config=config),
    )
    if not is_finished(folder, header):
        with atomic_folder(folder) as partial:
            make(partial)
            write_header(partial, header)
    return folder


def _sparse(study: Study, base: Path, plan: Plan, out: Path, precision: str) -> None:
    with TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(study.source, plan, checkpoint)
        export(checkpoint, out, precision, base=base)


def _llama_files(study: Study, gguf: Path) -> dict[str, Path]:
    """The very file, and one that llama.cpp rounds to Q4_0 from it; where llama.cpp is not installed the latter is not
    made.
    """
    form = gguf_format(gguf)
    made = study.work / "graphs" / f"{gguf.stem}.from-{hash_file(gguf)[:12]}.{Q4_0}.gguf"
    if OPENERS[LLAMA].missing() is None and not made.is_file() and form != Q4_0:
        from sparsegate.converter.evaluation.speed.llama_cpp_peer import quantise

        quantise(gguf, made, Q4_0)
    return {form: gguf} if form == Q4_0 else {form: gguf, Q4_0: made}


def gguf_format(path: Path) -> str:
    """The format in a GGUF file's name, as in model.Q4_1.gguf. Raises InputError where it names none."""
    found = re.search(r"[.-]((?:Q\d+_\w+|F16|BF16|F32))\.gguf$", path.name, re.IGNORECASE)
    if found is None:
        raise InputError(
            f"The GGUF file's name must end with its format, as in model.Q4_1.gguf, got {path.name}. Rename it."
        )
    return found[1].upper()


# Losses


def losses(study: Study, models: dict[str, TimedModel], timing: Timing) -> dict[str, Loss]:
    """The loss of every model that can be run, each a stage: the same ids go into all of them."""
    found = {}
    for role, entry in models.items():
        if OPENERS[entry.runtime].missing() is not None:
            continue
        same = next((other for other in found if models[other].path == entry.path), None)
        found[role] = found[same] if same is not None else _loss(study, role, entry, timing)
    return found


def _loss(study: Study, role: str, entry: TimedModel, timing: Timing) -> Loss:
    windows = study.heldout.tokens[: timing.windows]
    header = read_header(entry.path) if entry.path.is_dir() else None
    made = Header(
        format="loss",
        parents={"model": hash_file(entry.path) if header is None else header.fingerprint},
        config={"windows": len(windows)},
        calibration=study.heldout.sha256,
    )
    folder = study.work / "losses" / role.replace(" ", "_")
    if not is_finished(folder, made):
        logits = (
            _llama_logits(entry, windows.shape[1], timing.threads) if entry.runtime == LLAMA else _onnx_logits(entry)
        )
        nll = [window_nll(logits(window), window) for window in tqdm(windows, desc=f"loss of {role}", unit="window")]
        with atomic_folder(folder) as partial:
            write_json(
                partial / "loss.json", Loss(tokens=[len(window) - 1 for window in windows], nll=nll).model_dump()
            )
            write_header(partial, made)
    return Loss.model_validate(read_json(folder / "loss.json", "A stored loss"))


def window_nll(logits: np.ndarray, window: Tensor) -> float:
    """NLL in nats of the tokens after the first of a window [T], from logits [T, V]."""
    chances = torch.from_numpy(logits)[:-1].double().log_softmax(-1)
    return float(-chances.gather(1, window[1:, None]).sum())


def _onnx_logits(entry: TimedModel) -> Callable[[Tensor], np.ndarray]:
    decoder = Decoder(entry.path)

    def logits(window: Tensor) -> np.ndarray:
        decoder.reset()
        return decoder(window.numpy())

    return logits


def _llama_logits(entry: TimedModel, context: int, threads: int) -> Callable[[Tensor], np.ndarray]:
    from sparsegate.converter.evaluation.speed.llama_cpp_peer import Llama

    model = Llama(entry.path, threads, context)
    return lambda window: model.all_logits(window.tolist())


def shipped(losses: dict[str, Loss]) -> dict[str, Shipped]:
    """Every model's loss beside the dense one's in fp32, window by window."""
    base = torch.tensor(losses[BASELINE].nll, dtype=torch.float64)
    found = {}
    for role, loss in losses.items():
        counts, nll = torch.tensor(loss.tokens, dtype=torch.float64), torch.tensor(loss.nll, dtype=torch.float64)
        total = float(counts.sum())
        error = 0.0 if role == BASELINE else clustered_error(nll - base, counts)
        found[role] = Shipped(
            tokens=int(total),
            windows=len(counts),
            nll=float(nll.sum()) / total,
            difference=float((nll - base).sum()) / total,
            error=error if math.isfinite(error) else 0.0,
        )
    return found


# Speeds


def speeds(study: Study, models: dict[str, TimedModel], timing: Timing, command: str) -> dict[str, Any]:
    """`bench_models` of all models on held-out text, a stage."""
    header = Header(
        format="speed",
        parents={"model": study.source.fingerprint} | {role: _fingerprint(entry) for role, entry in models.items()},
        config=timing.__dict__,
        calibration=study.heldout.sha256,
    )
    folder = study.work / "speed"
    if not is_finished(folder, header):
        ids = (
            study.heldout.tokens[: 1 + (timing.prompt + timing.decoded) // study.heldout.tokens.shape[1]]
            .flatten()
            .tolist()
        )
        settings = {"model": study.source.name, "density": None, "precision": "each its own"}
        result = bench_models(
            models,
            ids,
            folders.BenchTiming(timing.prompt, timing.decoded, timing.rounds, timing.threads),
            settings,
            memory=timing.memory,
            command=command,
        )
        with atomic_folder(folder) as partial:
            write_json(partial / "speed.json", result)
            write_header(partial, header)
    return read_json(folder / "speed.json", "The stored speeds")


def _fingerprint(entry: TimedModel) -> str:
    header = read_header(entry.path) if entry.path.is_dir() else None
    if header is not None:
        return header.fingerprint
    return hash_file(entry.path) if entry.path.is_file() else "missing"
