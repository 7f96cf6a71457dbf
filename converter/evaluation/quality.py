"""Held-out quality of gated models and of ONNX executors beside one dense pass, on as many windows as tell their
difference.

Windows go through the decoder in groups, once dense and once for every plan; the head and the softmax follow in chunks
of positions, the dense side's once for all plans. Logits are those of the model's own forward, which is handed the
decoder's hidden states, so that its scaling and soft caps hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime_onnx.errors import InputError
from ...runtime_onnx.session import Decoder
from ..arch import load_arch
from ..checkpoint.cost import block_cost, mlp_cost, site_cost, site_parameters, weighted
from ..checkpoint.plan import Plan
from ..modeling.gated import Gates, Recorder, gates_of, make_gates, switched
from ..modeling.losses import expected_difference, token_nll
from ..modeling.taps import replaced
from ..progress import track
from ..text.windows import Batches
from .checks import QUALITY_WINDOWS, ExecutorQuality, Quality

ERROR = 0.005
"""Standard error (nats per token) of the paired NLL difference at which enough windows are measured."""
MOST_TOKENS = 65536
LEAST_WINDOWS = 16
"""Fewer windows do not tell a standard error."""
GROUP_TOKENS = 2048
_LOGITS_AT_ONCE = 1 << 24
"""Most logits of a chunk of positions, one position at least."""
_LOGITS_IN_CACHE = 1 << 18
"""Logits that the passes of a softmax go over together on a CPU."""

Logits = Callable[[int, slice], Tensor]
"""Fresh fp32 logits [P, V] of a slice of a window's positions, by the window's number in its group."""


# Windows


def groups(batches: Batches) -> list[list[Tensor]]:
    """Windows [T] without padding, in order, in groups that go through a decoder together; windows of one token are
    left out.
    """
    at_once = max(1, GROUP_TOKENS // batches.tokens.shape[1])
    rows = [row[mask] for row, mask in zip(batches.tokens, batches.mask, strict=True)]
    rows = [row for row in rows if len(row) > 1]
    return [rows[k : k + at_once] for k in range(0, len(rows), at_once)]


def _chunks(window: Tensor, vocabulary: int) -> Iterator[slice]:
    """Slices of nearly equal length over the positions that have a next token."""
    positions = len(window) - 1
    count = math.ceil(positions / max(1, _LOGITS_AT_ONCE // vocabulary))
    ends = [positions * k // count for k in range(count + 1)]
    yield from (slice(*pair) for pair in zip(ends, ends[1:], strict=False))


# A model in two parts


class Halves:
    """A causal model whose decoder and head run apart, both inside the model's own forward."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.output: type | None = None

    def hidden(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """What enters the head, [T - 1, d] of every window [T]; windows of equal length go through the decoder
        together.
        """
        hidden: dict[int, Tensor] = {}
        for length in sorted({len(window) for window in windows}):
            numbers = [k for k, window in enumerate(windows) if len(window) == length]
            hidden |= zip(numbers, self._decode(torch.stack([windows[k] for k in numbers])), strict=True)
        return [hidden[k] for k in range(len(windows))]

    def _decode(self, tokens: Tensor) -> Tensor:
        seen: list[Tensor] = []
        run = self.decoder.forward

        def first_only(*values: Any, **keywords: Any) -> Any:
            """The decoder, of whose output the head gets one position a window."""
            output = run(*values, **keywords)
            self.output = type(output)
            seen.append(output.last_hidden_state)
            return self.output(last_hidden_state=seen[0][:, :1])

        with replaced({self.decoder: first_only}):
            self.model(input_ids=tokens.to(self.model.device), use_cache=False)
        return seen[0][:, :-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [P, V] fp32 of hidden states [P, d] that `hidden` gave."""
        assert self.output is not None
        output = self.output(last_hidden_state=hidden[None])
        tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with replaced({self.decoder: lambda *_, **__: output}):
            return self.model(input_ids=tokens, use_cache=False).logits[0].float()


# The comparison


@dataclass(frozen=True)
class Side:
    """The reference side of a chunk: logits less their maximum [P, V], the log of the sum of their exponentials [P]
    fp64, the argmax [P, 1].
    """

    logits: Tensor
    normaliser: Tensor
    best: Tensor


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows [P, V] that stay in a CPU's cache while they are passed over."""
    step = max(1, _LOGITS_IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    yield from (slice(k, min(k + step, len(logits))) for k in range(0, len(logits), step))


def normalised(logits: Tensor) -> Side:
    """The reference side of a chunk of logits [P, V], which become the side's own."""
    normaliser = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    best = torch.empty((len(logits), 1), dtype=torch.int64, device=logits.device)
    for rows in _blocks(logits):
        block = logits[rows]
        top, best[rows] = block.max(-1, keepdim=True)
        normaliser[rows] = block.sub_(top).exp().sum(-1).double().log()
    return Side(logits, normaliser, best)


def compare_rows(side: Side, chances: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Every position's [P, 6] fp64: NLL of the reference side p and of q, KL(p || q), then 0 or 1 for equal argmax, and
    for an argmax that is the target, of p and of q. `chances` are exp(side.logits) [P, V], `logits` are q's, which are
    overwritten; `target` [P].

    KL = sum p (log p - log q) = sum_v p_v (a_v - b_v) - log A + log B with a, b the logits less their maxima and A, B
    the sums of their exponentials. log A and log B are fp64: what is measured is a small difference of two NLLs.
    """
    values = torch.empty((len(logits), 6), dtype=torch.float64, device=side.logits.device)
    for rows in _blocks(logits):
        a, b, p, wanted = side.logits[rows], logits[rows], chances[rows], target[rows]
        top = b.amax(-1, keepdim=True)
        agree = (b.gather(-1, side.best[rows]) == top)[:, 0]
        hit_p, hit_q = side.best[rows, 0] == wanted, (b.gather(-1, wanted[:, None]) == top)[:, 0]
        spread = b.sub_(top).exp()
        log_a, log_b = side.normaliser[rows], spread.sum(-1).double().log()
        kl = expected_difference(p, a, b, out=spread).double() * (-log_a).exp() - log_a + log_b
        nll_p, nll_q = token_nll(a, wanted, log_a), token_nll(b, wanted, log_b)
        values[rows] = torch.stack([nll_p, nll_q, kl, agree.double(), hit_p.double(), hit_q.double()], dim=1)
    return values


class Reference:
    """The reference side of comparisons on windows: the dense `reference_model`, or None for `model` itself without
    gates, or with `gates`.

    What fits into `keep_bytes` is kept for the next plan: logits, else hidden states, else nothing.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        reference_model: Any | None = None,
        keep_bytes: float = 0.0,
        gates: Gates | None = None,
    ) -> None:
        self.groups = groups(batches)
        self.halves = Halves(model if reference_model is None else reference_model)
        self.gates = {} if reference_model is not None or gates is None else gates
        self.vocabulary = int(self.halves.model.config.vocab_size)
        tokens, width = (
            sum(len(window) for group in self.groups for window in group),
            self.halves.model.get_input_embeddings().weight.shape[1],
        )
        self.keeps_logits = 4 * tokens * self.vocabulary <= keep_bytes
        self.keeps_hidden = not self.keeps_logits and 4 * tokens * width <= keep_bytes
        self._sides: dict[int, list[list[Side]]] = {}
        self._hidden: dict[int, list[Tensor]] = {}

    def sides(self, number: int) -> Iterator[tuple[int, slice, Side]]:
        """Window in the group, positions and reference side of every chunk of a group."""
        group = self.groups[number]
        if number in self._sides:
            for window, sides in enumerate(self._sides[number]):
                for rows, side in zip(_chunks(group[window], self.vocabulary), sides, strict=True):
                    yield window, rows, side
            return
        states = self._states(number)
        kept: list[list[Side]] = []
        for window, tokens in enumerate(group):
            kept.append([])
            for rows in _chunks(tokens, self.vocabulary):
                side = normalised(self.halves.logits(states[window][rows]))
                if self.keeps_logits:
                    kept[-1].append(side)
                yield window, rows, side
        if self.keeps_logits:
            self._sides[number] = kept

    def _states(self, number: int) -> list[Tensor]:
        if number in self._hidden:
            return self._hidden[number]
        with switched(self.halves.model, self.gates):
            states = self.halves.hidden(self.groups[number])
        if self.keeps_hidden:
            self._hidden[number] = states
        return states


def compare(reference: Reference, number: int, others: Sequence[Logits]) -> Tensor:
    """Sums [others, windows, 5] fp64 of a group of windows: tokens, NLL of the reference and of the other, KL to the
    other, equal argmax.
    """
    group = reference.groups[number]
    sums = torch.zeros((len(others), len(group), 5), dtype=torch.float64)
    sums[:, :, 0] = torch.tensor([len(window) - 1 for window in group], dtype=torch.float64)
    for window, rows, side in reference.sides(number):
        device = side.logits.device
        target = group[window][1:][rows].to(device)
        chances = side.logits.exp()
        for other, logits in enumerate(others):
            values = compare_rows(side, chances, logits(window, rows).to(device), target)
            sums[other, window, 1:] += values[:, :4].sum(0).cpu()
    return sums


def torch_logits(model: Any, gates: Gates, group: Sequence[Tensor], recorder: Recorder | None = None) -> Logits:
    """Logits of the model under `gates`; the decoder runs now, the head when asked."""
    halves = Halves(model)
    with switched(model, gates, recorder):
        states = halves.hidden(group)
    return lambda window, rows: halves.logits(states[window][rows])


def onnx_logits(decoder: Decoder, group: Sequence[Tensor]) -> Logits:
    """Logits of an ONNX executor, whose windows run one by one when asked."""
    last: list[tuple[int, Tensor]] = []

    def logits(window: int, rows: slice) -> Tensor:
        if not last or last[0][0] != window:
            last.clear()
            decoder.reset()
            last.append((window, torch.from_numpy(decoder(group[window].numpy())).float()))
        return last[0][1][rows].clone()

    return logits


@dataclass
class Totals:
    """Sums [W, 5] fp64 of every window so far: tokens, NLL of the reference p and of q, KL(p || q), equal argmax."""

    sums: Tensor

    def __init__(self) -> None:
        self.sums = torch.zeros((0, 5), dtype=torch.float64)

    def add(self, sums: Tensor) -> None:
        """The sums of more windows [W, 5]."""
        self.sums = torch.cat([self.sums, sums])

    @property
    def tokens(self) -> int:
        """Tokens compared."""
        return int(self.sums[:, 0].sum())

    @property
    def windows(self) -> int:
        """Windows compared."""
        return len(self.sums)

    def means(self) -> tuple[float, float, float, float]:
        """NLL of p, NLL of q and KL in nats per token, and the share of equal argmax. Raises InputError when nothing
        was compared.
        """
        if not self.windows:
            raise InputError("Held-out text must hold a window of two tokens or more, got none. Give more text.")
        nll_reference, nll, kl, agreement = (self.sums[:, 1:].sum(0) / self.sums[:, 0].sum()).tolist()
        return nll_reference, nll, kl, agreement

    def error(self) -> float:
        """Standard error (nats per token) of the mean of NLL(q) - NLL(p), see `clustered_error`."""
        return clustered_error(self.sums[:, 2] - self.sums[:, 1], self.sums[:, 0])

    def rises(self) -> list[tuple[int, float]]:
        """Tokens of every window, and its sum of NLL(q) - NLL(p)."""
        return [
            (int(count), rise)
            for count, rise in zip(self.sums[:, 0].tolist(), (self.sums[:, 2] - self.sums[:, 1]).tolist(), strict=True)
        ]

    def kl_error(self) -> float:
        """Standard error (nats per token) of the mean KL."""
        return clustered_error(self.sums[:, 3], self.sums[:, 0])

    def is_enough(self, error: float, most: int) -> bool:
        """Whether windows need no longer be measured."""
        return self.tokens >= most or (self.windows >= LEAST_WINDOWS and self.error() < error)


def clustered_error(sums: Tensor, counts: Tensor) -> float:
    """Standard error of the ratio sum(sums) / sum(counts) over W windows drawn at random, whose tokens hang together
    (Cochran 1977, Sampling Techniques, 6.4): sqrt(W / (W - 1) sum_w (s_w - r n_w)^2) / sum_w n_w. Infinite for fewer
    than two windows.
    """
    windows = len(sums)
    if windows < 2:
        return math.inf
    off = sums - sums.sum() / counts.sum() * counts
    return float((off.square().sum() * windows / (windows - 1)).sqrt() / counts.sum())


# Quality


def measure_qualities(
    model: Any,
    plans: Mapping[str, Plan],
    batches: Batches,
    reference_model: Any | None = None,
    error: float = ERROR,
    most: int = MOST_TOKENS,
) -> dict[str, Quality]:
    """Compare an ungated model under each of `plans` with the dense `reference_model` that it was made from (None:
    with itself), all on the same windows; the first token of a window is given.

    Windows are taken in order until every plan's `nll_error` is below `error` (of LEAST_WINDOWS at least), or `most`
    tokens were measured; with error 0 all of them. Where a part of them may stand for all, they must be in random
    order.
    """
    arch = load_arch(model.config.model_type)
    activation = arch.activation(model.config)
    gates = {name: make_gates(model, plan, arch, activation) for name, plan in plans.items()}
    return _measure(model, plans, gates, Reference(model, batches, reference_model), error, most)


def measure_quality(
    model: Any,
    plan: Plan,
    batches: Batches,
    reference_model: Any | None = None,
    error: float = ERROR,
    most: int = MOST_TOKENS,
    reference: Reference | None = None,
) -> Quality:
    """As `measure_qualities` for a model that `plan` gates already. `reference` keeps the dense side for many plans on
    one model and text, where given.
    """
    reference = reference or Reference(model, batches, reference_model)
    return _measure(model, {"": plan}, {"": gates_of(model)}, reference, error, most)[""]


@torch.no_grad()
def _measure(
    model: Any, plans: Mapping[str, Plan], gates: Mapping[str, Gates], reference: Reference, error: float, most: int
) -> dict[str, Quality]:
    totals = {name: Totals() for name in plans}
    recorders = {name: Recorder(counts_only=True) for name in plans}
    for number, group in enumerate(track(reference.groups, unit="group")):
        others = [torch_logits(model, gates[name], group, recorders[name]) for name in plans]
        for total, sums in zip(totals.values(), compare(reference, number, others), strict=True):
            total.add(sums)
        if all(total.is_enough(error, most) for total in totals.values()):
            break
    return {name: _quality(model, plan, totals[name], recorders[name]) for name, plan in plans.items()}


def _quality(model: Any, plan: Plan, total: Totals, record: Recorder) -> Quality:
    arch, config = load_arch(model.config.model_type), model.config
    nll_dense, nll, kl, agreement = total.means()
    density, opened = record.density(), record.opened_share()
    return Quality(
        tokens=total.tokens,
        windows=total.windows,
        nll_dense=nll_dense,
        nll=nll,
        nll_error=_finite(total.error()),
        kl=kl,
        agreement=agreement,
        density=weighted(density, site_parameters(plan, arch, config)),
        cost=mlp_cost(plan, arch, config, density, opened),
        block_cost=block_cost(plan, arch, config, density, opened),
        site_density={site.key: v for site, v in density.items()},
        site_cost={
            site.key: site_cost(plan, site, arch, config, share, opened.get(site)) for site, share in density.items()
        },
        site_opened={site.key: share for site, share in opened.items()},
    )


def _finite(error: float) -> float:
    """One window has no standard error: 0."""
    return 0.0 if math.isinf(error) else error


@torch.no_grad()
def measure_executor(
    decoder: Decoder,
    model: Any,
    batches: Batches,
    count: int | None = QUALITY_WINDOWS,
    reference_model: Any | None = None,
    error: float = ERROR,
    most: int = MOST_TOKENS,
    nll_torch: float | None = None,
) -> ExecutorQuality:
    """An ONNX executor beside the gated torch model and what that is compared with (`Reference`), on the first `count`
    windows; None: on as many as `measure_qualities` would take. The torch model is not run again where its NLL on these
    windows is known, as `nll_torch`.
    """
    if count is not None:
        batches, error, most = Batches(batches.tokens[:count], batches.mask[:count]), 0.0, batches.tokens.numel()
    reference, gates, sparse, onnx = Reference(model, batches, reference_model), gates_of(model), Totals(), Totals()
    dense = reference_model is None and not gates  # torch is the reference itself
    for number, group in enumerate(reference.groups):
        torch_side = [] if dense or nll_torch is not None else [torch_logits(model, gates, group)]
        sums = compare(reference, number, [*torch_side, onnx_logits(decoder, group)])
        sparse.add(sums[0])
        onnx.add(sums[-1])
        if onnx.is_enough(error, most):
            break
    nll_torch = sparse.means()[0 if dense else 1] if nll_torch is None else nll_torch
    nll_dense, nll, kl, agreement = onnx.means()
    return ExecutorQuality(
        tokens=onnx.tokens,
        windows=onnx.windows,
        nll_dense=nll_dense,
        nll_torch=nll_torch,
        nll=nll,
        nll_error=_finite(onnx.error()),
        kl=kl,
        agreement=agreement,
        rises=onnx.rises(),
    )


def paired_rise(sparse: ExecutorQuality, dense: ExecutorQuality) -> tuple[float, float | None] | None:
    """Mean of NLL(sparse) - NLL(dense) in nats per token over the windows that both were measured on, the first ones of
    the same text, and its standard error (None for one window). None where either does not tell its windows.
    """
    pairs = list(zip(sparse.rises, dense.rises, strict=False))
    if not pairs:
        return None
    counts = torch.tensor([count for (count, _), _ in pairs], dtype=torch.float64)
    sums = torch.tensor([rise - dense_rise for (_, rise), (_, dense_rise) in pairs], dtype=torch.float64)
    error = clustered_error(sums, counts)
    return float(sums.sum() / counts.sum()), None if math.isinf(error) else error


@torch.no_grad()
def measure_dense_executor(decoder: Decoder, model: Any, batches: Batches, count: int = QUALITY_WINDOWS) -> Totals:
    """The ONNX executor of a dense graph (q) beside the dense torch model (p), which runs once, on the first `count`
    windows.
    """
    reference, total = Reference(model, Batches(batches.tokens[:count], batches.mask[:count])), Totals()
    for number, group in enumerate(reference.groups):
        total.add(compare(reference, number, [onnx_logits(decoder, group)])[0])
    return total
