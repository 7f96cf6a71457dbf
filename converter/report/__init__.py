"""Reports: tables, plots and the model card, HTML pages and curves, all generated from stored JSON (`Report`,
`Evaluation`, `Curves`).
"""

from __future__ import annotations

from ..checkpoint.manifest import installed_versions
from ..evaluation.records import (
    EVALUATION,
    RESULTS,
    DenseReference,
    Evaluation,
    Layer,
    Machine,
    OnnxRow,
    Report,
    ReportCheck,
    Row,
    Speed,
    StageTime,
    Text,
    this_machine,
)
from ..evaluation.recovery_record import (
    RECOVERY,
    CurvePoint,
    DenseQuality,
    HeldoutPoint,
    RecoveryRecord,
    SiteDensity,
    SwappedQuality,
    TrainingText,
)
from .card import BaseCard, read_base_card, write_card
from .change import Change, perplexity_change
from .comparison import reference_table
from .curves import CURVES, Correlations, Curves, Point, at_cost, best_at_cost, curves_page, curves_table, ranking
from .html import PAGE, make_report, render, write_report
from .plots import (
    plot_candidates,
    plot_correlations,
    plot_curves,
    plot_layers,
    plot_positions,
    plot_recovery,
    plot_zeros,
)
from .tables import check_table, detail_table, layer_table, onnx_table, quality_table, stage_text
from .verdict import Verdict, make_verdict, read_recovery

__all__ = [
    "reference_table",
    "read_recovery",
    "plot_candidates",
    "perplexity_change",
    "make_verdict",
    "detail_table",
    "Verdict",
    "DenseReference",
    "Change",
    "CURVES",
    "EVALUATION",
    "PAGE",
    "RECOVERY",
    "RESULTS",
    "BaseCard",
    "ReportCheck",
    "Correlations",
    "CurvePoint",
    "Curves",
    "DenseQuality",
    "Evaluation",
    "HeldoutPoint",
    "Layer",
    "Machine",
    "OnnxRow",
    "Point",
    "RecoveryRecord",
    "Report",
    "Row",
    "SiteDensity",
    "StageTime",
    "Speed",
    "SwappedQuality",
    "Text",
    "TrainingText",
    "at_cost",
    "best_at_cost",
    "check_table",
    "curves_page",
    "curves_table",
    "installed_versions",
    "layer_table",
    "make_report",
    "onnx_table",
    "plot_correlations",
    "plot_curves",
    "plot_layers",
    "plot_positions",
    "plot_recovery",
    "plot_zeros",
    "quality_table",
    "ranking",
    "read_base_card",
    "render",
    "stage_text",
    "this_machine",
    "write_card",
    "write_report",
]
