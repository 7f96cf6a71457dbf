"""How what a method selects by is trained end to end, and what of the weights with it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ..checkpoint.fields import PassPrecision, Strict


class Tune(Strict):
    """Training end to end of what a method selects by, under its own gates.

    Attributes:
        steps: Per density, of `windows` windows each.
        rate: Peak, of thresholds, predictors and residuals.
        local: Weighs the lost energy of each network's output against the divergence from the dense model.
        data: Windows that are trained on at most.
        precision: Of the passes through the model; auto is bfloat16 where the machine multiplies it natively.
        updates: What of the weights is trained with it, and merged into them afterwards: low-rank updates of all linear
            maps of the blocks, or those of attention and the whole weights of the networks.
        rank: Of the updates.
        update_rate: Peak rate of updates and offsets, of whole weights a twentieth of it.
        offsets: Trains a vector too that is added to every output of a gated network (arXiv 2512.12744).
        likeliest: So many tokens of the dense distribution are kept a position, the others count as one; windows that
            come again need no dense pass. 0 keeps none and compares whole distributions.
        recompute: Keeps the inputs of blocks instead of all activations, for models that do not fit.
    """

    steps: int = Field(default=300, ge=1)
    windows: int = Field(default=2, ge=1)
    rate: float = Field(default=4e-3, gt=0)
    local: float = Field(default=0.0, ge=0)
    data: int = Field(default=1024, ge=4)
    precision: PassPrecision = "auto"
    updates: Literal["none", "low_rank", "networks"] = "low_rank"
    rank: int = Field(default=16, ge=1)
    update_rate: float = Field(default=1e-3, gt=0)
    offsets: bool = True
    likeliest: int = Field(default=64, ge=0)
    recompute: bool = False


def tune_of(config: BaseModel) -> Tune | None:
    """How what a configuration selects by is trained, where its method can be trained."""
    tune = getattr(config, "tune", None)
    return tune if isinstance(tune, Tune) else None
