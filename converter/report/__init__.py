"""Reports: tables, plots and the model card, all generated from one stored JSON (`Report`)."""

from __future__ import annotations

from ..manifest import installed_versions
from .card import BaseCard, read_base_card, write_card, write_report
from .plots import plot_layers
from .results import RESULTS, Check, Layer, Machine, Report, Row, Speed, Text, this_machine
from .tables import check_table, layer_table, quality_table

__all__ = [
    "RESULTS",
    "BaseCard",
    "Check",
    "Layer",
    "Machine",
    "Report",
    "Row",
    "Speed",
    "Text",
    "check_table",
    "installed_versions",
    "layer_table",
    "plot_layers",
    "quality_table",
    "read_base_card",
    "this_machine",
    "write_card",
    "write_report",
]
