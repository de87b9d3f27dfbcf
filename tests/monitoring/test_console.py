import io
import math
from pathlib import Path

import pytest

from mmrec_train.monitoring import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


RECORD = {
    "step": 25,
    "tokens": 409600,
    "loss": 4.12345,
    "learning_rate": 0.001,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "data_wait_seconds": 0.00123,
    "mfu": 0.4123,
    "peak_memory_bytes": 3435973837,
    "solver_iterations": 5,
    "solver_residual": 3.1e-5,
    "skipped": 0,
}


def test_a_logged_step_is_one_line_with_its_numbers_and_the_time_left(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    with Console(tmp_path, file=out, clock=clock) as console, console.progress(2000):
        clock.now += 50
        console.log_record(RECORD)  # 25 steps in 50 s, 1975 to go
    assert out.getvalue() == (
        "step   25/2000  loss 4.1235  lr 1.00e-03  grad 0.500  12.3k tok/s  data 1.2 ms  mfu 41.2%"
        "  3.2 GiB  solver 5 it  residual 3.1e-05  eta 1:05:50\n"
    )


def test_the_pace_of_a_resumed_run_counts_from_where_it_resumed(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    with Console(tmp_path, file=out, clock=clock) as console, console.progress(100, first_step=90):
        console.log_record({"step": 90, "loss": 2.0})
        clock.now += 10
        console.log_record({"step": 92, "loss": 2.0})  # 2 steps in 10 s, 8 to go
    assert out.getvalue() == "step  90/100  loss 2.0000  eta -\nstep  92/100  loss 2.0000  eta 0:00:40\n"


def test_validation_unknown_skipped_and_nan(tmp_path: Path) -> None:
    out = io.StringIO()
    with Console(tmp_path, file=out) as console, console.progress(9):
        console.log_record({"step": 3, "validation_loss": 2.0, "validation_perplexity": math.exp(2.0)})
        console.log_record({"step": 0, "loss": math.nan, "grad_norm": math.inf, "mfu": None, "skipped": 2})
    assert out.getvalue() == (
        "step 3/9  validation loss 2.0000  perplexity 7.39\nstep 0/9  loss nan  grad inf  skipped 2  eta -\n"
    )


def test_several_validation_sets_are_named(tmp_path: Path) -> None:
    out = io.StringIO()
    losses = {"validation/code/loss": 1.5, "validation/code/loss_0-1K": 1.5, "validation/text/loss": math.nan}
    with Console(tmp_path, file=out) as console, console.progress(9):
        console.log_record({"step": 3, "validation_loss": 2.0, **losses})
        console.log_record({"step": 3, "validation_loss": 2.0, "validation/text/loss": 2.0})
    assert out.getvalue() == (
        "step 3/9  validation loss 2.0000  code 1.5000  text nan\nstep 3/9  validation loss 2.0000\n"
    )


def test_everything_is_also_in_the_log_and_nothing_is_a_control_code(tmp_path: Path) -> None:
    out = io.StringIO()
    long = "a line [bold]longer[/bold] than any terminal " * 5
    with Console(tmp_path, file=out) as console:
        console.model_card("MM-Rec tiny", [("parameters", "1.20M"), ("folder", "runs/[tiny]")])
        with console.progress(10):
            console.print(long, style="yellow")
            console.advance(5)
            console.log_record({"step": 5, "loss": 1.0})
        console.summary([("steps", "10")], "the curve", "def f():\n  return \x1b[31m'é'\x07")
    text = out.getvalue()
    assert text == (tmp_path / "log.txt").read_text()
    assert long in text.splitlines()
    assert "│ parameters  1.20M       │" in text
    assert "│ folder      runs/[tiny] │" in text
    assert text.endswith("the curve\n\nA text sample from the model:\n  def f():\n    return \ufffd[31m'é'\ufffd\n")
    assert not [c for c in text if not c.isprintable() and c not in "\n\t"]


def test_a_terminal_gets_colours_and_a_bar_and_the_log_does_not(tmp_path: Path) -> None:
    out, clock = Terminal(), Clock()
    with Console(tmp_path, file=out, clock=clock) as console, console.progress(10):
        clock.now += 6
        console.advance(2)
        console.log_record({"step": 2, "loss": math.nan})
    assert "\x1b[1;31mloss nan\x1b[0m" in out.getvalue()
    assert "eta 0:00:24" in out.getvalue()
    assert "━━━" in out.getvalue()
    assert (tmp_path / "log.txt").read_text() == "step  2/10  loss nan  eta 0:00:24\n"


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with Console(tmp_path, file=io.StringIO()) as console:
            console.print(text)
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_a_terminal_without_unicode_does_not_end_the_run(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with Console(tmp_path, file=io.TextIOWrapper(raw, encoding="ascii")) as console:
        console.print("10.2 → 2.4")
        assert raw.getvalue() == b"10.2 ? 2.4\n"
    assert (tmp_path / "log.txt").read_text() == "10.2 → 2.4\n"


def test_the_bar_moves_only_inside_progress(tmp_path: Path) -> None:
    with Console(tmp_path, file=io.StringIO()) as console, pytest.raises(AssertionError):
        console.advance(1)
