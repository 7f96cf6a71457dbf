"""A relative change of perplexity with its standard error, and how it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

_LARGEST = 700.0
"""Nats: exp of more is beyond floats."""
_WRITTEN_OUT = 1e3
"""Shares from here on are written with an exponent."""


@dataclass(frozen=True)
class Change:
    """A relative change of perplexity, 0.021 for +2.1 %, and its standard error where the stored numbers have one."""

    value: float
    error: float | None = None

    @property
    def uncertain(self) -> bool:
        """Whether the error is larger than the change itself."""
        return self.error is not None and self.error > abs(self.value)

    def __str__(self) -> str:
        """As `+2.1 % (± 0.3)`, in percent, with the decimals that the error's first digit needs."""
        value, error = self._texts()
        return f"{value} %" if error is None else f"{value} % (± {error})"

    @property
    def cell(self) -> str:
        """As `+2.1 ± 0.3 %`, for tables."""
        value, error = self._texts()
        return f"{value} %" if error is None else f"{value} ± {error} %"

    def _texts(self) -> tuple[str, str | None]:
        if self.error is None:
            return _signed(self.value, max(1, _decimals(self.value))), None
        return _signed(self.value, _decimals(self.error)), _plain(self.error, _decimals(self.error))


def perplexity_change(nll: float, nll_dense: float, nll_error: float | None = None) -> Change:
    """Relative change of perplexity, exp(nll - nll_dense) - 1, from nats per token; its standard error is exp(nll -
    nll_dense) times that of the difference (delta method).
    """
    factor = math.exp(min(nll - nll_dense, _LARGEST))
    return Change(factor - 1, None if nll_error is None else factor * nll_error)


def _decimals(share: float) -> int:
    """Decimals that show the first digit of a share in percent: 0 for 0.12, 1 for 0.003, 2 for 0.0004; at most 4."""
    percent = abs(100 * share)
    if percent >= 10:
        return 0
    return 1 if percent >= 0.1 or percent == 0 else min(4, math.ceil(-math.log10(percent)))


def _signed(share: float, digits: int) -> str:
    """In percent with its sign; what rounds to 0 is +0."""
    text = _plain(share, digits)
    return f"+{text.removeprefix('-')}" if float(text) >= 0 else text


def _plain(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f}" if abs(share) < _WRITTEN_OUT else f"{100 * share:.2e}"
