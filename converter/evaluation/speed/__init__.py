"""`sparsegate bench`: ops, whole models of well-known sizes with random weights, and two folders; peers beside them,
tables and the roofline plot.
"""

from __future__ import annotations

from .run import BenchRequest, bench
from .shapes import SHAPES

__all__ = ["SHAPES", "BenchRequest", "bench"]
