"""Every strategy in every precision it takes: learns, saves, and resumes to the bit (one rank, in this process)."""

from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from tests.trainer import ranks
from tests.trainer.command import Command

OFFLOAD = "zero3_offload_cpu"
CASES = [(s, p) for s in ("zero1", "zero2", "zero3", OFFLOAD) for p in ("bf16", "fp16", "fp32")]


@pytest.mark.parametrize(("strategy", "precision"), CASES)
def test_learns_and_resumes_to_the_bit(
    strategy: str,
    precision: str,
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        pytest.skip("this CPU cannot train in fp16, and tests/config/test_checks.py shows that this is said")
    pretrain = Command(config_file, capsys, monkeypatch)
    settings = [f"deepspeed.config=ds_configs/{strategy}.json", f"train.precision={precision}", "train.steps=12"]
    settings += ["checkpoint.every=6", "train.global_batch_size=2", "train.validate_every=0", "logging.sample_tokens=0"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = pretrain(*settings, f"run_dir={whole}")
    assert result.code == 0, result
    expected = ranks.training_records(whole)
    assert min(r["loss"] for r in expected) < expected[0]["loss"] - 0.3
    assert expected[-1]["skipped"] < 12  # fp16 may skip steps while it finds its loss scale

    options = ("--resume", str(whole / "checkpoints/step_6"))
    result = pretrain(*settings, f"run_dir={resumed}", options=options)
    assert result.code == 0, result
    actual = ranks.training_records(resumed)
    assert [(r["step"], r["loss"]) for r in actual] == [(r["step"], r["loss"]) for r in expected[6:]]
    weights = [load_file(run / "checkpoints/step_12/model/model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
