"""Whether the executors of an ONNX folder agree with torch: ONNX body and kernel, in plain ONNX Runtime and in onnxruntime-genai.

Equality is judged on short windows and greedy tokens, where a score near its threshold excuses a difference (such windows are counted, not compared) because
rounding may flip it. A file in less than fp32 is compared with the torch model that holds its rounded weights: within the same bound where activations stay in
float32, and by NLL and KL where they are rounded too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime_onnx.library import PROVIDERS, executor
from ..runtime_onnx.session import Decoder
from .artifact import InputError
from .data import Batches
from .onnx_export import PRECISIONS, onnx_logits, open_float
from .quality import compare_torch, measure_executor
from .recipe import Export
from .reference import recording
from .verification import ACTIVATION_NLL, LOGIT_BOUND, NLL_BOUND, Check, ExecutorQuality

log = logging.getLogger("sparsegate")
NO_CUDA = "no CUDA device was at hand"
MARGIN = 1e-4
REMAINING = 0.8
ACTIVATION_KL = 0.05
"""Nats per token that rounding activations to 8 bits or half precision may cost, beside ACTIVATION_NLL; measured on the bundled model: 0.0003 to 0.002 with
one op a layer, 0.024 with six, whose thresholds pass rounding on."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, FULL_MATCHES = 10, 16, 64, 8
_LENGTHS = (16, 8, 4, 2, 1)
_CHECKED_TOKENS = 512


@dataclass(frozen=True)
class Probe:
    """Token windows for equality checks, made once a checkpoint: `windows` [N, T] with sparse logits [N, T, V], `compare` [N, T]; greedy rows with how
    many new tokens each must match; `ends` are the tokens that end a text.
    """

    windows: Tensor
    logits: Tensor
    compare: Tensor
    greedy: Tensor
    must_match: list[int]
    ends: frozenset[int]

    @property
    def remaining(self) -> float:
        """Share of the windows' positions that are compared."""
        return float(self.compare.float().mean())


