"""Runs `launch/pretrain.py` as several ranks on this machine, the way a launcher would start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(config, overrides=(), *, world_size=2, resume="auto", port=None):
    """Starts the ranks; returns their processes."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(REPOSITORY / "launch/pretrain.py"), "--config", str(config), "--resume", resume]
    if overrides:
        command += ["--set", *overrides]
    return [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in range(world_size)
    ]


def finish(processes, timeout=280):
    """Waits; returns exit codes and outputs of the ranks. One that fails takes the others down, as launchers do."""
    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in processes):
        failed = [p for p in processes if p.poll() not in (None, 0, 75)]
        if failed or time.monotonic() > deadline:
            time.sleep(2)
            for p in processes:
                p.kill()
        time.sleep(0.05)
    outputs = [p.communicate()[0] for p in processes]
    return [p.returncode for p in processes], outputs


def run(config, overrides=(), *, world_size=2, resume="auto", port=None):
    """Runs to the end and expects success; returns rank 0's output."""
    codes, outputs = finish(start(config, overrides, world_size=world_size, resume=resume, port=port))
    assert codes == [0] * world_size, "\n".join(outputs)
    return outputs[0]


def stop_after(processes, run_dir, step, number=signal.SIGTERM):
    """Sends a signal to the last rank once that step is logged."""
    metrics = Path(run_dir) / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.02)
    processes[-1].send_signal(number)


def training_records(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
