"""Reports: tables, plots and the model card, all generated from one stored JSON (`Report`)."""

from __future__ import annotations

from .assembly import build
from .card import write_card
from .plots import plot_layers
from .results import Check, Layer, Machine, Report, Row, Speed, Text, read, write
from .tables import check_table, layer_table, layer_text, quality_table, quality_text

__all__ = [
    "Check",
    "Layer",
    "Machine",
    "Report",
    "Row",
    "Speed",
    "Text",
    "build",
    "check_table",
    "layer_table",
    "layer_text",
    "plot_layers",
    "quality_table",
    "quality_text",
    "read",
    "write",
    "write_card",
]
