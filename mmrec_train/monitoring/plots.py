"""Line plots as SVG to be put into an HTML page, in colours that the page decides."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmrec_train.monitoring.metrics_file import Record, step_of

# Matplotlib wants colours, the page has light and dark ones: each stand-in becomes a variable of its style.
_INK, _GRID = "#00000a", "#00000b"
_SERIES = ("#000001", "#000002", "#000003", "#000004")
_VARIABLES = {_INK: "var(--ink-soft)", _GRID: "var(--grid)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.solid_joinstyle": "round",
    "axes.formatter.useoffset": False,
    "axes.xmargin": 0.015,
}
FEW_POINTS = 30  # below, each point gets a dot; a lone point would be invisible without


@dataclass(frozen=True)
class Series:
    key: str  # of the records
    label: str
    dots: bool = False  # measured rarely: always show where


@dataclass(frozen=True)
class Plot:
    """One or more series of the same unit over the training step. `scale` multiplies the records' numbers."""

    name: str  # in ids of the page
    title: str
    unit: str
    series: tuple[Series, ...]
    scale: float = 1.0
    log: bool = False
    from_zero: bool = False  # amounts: a cut axis would exaggerate their noise
    wide: bool = False


def draw(plot: Plot, records: Sequence[Record]) -> str | None:
    """The `<svg>` element, or None where no record has a finite number for it. NaN and infinity are gaps."""
    lines = [
        (series, color, *_points(plot, series.key, records))
        for series, color in zip(plot.series, _SERIES[: len(plot.series)], strict=True)
    ]
    lines = [line for line in lines if any(math.isfinite(y) for y in line[-1])]
    if not lines:
        return None
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": plot.name}):
        figure = Figure(figsize=(9.6, 3.4) if plot.wide else (4.7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for series, color, xs, ys in lines:
            few = series.dots or len(xs) < FEW_POINTS
            axes.plot(xs, ys, color=color, label=series.label, marker="o" if few else "", markersize=3)
        if plot.from_zero:
            axes.set_ylim(bottom=0)
        if plot.log and any(y > 0 for *_, ys in lines for y in ys):
            axes.set_yscale("log", nonpositive="mask")  # zeros become gaps, unless there is nothing else
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if plot.wide else 5, integer=True, min_n_ticks=1))
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        if len(plot.series) > 1:
            axes.legend(ncols=len(plot.series), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), plot)


def _points(plot: Plot, key: str, records: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Steps and scaled values; what is not finite becomes NaN, which is drawn as a gap."""
    xs, ys = [], []
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float):
            xs.append(step_of(record))
            ys.append(value * plot.scale if math.isfinite(value) else math.nan)
    return xs, ys


def _inline(svg: str, plot: Plot) -> str:
    """Matplotlib's SVG file as an element of an HTML page: unique ids, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    for prefix in ('id="', 'href="#', "url(#"):
        svg = svg.replace(prefix, f"{prefix}{plot.name}-")
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{plot.title} over training steps"', 1)
