"""The loss curve, drawn with characters."""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator
from plotext import figure, terminal

from mmrec_train.monitoring.metrics_file import Record
from mmrec_train.monitoring.summary import finite_points


def loss_curve(records: Sequence[Record], *, width: int = 100, height: int = 22) -> str:
    """Training and validation loss over steps.

    Without colours or control codes, so that it also reads well in a file. Points that are not finite are
    left out. `width` and `height` are in characters.
    """
    training, validation = finite_points(records, "loss"), finite_points(records, "validation_loss")
    steps = training[0] + validation[0]
    if not steps:
        return "(no finite loss was logged)"
    terminal.limit(False, False)
    figure.clear()  # plotext draws on one figure of the process
    figure.theme("colorless").plot_size(width, height).label("step")
    figure.title("loss    ▄▀ training    ● validation")  # plotext's own legend would cover the curve's start
    if training[0]:
        figure.draw(figure.signal(*training, marker="hd").lines())
    if validation[0]:
        figure.draw(figure.signal(*validation, marker="●"))
    ticks = MaxNLocator(nbins=8, integer=True).tick_values(min(steps), max(steps))
    shown = [round(tick) for tick in ticks if min(steps) <= tick <= max(steps)]
    figure.ruler("x").ticks(shown, [str(tick) for tick in shown])
    drawing: str = figure.build().string(colorless=True)
    return "\n".join(line.rstrip() for line in drawing.split("\n")).rstrip("\n")
