"""launch/local.py with a stand-in for training: who is told to stop, what is returned, who is left."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.local import _choose_accelerators
from mmrec_train.errors import UserError

ROOT = Path(__file__).parents[2]
LOCAL = [sys.executable, str(ROOT / "launch" / "local.py")]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

# Two of these make a run. Those that `train` meet after both were asked to stop, as for writing a checkpoint;
# those that `agree` stop when one was asked. Each has a helper process, which is not to be stopped before it.
RANK_SCRIPT = """
    import os, pathlib, signal, subprocess, sys, time

    behaviour, folder, rank = sys.argv[-2], pathlib.Path(sys.argv[-1]), os.environ["RANK"]
    times_asked = 0

    def ask(number, frame):
        global times_asked
        times_asked += 1

    signal.signal(signal.SIGTERM, ask)
    helper = subprocess.Popen(["sleep", "100"], stderr=subprocess.DEVNULL)
    (folder / f"started_{rank}").write_text(f"{os.getpid()} {helper.pid} .")
    stopping = lambda: len(list(folder.glob("stopping_*")))
    while behaviour == "stubborn":
        time.sleep(0.02)
    if behaviour == "fail" and rank == "1":
        helper.kill()
        sys.exit(2)
    while behaviour != "succeed" and not times_asked and not (behaviour == "agree" and stopping()):
        time.sleep(0.02)
    (folder / f"stopping_{rank}").touch()
    while behaviour in ("train", "agree") and stopping() < 2:
        time.sleep(0.02)
    (folder / f"ended_{rank}").write_text(f"asked {times_asked}, helper {helper.poll()}")
    helper.kill()
    sys.exit(0 if behaviour == "succeed" else 75)
"""


class Run:
    """Two ranks of RANK_SCRIPT under launch/local.py."""

    def __init__(self, folder: Path, behaviour: str) -> None:
        script = folder / "script.py"
        script.write_text(textwrap.dedent(RANK_SCRIPT))
        command = [*LOCAL, "--ranks", "2", str(script), behaviour, str(folder)]
        self.folder = folder
        self.local = psutil.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        self.ranks: list[psutil.Process] = []
        self.processes: list[psutil.Process] = []

    def wait_for_ranks(self) -> None:
        reports = [self.folder / f"started_{rank}" for rank in range(2)]
        wait_until(lambda: all(path.exists() and path.read_text().endswith(".") for path in reports))
        self.ranks = [psutil.Process(int(path.read_text().split()[0])) for path in reports]
        self.processes = self.local.children(recursive=True)

    def launcher(self) -> psutil.Process:
        (launcher,) = self.local.children()
        return launcher

    def end(self) -> tuple[int, str]:
        """Exit code and what was printed to stderr."""
        _, errors = self.local.communicate(timeout=60)
        return self.local.returncode, errors

    def ends_of_ranks(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("ended_*"))]

    def nobody_is_left(self) -> bool:
        return not any(process.is_running() and process.status() != "zombie" for process in self.processes)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Run]]:
    runs = []

    def start_run(behaviour: str) -> Run:
        runs.append(Run(tmp_path, behaviour))
        return runs[-1]

    yield start_run
    for run in runs:  # what a failed test left
        for process in [run.local, *run.processes]:
            if process.is_running():
                process.kill()


@pytest.mark.parametrize("stop_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_asks_each_rank_once_and_their_75_is_returned(
    start: Callable[[str], Run], stop_signal: signal.Signals
) -> None:
    run = start("train")
    run.wait_for_ranks()
    run.local.send_signal(stop_signal)
    run.local.send_signal(signal.SIGUSR1)

    code, errors = run.end()
    assert code == 75
    assert run.ends_of_ranks() == ["asked 1, helper None"] * 2
    assert f"{stop_signal.name}: asking the ranks" in errors or "SIGUSR1: asking the ranks" in errors
    assert run.nobody_is_left()


def test_success_is_returned(start: Callable[[str], Run]) -> None:
    run = start("succeed")
    assert run.end()[0] == 0
    assert run.ends_of_ranks() == ["asked 0, helper None"] * 2


def test_bad_input_seen_by_one_rank_is_returned_though_the_other_answers_75(
    start: Callable[[str], Run],
) -> None:
    run = start("fail")
    assert run.end()[0] == 2
    assert (run.folder / "stopping_0").exists()


def test_a_killed_rank_is_a_failure_and_named(start: Callable[[str], Run]) -> None:
    run = start("fend for itself")
    run.wait_for_ranks()
    run.ranks[0].kill()
    code, errors = run.end()
    assert code == 1
    assert "A rank was killed by signal 9" in errors
    wait_until(run.nobody_is_left)


def test_a_second_interrupt_kills_ranks_that_do_not_stop(start: Callable[[str], Run]) -> None:
    run = start("stubborn")
    run.wait_for_ranks()
    run.local.send_signal(signal.SIGINT)
    run.local.send_signal(signal.SIGTERM)  # not an interrupt: no reason to kill
    time.sleep(0.5)
    assert run.local.poll() is None
    run.local.send_signal(signal.SIGINT)
    assert run.end()[0] == 1
    wait_until(run.nobody_is_left)


def test_ranks_stop_when_local_py_dies(start: Callable[[str], Run]) -> None:
    run = start("agree")
    run.wait_for_ranks()
    run.local.kill()
    wait_until(run.nobody_is_left)
    assert len(run.ends_of_ranks()) == 2


def test_ranks_are_killed_when_the_launcher_dies(start: Callable[[str], Run]) -> None:
    run = start("stubborn")
    run.wait_for_ranks()
    run.launcher().kill()
    code, errors = run.end()
    assert code == 1
    assert "The launcher was killed by signal 9" in errors
    wait_until(run.nobody_is_left)


class FakeGpus:
    """What launch/local.py asks of a DeepSpeed accelerator, on a machine with four GPUs."""

    def device_name(self) -> str:
        return "cuda"

    def device_count(self) -> int:
        return 4

    def visible_devices_envs(self) -> list[str]:
        return ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("visible", "ranks", "chosen"),
    [("", None, ["0", "1", "2", "3"]), ("", 2, ["0", "1"]), ("2,5", None, ["2", "5"]), ("2,5", 1, ["2"])],
)
def test_gpus_are_all_that_are_visible_or_the_first_of_them(
    monkeypatch: pytest.MonkeyPatch, visible: str, ranks: int | None, chosen: list[str]
) -> None:
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", FakeGpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _choose_accelerators(ranks)[0] == chosen
    with pytest.raises(UserError, match="--ranks is 5, but this machine shows"):
        _choose_accelerators(5)


def test_a_port_in_use_and_no_ranks_are_user_errors() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        command = [*LOCAL, "--master_port", port, "script.py"]
        result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --master_port {port} cannot be used: ")
    assert result.stderr.count("\n") == 1

    command = [*LOCAL, "--ranks", "0", "script.py"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: --ranks is 0; it must be at least 1.\n"
