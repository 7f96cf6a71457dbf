"""What a sparse checkpoint lost on held-out windows, in torch and in ONNX, and the judgement on its budget; `executors` judges whether executors agree."""

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

from ..runtime_onnx.session import Decoder
from .arch import PREFIX, Arch, Site, load_arch
from .artifact import InputError
from .checkpoint import read_sparsity
from .data import Batches
from .plans import Plan, block_cost, cost, deciding, linear_shapes, mlp_cost
from .progress import track
from .reference import dense, load_dense, recording

LOGIT_BOUND = 1e-4
ACTIVATION_NLL = 0.01  # nats per token: what rounding activations to 8 bits or half precision may change
NLL_BOUND = 1e-3  # nats per token: scores near a threshold may fall on either side, each time for one neuron
UNSEEN_PPL, UNSEEN_KL = 0.002, 0.15  # points of perplexity, share of a divergence: what one text's losses differ from another's
QUALITY_WINDOWS = 16
_LOGITS_AT_ONCE = 1 << 22
"""Most logits of one forward pass while quality is measured: windows go through the model together up to this, one by one above."""


class Quality(BaseModel):
    """Held-out quality: `nll_dense`, `nll` and `kl` in nats per token, `agreement` of the argmax, realised density and cost.

    `density` is the mean over gated sites, weighted by their parameters; `cost` the bytes of the MLPs touched per token relative to dense, `block_cost` those
    of all linear maps of the blocks; `site_cost` is relative to the site's own dense weights; `site_opened` the share of non-zero gates where the zeros decide.
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
    site_opened: dict[str, float] = {}

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


class ExecutorQuality(BaseModel):
    """An ONNX executor on `tokens` tokens: NLL of it and of sparse torch there, KL from dense torch to it, all in nats per token, and equal argmax to dense."""

    tokens: int
    nll_torch: float
    nll: float
    kl: float
    agreement: float


class Verification(BaseModel):
    """What `verify` found; `shipped` is the ONNX file's loss in its own precision, where that is not torch's."""

    quality: Quality
    checks: list[Check]
    shipped: ExecutorQuality | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


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


def dense_side(model: Any, tokens: Tensor, original: Any | None = None) -> Tensor:
    """`log_probs` of what a gated model is compared with: the dense `original`, or None for the model itself ungated."""
    if original is not None:
        return log_probs(original, tokens)
    with dense(model):
        return log_probs(model, tokens)


@torch.no_grad()
def dense_log_probs(model: Any, batches: Batches) -> list[Tensor]:
    """What `measure_quality` takes as `reference`, for many plans on one model and text: 4 bytes x tokens x vocabulary, so for small models only."""
    with dense(model):
        return [log_probs(model, rows) for rows in windows(batches, model.config.vocab_size)]


@torch.no_grad()
def measure_quality(model: Any, plan: Plan, batches: Batches, reference: list[Tensor] | None = None, original: Any | None = None) -> Quality:
    """Compare a gated model on every window with the dense `original` that it was made from (None: with itself ungated, which is that model unless its weights
    or activations were changed); the first token of a window is given.

    `reference` is `dense_log_probs` of what is compared with, on the same batches, where it was computed before.
    """
    arch, config = load_arch(model.config.model_type), model.config
    total = Totals()
    groups = list(windows(batches, config.vocab_size))
    with recording(model) as record:
        for number, rows in enumerate(track(groups, unit="batch")):
            if reference is None:
                p = dense_side(model, rows, original)
            else:
                p = reference[number].to(model.device)
            total.add(p, log_probs(model, rows), rows[:, 1:])
    density, opened = record.density(), record.opened_share()
    nll_dense, nll, kl, agreement = total.means()
    sizes = site_parameters(plan, arch, config)
    return Quality(
        tokens=total.tokens, nll_dense=nll_dense, nll=nll, kl=kl, agreement=agreement,
        density=weighted(density, sizes), cost=mlp_cost(plan, arch, config, density, opened), block_cost=block_cost(plan, arch, config, density, opened),
        site_density={site.key: v for site, v in density.items()},
        site_cost={site.key: site_cost(plan, site, arch, config, share, opened.get(site)) for site, share in density.items()},
        site_opened={site.key: share for site, share in opened.items()},
    )  # fmt: skip


def site_parameters(plan: Plan, arch: Arch, config: Any) -> dict[Site, int]:
    """Dense weights, biases left out, that each site of a plan gates: all matrices of a feed-forward network, the one matrix of a linear site."""
    hidden, units, matrices = arch.size(config, "hidden"), arch.size(config, "units"), 2 if arch.ffn.kind == "plain" else 3
    shapes = linear_shapes(arch, config)
    linear = {site: shapes[site.kind.removeprefix("linear:")] for site in plan if site.kind.startswith("linear:")}
    return {site: linear[site][0] * linear[site][1] if site in linear else matrices * hidden * units for site in plan}


def site_units(plan: Plan, arch: Arch, config: Any) -> dict[Site, int]:
    """Units that each site of a plan decides on: neurons, or a linear's input channels."""
    shapes = linear_shapes(arch, config)
    return {site: arch.size(config, "units") if site.kind == "ffn" else shapes[site.kind.removeprefix("linear:")][1] for site in plan}


