"""How the trainer reads its stream: windows of chunks, finite sources, ahead of time; one rank, in this process."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec_train.config import RunConfig, load_config
from mmrec_train.config.stream import stream_settings, training_data
from mmrec_train.data import Chunk, LaneLoader
from mmrec_train.data.delivery import Delivery
from mmrec_train.data.lanes import NO_LABEL
from mmrec_train.monitoring import read_metrics
from tests.trainer import ranks
from tests.trainer.command import Command, Result
from tests.trainer.plain import plain_losses
from tests.trainer.texts import write_texts

QUIET = ["train.validate_every=0", "logging.sample_tokens=0", "checkpoint.every=1000"]


@pytest.fixture
def pretrain(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    command = Command(config_file, capsys, monkeypatch)
    return lambda *overrides: command(*QUIET, *overrides)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in ranks.training_records(run_dir)]


@pytest.mark.parametrize(
    "strategy, more", [("zero0", []), ("zero2", ["data.sequence_len=[{step: 0, tokens: 30}, {step: 2, tokens: 72}]"])]
)
def test_windows_are_accumulated_chunk_by_chunk(
    pretrain: Callable[..., Result], config_file: Path, tmp_path: Path, strategy: str, more: list[str]
) -> None:
    """Half the steps, each of two chunks of every lane, against a plain loop over these chunks."""
    settings = ["data.window_chunks=2", "train.steps=8", *more]
    result = pretrain(f"deepspeed.config=ds_configs/{strategy}.json", *settings)
    assert result.code == 0, result
    expected = plain_losses(config_file, tuple(settings))
    assert min(expected) < expected[0] - 0.5
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)
    records = ranks.training_records(tmp_path / "run")
    assert [record["tokens"] for record in records] == [step * 4 * 2 * 48 for step in range(1, 9)]
    # the first step sees the tokens of the first two steps of single chunks
    assert expected[0] != pytest.approx(plain_losses(config_file, ("train.steps=5",))[0], rel=1e-4)


class AtOnce(Delivery):
    """Makes a step when it is asked for, without a thread."""

    def __init__(self, loader: LaneLoader, device: torch.device) -> None:
        self.loader = loader

    def next_step(self) -> list[Chunk]:
        return self.loader.next_step()

    def state_dict(self) -> dict[str, object]:
        return self.loader.state_dict()

    @property
    def consumed(self) -> dict[str, int]:
        return self.loader.consumed

    def waits(self) -> list[float]:
        return [0.0]

    def close(self) -> None:
        pass


def test_reading_ahead_changes_nothing(
    pretrain: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train.steps=4", "checkpoint.every=2", "data.window_chunks=2"]
    assert pretrain(*settings, f"run_dir={tmp_path / 'ahead'}").code == 0
    monkeypatch.setattr("mmrec_train.trainer.trainer.Delivery", AtOnce)
    assert pretrain(*settings, f"run_dir={tmp_path / 'at_once'}").code == 0
    assert losses(tmp_path / "ahead") == losses(tmp_path / "at_once")
    for step in (2, 4):
        states = [
            json.loads((tmp_path / run / f"checkpoints/step_{step}/run.json").read_text())["data"]
            for run in ("ahead", "at_once")
        ]
        assert states[0] == states[1]  # the position of the step that was trained, not of what was read ahead


@pytest.fixture
def two_sources(tmp_path: Path) -> Path:
    """Documents of two kinds; some are longer than a window."""
    numbers = [" ".join(map(str, range(i, i + 3 + i % 40))) for i in range(50)]
    words = [f"the word {i} " * (1 + i % 17) for i in range(60)]
    texts = {"train": {"numbers": numbers, "words": words}, "validation": {"numbers": numbers[:9], "words": words[:30]}}
    return write_texts(tmp_path / "two", texts)


def some_lane_runs_out(config: RunConfig) -> bool:
    """Whether there are tokens without label before the last step's end."""
    dataset = training_data(config, verify=False)
    sizes = dict(num_lanes=4, chunk_len=config.data.chunk_len, micro_batch_size=4)
    loader = LaneLoader(dataset, stream_settings(config), **sizes)
    labels = [loader.next_step()[0].labels for _ in range(config.train.steps)]
    return any(bool((step == NO_LABEL).any()) for step in labels)


