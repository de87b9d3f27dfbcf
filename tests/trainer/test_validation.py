"""What a validation counts."""

import json
from pathlib import Path

import pytest
import torch

from launch import prepare_data
from mmrec_train.data import LaneLoader, open_dataset
from mmrec_train.model import MMRecForCausalLM
from mmrec_train.monitoring import read_metrics
from tests.trainer.command import Command


def test_validation_loss_is_that_of_a_plain_loop_and_ends_before_documents_repeat(
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts, dataset = tmp_path / "texts", tmp_path / "data"
    texts.mkdir()
    source = Path(json.__file__).read_text()
    for i in range(60):
        (texts / f"{i}.txt").write_text(source[100 * i : 100 * i + 1500])
    arguments = ["--source", str(texts), "--out", str(dataset), "--train-tokenizer", "300"]
    assert prepare_data.main([*arguments, "--validation-fraction", "0.3"]) == 0

    pretrain = Command(config_file, capsys, monkeypatch)
    settings = ["train.steps=1", "schedule.warmup_steps=0", "train.validate_every=1", "logging.sample_tokens=0"]
    settings += [
        f"data.path={dataset}",
        "train.validation_tokens=10000000",
        "data.chunk_len=256",
        "train.global_batch_size=2",
    ]
    result = pretrain(*settings)
    assert result.code == 0, result
    trained = MMRecForCausalLM.from_pretrained(tmp_path / "run/checkpoints/step_1/model").eval()

    split = open_dataset(dataset, "validation", verify=False)
    loader = LaneLoader(
        split, num_lanes=2, chunk_len=256, seed=0, rank=0, world_size=1, micro_batch_size=2, shuffle=False
    )
    states, losses, tokens = None, [], 0
    with torch.no_grad():
        while True:
            (chunk,) = loader.next_step()
            if loader.epoch > 0:
                break
            out = trained(chunk.input_ids, shift_labels=chunk.labels, reset=chunk.reset, memory_states=states)
            states = out.memory_states
            losses.append(out.loss.item())
            tokens += 2 * 256
    assert split.num_tokens / 2 < tokens <= split.num_tokens
    logged = [r["validation_loss"] for r in read_metrics(tmp_path / "run") if "validation_loss" in r]
    assert logged[-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
