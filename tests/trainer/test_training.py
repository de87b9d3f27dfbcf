"""Whole runs on two CPU ranks, against a plain single-process PyTorch loop and against themselves."""

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import ranks
from tests.trainer.plain import LIMITS, plain_losses
from tests.trainer.runs import write_config

# DeepSpeed swaps only what has at least a MiB, so this takes a larger model; fewer steps make up for it
SWAPPED = ["model.hidden_dim=384", "optimizer.learning_rate=2e-3", "train.steps=10"]
STRATEGIES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]


def overrides_of(strategy, tmp_path):
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json"]
    if strategy.endswith("nvme"):
        (tmp_path / "nvme").mkdir()
        overrides += [f"deepspeed.nvme_path={tmp_path / 'nvme'}", *SWAPPED]
    return overrides


@pytest.fixture(scope="module")
def plain_config(dataset, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("plain"), dataset)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_loss_curve_of_a_plain_loop(strategy, config_file, plain_config, tmp_path):
    overrides = overrides_of(strategy, tmp_path)
    expected = plain_losses(plain_config, tuple(SWAPPED) if strategy.endswith("nvme") else ())
    assert min(expected) < expected[0] - 0.5  # it learns: the curve is worth comparing
    ranks.run(config_file, overrides)
    records = ranks.training_records(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, len(expected) + 1))
    for record, loss in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4), record["step"]
    for component, limit in LIMITS.items():
        assert any(r[f"grad_norm_{component}"] > limit for r in records)  # clipping was at work
    if strategy.endswith("nvme"):
        assert list((tmp_path / "nvme").rglob("params/**/*.swp")) or list(
            (tmp_path / "nvme").rglob("*params*/**/*.swp")
        )
        assert list((tmp_path / "nvme").rglob("exp_avg-*.swp"))


@pytest.mark.parametrize("strategy", ["zero0", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"])
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_to_the_bit(strategy, config_file, tmp_path):
    overrides = [*overrides_of(strategy, tmp_path), "model.dropout=0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.run(config_file, [*overrides, f"run_dir={whole}"])

    overrides.append(f"run_dir={parts}")
    processes = ranks.start(config_file, overrides)
    ranks.stop_after(processes, parts, step=4)
    codes, outputs = ranks.finish(processes)
    assert codes == [75, 75], outputs
    (stopped,) = (parts / "checkpoints").iterdir()
    expected = ranks.training_records(whole)
    last = expected[-1]["step"]
    assert 4 <= int(stopped.name.removeprefix("step_")) < last
    ranks.run(config_file, overrides)

    actual = ranks.training_records(parts)
    for key in ("step", "loss", "grad_norm", "grad_norm_memory", "learning_rate", "solver_residual"):
        assert [r[key] for r in actual] == [r[key] for r in expected], key
    assert (parts / "report.html").exists()
    final = f"checkpoints/step_{last}"
    weights = [load_file(folder / final / "model/model.safetensors") for folder in (whole, parts)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for rank in (0, 1):
        states = [torch.load(f / final / f"ranks/rank_{rank}.pt", weights_only=True) for f in (whole, parts)]
        memories = [[t for micro in s["memories"] for layer in micro for t in layer] for s in states]
        assert all(torch.equal(a, b) for a, b in zip(*memories, strict=True))
        assert torch.equal(states[0]["rng"], states[1]["rng"])
