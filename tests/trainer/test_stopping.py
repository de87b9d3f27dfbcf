"""Signals: remembered, agreed upon, and answered by exactly one checkpoint wherever in a step they come."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec_train.trainer import Trainer
from mmrec_train.trainer import checkpoint as checkpoint_module
from mmrec_train.trainer.stopping import STOP_SIGNALS, StopRequest
from tests.trainer import ranks
from tests.trainer.command import Command

CPU = torch.device("cpu")


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def all_reduce(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Stands in for the other ranks: the tensors that were reduced; none of the others was asked to stop."""
    reduced: list[torch.Tensor] = []
    monkeypatch.setattr("mmrec_train.trainer.stopping.dist.all_reduce", lambda tensor, op: reduced.append(tensor))
    return reduced


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Whatever a test does to the handlers ends with it."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    after = [signal.getsignal(number) for number in STOP_SIGNALS]
    for number, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before, "the handlers were not put back"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_is_remembered(number: int, all_reduce: list[torch.Tensor]) -> None:
    with StopRequest() as stop:
        assert not stop.agreed(CPU)
        send(number)
        assert stop.agreed(CPU) and stop.agreed(CPU)
    assert len(all_reduce) == 3  # each a collective call, whatever this rank knows


def test_one_rank_that_was_asked_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_was_asked(tensor: torch.Tensor, op: object) -> None:
        tensor.fill_(1.0)

    monkeypatch.setattr("mmrec_train.trainer.stopping.dist.all_reduce", another_was_asked)
    with StopRequest() as stop:
        assert stop.agreed(CPU)


def test_asking_twice(all_reduce: list[torch.Tensor]) -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # schedulers repeat it
        send(signal.SIGUSR1)
        assert stop.agreed(CPU)
    with StopRequest():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


# ---- in a run of three steps with a checkpoint after each


class Run:
    """The command, with a signal sent where the test says; what was saved."""

    def __init__(self, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._command, self._monkeypatch = command, monkeypatch
        self.folder = folder
        self.saved: list[int] = []
        save = checkpoint_module.save

        def remember(*arguments: Any, step: int, **rest: Any) -> Path:
            self.saved.append(step)
            return save(*arguments, step=step, **rest)

        monkeypatch.setattr(checkpoint_module, "save", remember)

    def __call__(self, *overrides: str) -> int:
        return self._command(
            "train.steps=3",
            "train.global_batch_size=1",
            "train.validate_every=2",
            "train.validation_tokens=48",
            "schedule.warmup_steps=1",
            "checkpoint.every=1",
            "logging.sample_tokens=0",
            *overrides,
        ).code

    def signal_after(self, method: str, call: int) -> None:
        """Sends SIGTERM at the end of the n-th call of a trainer's method, counted from 1."""
        original: Callable[..., Any] = getattr(Trainer, method)
        calls = 0

        def then_signal(*arguments: Any) -> Any:
            nonlocal calls
            result = original(*arguments)
            calls += 1
            if calls == call:
                send(signal.SIGTERM)
            return result

        self._monkeypatch.setattr(Trainer, method, then_signal)


@pytest.fixture
def run(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(Command(config_file, capsys, monkeypatch), tmp_path / "run", monkeypatch)


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in ranks.training_records(run_dir)]


@pytest.mark.parametrize(
    "method, call, saved",
    [
        ("_validate", 1, [1]),  # before the first step
        ("_train_step", 1, [1]),  # in a step that is saved anyway: once, not twice
        ("_save", 1, [1, 2]),  # when step 1 is saved already: after the next one
        ("_validate", 2, [1, 2, 3]),  # after the ranks agreed on step 2
        ("_train_step", 3, [1, 2, 3]),  # in the last step
    ],
)
def test_a_signal_anywhere_stops_with_one_checkpoint_a_step(run: Run, method: str, call: int, saved: list[int]) -> None:
    run.signal_after(method, call)
    assert run() == 75
    assert run.saved == saved
    assert steps(run.folder) == list(range(1, saved[-1] + 1))
    assert not (run.folder / "report.html").exists()

    assert run() == 0
    assert run.saved == [1, 2, 3]
    assert steps(run.folder) == [1, 2, 3]
    assert (run.folder / "report.html").exists()


@pytest.mark.parametrize("method, call", [("_save", 3), ("_finish", 1)])
def test_a_signal_after_the_last_step_changes_nothing(run: Run, method: str, call: int) -> None:
    run.signal_after(method, call)
    assert run() == 0
    assert run.saved == [1, 2, 3]
    assert (run.folder / "report.html").exists()


def test_without_a_checkpoint_due_the_stop_writes_one(run: Run) -> None:
    run.signal_after("_train_step", 2)
    assert run("checkpoint.every=100") == 75
    assert run.saved == [2]
    assert run("checkpoint.every=100") == 0
    assert run.saved == [2, 3]
