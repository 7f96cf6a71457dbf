"""What a sparse checkpoint lost, and whether its executors agree: dense torch, sparse torch, ONNX body, ONNX kernel, onnxruntime-genai.

Quality is measured on held-out windows; equality on short windows and greedy tokens, where a score near its threshold excuses a difference (such windows are
counted, not compared) because rounding may flip it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..runtime_onnx.library import executor
from ..runtime_onnx.session import Decoder
from .arch import Arch, Site, load_arch
from .artifact import InputError
from .checkpoint import read_sparsity
from .data import Batches
from .plans import Plan, block_cost, cost, linear_shapes, mlp_cost
from .reference import dense, load_dense, recording

LOGIT_BOUND = 1e-4
MARGIN = 1e-4
REMAINING = 0.8
NLL_BOUND = 1e-3  # nats per token: scores near a threshold may fall on either side, each time for one neuron
UNSEEN_PPL, UNSEEN_KL = 0.002, 0.15  # points of perplexity, share of a divergence: what one text's losses differ from another's
QUALITY_WINDOWS = 16
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, FULL_MATCHES = 10, 16, 64, 8
_LENGTHS = (16, 8, 4, 2, 1)
_CHECKED_TOKENS = 512
_LOGITS_AT_ONCE = 1 << 22
"""Most logits of one forward pass while quality is measured: windows go through the model together up to this, one by one above."""


class Quality(BaseModel):
    """Held-out quality: `nll_dense`, `nll` and `kl` in nats per token, `agreement` of the argmax, realised density and cost.

    `density` is the mean over gated sites, weighted by their parameters; `cost` the bytes of the MLPs touched per token relative to dense, `block_cost` those
    of all linear maps of the blocks; `site_cost` is relative to the site's own dense weights.
    """

    tokens: int
    nll_dense: float
    nll: float
    kl: float
    agreement: float
    density: float
    cost: float
    block_cost: float | None = None
    site_density: dict[str, float]
    site_cost: dict[str, float]

    @property
    def ppl_increase(self) -> float:
        """Relative rise in perplexity."""
        return float(np.exp(self.nll - self.nll_dense) - 1)


class Check(BaseModel):
    """One judgement: a measured value that has to be at most its bound (at least it where `at_least`), and a note on what was compared.

    Unlike a report's check it may hold NaN, which fails.
    """

    name: str
    value: float
    bound: float
    passed: bool
    note: str = ""
    at_least: bool = False


class Verification(BaseModel):
    """What `verify` found."""

    quality: Quality
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


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


@dataclass
class Totals:
    """Sums over the positions compared so far, in fp64: NLL of dense p and of sparse q, KL(p || q), equal argmax."""

    tokens: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, p: Tensor, q: Tensor, target: Tensor) -> None:
        """Compare log-probabilities p and q [..., V] of `target` [...]."""
        p, q, target = p.flatten(0, -2), q.flatten(0, -2).to(p.device), target.flatten().to(p.device)
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        parts = (F.nll_loss(p, target, reduction="sum"), F.nll_loss(q, target, reduction="sum"), (p.exp() * (p - q)).sum(), agree)
        self.sums = self.sums + torch.stack([part.double().cpu() for part in parts])
        self.tokens += len(target)

    def means(self) -> tuple[float, float, float, float]:
        """NLL of p, NLL of q and KL in nats per token, and the share of equal argmax. Raises InputError when nothing was compared."""
        if not self.tokens:
            raise InputError("Held-out text must hold a window of two tokens or more, got none. Give more text.")
        nll_dense, nll, kl, agreement = (self.sums / self.tokens).tolist()
        return nll_dense, nll, kl, agreement


def windows(batches: Batches, vocabulary: int) -> Iterator[Tensor]:
    """Token windows [B, T] without padding, in order: full ones together as far as memory allows, others alone; windows of one token are left out."""
    at_once = max(1, min(8, _LOGITS_AT_ONCE // (batches.tokens.shape[1] * vocabulary)))
    full = batches.mask.all(dim=1)
    yield from batches.tokens[full].split(at_once)
    for row, mask in zip(batches.tokens[~full], batches.mask[~full], strict=True):
        if int(mask.sum()) > 1:
            yield row[mask][None]


def log_probs(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, T - 1, V] fp32 of the tokens that follow the first of each window [B, T]."""
    return model(input_ids=tokens.to(model.device)).logits[:, :-1].float().log_softmax(-1)


