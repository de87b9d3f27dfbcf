"""What the user sees while a run goes on, and finds again in `RUN/log.txt`."""

import io
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import rich.console
from rich import box
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from mmrec_train.monitoring.formatting import format_bytes, format_count, format_duration
from mmrec_train.monitoring.metrics_file import Record, step_of
from mmrec_train.monitoring.validation_table import set_losses

LOG_NAME = "log.txt"
PLAIN_WIDTH = 110  # columns of log.txt, and of a terminal that is none (a file, a pipe)

Rows = Sequence[tuple[str, str]]


class Console:
    """Prints to the terminal and to `RUN/log.txt` (appended: a resumed run goes on in it). For rank 0 only.

    On a terminal it shows a progress bar under the lines. Elsewhere there are no control codes; each logged
    step's line says by itself how far the run is and how long it will still take.

    file: the terminal, standard output by default. clock: seconds, rising; replaced in tests.
    """

    def __init__(
        self, run_dir: str | Path, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        file = sys.stdout if file is None else file
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")  # a terminal without Unicode must not end the training
        self._terminal = rich.console.Console(file=file, highlight=False)
        if not self._terminal.is_terminal:
            self._terminal.width = PLAIN_WIDTH
        log_path = Path(run_dir) / LOG_NAME
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = open(log_path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._log = rich.console.Console(
            file=self._log_file, width=PLAIN_WIDTH, highlight=False, color_system=None, force_terminal=False
        )
        self._clock = clock
        self._total_steps = 0
        self._first_step = 0
        self._started = 0.0
        self._bar: tuple[Progress, TaskID] | None = None

    def print(self, text: str, style: str = "") -> None:
        """Print `text` as it is: no markup, no wrapping. `style` is rich's, e.g. "bold" or "yellow"."""
        self._emit(Text(text, style=style))

    def model_card(self, title: str, rows: Rows) -> None:
        """A titled box of (name, value) rows."""
        self._emit(_card(title, rows))

    def summary(self, rows: Rows, curve: str, sample: str = "") -> None:
        """The end: the rows of `summarize`, the drawing of `loss_curve`, a text that the model wrote."""
        self._emit(_card("Summary", rows))
        self.print(curve)
        if sample:
            self._emit(Text("\nA text sample from the model:", style="bold"))
            self.print(textwrap.indent(_printable(sample), "  "))

    @contextmanager
    def progress(self, total_steps: int, first_step: int = 0) -> Iterator[None]:
        """Show progress while the body runs. `first_step` steps are done already (a resumed run)."""
        self._total_steps, self._first_step, self._started = total_steps, first_step, self._clock()
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("eta {task.fields[eta]}"),
        )
        bar = Progress(
            *columns,
            console=self._terminal,
            transient=True,
            disable=not self._terminal.is_terminal,
            expand=True,
        )
        with bar:
            self._bar = bar, bar.add_task("", total=total_steps, completed=first_step, eta="-")
            try:
                yield
            finally:
                self._bar = None

    def advance(self, step: int) -> None:
        """`step` steps are done: move the bar. Call it at every step, inside `progress`."""
        assert self._bar is not None
        bar, task = self._bar
        bar.update(task, completed=step, eta=self._eta(step))

    def log_record(self, record: Record) -> None:
        """One line for a record of training or of validation. Call it inside `progress`."""
        step = step_of(record)
        width = len(str(self._total_steps))
        head = f"step {step:>{width}}/{self._total_steps}"
        fields = [_field(record.get(key), form, style) for key, form, style in _FIELDS]
        sets = set_losses(record)
        if len(sets) > 1:
            fields += [_field(loss, f"{name} {{:.4f}}".format, "") for name, loss in sets.items()]
        if "validation_loss" not in record:
            fields.append(Text(f"eta {self._eta(step)}"))
        self._emit(Text("  ").join([Text(head, style="dim"), *filter(None, fields)]))

    def close(self) -> None:
        self._log_file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _emit(self, renderable: rich.console.RenderableType) -> None:
        # soft_wrap: a line longer than the terminal stays one line, to be searched and copied.
        soft_wrap = isinstance(renderable, Text)
        self._terminal.print(renderable, soft_wrap=soft_wrap)
        self._log.print(renderable, soft_wrap=soft_wrap)

    def _eta(self, step: int) -> str:
        """Time to the last step at the average pace so far, validation and checkpoints included."""
        done = step - self._first_step
        if done <= 0:
            return "-"
        return format_duration((self._clock() - self._started) / done * (self._total_steps - step))


def _card(title: str, rows: Rows) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return Panel(table, title=Text(title, style="bold"), title_align="left", box=box.ROUNDED, expand=False)


# The parts of a line: the record's key, how its number reads, rich's style. What a record lacks is left out.
_FIELDS: tuple[tuple[str, Callable[[float], str], str], ...] = (
    ("loss", lambda x: f"loss {x:.4f}", "bold"),
    ("validation_loss", lambda x: f"validation loss {x:.4f}", "bold green"),
    ("validation_perplexity", lambda x: f"perplexity {x:.2f}", "green"),
    ("learning_rate", lambda x: f"lr {x:.2e}", ""),
    ("grad_norm", lambda x: f"grad {x:.3f}", ""),
    ("tokens_per_second", lambda x: f"{format_count(x)} tok/s", ""),
    ("data_wait_seconds", lambda x: f"data {x * 1e3:.1f} ms", ""),
    ("mfu", lambda x: f"mfu {x:.1%}", ""),
    ("peak_memory_bytes", format_bytes, ""),
    ("solver_iterations", lambda x: f"solver {x:.3g} it", ""),
    ("solver_residual", lambda x: f"residual {x:.1e}", ""),
    ("skipped", lambda x: f"skipped {x:g}" if x else "", "bold red"),
)


def _field(value: object, form: Callable[[float], str], style: str) -> Text | None:
    if not isinstance(value, int | float):
        return None
    return Text(form(value), style if math.isfinite(value) else "bold red")


def _printable(text: str) -> str:
    """What a model writes may hold control characters, which must not reach the terminal: U+FFFD instead."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
