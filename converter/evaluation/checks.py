"""What a sparse checkpoint lost on held-out windows, and the judgement on its budget; `quality` measures it,
`agreement` judges whether executors agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from ..arch import PREFIX, load_arch
from ..checkpoint.plan import Plan
from ..checkpoint.source import open_source
from ..checkpoint.sparsity import read_sparsity
from ..modeling.gated import dense, load_dense
from ..modeling.rotation import error_bound, logit_error
from ..onnx_export.tokenizer_check import check_tokenizer
from ..text.windows import Batches
from .long_record import LongContext

LOGIT_BOUND = 1e-4
ACTIVATION_NLL = 0.01  # nats per token: what rounding activations to 8 bits or half precision may change
NLL_BOUND = 1e-3  # nats per token: scores near a threshold may fall on either side, each time for one neuron
UNSEEN_PPL, UNSEEN_KL = (
    0.002,
    0.15,
)  # points of perplexity, share of a divergence: what one text's losses differ from another's
SHARE_BOUND = 0.02
"""Of agreement, density and cost: what another machine's rounding may move them by."""
QUALITY_WINDOWS = 16
DENSE_WINDOWS = 64
"""Windows that the dense graph in integers is measured on where no budget depends on its loss: rounding to 4 bits
spreads so much over windows that the error asked of a plan would take all of them.
"""


class Quality(BaseModel):
    """Held-out quality: `nll_dense`, `nll` and `kl` in nats per token, `agreement` of the argmax, realised density and
    cost.

    `density` is the mean over gated sites, weighted by their parameters; `cost` the bytes of the MLPs touched per token
    relative to dense, `block_cost` those of all linear maps of the blocks; `site_cost` is relative to the site's own
    dense weights; `site_opened` the share of non-zero gates where the zeros decide. `nll_error` is the standard error
    (nats per token) of the mean paired difference NLL - NLL dense over the `windows` measured, which are its clusters.
    `long` is what long windows lost, where they were measured, and `kl_long` its divergence of the far tokens.
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
    nll_error: float = 0.0
    windows: int = 0
    kl_long: float | None = None
    long: LongContext | None = None

    def with_long(self, long: LongContext) -> Quality:
        """The quality with what long windows lost."""
        return self.model_copy(update={"kl_long": long.far.kl, "long": long})

    @property
    def ppl_increase(self) -> float:
        """Relative rise in perplexity."""
        return float(np.exp(self.nll - self.nll_dense) - 1)


class Check(BaseModel):
    """One judgement: a measured value that has to be at most its bound (at least it where `at_least`), and a note on
    what was compared.

    Unlike a report's check it may hold NaN, which fails.
    """

    name: str
    value: float
    bound: float
    passed: bool
    note: str = ""
    at_least: bool = False


class ExecutorQuality(BaseModel):
    """An ONNX executor on `tokens` tokens: NLL of it, of sparse and of dense torch there, KL from dense torch to it,
    all in nats per token, and equal argmax to dense.

    `nll_error` and `windows` are as in `Quality`; `rises` are each window's tokens and sum of NLL - NLL dense, by which
    files are compared in pairs.
    """

    tokens: int
    nll_torch: float
    nll: float
    kl: float
    agreement: float
    nll_error: float = 0.0
    windows: int = 0
    nll_dense: float | None = None
    rises: list[tuple[int, float]] = []


class Verification(BaseModel):
    """What `verify` found; `shipped` is the ONNX file's loss in its own precision, where that is not torch's."""

    quality: Quality
    checks: list[Check]
    shipped: ExecutorQuality | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def check_text(onnx: Path) -> Check:
    """How many probe texts onnxruntime-genai's own tokenizer reads otherwise than the tokenizers library: whether it
    may be used. Never a failure.
    """
    comparison = check_tokenizer(onnx)
    wrong = comparison.texts - min(comparison.ids, comparison.decoded)
    return Check(name="genai's own tokenizer", value=wrong, bound=comparison.texts, passed=True, note=comparison.note)


def check_record(quality: Quality, measured: dict[str, float], shipped: ExecutorQuality | None = None) -> list[Check]:
    """The quality against what was measured when the checkpoint was made, on the same windows; that of the ONNX file
    where both measured it.
    """
    pairs: list[tuple[str, Quality | ExecutorQuality, str, float]] = [("quality as recorded", quality, "", NLL_BOUND)]
    if shipped is not None and "onnx_nll" in measured:
        pairs.append(
            ("ONNX quality as recorded", shipped, "onnx_", ACTIVATION_NLL)
        )  # another executor may round activations otherwise
    checks = []
    for name, part_quality, prefix, bound in pairs:
        off = largest(
            abs(getattr(part_quality, part) - measured.get(f"{prefix}{part}", math.nan)) for part in ("nll", "kl")
        )
        checks.append(
            Check(name=name, value=off, bound=bound, passed=off <= bound, note="largest difference of NLL and KL")
        )
    if "kl_long" in measured:
        off = abs((math.nan if quality.kl_long is None else quality.kl_long) - measured["kl_long"])
        note = "KL of far tokens"
        passed = off <= NLL_BOUND
        checks.append(Check(name="long quality as recorded", value=off, bound=NLL_BOUND, passed=passed, note=note))
    shares = [abs(getattr(quality, name) - measured.get(name, math.nan)) for name in ("agreement", "density", "cost")]
    off = largest(shares)
    note = "largest difference of agreement, density and cost"
    return [
        *checks,
        Check(name="shares as recorded", value=off, bound=SHARE_BOUND, passed=off <= SHARE_BOUND, note=note),
    ]


def largest(values: Iterable[float]) -> float:
    """The largest value, NaN where one is: Python's max keeps a NaN only in the first place."""
    return float(np.max(list(values)))


