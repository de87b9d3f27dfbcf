"""What has become of a sweep's trials: read from their run folders, written as a table and a plot."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmrec_train.errors import EXIT_OK, EXIT_STOPPED
from mmrec_train.monitoring import Record, read_metrics
from mmrec_train.monitoring.metrics_file import FILE_NAME as METRICS_NAME
from mmrec_train.monitoring.metrics_file import step_of, write_atomically
from mmrec_train.monitoring.summary import finite_points
from mmrec_train.sweep.specification import Sweep, Trial

EXIT_NAME = "trial.json"  # in the run folder: the exit code of the last start
LEGEND_ROWS = 12  # the best trials; more would cover the plot

Status = Literal["waiting", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Result:
    """A trial's newest numbers; None for what it has not logged. A diverged run's loss is NaN."""

    trial: Trial
    status: Status
    records: tuple[Record, ...]
    loss: float | None
    validation_loss: float | None

    @property
    def step(self) -> int:
        return max(map(step_of, self.records), default=0)


def record_exit(trial: Trial, code: int) -> None:
    """Notes how a start of the trial ended."""
    trial.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(trial.run_dir / EXIT_NAME, json.dumps({"exit_code": code}) + "\n")


def read_result(trial: Trial) -> Result:
    """What the trial's run folder says; raises UserError for damaged metrics."""
    metrics = trial.run_dir / METRICS_NAME
    records = tuple(read_metrics(trial.run_dir)) if metrics.exists() else ()
    return Result(trial, _status(trial, records), records, _last(records, "loss"), _last(records, "validation_loss"))


def sorted_results(results: Sequence[Result]) -> list[Result]:
    """Best first: by validation loss where there is one, else by training loss; without a finite one last."""
    key = _objective(results)

    def order(result: Result) -> float:
        value = getattr(result, key)
        return value if value is not None and math.isfinite(value) else math.inf

    return sorted(results, key=order)


def write_results(sweep: Sweep, results: Sequence[Result]) -> None:
    """Writes results.csv (a row for each trial, best first) and plot.png (the losses of all trials)."""
    ranked = sorted_results(results)
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["trial", *sweep.labels, "status", "step", "loss", "validation_loss"])
    for result in ranked:
        choice = [_cell(result.trial.choice.get(key)) for key in sweep.labels]
        numbers = [result.step, _cell(result.loss), _cell(result.validation_loss)]
        writer.writerow([result.trial.name, *choice, result.status, *numbers])
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep.folder / "results.csv", rows.getvalue())
    _plot(ranked, _objective(results), sweep.folder / "plot.png")


def _plot(ranked: Sequence[Result], key: str, path: Path) -> None:
    """One line a trial, coloured by rank."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["viridis"].resampled(max(len(ranked), 2))
    lines = 0
    for rank, result in enumerate(ranked):
        steps, values = finite_points(result.records, key)
        if steps:
            label = f"{values[-1]:.4f}  {result.trial.name}" if lines < LEGEND_ROWS else None
            axes.plot(
                steps, values, color=colors(rank), label=label, marker="o" if len(steps) < 30 else "", markersize=3
            )
            lines += 1
    axes.set_xlabel("step")
    axes.set_ylabel(f"{key.replace('_', ' ')} (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if lines:
        axes.legend(fontsize="small", title="best" if lines > LEGEND_ROWS else None)
    figure.savefig(path, dpi=120)


def _status(trial: Trial, records: Sequence[Record]) -> Status:
    try:
        code = json.loads((trial.run_dir / EXIT_NAME).read_text())["exit_code"]
    except FileNotFoundError:
        return "interrupted" if records else "waiting"
    if code == EXIT_OK:
        return "finished"
    return "interrupted" if code == EXIT_STOPPED else "failed"


def _objective(results: Sequence[Result]) -> Literal["validation_loss", "loss"]:
    """What the trials are compared by."""
    return "validation_loss" if any(result.validation_loss is not None for result in results) else "loss"


def _last(records: Sequence[Record], key: str) -> float | None:
    """Of the last record that has it, finite or not: the end of a run that diverged is not its last good number."""
    values = [float(value) for record in records if isinstance(value := record.get(key), int | float)]
    return values[-1] if values else None


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
