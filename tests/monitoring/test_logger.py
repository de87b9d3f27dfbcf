import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord  # type: ignore[attr-defined]

from mmrec_train.monitoring import MetricsLogger, read_metrics

CONFIG = {"model": {"preset": "tiny"}, "train": {"steps": 4}}


@dataclass(frozen=True)
class Settings:
    mode: str = "offline"
    project: str = "mmrec"
    name: str | None = None
    entity: str | None = None


def open_logger(run_dir: Path, said: list[str], **changes: Any) -> MetricsLogger:
    arguments: dict[str, Any] = {
        "run_config": CONFIG,
        "wandb_settings": Settings(mode="disabled"),
        "tensorboard": False,
        "wandb_run_id": None,
        "resume_step": 0,
        "report": said.append,
    }
    return MetricsLogger(run_dir, **(arguments | changes))


def wandb_records(file: Path) -> Iterator[WandbRecord]:
    """The records of an offline file: LevelDB's log format after a header of 7 bytes."""
    data, at, message = file.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no piece starts where its header would not fit into the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield WandbRecord.FromString(message)
            message = b""


def wandb_history(file: Path) -> tuple[str, str, list[dict[str, str]]]:
    """The run's id and name in an offline file, and what was logged: names with JSON values."""
    run_id, name, history = "", "", []
    for record in wandb_records(file):
        if record.HasField("run"):
            run_id, name = record.run.run_id, record.run.display_name
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            history.append({key: items[key] for key in ("_step", "loss", "mfu") if key in items})
    return run_id, name, history


def test_a_disabled_wandb_writes_nothing_and_keeps_the_id_for_later(tmp_path: Path) -> None:
    said: list[str] = []
    with open_logger(tmp_path, said, wandb_run_id="kept1234") as logger:
        logger.log({"step": 1, "loss": 2.0})
        assert logger.wandb_run_id == "kept1234"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert said == []


def test_a_resumed_offline_wandb_run_keeps_its_id_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))  # whoever looks for the network would come here
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    said: list[str] = []
    settings = Settings(mode="offline")
    with open_logger(tmp_path, said, wandb_settings=settings) as logger:
        run_id = logger.wandb_run_id
        assert run_id
        for step in (1, 2, 3):
            logger.log({"step": step, "loss": float(step), "mfu": None})
    resumed = {"wandb_run_id": run_id, "resume_step": 2}
    with open_logger(tmp_path, said, wandb_settings=settings, **resumed) as logger:
        assert logger.wandb_run_id == run_id
        for step in (3, 4):
            logger.log({"step": step, "loss": float(step)})

    wandb.teardown()  # waits until its process has written everything
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()

    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    parts = sorted((wandb_history(file) for file in files), key=lambda part: part[-1][0]["_step"])
    assert parts == [
        (run_id, tmp_path.name, [{"_step": str(step), "loss": str(step)} for step in (1, 2, 3)]),
        (run_id, tmp_path.name, [{"_step": str(step), "loss": str(step)} for step in (3, 4)]),
    ]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(said) == 2
    assert all(f"wandb sync {tmp_path}/wandb/*-{run_id}*" in line for line in said)


def test_online_without_a_key_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said: list[str] = []
    with open_logger(tmp_path, said, wandb_settings=Settings(mode="online"), wandb_run_id="kept1234") as logger:
        logger.log({"step": 1, "loss": 2.0})
        logger.log({"step": 2, "loss": 1.0})
        assert logger.wandb_run_id == "kept1234"  # a later part of the run may have the network again
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert len(said) == 1
    assert said[0].startswith("warning: wandb could not start (UsageError: ")
    assert said[0].endswith("metrics.jsonl has every record.")


def test_wandb_failing_on_the_way_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.errors.CommError("the line is dead")

    said: list[str] = []
    with open_logger(tmp_path, said, wandb_settings=Settings(mode="offline")) as logger:
        said.clear()
        with monkeypatch.context() as patch:
            patch.setattr(wandb.Run, "log", fail)
            for step in (1, 2, 3):
                logger.log({"step": step, "loss": 1.0})
    assert [line.split(". ")[0] for line in said] == ["warning: wandb failed (CommError: the line is dead)"]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_mistake_of_ours_is_no_wandb_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("ours")

    logger = open_logger(tmp_path, [], wandb_settings=Settings(mode="offline"))
    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "log", fail)
        with pytest.raises(ValueError, match="ours"):
            logger.log({"step": 1, "loss": 1.0})
    logger.close()


KILL_WANDB = """
import sys
from types import SimpleNamespace
import psutil
from mmrec_train.monitoring import MetricsLogger

settings = SimpleNamespace(mode="offline", project="mmrec", name=None, entity=None)
with MetricsLogger(sys.argv[1], run_config={}, wandb_settings=settings, tensorboard=False, wandb_run_id=None,
                   resume_step=0, report=print) as logger:
    (service,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    service.kill()
    service.wait()
    for step in range(1, 50):
        logger.log({"step": step, "loss": 1.0})
print("trained to the end")
"""


def test_the_death_of_wandbs_process_does_not_end_the_training(tmp_path: Path) -> None:
    # In a process of its own: wandb serves all runs of a process, and of its children, from one service.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILL_WANDB, str(tmp_path)],
        env=environment | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    start, warning, end = done.stdout.splitlines()
    assert start.startswith("wandb: offline run ")
    assert warning.startswith(("warning: wandb failed (", "warning: wandb could not finish ("))
    assert end == "trained to the end"
    assert len(read_metrics(tmp_path)) == 49


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    with open_logger(tmp_path, [], tensorboard=True) as logger:
        for step in (1, 2, 3, 4):
            logger.log({"step": step, "loss": float(step), "mfu": None, "skipped": 0})
    with open_logger(tmp_path, [], tensorboard=True, resume_step=2) as logger:
        for step in (3, 4, 5):
            logger.log({"step": step, "loss": 10.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
        (5, 50),
    ]
    assert sorted(events.Tags()["scalars"]) == [
        "loss",
        "skipped",
    ]  # neither the step itself nor what is unknown
    (config,) = events.Tensors("config/text_summary")[-1].tensor_proto.string_val
    assert b'"preset": "tiny"' in config


def test_tensorboard_gets_nan(tmp_path: Path) -> None:
    with open_logger(tmp_path, [], tensorboard=True) as logger:
        logger.log({"step": 1, "loss": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("loss")
    assert math.isnan(event.value)