@torch.no_grad()
def dense_log_probs(model: Any, batches: Batches) -> list[Tensor]:
    """What `measure_quality` takes as `reference`, for many plans on one model and text: 4 bytes x tokens x vocabulary, so for small models only."""
    with dense(model):
        return [log_probs(model, rows) for rows in windows(batches, model.config.vocab_size)]


@torch.no_grad()
def measure_quality(model: Any, plan: Plan, batches: Batches, reference: list[Tensor] | None = None) -> Quality:
    """Compare a gated model with itself ungated on every window; the first token of a window is given.

    `reference` is `dense_log_probs` of the same model and batches, where it was computed before.
    """
    arch, config = load_arch(model.config.model_type), model.config
    total = Totals()
    groups = list(windows(batches, config.vocab_size))
    with recording(model) as record:
        for number, rows in enumerate(tqdm(groups, desc="quality", unit="batch")):
            if reference is None:
                with dense(model):
                    p = log_probs(model, rows)
            else:
                p = reference[number].to(model.device)
            total.add(p, log_probs(model, rows), rows[:, 1:])
    density = record.density()
    nll_dense, nll, kl, agreement = total.means()
    sizes = site_parameters(plan, arch, config)
    return Quality(
        tokens=total.tokens, nll_dense=nll_dense, nll=nll, kl=kl, agreement=agreement,
        density=weighted(density, sizes), cost=mlp_cost(plan, arch, config, density), block_cost=block_cost(plan, arch, config, density),
        site_density={site.key: v for site, v in density.items()},
        site_cost={site.key: site_cost(plan, site, arch, config, share) for site, share in density.items()},
    )  # fmt: skip


def site_parameters(plan: Plan, arch: Arch, config: Any) -> dict[Site, int]:
    """Dense weights, biases left out, that each site of a plan gates: all matrices of a feed-forward network, the one matrix of a linear site."""
    hidden, units, matrices = arch.size(config, "hidden"), arch.size(config, "units"), 2 if arch.ffn.kind == "plain" else 3
    shapes = linear_shapes(arch, config)
    linear = {site: shapes[site.kind.removeprefix("linear:")] for site in plan if site.kind.startswith("linear:")}
    return {site: linear[site][0] * linear[site][1] if site in linear else matrices * hidden * units for site in plan}


def site_cost(plan: Plan, site: Site, arch: Arch, config: Any, density: float) -> float:
    """Bytes of a site touched per token relative to its own dense weights, predictor included."""
    return cost(plan[site][0], arch.size(config, "hidden"), arch.size(config, "units"), 2 if arch.ffn.kind == "plain" else 3, density)


def weighted(values: Mapping[Site, float], sizes: Mapping[Site, int]) -> float:
    """Mean over the sites of `values`, weighted by their parameters."""
    return sum(value * sizes[site] for site, value in values.items()) / sum(sizes[site] for site in values)


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


def check_onnx(onnx: Path, model: Any, batches: Batches) -> list[Check]:
    """Equality of every executor of an ONNX folder with the gated torch model: body and kernel, in plain ONNX Runtime and in onnxruntime-genai."""
    probe = make_probe(model, batches)
    chosen = executor(onnx)
    checks = []
    for name, library in (("body", False), ("kernel", True)):
        if library and not chosen.kernel:
            checks.append(Check(name=name, value=0, bound=0, passed=True, note=f"not run: {chosen.reason}"))
            continue
        decoder = Decoder(onnx, library=library)
        checks += [_logits_check(name, decoder, probe), _quality_check(name, decoder, model, batches)]
        checks.append(_greedy_check(f"genai {name}", _genai_tokens(onnx, probe, library), probe))
    return checks


class ExecutorQuality(BaseModel):
    """An ONNX executor on `tokens` tokens: NLL of it and of sparse torch there, KL from dense torch to it, all in nats per token, and equal argmax to dense."""

    tokens: int
    nll_torch: float
    nll: float
    kl: float
    agreement: float