def site_cost(plan: Plan, site: Site, arch: Arch, config: Any, density: float, opened: float | None = None) -> float:
    """Bytes of a site touched per token relative to its own dense weights, predictor included."""
    return cost(deciding(plan[site]), arch.size(config, "hidden"), arch.size(config, "units"), 2 if arch.ffn.kind == "plain" else 3, density, opened)


def weighted(values: Mapping[Site, float], sizes: Mapping[Site, int]) -> float:
    """Mean over the sites of `values`, weighted by their parameters."""
    return sum(value * sizes[site] for site, value in values.items()) / sum(sizes[site] for site in values)


@torch.no_grad()
def measure_executor(decoder: Decoder, model: Any, batches: Batches, count: int = QUALITY_WINDOWS, original: Any | None = None) -> ExecutorQuality:
    """An ONNX executor on the first `count` windows, beside the gated torch model and what that is compared with (`dense_side`)."""
    against_torch, against_dense = Totals(), Totals()
    first = Batches(batches.tokens[:count], batches.mask[:count])
    for rows in windows(first, model.config.vocab_size):
        p = dense_side(model, rows, original).cpu()
        q = log_probs(model, rows).cpu()
        for number, row in enumerate(rows):
            decoder.reset()
            o = torch.from_numpy(decoder(row.numpy()))[:-1].log_softmax(-1)
            against_torch.add(q[number], o, row[1:])
            against_dense.add(p[number], o, row[1:])
    nll_torch, nll, _, _ = against_torch.means()
    _, _, kl, agreement = against_dense.means()
    return ExecutorQuality(tokens=against_torch.tokens, nll_torch=nll_torch, nll=nll, kl=kl, agreement=agreement)


def check_record(quality: Quality, measured: dict[str, float], shipped: ExecutorQuality | None = None) -> list[Check]:
    """The quality against what was measured when the checkpoint was made, on the same windows; that of the ONNX file where both measured it."""
    pairs: list[tuple[str, Quality | ExecutorQuality, str, float]] = [("quality as recorded", quality, "", NLL_BOUND)]
    if shipped is not None and "onnx_nll" in measured:
        pairs.append(("ONNX quality as recorded", shipped, "onnx_", ACTIVATION_NLL))  # another executor may round activations otherwise
    checks = []
    for name, found, prefix, bound in pairs:
        off = max(abs(found.nll - measured[f"{prefix}nll"]), abs(found.kl - measured[f"{prefix}kl"]))
        checks.append(Check(name=name, value=off, bound=bound, passed=off <= bound, note="largest difference of NLL and KL"))
    return checks


def shipped_checks(shipped: ExecutorQuality, quality: Quality, budget: dict[str, Any], precision: str) -> list[Check]:
    """The quality budget of the ONNX file in its own precision, against the dense model in fp32 on the same windows."""
    found = quality.model_copy(update={"nll": shipped.nll, "kl": shipped.kl})
    return [check.model_copy(update={"name": f"{check.name}, ONNX {precision}"}) for check in check_budget(found, {**budget, "sparsity": None})]


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
def check_source(model: Any, source: Path, batches: Batches, trained: bool = False) -> Check:
    """The checkpoint's dense model against the model it was made from: largest logit difference on one window.

    Where activations were swapped, or weights `trained`, the two differ by design; then only the sizes that both configurations name are compared.
    """
    original = load_dense(source)
    if trained or model.config.model_type.startswith(PREFIX):
        return _check_sizes(model, original, source)
    row = batches.tokens[:1]
    with dense(model):
        worst = float((model(input_ids=row).logits - original(input_ids=row).logits).abs().max())
    return Check(name="dense weights", value=worst, bound=LOGIT_BOUND, passed=worst <= LOGIT_BOUND, note=f"against {source.name}")


def _check_sizes(model: Any, original: Any, source: Path) -> Check:
    arch, wanted = load_arch(model.config.model_type), load_arch(original.config.model_type)
    different = [space for space in arch.spaces if space not in wanted.spaces or arch.size(model.config, space) != wanted.size(original.config, space)]
    if arch.model_type != wanted.model_type:
        different.append(f"model type {arch.model_type} for {wanted.model_type}")
    found, own = original.state_dict(), model.state_dict()
    equal = sum(name in own and torch.equal(tensor, own[name]) for name, tensor in found.items())
    note = f"against {source.name}: weights or activations were changed, so sizes are compared; {equal} of {len(found)} tensors are the source's"
    if different:
        note = f"against {source.name}: {', '.join(different)} differ"
    return Check(name="dense sizes", value=len(different), bound=0, passed=not different, note=note)


def read_plan(folder: Path) -> Plan:
    """The plan of a checkpoint folder."""
    return read_sparsity(folder)[0]