def test_a_finite_stream_is_trained_to_its_last_whole_step(
    pretrain: Callable[..., Result], config_file: Path, two_sources: Path, tmp_path: Path
) -> None:
    data = [f"data.path={two_sources}", "data.sources={words: {epochs: 1}}"]
    refusal = pretrain(*data, "train.steps=9999").refusal
    [steps] = [int(word.replace(",", "")) for word in refusal.split("enough for ")[1].split()[:1]]
    assert "data.sources.NAME.epochs" in refusal
    assert f"enough for {steps:,} steps" in pretrain(*data, f"train.steps={steps + 1}").refusal

    settings = (*data, f"train.steps={steps}")
    assert some_lane_runs_out(load_config(config_file, settings))
    result = pretrain(*settings)
    assert result.code == 0, result
    expected = plain_losses(config_file, settings)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


def test_what_was_read_of_each_source_is_logged(
    pretrain: Callable[..., Result], two_sources: Path, tmp_path: Path
) -> None:
    sources = "data.sources={words: {weight: 3}, numbers: {weight: 1}}"
    result = pretrain(f"data.path={two_sources}", sources, "train.steps=20", "logging.every=10")
    assert result.code == 0, result
    records: list[dict[str, Any]] = [dict(record) for record in read_metrics(tmp_path / "run")]
    assert [record["step"] for record in records] == [10, 20]
    for record in records:
        tokens = {name: record[f"source/{name}/tokens"] for name in ("words", "numbers")}
        assert sum(tokens.values()) == record["tokens"] == record["step"] * 4 * 48
        assert tokens["words"] / record["tokens"] == pytest.approx(0.75, abs=0.1)
        assert 0 < record["data_wait_seconds"] < record["step_seconds"]
        assert record["data_wait_seconds"] <= record["data_wait_max_seconds"] <= 10 * record["data_wait_seconds"]
    manifest = json.loads((two_sources / "manifest.json").read_text())
    trained = manifest["sources"]["words"]["splits"]["train"]["tokens"]
    assert records[-1]["source/words/epochs"] == records[-1]["source/words/tokens"] / trained


def test_waiting_for_a_slow_loader_is_logged(
    pretrain: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fifth step is made half a second after it was asked for, the others ahead."""
    made, taken = LaneLoader.next_step, Delivery.next_step
    asked, calls = threading.Semaphore(0), itertools.count(1)

    def late(loader: LaneLoader) -> list[Chunk]:
        if next(calls) == 5:
            for _ in range(5):
                asked.acquire()
            time.sleep(0.5)
        return made(loader)

    def asking(delivery: Delivery) -> list[Chunk]:
        asked.release()
        return taken(delivery)

    monkeypatch.setattr(LaneLoader, "next_step", late)
    monkeypatch.setattr(Delivery, "next_step", asking)
    assert pretrain("train.steps=6", "logging.every=3").code == 0
    records: list[dict[str, Any]] = [dict(record) for record in read_metrics(tmp_path / "run")]
    first, last = records
    assert first["data_wait_max_seconds"] < 0.4 < last["data_wait_max_seconds"]
    assert last["data_wait_seconds"] == pytest.approx(last["data_wait_max_seconds"] / 3, rel=0.3)


def test_another_stream_goes_on_only_if_asked(
    pretrain: Callable[..., Result], two_sources: Path, tmp_path: Path
) -> None:
    data = [f"data.path={two_sources}", "data.sources={words: {weight: 3}, numbers: {weight: 1}}"]
    assert pretrain(*data, "train.steps=4").code == 0
    changed = [*data, "data.sources.numbers.weight=3", "train.steps=6"]
    message = pretrain(*changed).refusal
    assert "weight of numbers is 0.5 here and 0.25 there" in message
    assert "--set data.allow_change=true" in message
    assert pretrain(*changed, "data.allow_change=true").code == 0
    assert [record["step"] for record in ranks.training_records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
