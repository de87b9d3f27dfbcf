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
RESUMED = ["zero0", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]
DROPOUT = "model.dropout=0.1"


def overrides_of(strategy, folder):
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json"]
    if strategy.endswith("nvme"):
        overrides += [f"deepspeed.nvme_path={folder / 'nvme'}", *SWAPPED]
    return overrides


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A folder with uninterrupted runs of all strategies, `plain/STRATEGY` and `dropout/STRATEGY`; their configuration.

    The same two processes made all of them, and those of a strategy swapped to its `nvme`.
    """
    folder = tmp_path_factory.mktemp("finished")
    runs = []
    for kind, strategies, more in (("plain", STRATEGIES, []), ("dropout", RESUMED, [DROPOUT])):
        for strategy in strategies:
            run_dir = folder / kind / strategy
            (run_dir / "nvme").mkdir(parents=True)
            runs.append([*overrides_of(strategy, run_dir), *more, f"run_dir={run_dir}"])
    config = write_config(folder, dataset)
    ranks.run_in_turn(config, runs)
    return folder, config


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_loss_curve_of_a_plain_loop(strategy, finished):
    folder, config = finished
    run_dir = folder / "plain" / strategy
    expected = plain_losses(config, tuple(SWAPPED) if strategy.endswith("nvme") else ())
    assert min(expected) < expected[0] - 0.5  # it learns: the curve is worth comparing
    records = ranks.training_records(run_dir)
    assert [r["step"] for r in records] == list(range(1, len(expected) + 1))
    for record, loss in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4), record["step"]
    for component, limit in LIMITS.items():
        assert any(r[f"grad_norm_{component}"] > limit for r in records)  # clipping was at work
    if strategy.endswith("nvme"):
        nvme = run_dir / "nvme"
        assert list(nvme.rglob("params/**/*.swp")) or list(nvme.rglob("*params*/**/*.swp"))
        assert list(nvme.rglob("exp_avg-*.swp"))


@pytest.mark.parametrize("strategy", RESUMED)
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_to_the_bit(strategy, finished, config_file, tmp_path):
    whole, parts = finished[0] / "dropout" / strategy, tmp_path / "parts"
    (tmp_path / "nvme").mkdir()
    overrides = [*overrides_of(strategy, tmp_path), DROPOUT, f"run_dir={parts}"]
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
