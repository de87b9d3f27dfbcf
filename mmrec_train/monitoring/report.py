"""`RUN/report.html`: the whole run on one page that needs nothing beside itself, no network and no script."""

import math
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmrec_train.monitoring.metrics_file import read_metrics, write_atomically
from mmrec_train.monitoring.plots import Plot, Series, draw
from mmrec_train.monitoring.summary import summarize
from mmrec_train.monitoring.validation_table import validation_table

REPORT_NAME = "report.html"
CONFIG_NAME = "config.yaml"
SAMPLE_NAME = "sample.txt"

PLOTS: tuple[Plot, ...] = (
    Plot(
        "loss",
        "Loss",
        "nats per token",
        (Series("loss", "training"), Series("validation_loss", "validation", dots=True)),
        wide=True,
    ),
    Plot("learning-rate", "Learning rate", "", (Series("learning_rate", "learning rate"),)),
    Plot(
        "grad-norm",
        "Gradient norms before clipping",
        "L2 norm",
        (
            Series("grad_norm", "all"),
            Series("grad_norm_memory", "memory"),
            Series("grad_norm_decay", "decay"),
            Series("grad_norm_gate", "gate"),
        ),
        log=True,
    ),
    Plot(
        "tokens-per-second",
        "Throughput",
        "tokens/s",
        (Series("tokens_per_second", "tokens/s"),),
        from_zero=True,
    ),
    Plot(
        "data-wait",
        "Waiting for data",
        "ms a step",
        (Series("data_wait_seconds", "mean"), Series("data_wait_max_seconds", "longest")),
        scale=1e3,
        from_zero=True,
    ),
    Plot("mfu", "Model FLOPs utilisation", "% of peak", (Series("mfu", "MFU"),), scale=100, from_zero=True),
    Plot(
        "memory",
        "Peak memory",
        "GiB",
        (Series("peak_memory_bytes", "peak memory"),),
        scale=2**-30,
        from_zero=True,
    ),
    Plot(
        "solver-iterations",
        "Solver iterations",
        "iterations",
        (Series("solver_iterations", "iterations"),),
        from_zero=True,
    ),
    Plot(
        "solver-residual",
        "Solver residual",
        "relative change",
        (Series("solver_residual", "residual"),),
        log=True,
    ),
)


def write_report(run_dir: str | Path) -> Path:
    """Make `RUN/report.html` from what the run's folder holds; returns its path.

    Needs `metrics.jsonl` (else UserError); shows `config.yaml` and `sample.txt` if they are there. A plot
    without numbers says so.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    environment = Environment(
        loader=PackageLoader("mmrec_train.monitoring"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        summary=summarize(records),
        nonfinite=sum(any(isinstance(v, float) and not math.isfinite(v) for v in r.values()) for r in records),
        validation=validation_table(records),
        plots=[(plot, Markup(svg) if (svg := draw(plot, records)) else None) for plot in PLOTS],
        config=_read_if_there(run_dir / CONFIG_NAME),
        sample=_read_if_there(run_dir / SAMPLE_NAME),
    )
    path = run_dir / REPORT_NAME
    write_atomically(path, html)
    return path


def _read_if_there(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
