"""Exact zeros: neurons whose activation is zero are skipped and nothing else, so nothing is lost. The sparsity is the
model's own, or what a swap gives it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from ...arch import Arch
from ...checkpoint.plan import Exact, Plan, SitePlan, Swap, check_exact
from ...stats import Stats, of_kind

SOURCE = (
    "Turbo Sparse, arXiv 2406.05955; ProSparse, arXiv 2402.13516; ReLU strikes back, arXiv 2310.04564",
    "keep = {i : z_i != 0}, dReLU: z = relu(gate x) relu(up x)",
    "none; without the recovery training of these papers a swap costs most of the quality",
)
NEEDS = ("sizes:gate",)


class Config(BaseModel):
    """`activation`, one of the op's RELUS, is swapped in at every network; None keeps what each one has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    activation: str | None = None

    @field_validator("activation")
    @classmethod
    def _check(cls, activation: str | None) -> str | None:
        if activation is not None:
            check_exact(activation)
        return activation


def plan(stats: Stats, arch: Arch, config: Config) -> Plan:
    """A gate on exact zeros for every network, behind a swap where an activation is named. Densities are 1 as yet.

    Raises InputError for drelu in a plain network.
    """
    arch.check_activation(config.activation or "")
    edits = (Swap(config.activation),) if config.activation else ()
    return {site: SitePlan(edits, Exact()) for site in of_kind(stats, "ffn")}