def shipped_checks(shipped: ExecutorQuality, quality: Quality, budget: dict[str, Any], precision: str) -> list[Check]:
    """The quality budget of the ONNX file in its own precision, against the dense model in fp32 on the same windows;
    long ones are judged in torch.
    """
    onnx_quality = quality.model_copy(update={"nll": shipped.nll, "kl": shipped.kl})
    return [
        check.model_copy(update={"name": f"{check.name}, ONNX {precision}"})
        for check in check_budget(onnx_quality, {**budget, "sparsity": None, "max_kl_long": None})
    ]


def check_budget(quality: Quality, budget: dict[str, Any]) -> list[Check]:
    """The quality budget, and the realised density against the asked one (within 0.05).

    A budget that was searched was met on other text; on this one it must land within UNSEEN_PPL and UNSEEN_KL of it.
    """
    checks = []
    numbers = (quality.nll_dense, quality.nll, quality.kl, quality.density)
    if not all(map(math.isfinite, numbers)):
        checks.append(
            Check(
                name="held-out numbers",
                value=largest(numbers),
                bound=0,
                passed=False,
                note="NLL, KL and density must be finite",
            )
        )
    searched = bool(budget.get("searched"))
    if budget.get("max_ppl_increase") is not None:
        limit = float(budget["max_ppl_increase"] or 0.0)
        bound = limit + UNSEEN_PPL * searched
        note = f"asked for {limit:.3g} and met by search on other text" if searched else ""
        checks.append(
            Check(
                name="perplexity increase",
                value=quality.ppl_increase,
                bound=bound,
                passed=quality.ppl_increase <= bound,
                note=note,
            )
        )
    for name, what in (("max_kl", "KL to dense"), ("max_kl_long", "KL to dense, far tokens of long windows")):
        if budget.get(name) is not None:
            limit, kl = float(budget[name] or 0.0), quality.kl if name == "max_kl" else quality.kl_long
            bound = limit * (1 + UNSEEN_KL * searched)
            note = f"asked for {limit:.3g} and met by search on other text" if searched else ""
            value = math.nan if kl is None else kl
            checks.append(Check(name=what, value=value, bound=bound, passed=value <= bound, note=note))
    sparsity = budget.get("sparsity")
    if sparsity is not None:
        off = abs(quality.density - (1 - sparsity))
        checks.append(Check(name="density off target", value=off, bound=0.05, passed=off <= 0.05))
    return checks


@torch.no_grad()
def check_source(model: Any, source: Path, batches: Batches, trained: bool = False, rotated: bool = False) -> Check:
    """The checkpoint's dense model against the model it was made from: largest logit difference on one window; of a
    `rotated` one, whose weights were rounded anew, the energy of the difference.

    Where activations were swapped, or weights `trained`, the two differ by design; then only the sizes that both
    configurations name are compared.
    """
    reference_model = load_dense(source)
    if trained or model.config.model_type.startswith(PREFIX):
        return _check_sizes(model, reference_model, source)
    row = batches.tokens[:1]
    with dense(model):
        logits, expected = model(input_ids=row).logits, reference_model(input_ids=row).logits
    worst, bound, note = float((logits - expected).abs().max()), LOGIT_BOUND, f"against {source.name}"
    if rotated:
        worst, bound = logit_error(logits, expected), error_bound(open_source(source))
        note += ", rotated: energy of the difference of logits relative to theirs"
    return Check(name="dense weights", value=worst, bound=bound, passed=worst <= bound, note=note)


def _check_sizes(model: Any, reference_model: Any, source: Path) -> Check:
    arch, wanted = load_arch(model.config.model_type), load_arch(reference_model.config.model_type)
    different = [
        space
        for space in arch.spaces
        if space not in wanted.spaces or arch.size(model.config, space) != wanted.size(reference_model.config, space)
    ]
    if arch.model_type != wanted.model_type:
        different.append(f"model type {arch.model_type} for {wanted.model_type}")
    reference_tensors, tensors = reference_model.state_dict(), model.state_dict()
    equal = sum(name in tensors and torch.equal(tensor, tensors[name]) for name, tensor in reference_tensors.items())
    note = (
        f"against {source.name}: weights or activations were changed, so sizes are compared; {equal} of "
        f"{len(reference_tensors)} tensors are the source's"
    )
    if different:
        note = f"against {source.name}: {', '.join(different)} differ"
    return Check(name="dense sizes", value=len(different), bound=0, passed=not different, note=note)


def read_plan(folder: Path) -> Plan:
    """The plan of a checkpoint folder."""
    return read_sparsity(folder)[0]
