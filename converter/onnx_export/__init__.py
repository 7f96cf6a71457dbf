"""From a checkpoint and a plan to an ONNX folder: base graph, matching of MLPs and linears, one emitter per plan kind,
surgery.
"""

from __future__ import annotations

from .base_graph import build_base, check_base, compare_base, load_stock, onnx_logits
from .emit import EMITTERS
from .gated_graph import METADATA, export, export_dense
from .linear_region import LinearRegion, find_linears
from .matmul_nbits import open_float
from .mlp_region import MlpRegion, find_regions
from .precision import PRECISIONS
from .rounded import round_model

__all__ = [
    "EMITTERS",
    "METADATA",
    "PRECISIONS",
    "LinearRegion",
    "MlpRegion",
    "build_base",
    "check_base",
    "compare_base",
    "export",
    "export_dense",
    "find_linears",
    "find_regions",
    "load_stock",
    "onnx_logits",
    "open_float",
    "round_model",
]
