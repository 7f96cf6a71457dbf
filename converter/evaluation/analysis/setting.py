"""What to try and what came of it: the settings of an analysis and its outcomes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ....runtime_onnx.errors import InputError
from ...scores import load_score

SELECTORS = ("top_k", "paper_cut", "threshold", "global_pool", "nonzero")
POSITIONS = ("all", "prefill", "first")
LABELS = ("greedy", "true", "second")
_OWN_PHASES = ("pre", "mid", "in")


@dataclass(frozen=True)
class Setting:
    """One thing to try.

    Attributes:
        density: Share of units to keep, of every kind in `kinds` (ffn, attn, or linear alone).
        selector: top_k and paper_cut are per token and site. threshold is one per site, from calibration windows.
            global_pool is per token over all sites of a kind, each keeping at least `floor`. nonzero ignores the
            density.
        masks: "dense", "own", or None for the rule of the score's phase.
        positions: "all" are masked; "prefill": the first `prompt` positions of a window run dense; "first": its first
            position does.
        label: For oracles: the dense greedy token, the true next token, or the dense model's second choice.
    """

    score: str
    density: float
    selector: str = "top_k"
    kinds: tuple[str, ...] = ("ffn",)
    masks: str | None = None
    positions: str = "all"
    prompt: int = 0
    label: str = "greedy"
    floor: float = 0.0

    @property
    def source(self) -> str:
        """Where the masks come from: dense or own."""
        return self.masks or ("own" if load_score(self.score).PHASE in _OWN_PHASES else "dense")


@dataclass(frozen=True)
class Outcome:
    """Quality in nats per token over the scored positions that ran sparse, and what really stayed.

    Attributes:
        masks: Whether they came from dense or own activations.
        oracle: No method's result: its score sees a label, or every activation that it chooses from (post).
        nll_error: Standard error over windows of NLL less the dense one, `kl_error` that of the KL; None for one
            window.
        second_choice: Share of positions where the sparse argmax is the dense model's second choice.
        density: By kind, the kept share of the units at sparse positions.
        density_all: The same with dense positions (prefill) counted as whole.
        sparsity: Every site is weighed by its parameters, biases left out: m d for a neuron, 2 d d_h for a head or a
            key-value group, d_out for an input channel. A group stays while any of its heads does. The masked run still
            computes its keys and values, since later tokens attend to them.
        sparsity_all: The same with dense positions counted as whole.
        sites: Density of every site.
    """

    setting: Setting
    phase: str
    masks: str
    oracle: bool
    tokens: int
    nll_dense: float
    nll: float
    nll_error: float | None
    kl: float
    kl_error: float | None
    agreement: float
    second_choice: float
    density: dict[str, float]
    density_all: dict[str, float]
    sparsity: float
    sparsity_all: float
    sites: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return asdict(self)


def check(setting: Setting, length: int, calibrated: bool) -> None:
    """Refuse a setting that makes no sense for windows of `length` tokens; `calibrated` says whether calibration
    windows are given. Raises InputError.
    """
    module = load_score(setting.score)
    for name, value, allowed in (
        ("selector", setting.selector, SELECTORS),
        ("positions", setting.positions, POSITIONS),
        ("label", setting.label, LABELS),
        ("masks", setting.source, ("dense", "own")),
    ):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}. Choose one of these.")
    linear = getattr(module, "KIND", "ffn") == "linear"
    allowed = {"linear"} if linear else {"ffn", "attn"} if hasattr(module, "score_heads") else {"ffn"}
    if not setting.kinds or not set(setting.kinds) <= allowed:
        raise InputError(
            f"kinds of score {setting.score} must be among {', '.join(sorted(allowed))}, got "
            f"{', '.join(setting.kinds)}. Choose another score."
        )
    if setting.source == "own" and (module.PHASE in ("oracle", "prompt") or setting.selector == "global_pool"):
        raise InputError(
            f"masks of {setting.score} by {setting.selector} must be dense, got own: they look beyond their site. "
            "Leave masks out."
        )
    if module.PHASE == "prompt" and setting.positions != "prefill":
        raise InputError(
            f"positions of score {setting.score} must be prefill, got {setting.positions!r}. Set prompt to the "
            "prompt's length."
        )
    if module.PHASE == "prompt" and setting.selector == "threshold":
        raise InputError(
            f"selector of score {setting.score} must choose per prompt, got threshold: its scores grow with the "
            "prompt. Use top_k."
        )
    if setting.positions == "prefill" and not 0 < setting.prompt < length - 1:
        raise InputError(
            f"prompt must be in 1..{length - 2} for windows of {length} tokens, got {setting.prompt}. Leave positions "
            "to mask."
        )
    if not calibrated and (setting.selector == "threshold" or "up_moment" in module.NEEDS):
        raise InputError(
            f"Score {setting.score} with selector {setting.selector} needs calibration windows, got none. Give "
            "calibration."
        )