@torch.no_grad()
def make_probe(model: Any, batches: Batches) -> Probe:
    """Sparse logits on the longest windows of which enough positions stay clear of thresholds, or on the longest of all where there are none, and greedy
    continuations of PROMPTS prompts.

    A model is causal, so a position is compared when no score at it or before it in its window is near its threshold.
    """
    rows = batches.tokens[batches.mask.all(dim=1)]
    if len(rows) < 1 or rows.shape[1] < PROMPT_TOKENS + 1:
        raise InputError(f"Held-out text must hold a full window of {batches.tokens.shape[1]} tokens, got less. Give more text.")
    tried: list[tuple[Tensor, Tensor, Tensor]] = []
    for length in _LENGTHS:
        per_row = rows.shape[1] // length
        windows = rows[:, : per_row * length].reshape(-1, length)
        windows = windows[:: max(1, len(windows) * length // _CHECKED_TOKENS)][: max(8, _CHECKED_TOKENS // length)]
        with recording(model) as record:
            logits = model(input_ids=windows.to(model.device)).logits.float().cpu()
            near = _near(record, windows)
        tried.append((windows, logits, near.cumsum(1) == 0))
        if float(tried[-1][2].float().mean()) >= REMAINING:
            break
    enough = float(tried[-1][2].float().mean()) >= REMAINING
    windows, logits, compare = tried[-1 if enough else 0]
    prompts = rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS, :PROMPT_TOKENS]
    while len(prompts) < PROMPTS:
        prompts = torch.cat([prompts, rows[: PROMPTS - len(prompts), len(prompts) : len(prompts) + PROMPT_TOKENS]])
    greedy = _greedy(model, prompts)
    with recording(model) as record:
        scores = model(input_ids=greedy.to(model.device)).logits.float().cpu()
        near = _near(record, greedy)
    top = scores.topk(2, dim=-1).values
    doubtful = near | (top[..., 0] - top[..., 1] < MARGIN)
    first = [int(row.nonzero()[0]) if bool(row.any()) else greedy.shape[1] for row in doubtful]
    must = [min(max(0, at - PROMPT_TOKENS + 1), greedy.shape[1] - PROMPT_TOKENS) for at in first]
    ends = model.config.eos_token_id
    return Probe(windows, logits, compare, greedy, must, frozenset(ends if isinstance(ends, list) else [ends]))


def _near(record: Any, tokens: Tensor) -> Tensor:
    flags = torch.zeros(tokens.shape, dtype=torch.bool)
    for site in record.near.values():
        flags |= site.view(tokens.shape).cpu()
    return flags


def _greedy(model: Any, prompts: Tensor) -> Tensor:
    limit = int(getattr(model.config, "max_position_embeddings", 1 << 30))
    new = min(NEW_TOKENS, limit - prompts.shape[1] - 1)
    tokens = prompts.to(model.device)
    out = model(input_ids=tokens, use_cache=True)
    for _ in range(new):
        following = out.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
        out = model(input_ids=following, past_key_values=out.past_key_values, use_cache=True)
    return tokens.cpu()


def check_onnx(onnx: Path, model: Any, batches: Batches, export: Export | None = None, original: Any | None = None) -> list[Check]:
    """Equality of every executor of an ONNX folder with the gated torch model: body and kernel, in plain ONNX Runtime and in onnxruntime-genai.

    `model` holds the weights of the file (`round_model`); notes name the divergence from `original`, or from the ungated model. A graph for CUDA without a CUDA
    device here is run by the CPU as far as that has kernels.
    """
    export = export or Export()
    cuda = export.target == "cuda"
    if cuda and not has_cuda():
        return [*_on_cpu(onnx, model, batches), _not_run("kernel", NO_CUDA), _not_run("genai", NO_CUDA)]
    provider = PROVIDERS[cuda]
    rounded = cuda or PRECISIONS[export.precision].bits is not None
    probe = make_probe(model, batches)
    chosen = executor(onnx, provider)
    checks = [_logits_check("float activations logits", FloatBody(onnx), probe)] if rounded and not cuda else []
    for name, library in (("body", False), ("kernel", True)):
        if library and not chosen.kernel:
            checks.append(_not_run(name, chosen.reason))
            continue
        decoder = Decoder(onnx, [provider, PROVIDERS[0]] if cuda else None, library=library)
        if rounded:
            checks += _activation_checks(name, decoder, model, batches)
            probe = _own_greedy(decoder, probe)
        else:
            checks += [_logits_check(f"{name} logits", decoder, probe), _quality_check(name, decoder, model, batches, original)]
        checks.append(_greedy_check(f"genai {name}", _genai_tokens(onnx, probe, library), probe))
    return checks


def has_cuda() -> bool:
    """Whether ONNX Runtime can open a CUDA device here."""
    import onnxruntime

    return PROVIDERS[1] in onnxruntime.get_available_providers() and (torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*")))


def _not_run(name: str, reason: str) -> Check:
    return Check(name=name, value=0, bound=0, passed=True, note=f"not run: {reason}")


def _on_cpu(onnx: Path, model: Any, batches: Batches) -> list[Check]:
    """The body of a graph for CUDA on the CPU, which has no kernels for bfloat16."""
    try:
        decoder = Decoder(onnx, library=False)
    except Exception as error:  # onnxruntime's exceptions have no public base
        return [_not_run("body on CPU", str(error).splitlines()[0])]
    return _activation_checks("body on CPU", decoder, model, batches)


class FloatBody:
    """Teacher-forced logits of an ONNX folder's body with activations in float32, called as a Decoder."""

    def __init__(self, onnx: Path) -> None:
        """Opens the folder."""
        self.session = open_float(onnx)

    def reset(self) -> None:
        """Every call starts anew."""

    def __call__(self, ids: Any) -> NDArray[np.float32]:
        """Logits [T, vocabulary] of token ids [T]."""
        return onnx_logits(self.session, np.asarray(ids, np.int64)[None])[0]


def _activation_checks(name: str, decoder: Decoder, model: Any, batches: Batches) -> list[Check]:
    """NLL and KL of an executor that rounds activations against the torch model that holds its weights, on QUALITY_WINDOWS windows."""
    total = compare_torch(decoder, model, batches)
    nll_torch, nll, kl, agreement = total.means()
    off, kl = abs(nll - nll_torch), max(0.0, kl)
    note = f"NLL {nll:.4f} (torch with the same weights {nll_torch:.4f}), agreement {agreement:.1%} over {total.tokens} tokens; activations are rounded"
    return [
        Check(name=f"{name} NLL", value=off, bound=ACTIVATION_NLL, passed=off <= ACTIVATION_NLL, note=note),
        Check(name=f"{name} KL", value=kl, bound=ACTIVATION_KL, passed=kl <= ACTIVATION_KL, note="torch with the same weights to it"),
    ]


def _own_greedy(decoder: Decoder, probe: Probe) -> Probe:
    """The probe with an executor's own greedy tokens: what onnxruntime-genai has to repeat, up to the first top-2 margin below MARGIN."""
    rows, must = [], []
    for row in probe.greedy:
        decoder.reset()
        tokens, doubtful = row[:PROMPT_TOKENS].tolist(), None
        logits = decoder(tokens)[-1]
        while True:
            second, first = np.partition(logits, -2)[-2:]
            if doubtful is None and first - second < MARGIN:
                doubtful = len(tokens) - PROMPT_TOKENS
            tokens.append(int(logits.argmax()))
            if len(tokens) == len(row):
                break
            logits = decoder(tokens[-1:])[-1]
        rows.append(tokens)
        must.append(len(tokens) - PROMPT_TOKENS if doubtful is None else doubtful)
    return replace(probe, greedy=torch.tensor(rows), must_match=must)


def _quality_check(name: str, decoder: Decoder, model: Any, batches: Batches, original: Any | None) -> Check:
    """NLL, KL to dense torch and argmax agreement of an ONNX executor on QUALITY_WINDOWS windows; judged is the difference of its NLL to sparse torch's."""
    found = measure_executor(decoder, model, batches, original=original)
    off = abs(found.nll - found.nll_torch)
    note = f"NLL {found.nll:.4f} (torch {found.nll_torch:.4f}), KL to dense {found.kl:.4f}, agreement {found.agreement:.1%} over {found.tokens} tokens"
    return Check(name=f"{name} NLL", value=off, bound=NLL_BOUND, passed=off <= NLL_BOUND, note=note)


def _logits_check(name: str, decoder: Decoder | FloatBody, probe: Probe) -> Check:
    """Largest logit difference where compared, relative to the rms of the logits when that exceeds 1.

    With very many units nearly every token has some score near its threshold; then the median over all positions is judged, since a score that close seldom
    really falls on the other side.
    """
    differences = []
    for window, logits in zip(probe.windows, probe.logits, strict=True):
        decoder.reset()
        differences.append((torch.from_numpy(decoder(window.numpy())) - logits).abs().amax(-1))
    difference, few = torch.stack(differences), probe.remaining < REMAINING
    value = float(difference.median() if few else difference[probe.compare].max())
    bound = LOGIT_BOUND * max(1.0, float(probe.logits.square().mean().sqrt()))
    where = f"{probe.compare.numel()} positions in windows of {probe.windows.shape[1]}"
    note = (
        f"median of {where}; only {probe.remaining:.0%} are clear of thresholds" if few else f"{probe.remaining:.0%} of {where}; the rest lie near a threshold"
    )
    return Check(name=name, value=value, bound=bound, passed=value <= bound, note=note)


def _genai_tokens(onnx: Path, probe: Probe, library: bool) -> list[list[int]]:
    from ..runtime_onnx.generate import load

    try:
        import onnxruntime_genai as genai
    except ImportError:
        raise InputError('Verification must have onnxruntime-genai, got none. Run pip install "sparsegate[cpu]".') from None
    model = load(onnx, library=library)
    found = []
    for row in probe.greedy:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(row), do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(row[:PROMPT_TOKENS].numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(t) for t in generator.get_sequence(0)][PROMPT_TOKENS:])
    return found


def _greedy_check(name: str, found: list[list[int]], probe: Probe) -> Check:
    """Shortfall of greedy tokens: every prompt up to its first doubtful position, and FULL_MATCHES prompts to the end."""
    short, full = 0, 0
    for tokens, row, must in zip(found, probe.greedy, probe.must_match, strict=True):
        wanted = row[PROMPT_TOKENS:].tolist()
        end = next((k for k, token in enumerate(wanted) if token in probe.ends), len(wanted))
        wanted, must = wanted[:end], min(must, end)  # genai stops before the token that ends a text
        equal = next((k for k, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), min(len(tokens), len(wanted)))
        short += max(0, must - equal)
        full += equal == len(wanted)
    passed = short == 0 and full >= FULL_MATCHES
    return Check(
        name=f"{name} greedy tokens",
        value=float(full),
        bound=float(FULL_MATCHES),
        passed=passed,
        at_least=True,
        note=f"{full} of {len(found)} prompts equal to the end",
    )


@torch.no_grad()
def measure_shipped(onnx: Path, model: Any, batches: Batches, export: Export, original: Any | None = None, count: int | None = None) -> ExecutorQuality | None:
    """What an ONNX folder loses against `original` (None: the ungated model), by the executor that applications get, beside the gated torch model in fp32; on
    the first `count` windows, None: on as many as tell it.

    None in fp32 for the CPU, which is the torch model within LOGIT_BOUND, and where nothing here can run the graph.
    """
    if export == Export():
        return None
    cuda = export.target == "cuda" and has_cuda()
    try:
        decoder = Decoder(onnx, [PROVIDERS[1], PROVIDERS[0]] if cuda else None, library=None if cuda or export.target == "cpu" else False)
    except Exception as error:  # onnxruntime's exceptions have no public base
        if export.target == "cpu":
            raise
        log.warning("The graph for CUDA was not measured, the CPU cannot run it: %s", str(error).splitlines()[0])
        return None
    return measure_executor(decoder, model, batches, count, original)
