"""launch/pretrain.py before any process group: mistakes, the dry run, exit codes. See also tests/trainer."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.pretrain import main
from mmrec_train.config import RunConfig
from mmrec_train.trainer import Outcome
from tests.trainer.command import Command, Result
from tests.trainer.ranks import REPOSITORY
from tests.trainer.runs import write_config


@pytest.fixture
def pretrain(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """The command on a copy of the data set, `tmp_path/data`. It must not get as far as a process group."""

    def started(**_: Any) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr("mmrec_train.trainer.distributed.dist.init_distributed", started)
    shutil.copytree(dataset, tmp_path / "data")
    return Command(write_config(tmp_path, tmp_path / "data"), capsys, monkeypatch)


@pytest.fixture(autouse=True)
def _no_run_folder(tmp_path: Path) -> Iterator[None]:
    """What is refused leaves nothing behind."""
    yield
    assert not (tmp_path / "run").is_dir()


# ---- the data set


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def corrupt(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "file", ["train/main/shard_00000.bin", "train/main/shard_00000.idx", "validation/main/shard_00000.bin"]
)
@pytest.mark.parametrize("damage, word", [(delete, "missing"), (truncate, "truncated"), (corrupt, "corrupt")])
def test_a_damaged_shard(
    pretrain: Command, tmp_path: Path, file: str, damage: Callable[[Path], None], word: str
) -> None:
    damage(tmp_path / "data" / file)
    message = pretrain().refusal
    assert f"shard {tmp_path / 'data' / file} is {word}" in message
    assert "prepare it again" in message


def test_a_tokenizer_that_did_not_make_the_data_set(pretrain: Command, tmp_path: Path) -> None:
    path = tmp_path / "data/tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))
    assert f"{path.parent} is not the tokenizer that made this data set" in pretrain().refusal


def test_no_data_set(pretrain: Command, tmp_path: Path) -> None:
    for options in ((), ("--dry-run",)):
        message = pretrain(f"data.path={tmp_path}/nowhere", options=options).refusal
        assert f"{tmp_path}/nowhere is not a prepared data set" in message
        assert "launch/prepare_data.py" in message


def test_validation_without_validation_documents(pretrain: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "data/manifest.json"
    content = json.loads(manifest.read_text())
    del content["sources"]["main"]["splits"]["validation"]
    manifest.write_text(json.dumps(content))
    assert "has no validation documents" in pretrain().refusal


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "override, expected",
    [
        ("data.sources={mane: {}}", "data.sources: {data} has no source 'mane' to train on; did you mean 'main'?"),
        (
            "data.sources={main: {epochs: 1}} train.steps=5000",
            "train.steps 5000 takes 960,000 tokens, but data.sources",
        ),
        ("data.validation={other: {data}/nowhere}", "{data}/nowhere is not a prepared data set"),
        ("data.sequence_len=48 model.memory_across_documents=true", "data.sequence_len makes lanes forget"),
    ],
)
def test_a_stream_that_there_is_not(
    pretrain: Command, tmp_path: Path, override: str, expected: str, options: tuple[str, ...]
) -> None:
    data = str(tmp_path / "data")
    overrides = re.split(r" (?=[a-z]+\.)", override.replace("{data}", data))
    assert expected.replace("{data}", data) in pretrain(*overrides, options=options).refusal


def test_the_dry_run_counts_windows(pretrain: Command) -> None:
    out = pretrain("data.window_chunks=3", options=("--dry-run",)).out
    assert "\ntokens            11,520 (576 a step)\n" in out
    assert "\nmicro-batches     4 a step and rank, each of 3 chunks\n" in out


# ---- configuration and machine


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.stesp=3", "train.steps"),
        ("train.steps=three", "train.steps"),
        ("model.num_heads=3", "hidden_dim 32 is not divisible by num_heads 3"),
        ("train.micro_batch_size=3", "train.global_batch_size 4 is not divisible"),
        ("deepspeed.config=ds_configs/zero3_offload_nvme.json", "deepspeed.nvme_path is not set"),
        ("deepspeed.config=ds_configs/zero4.json", "zero4.json"),
    ],
)
def test_a_bad_configuration(pretrain: Command, override: str, expected: str, options: tuple[str, ...]) -> None:
    assert expected in pretrain(override, options=options).refusal


def test_no_configuration_file(pretrain: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(tmp_path / "nowhere.yaml")]) == 2
    assert capsys.readouterr().err == f"error: no such file: {tmp_path}/nowhere.yaml\n"
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2


def test_a_batch_that_the_ranks_cannot_share(pretrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for options in ((), ("--dry-run",)):
        assert "train.global_batch_size 4 is not divisible by 3 ranks" in pretrain(options=options).refusal


def test_a_mistake_is_said_once_on_each_machine(pretrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong there, a missing data set say, the first machine may not know."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert "train.steps" in pretrain("train.stesp=3").refusal
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pretrain("train.stesp=3") == Result(2, "", "")


def test_a_run_folder_that_cannot_be_written(
    pretrain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "run"
    in_the_way.write_text("mine")
    for run_dir in (in_the_way, in_the_way / "below"):
        assert f"{in_the_way} is not a folder" in pretrain(f"run_dir={run_dir}").refusal
    assert in_the_way.read_text() == "mine"

    # The tests may run as root, whom no permission stops.
    access = os.access
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    assert f"no permission to write to {closed}" in pretrain(f"run_dir={closed}/run").refusal
    assert not any(closed.iterdir())


def test_a_run_folder_whose_checkpoints_cannot_be_written(
    pretrain: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found now, not when the first checkpoint is due."""
    checkpoints = tmp_path / "mine/checkpoints"
    checkpoints.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != checkpoints and access(path, mode))
    assert f"no permission to write to {checkpoints}" in pretrain(f"run_dir={tmp_path}/mine").refusal


