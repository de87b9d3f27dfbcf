"""Whole runs on two CPU ranks, against a plain single-process PyTorch loop and against themselves."""

import functools
import math

import pytest
import torch
from safetensors.torch import load_file

from mmrec_train.config import load_config
from mmrec_train.data import LaneLoader, open_dataset
from mmrec_train.model import MMRecForCausalLM
from tests.trainer import ranks
from tests.trainer.runs import write_config

LIMITS = dict(memory=0.005, decay=0.003, gate=0.002)  # as in `write_config`
# DeepSpeed swaps only what has at least a MiB, so this takes a larger model; fewer steps make up for it
SWAPPED = ["model.hidden_dim=384", "optimizer.learning_rate=2e-3", "train.steps=10"]
STRATEGIES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]


def overrides_of(strategy, tmp_path):
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json"]
    if strategy.endswith("nvme"):
        (tmp_path / "nvme").mkdir()
        overrides += [f"deepspeed.nvme_path={tmp_path / 'nvme'}", *SWAPPED]
    return overrides


@functools.cache
def plain_losses(config_path, overrides):
    """The loss of each step from a plain loop: one process, the whole batch at once, torch's AdamW, no DeepSpeed."""
    config = load_config(config_path, overrides)
    steps, peak = config.train.steps, config.optimizer.learning_rate
    data = open_dataset(config.data.path, "train", verify=False)
    torch.manual_seed(config.train.seed)
    model = MMRecForCausalLM(config.model.to_model_config(data.manifest.vocab_size))
    loader = LaneLoader(
        data, num_lanes=4, chunk_len=config.data.chunk_len, seed=0, rank=0, world_size=1, micro_batch_size=4
    )
    decaying = [p for n, p in model.named_parameters() if p.dim() >= 2 and not n.endswith(("null_k", "null_v"))]
    others = [p for p in model.parameters() if not any(p is q for q in decaying)]
    groups = [dict(params=decaying, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    components = {
        "memory": ("mixer.memory.", "mixer.state_proj.", "mixer.state_norm."),
        "decay": ("mixer.decay.",),
        "gate": ("mixer.recurrence.",),
    }
    states, losses = None, []
    for step in range(steps):
        # linear warm-up over 3 steps, then a cosine from the peak to a tenth of it at the last step
        rate = (step + 1) / 3 if step < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / (steps - 4)))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        (chunk,) = loader.next_step()
        model.train()
        out = model(chunk.input_ids, shift_labels=chunk.labels, reset=chunk.reset, memory_states=states)
        optimizer.zero_grad()
        out.loss.backward()
        states = [s.detach() for s in out.memory_states]
        for component, parts in components.items():
            members = [p for n, p in model.named_parameters() if any(part in n for part in parts)]
            assert members
            torch.nn.utils.clip_grad_norm_(members, LIMITS[component])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(out.loss.item())
    return losses


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
