"""A site: what is gated in a layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...runtime_onnx.errors import InputError

_SITE = re.compile(r"layers\.(\d+)\.(?:experts\.(\d+)\.)?(ffn|attn|linear:[a-z_]+)")


@dataclass(frozen=True, order=True)
class Site:
    """Where units are gated: a layer, an expert or none, and a kind (`ffn` neurons, `attn` heads, `linear:<name>` input
    channels).
    """

    layer: int
    expert: int | None = None
    kind: str = "ffn"

    @property
    def key(self) -> str:
        """The site's spelling in files, as in `layers.3.ffn` or `layers.3.experts.7.ffn`."""
        expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"layers.{self.layer}.{expert}{self.kind.replace(':', '.')}"

    @classmethod
    def parse(cls, key: str) -> Site:
        """The inverse of `key`. Raises InputError for anything else."""
        match = _SITE.fullmatch(re.sub(r"\.linear\.", ".linear:", key))
        if not match:
            raise InputError(
                f"A site must read like layers.3.ffn, got {key!r:.100}. Make the plan or checkpoint again."
            )
        return cls(int(match[1]), None if match[2] is None else int(match[2]), match[3])