@torch.no_grad()
def measure_executor(decoder: Decoder, model: Any, batches: Batches, count: int = QUALITY_WINDOWS) -> ExecutorQuality:
    """An ONNX executor on the first `count` windows, beside the gated torch model."""
    against_torch, against_dense = Totals(), Totals()
    first = Batches(batches.tokens[:count], batches.mask[:count])
    for rows in windows(first, model.config.vocab_size):
        with dense(model):
            p = log_probs(model, rows).cpu()
        q = log_probs(model, rows).cpu()
        for number, row in enumerate(rows):
            decoder.reset()
            o = torch.from_numpy(decoder(row.numpy()))[:-1].log_softmax(-1)
            against_torch.add(q[number], o, row[1:])
            against_dense.add(p[number], o, row[1:])
    nll_torch, nll, _, _ = against_torch.means()
    _, _, kl, agreement = against_dense.means()
    return ExecutorQuality(tokens=against_torch.tokens, nll_torch=nll_torch, nll=nll, kl=kl, agreement=agreement)


def _quality_check(name: str, decoder: Decoder, model: Any, batches: Batches) -> Check:
    """NLL, KL to dense torch and argmax agreement of an ONNX executor on QUALITY_WINDOWS windows; judged is the difference of its NLL to sparse torch's."""
    found = measure_executor(decoder, model, batches)
    off = abs(found.nll - found.nll_torch)
    note = f"NLL {found.nll:.4f} (torch {found.nll_torch:.4f}), KL to dense {found.kl:.4f}, agreement {found.agreement:.1%} over {found.tokens} tokens"
    return Check(name=f"{name} NLL", value=off, bound=NLL_BOUND, passed=off <= NLL_BOUND, note=note)


def _logits_check(name: str, decoder: Decoder, probe: Probe) -> Check:
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
    return Check(name=f"{name} logits", value=value, bound=bound, passed=value <= bound, note=note)


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


def check_record(quality: Quality, measured: dict[str, float]) -> list[Check]:
    """The quality against what was measured when the checkpoint was made, on the same windows."""
    off = max(abs(quality.nll - measured["nll"]), abs(quality.kl - measured["kl"]))
    return [Check(name="quality as recorded", value=off, bound=NLL_BOUND, passed=off <= NLL_BOUND, note="largest difference of NLL and KL")]


def check_budget(quality: Quality, budget: dict[str, Any]) -> list[Check]:
    """The quality budget, and the realised density against the asked one (within 0.05).

    A budget that was searched was met on other text; on this one it must land within UNSEEN_PPL and UNSEEN_KL of it.
    """
    checks = []
    searched = bool(budget.get("searched"))
    if budget.get("max_ppl_increase") is not None:
        asked = float(budget["max_ppl_increase"] or 0.0)
        bound = asked + UNSEEN_PPL * searched
        note = f"asked for {asked:.3g} and met by search on other text" if searched else ""
        checks.append(Check(name="perplexity increase", value=quality.ppl_increase, bound=bound, passed=quality.ppl_increase <= bound, note=note))
    if budget.get("max_kl") is not None:
        asked = float(budget["max_kl"] or 0.0)
        bound = asked * (1 + UNSEEN_KL * searched)
        note = f"asked for {asked:.3g} and met by search on other text" if searched else ""
        checks.append(Check(name="KL to dense", value=quality.kl, bound=bound, passed=quality.kl <= bound, note=note))
    sparsity = budget.get("sparsity")
    if sparsity is not None:
        off = abs(quality.density - (1 - sparsity))
        checks.append(Check(name="density off target", value=off, bound=0.05, passed=off <= 0.05))
    return checks


@torch.no_grad()
def check_source(model: Any, source: Path, batches: Batches) -> Check:
    """The checkpoint's dense model against the model it was made from: largest logit difference on one window."""
    original = load_dense(source)
    row = batches.tokens[:1]
    with dense(model):
        worst = float((model(input_ids=row).logits - original(input_ids=row).logits).abs().max())
    return Check(name="dense weights", value=worst, bound=LOGIT_BOUND, passed=worst <= LOGIT_BOUND, note=f"against {source.name}")


def read_plan(folder: Path) -> Plan:
    """The plan of a checkpoint folder."""
    return read_sparsity(folder)[0]
