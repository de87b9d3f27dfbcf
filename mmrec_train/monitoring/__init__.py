"""Seeing a run: records, console, curves, report, utilisation. docs/monitoring.md is for its users."""

from mmrec_train.monitoring.console import Console
from mmrec_train.monitoring.curve import loss_curve
from mmrec_train.monitoring.logger import MetricsLogger
from mmrec_train.monitoring.metrics_file import Record, read_metrics
from mmrec_train.monitoring.mfu import mfu, peak_flops
from mmrec_train.monitoring.report import write_report
from mmrec_train.monitoring.summary import summarize

__all__ = [
    "Console",
    "MetricsLogger",
    "Record",
    "loss_curve",
    "mfu",
    "peak_flops",
    "read_metrics",
    "summarize",
    "write_report",
]
