"""How what a method selects by is trained end to end."""

from __future__ import annotations

from pydantic import BaseModel, Field

from ..checkpoint.fields import PassPrecision, Strict


class Tune(Strict):
    """Training end to end of what a method selects by: `steps` per density of `windows` windows, at peak `rate`;
    `local` weighs the lost energy of each layer's output against the divergence from the dense model; `precision` is
    that of the passes through the model (auto: bfloat16 where the machine multiplies it natively); `data` windows are
    trained on at most.
    """

    steps: int = Field(default=300, ge=1)
    windows: int = Field(default=2, ge=1)
    rate: float = Field(default=4e-3, gt=0)
    local: float = Field(default=0.2, ge=0)
    data: int = Field(default=1024, ge=4)
    precision: PassPrecision = "auto"


def tune_of(config: BaseModel) -> Tune | None:
    """How what a configuration selects by is trained, where its method can be trained."""
    tune = getattr(config, "tune", None)
    return tune if isinstance(tune, Tune) else None
