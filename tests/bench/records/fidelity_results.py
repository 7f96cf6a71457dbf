"""What the benchmark of where the loss sits stores, as one JSON file."""

from __future__ import annotations

from records.folders import RESULTS
from records.model_results import ModelResult, TextFile
from sparsegate.converter.checkpoint.fields import Strict

PLACE = RESULTS / "fidelity.json"


class Loss(Strict):
    """What masks cost, in nats per token over all tokens after the first of a window: `nll` is the rise over dense,
    `kl` that from dense to masked; errors are standard errors over windows. `agreement` is the share of equal argmax.
    """

    nll: float
    nll_error: float
    kl: float
    kl_error: float
    agreement: float


class KindRow(Strict):
    """A kind of sparsity in all blocks: kept shares of what it chooses from, and bytes of the networks touched per
    token, aimed at and realised.
    """

    kind: str
    shares: dict[str, float]
    aim: float
    cost: float
    loss: Loss
    windows: int


class BlockRow(Strict):
    """One block. `alone`: only it is masked. `gain`: all blocks masked, less all but this one, token by token; None
    where that was not measured.
    """

    layer: int
    alone: Loss
    gain: Loss | None = None


class PositionRow(Strict):
    """Masks in all blocks, but only at some positions: which, and the share of tokens that it is."""

    positions: str
    share: float
    loss: Loss


class BandRow(Strict):
    """Positions `first` to `last` of a window that predict the next token under masks everywhere."""

    first: int
    last: int
    kl: float
    kl_error: float


class Kind(Strict):
    """What was measured of one kind of sparsity at one cost: single blocks and positions on `windows` windows, and
    `whole`, all blocks masked, on the same tokens; None where positions were not measured.
    """

    kind: str
    aim: float
    windows: int
    whole: Loss | None
    blocks: list[BlockRow]
    positions: list[PositionRow]
    bands: list[BandRow]

    @property
    def ranked(self) -> list[BlockRow]:
        """The blocks by what they cost alone, the dearest first."""
        return sorted(self.blocks, key=lambda row: -row.alone.kl)


class PeakRow(Strict):
    """A place in a window: the largest absolute value that enters any block there, median and maximum over windows, and
    the block in front of which it is largest.
    """

    first: int
    last: int
    median: float
    largest: float
    layer: int


class ScoreRow(Strict):
    """A score at a sparsity, as examples/compare_scores.py measures it; `oracle` for what no executor can know.

    `sparsity` is weighed by parameters; `bleu` (0 to 100) and `accuracy` are those of greedy answers against the dense
    ones.
    """

    kinds: str
    score: str
    phase: str
    oracle: bool
    sparsity_target: float
    sparsity: float
    nll_dense: float
    nll: float
    nll_error: float | None
    kl: float
    kl_error: float | None
    agreement: float
    bleu: float | None = None
    bleu_error: float | None = None
    accuracy: float | None = None
    accuracy_error: float | None = None


class Scores(Strict):
    """One run of examples/compare_scores.py."""

    windows: int
    length: int
    tokens: int
    answers: int
    text_sha256: str
    command: str
    rows: list[ScoreRow]


class Fidelity(ModelResult):
    """One benchmark. `dense_nll` in nats per token; blocks and positions are measured on the first `short` tokens of
    `few` of every eight windows. `huge` is how many times the median token's largest entry makes a token a huge one,
    `huge_share` the share of such tokens, `huge_first` the share of first tokens that are, `huge_tokens` counts the
    others by their text.
    """

    heldout: TextFile
    few: int
    short: int
    dense_nll: float
    blocks: int
    huge: float
    huge_share: float
    huge_first: float
    huge_tokens: dict[str, int]
    peaks: list[PeakRow]
    rows: list[KindRow]
    kinds: list[Kind]
    scores: Scores | None = None
    answers: Scores | None = None