def test_a_port_in_use(pretrain: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        message = pretrain(port=port).refusal
    assert f"port {port}, where the ranks were to meet, cannot be used" in message
    assert "--master_port" in message


def test_a_gpu_demanded_where_there_is_none(config_file: Path) -> None:
    """A process of its own, as DeepSpeed chooses its accelerator at the first import."""
    script = str(REPOSITORY / "launch/pretrain.py")
    command = [sys.executable, script, "--config", str(config_file), "--set", "train.device=gpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DS_ACCELERATOR", None)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    message = Result(run.returncode, run.stdout, run.stderr).refusal
    assert message.startswith("error: --set train.device=gpu: train.device is gpu, but PyTorch finds none here")


# ---- the dry run, exit codes


@dataclass(frozen=True)
class Finished:
    """A trainer that has nothing left to do."""

    outcome: Outcome

    def fit(self) -> Outcome:
        return self.outcome


def test_the_dry_run_says_what_a_run_needs_and_starts_none(pretrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec_train.trainer.Trainer", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = pretrain("optimizer.learning_rate=5e-3", options=("--dry-run",))
    assert (result.code, result.errors) == (0, "")
    out = result.out
    assert "\n  learning_rate: 0.005\n" in out
    assert "\nparameters        48,834\n" in out
    assert "\nvocabulary        512\n" in out
    assert "\nsteps             20\n" in out
    assert "\ntokens            3,840 (192 a step)\n" in out
    assert "\nmicro-batches     2 a step and rank\n" in out
    assert "\nEstimate for each of 2 ranks" in out
    assert all(column in out for column in ("GPU", "host", "NVMe"))

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pretrain(options=("--dry-run",)) == Result(0, "", "")


@pytest.mark.parametrize("stopped, code", [(False, 0), (True, 75)])
@pytest.mark.parametrize("options, resume", [((), "auto"), (("--resume", "never"), "never")])
def test_exit_codes_and_resume(
    pretrain: Command,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
    code: int,
    options: tuple[str, ...],
    resume: str,
) -> None:
    given = []

    def trainer(config: RunConfig, resume: str) -> Finished:
        given.append((config.train.steps, resume))
        return Finished(Outcome(step=7, stopped=stopped))

    monkeypatch.setattr("mmrec_train.trainer.Trainer", trainer)
    assert pretrain("train.steps=7", options=options).code == code
    assert given == [(7, resume)]


@pytest.mark.parametrize("device, accelerator", [("cpu", "cpu"), ("gpu", "cuda"), ("auto", "cuda")])
def test_deepspeed_uses_the_device_that_the_run_asks_for(
    pretrain: Command, monkeypatch: pytest.MonkeyPatch, device: str, accelerator: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("mmrec_train.trainer.Trainer", lambda *_, **__: Finished(Outcome(step=1, stopped=False)))
    monkeypatch.delenv("DS_ACCELERATOR")
    assert pretrain(f"train.device={device}").code == 0
    assert os.environ["DS_ACCELERATOR"] == accelerator
