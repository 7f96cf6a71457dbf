"""load: a checkpoint in torch, with its gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..modeling.gated import load as load_folder
from ..sources.hub import local_folder


def load(model: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A sparse checkpoint, folder or Hub id, as a transformers model with its gating, `generate` included. Raises
    InputError for anything else.
    """
    return load_folder(local_folder(model), dtype)
