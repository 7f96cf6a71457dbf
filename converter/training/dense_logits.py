"""What the dense model says to the windows of a training, kept where it is compact: windows come again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..methods.tune import Tune
from ..modeling.distributed import in_bf16
from ..modeling.losses import Kept, keep_likeliest


class DenseLogits:
    """The distributions of a dense `model` by window: whole logits, or the `tune.likeliest` tokens of each position.

    Kept ones take 8 bytes a token that is named and come from one pass a window, however often it is trained on.
    """

    def __init__(self, model: Any, tune: Tune) -> None:
        self.model, self.count = model, tune.likeliest
        self.half = in_bf16(tune.precision, model.device)
        self._kept: dict[bytes, Kept] = {}

    @property
    def keeps(self) -> bool:
        """Whether `of` gives what is kept, or whole logits."""
        return self.count > 0

    @torch.no_grad()
    def of(self, tokens: Tensor, mask: Tensor) -> Tensor | Kept:
        """The dense model's distributions [B, S] for windows [B, S] with their padding masked."""
        if not self.keeps:
            return self.logits(self.model, tokens, mask)
        names = [
            hashlib.sha256(bytes(row.cpu().numpy()) + bytes(pad.cpu().numpy())).digest()
            for row, pad in zip(tokens, mask, strict=True)
        ]
        missing = [k for k, name in enumerate(names) if name not in self._kept]
        if missing:
            fresh = keep_likeliest(self.logits(self.model, tokens[missing], mask[missing]), self.count)
            for at, k in enumerate(missing):
                self._kept[names[k]] = Kept(*(part[at].clone() for part in fresh))
        rows = [self._kept[name] for name in names]
        return Kept(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def logits(self, model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, S, V] of a model's pass in the training's precision."""
        attention = None if bool(mask.all()) else mask.long()
        wide = self.half and next(model.parameters()).dtype == torch.float32
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=wide):
            logits: Tensor = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
        return logits
