"""Run a sweep: the trials of launch/sweeps/NAME.yaml on this machine, one after another.

Each trial is a run of launch/pretrain.py in a folder of its own. Run the same command again to go on: finished trials
are skipped, an interrupted one resumes. Exit codes: 0 done; 2 bad configuration or input; 75 stopped on request;
1 a trial failed.
"""

import argparse
import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from mmrec_train.sweep import Result, Sweep, Trial, load_sweep, read_result, record_exit, sorted_results, write_results

LAUNCH = Path(__file__).resolve().parent
LOCAL_COMMAND = (sys.executable, str(LAUNCH / "local.py"))
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>: the signal a process gets when its parent dies


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a YAML file, see launch/sweeps/")
    parser.add_argument("--ranks", type=int, help="processes of each trial (default: one per accelerator, or 2)")
    options = parser.parse_args(arguments)
    try:
        sweep = load_sweep(options.file)
        with _StopSignals() as signals:
            code = _run_trials(sweep, options.ranks, signals)
        results = _collect(sweep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    console = Console(highlight=False)
    console.print(_table(sweep, results))
    console.print(f"{sweep.folder}/results.csv, {sweep.folder}/plot.png", soft_wrap=True, markup=False)
    return code


def _run_trials(sweep: Sweep, ranks: int | None, signals: "_StopSignals") -> int:
    """Runs what is not finished, and returns the exit code. After a trial that failed the others still run."""
    outcome = EXIT_OK
    for number, trial in enumerate(sweep.trials, start=1):
        title = f"trial {number}/{len(sweep.trials)}: {trial.name}"
        if read_result(trial).status == "finished":
            print(f"{title}: finished already", flush=True)
            continue
        if signals.received:
            return outcome or EXIT_STOPPED
        print(title, flush=True)
        code = _run(sweep, trial, ranks, signals)
        record_exit(trial, code)
        _collect(sweep)
        if code in (EXIT_STOPPED, EXIT_USER_ERROR):  # what the user has to mend would stop the next trial too
            return code
        if code != EXIT_OK:
            print(f"{title}: failed with exit code {code}", file=sys.stderr, flush=True)
            outcome = EXIT_FAILURE
    return outcome


def _run(sweep: Sweep, trial: Trial, ranks: int | None, signals: "_StopSignals") -> int:
    """One start of a trial, to which stop signals are passed on; returns its exit code."""
    command = [*LOCAL_COMMAND, *(["--ranks", str(ranks)] if ranks else []), str(LAUNCH / "pretrain.py")]
    command += ["--config", str(sweep.config_path), "--set", *trial.arguments]
    libc = ctypes.CDLL(None)
    # In a session of its own: Ctrl-C in the terminal would reach it twice, which kills a run that is saving.
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    passed_on = 0
    while True:
        try:
            code = process.wait(POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            while passed_on < len(signals.received):
                process.send_signal(signals.received[passed_on])
                passed_on += 1
    # killed by what was passed on: it had not begun to train
    return EXIT_STOPPED if -code in signals.received[:passed_on] else code


class _StopSignals:
    """Collects the stop signals that this process gets, in a `with`."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopSignals":
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def _collect(sweep: Sweep) -> list[Result]:
    """The results so far, which it also writes."""
    results = [read_result(trial) for trial in sweep.trials]
    write_results(sweep, results)
    return results


def _table(sweep: Sweep, results: Sequence[Result]) -> Table:
    """A row for each trial, best first."""
    table = Table()
    for label in sweep.labels.values():
        table.add_column(label, overflow="fold")
    table.add_column("status")
    for column in ("step", "loss", "validation loss"):
        table.add_column(column, justify="right")
    for result in sorted_results(results):
        choice = (str(result.trial.choice.get(key, "")) for key in sweep.labels)
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (result.loss, result.validation_loss))
        table.add_row(*choice, result.status, f"{result.step:,}", *losses)
    return table


if __name__ == "__main__":
    sys.exit(main())
