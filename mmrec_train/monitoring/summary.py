"""What a run comes to: the rows of the final summary, on the console and at the head of the report."""

import math
import statistics
from collections.abc import Sequence

from mmrec_train.monitoring.formatting import format_bytes, format_count
from mmrec_train.monitoring.metrics_file import Record, step_of


def finite_points(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key`, of the records where it is a finite number."""
    points = [
        (step_of(record), float(value))
        for record in records
        if isinstance(value := record.get(key), int | float) and math.isfinite(value)
    ]
    return [step for step, _ in points], [value for _, value in points]


def summarize(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(name, value) rows for people. A row whose numbers were never recorded is left out.

    Rates are medians over the records, so that a slow first step (compilation) does not count.
    """
    values = {key: finite_points(records, key)[1] for key in _KEYS}
    rows = [("steps", f"{max(map(step_of, records), default=0):,}")]
    if tokens := values["tokens"]:
        rows.append(("tokens", format_count(tokens[-1])))
    for key, name in (("loss", "training loss"), ("validation_loss", "validation loss")):
        if losses := values[key]:
            rows.append((name, f"{losses[0]:.4f} → {losses[-1]:.4f}"))
    if perplexities := values["validation_perplexity"]:
        rows.append(("validation perplexity", f"{perplexities[-1]:.2f}"))
    if rates := values["tokens_per_second"]:
        rows.append(("tokens/s", format_count(statistics.median(rates))))
    waits, steps = values["data_wait_seconds"], values["step_seconds"]
    if waits and steps:
        rows.append(("waiting for data", f"{statistics.median(waits) / statistics.median(steps):.2%} of a step"))
    if shares := values["mfu"]:
        rows.append(("MFU", f"{statistics.median(shares):.1%}"))
    if peaks := values["peak_memory_bytes"]:
        rows.append(("peak memory", format_bytes(max(peaks))))
    if iterations := values["solver_iterations"]:
        rows.append(("solver iterations", f"{statistics.mean(iterations):.1f}, at most {max(iterations):g}"))
    if skipped := values["skipped"]:
        rows.append(("skipped steps", f"{skipped[-1]:g}"))
    return rows


_KEYS = (
    "tokens",
    "loss",
    "validation_loss",
    "validation_perplexity",
    "tokens_per_second",
    "step_seconds",
    "data_wait_seconds",
    "mfu",
    "peak_memory_bytes",
    "solver_iterations",
    "skipped",
)
