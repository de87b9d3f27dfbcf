"""Runs a training script on all accelerators of this machine, and stops it so that nothing is lost.

    python launch/local.py [--ranks N] [--master_port PORT] SCRIPT [ARGUMENTS ...]

The ranks are started by DeepSpeed's own per-node launcher, with the environment that `deepspeed SCRIPT` gives
them: one rank per visible accelerator, or two on a machine that has none. What this program adds is the end:

- Ctrl-C, SIGTERM or SIGUSR1 asks the ranks, and only them, to stop, once. They write a checkpoint and exit
  with 75. (DeepSpeed's launcher, signalled itself, gives them 30 seconds, kills them, and exits with 1.)
  A second Ctrl-C kills everything at once.
- The exit code is that of the ranks: 0, 2 (bad input) or 75 (stopped, run again to go on); else it is 1.
- No rank outlives the run. If this program dies, the kernel sends the launcher SIGTERM, which the launcher
  passes on; if the launcher dies, this program kills the ranks.

Several machines: `deepspeed --hostfile` or SLURM start the same script; see the README.
"""

import argparse
import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil

from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, UserError

DEFAULT_CPU_RANKS = 2
HOST = "127.0.0.1"
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>: the signal a process gets when its parent dies


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, help="processes to start (default: one per accelerator, or 2)")
    parser.add_argument("--master_port", type=int, help="port of the rendezvous (default: a free one)")
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the training script is given")
    args = parser.parse_args(argv)
    try:
        port = _usable_port(args.master_port)
        accelerator_ids, environment = _choose_accelerators(args.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return _run(_launcher_command(accelerator_ids, port, [args.script, *args.arguments]), environment)


def _usable_port(requested: int | None) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, requested or 0))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--master_port {requested} cannot be used: {error}. Choose another, or leave it out."
            ) from error
        port: int = probe.getsockname()[1]
    return port


def _choose_accelerators(ranks: int | None) -> tuple[list[str], dict[str, str]]:
    """The identifiers of the accelerators to use, one a rank, and the environment for the launcher."""
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks is {ranks}; it must be at least 1.")
    from deepspeed.accelerator import get_accelerator  # takes seconds: --help and mistakes need not wait

    accelerator = get_accelerator()
    environment = dict(os.environ)
    if accelerator.device_name() == "cpu":
        ranks = ranks or DEFAULT_CPU_RANKS
        environment["DS_ACCELERATOR"] = "cpu"  # spares the launcher and each rank the search and its warning
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        return [str(rank) for rank in range(ranks)], environment

    visible = os.environ.get(accelerator.visible_devices_envs()[0], "")
    available = visible.split(",") if visible else [str(index) for index in range(accelerator.device_count())]
    if ranks is not None and ranks > len(available):
        raise UserError(f"--ranks is {ranks}, but this machine shows {len(available)} accelerators.")
    return available[:ranks], environment


def _launcher_command(accelerator_ids: list[str], port: int, script: list[str]) -> list[str]:
    # The `deepspeed` command would only add a process between this one and the launcher, one that hides the
    # launcher's death behind exit code 0 and does not pass on the signal of its own parent's death.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": accelerator_ids}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    return [*launcher, f"--master_addr={HOST}", f"--master_port={port}", "--log_level=critical", *script]


class _StopRequest:
    """Remembers the stop signals that this process got; installs itself as their handler."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first one
        self.interrupts = 0
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self.interrupts += number == signal.SIGINT


def _run(command: list[str], environment: dict[str, str]) -> int:
    request = _StopRequest()
    libc = ctypes.CDLL(None)
    # In a session of its own, so that Ctrl-C in the terminal reaches this process alone.
    launcher = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    asked = False
    while launcher.returncode is None:
        if request.interrupts > 1:
            _say("Killing all ranks.")
            _kill_all(launcher)
            launcher.wait()
            return EXIT_FAILURE
        if request.signal is not None and not asked:
            _say(f"{request.signal.name}: asking the ranks to write a checkpoint and stop.")
            _ask_to_stop(launcher)
            asked = True
        try:
            launcher.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return _exit_code(launcher)


def _ranks(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher's children that are ranks. What the ranks start themselves (compilers, wandb) is not."""
    ranks = []
    for child in psutil.Process(launcher.pid).children():
        with suppress(psutil.NoSuchProcess):  # it may end between the two calls
            if "RANK" in child.environ():
                ranks.append(child)
    return ranks


def _ask_to_stop(launcher: subprocess.Popen[bytes]) -> None:
    ranks = _ranks(launcher)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # it may have ended by itself just now
            rank.terminate()
    if not ranks:  # none was started yet, so there is nothing to save
        launcher.terminate()


def _kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher, the ranks and what they started: all have the launcher's process group."""
    with suppress(ProcessLookupError):  # all may be gone already
        os.killpg(launcher.pid, signal.SIGKILL)


def _exit_code(launcher: subprocess.Popen[bytes]) -> int:
    code = launcher.returncode
    if code in (EXIT_OK, EXIT_USER_ERROR, EXIT_STOPPED):
        return code
    if code < 0:
        _say(f"The launcher was killed by signal {-code}; killing the ranks.")
    elif code > 128:  # a rank killed by a signal: the launcher exits with its negative number, modulo 256
        _say(f"A rank was killed by signal {256 - code} (signal 9 often means: out of memory).")
    _kill_all(launcher)
    return EXIT_FAILURE


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
