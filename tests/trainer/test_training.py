"""Whole runs on two CPU ranks, against a plain single-process PyTorch loop and against themselves."""

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import ranks
from tests.trainer.plain import LIMITS, plain_losses
from tests.trainer.runs import write_config

STEPS = ["train.steps=12"]
# DeepSpeed swaps only what has at least a MiB, so this takes a larger model; fewer steps make up for it
SWAPPED = ["model.hidden_dim=384", "optimizer.learning_rate=2e-3", "train.steps=10"]
STRATEGIES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]
RESUMED = ["zero0", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]
DROPOUT = "model.dropout=0.1"


def model_and_steps(strategy):
    return SWAPPED if strategy.endswith("nvme") else STEPS


def overrides_of(strategy, run_dir, *more):
    """Of a run in `run_dir`, in which it swaps to `nvme`."""
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json", *model_and_steps(strategy), f"run_dir={run_dir}"]
    if strategy.endswith("nvme"):
        (run_dir / "nvme").mkdir(parents=True)
        overrides.append(f"deepspeed.nvme_path={run_dir / 'nvme'}")
    return [*overrides, *more]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A folder with uninterrupted runs of all strategies, `plain/STRATEGY` and `dropout/STRATEGY`; their configuration.

    The same two processes made all of them.
    """
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, dataset)
    runs = [overrides_of(strategy, folder / "plain" / strategy) for strategy in STRATEGIES]
    runs += [overrides_of(strategy, folder / "dropout" / strategy, DROPOUT) for strategy in RESUMED]
    ranks.expect_success(ranks.start_in_turn(config, runs))
    return folder, config


@pytest.fixture(scope="module")
def resumed(dataset, tmp_path_factory):
    """A folder with runs of strategies that were stopped and went on, and the checkpoint that each stopped with.

    Two processes made the first parts of them, two others the second parts.
    """
    folder = tmp_path_factory.mktemp("resumed")
    config = write_config(folder, dataset)
    runs = [overrides_of(strategy, folder / strategy, DROPOUT) for strategy in RESUMED]
    processes = ranks.start_in_turn(config, runs, code=75)
    for strategy in RESUMED:
        ranks.stop_after(processes, folder / strategy, step=4)
    ranks.expect_success(processes)
    stopped = {strategy: list((folder / strategy / "checkpoints").iterdir()) for strategy in RESUMED}
    ranks.expect_success(ranks.start_in_turn(config, runs))
    return folder, stopped


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_the_loss_curve_of_a_plain_loop(strategy, finished):
    folder, config = finished
    run_dir = folder / "plain" / strategy
    expected = plain_losses(config, tuple(model_and_steps(strategy)))
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
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_to_the_bit(strategy, finished, resumed):
    whole, parts = finished[0] / "dropout" / strategy, resumed[0] / strategy
    (stopped,) = resumed[1][strategy]
    expected = ranks.training_records(whole)
    last = expected[-1]["step"]
    assert 4 <= int(stopped.name.removeprefix("step_")) < last
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
