"""What a model loses over long windows, as it is stored: by the context before a token, when it repeats what it read,
and when it recalls a fact.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..checkpoint.fields import Strict


class PositionBin(Strict):
    """Tokens that have from `first` to `last` tokens before them in their window.

    Attributes:
        tokens: How many were measured.
        nll_dense: Nats per token; `nll` of the sparse model and `kl` from dense to it likewise.
        nll_error: Standard error of the paired difference of NLL, whose clusters are the windows; None of one window.
        kl_error: Standard error of `kl` likewise.
        agreement: Share of equal argmax.
    """

    first: int = Field(ge=1)
    last: int = Field(ge=1)
    tokens: int = Field(ge=1)
    nll_dense: float
    nll: float
    nll_error: float | None = Field(default=None, ge=0)
    kl: float
    kl_error: float | None = Field(default=None, ge=0)
    agreement: float = Field(ge=0, le=1)


class Repetition(Strict):
    """The second copy of something that was read before, its first token left out, which nothing tells.

    Attributes:
        kind: Tokens drawn at random, or a piece of the held-out text.
        distance: Tokens from one copy to the next, which is the length of a copy.
        sequences: How many; `tokens` are scored in all.
        nll_dense: Nats per token; `nll` of the sparse model and `kl` from dense to it likewise.
        accuracy_dense: Share of tokens that are the argmax; `accuracy` of the sparse model likewise.
    """

    kind: Literal["random", "text"]
    distance: int = Field(ge=1)
    sequences: int = Field(ge=1)
    tokens: int = Field(ge=1)
    nll_dense: float
    nll: float
    kl: float
    accuracy_dense: float = Field(ge=0, le=1)
    accuracy: float = Field(ge=0, le=1)


class Needle(Strict):
    """A short fact inside held-out text of a window's length, asked for at the window's end.

    Attributes:
        depth: Where the fact stands: 0 at the window's begin, 1 right before the question.
        prompts: How many, each with a fact of its own.
        log_probability_dense: Of the whole answer, in nats, the mean over prompts; `log_probability` of the sparse
            model likewise.
        exact_dense: Share of prompts that are answered exactly by greedy decoding; `exact` of the sparse model
            likewise.
    """

    depth: float = Field(ge=0, le=1)
    prompts: int = Field(ge=1)
    log_probability_dense: float
    log_probability: float
    exact_dense: float = Field(ge=0, le=1)
    exact: float = Field(ge=0, le=1)


class LongContext(Strict):
    """Everything that was measured over windows of `length` tokens, a power of two.

    Attributes:
        windows: Windows of the held-out text behind `positions`.
        positions: Bins by powers of two of the context, from the shortest on. The last one, `far`, is the second half
            of the windows, which a budget on long context bounds.
        repetitions: Empty where they were not measured; `needles` likewise.
    """

    length: int = Field(ge=2)
    windows: int = Field(ge=1)
    positions: list[PositionBin] = Field(min_length=1)
    repetitions: list[Repetition] = []
    needles: list[Needle] = []

    @property
    def far(self) -> PositionBin:
        """The tokens that have half of a window before them, or more."""
        return self.positions[-1]
