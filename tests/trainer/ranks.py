"""Runs `launch/pretrain.py` as several ranks on this machine, the way a launcher would start them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port():
    """A port that nobody has, and that the system will not give to a connection before a rank takes it.

    Runs in turn take theirs after minutes. The system's own choice begins at 32768 on Linux.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start(config, overrides=(), *, world_size=2, resume="auto", port=None):
    """Starts the ranks; returns their processes."""
    return _start([_pretrain(config, overrides, resume)] * world_size, port or free_port())


def start_differing(config, *overrides):
    """Starts a rank for each of the overrides, as hosts do whose configurations are not the same."""
    return _start([_pretrain(config, of_rank) for of_rank in overrides], free_port())


def _pretrain(config, overrides, resume="auto"):
    command = [str(REPOSITORY / "launch/pretrain.py"), "--config", str(config), "--resume", resume]
    return [*command, "--set", *overrides] if overrides else command


def _start(commands, port):
    """A rank for each of the commands."""
    world_size = len(commands)
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
        )
        for rank, command in enumerate(commands)
    ]


def finish(processes, timeout=280):
    """Waits; returns exit codes and outputs of the ranks. One that fails takes the others down, as launchers do."""
    deadline = time.monotonic() + timeout
    with ThreadPoolExecutor(len(processes)) as pool:
        outputs = [pool.submit(p.communicate) for p in processes]  # a pipe that nobody reads stops them when it is full
        try:
            while any(p.poll() is None for p in processes):
                failed = [p for p in processes if p.poll() not in (None, 0, 75)]
                if failed or time.monotonic() > deadline:
                    time.sleep(2)
                    break
                time.sleep(0.05)
        finally:
            for p in processes:  # those that are left, also when the test's own time is over
                p.kill()
    return [p.returncode for p in processes], [output.result()[0] for output in outputs]


def run(config, overrides=(), *, world_size=2, resume="auto", port=None):
    """Runs to the end and expects success; returns rank 0's output."""
    return expect_success(start(config, overrides, world_size=world_size, resume=resume, port=port))


def start_in_turn(config, runs, *, code=0, world_size=2):
    """Starts ranks that do a run for each of the overrides, one after another; each has to return that code."""
    arguments = [str(config), json.dumps([(free_port(), overrides) for overrides in runs]), str(code)]
    return _start([["-m", "tests.trainer.in_turn", *arguments]] * world_size, 0)


def expect_success(processes):
    """Waits until the ranks have ended well; returns rank 0's output."""
    codes, outputs = finish(processes)
    assert codes == [0] * len(processes), "\n".join(outputs)
    return outputs[0]


def stop_after(processes, run_dir, step, number=signal.SIGTERM):
    """Sends a signal to the last rank once that step is logged. What the ranks print until then has to fit a pipe."""
    metrics = Path(run_dir) / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.02)
    processes[-1].send_signal(number)


def training_records(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
