"""Whole runs on two CPU ranks, against a plain single-process PyTorch loop and against themselves."""

import math

import pytest
import torch
from safetensors.torch import load_file

from mmrec_train.config import load_config
from mmrec_train.data import LaneLoader, open_dataset
from mmrec_train.model import MMRecForCausalLM
from tests.trainer import ranks
from tests.trainer.runs import write_config


@pytest.fixture(scope="module")
def plain_losses(dataset, tmp_path_factory):
    """The loss of each step from a plain loop: one process, the whole batch at once, torch's AdamW, no DeepSpeed."""
    config = load_config(write_config(tmp_path_factory.mktemp("plain"), dataset))
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
    limits = dict(memory=0.005, decay=0.003, gate=0.002)
    states, losses = None, []
    for step in range(20):
        # linear warm-up over 3 steps, then a cosine from 1e-2 to 1e-3 at step 19
        rate = 1e-2 * (step + 1) / 3 if step < 3 else 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 16))
        for group in optimizer.param_groups:
            group["lr"] = rate
        (chunk,) = loader.next_step()
        model.train()
        out = model(chunk.input_ids, shift_labels=chunk.labels, reset=chunk.reset, memory_states=states)
        optimizer.zero_grad()
        out.loss.backward()
        states = [s.detach() for s in out.memory_states]
        for component, parts in components.items():
            members = [p for n, p in model.named_parameters() if any(part in n for part in parts)]
            assert members
            torch.nn.utils.clip_grad_norm_(members, limits[component])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(out.loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"])
def test_every_strategy_gives_the_loss_curve_of_a_plain_loop(strategy, config_file, plain_losses, tmp_path):
    assert plain_losses[-1] < plain_losses[0] - 0.5  # it learns: the curve is worth comparing
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json"]
    if strategy.endswith("nvme"):
        (tmp_path / "nvme").mkdir()
        overrides.append(f"deepspeed.nvme_path={tmp_path / 'nvme'}")
    ranks.run(config_file, overrides)
    records = ranks.training_records(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 21))
    for record, loss in zip(records, plain_losses, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4), record["step"]
    for component, limit in dict(memory=0.005, decay=0.003, gate=0.002).items():
        assert any(r[f"grad_norm_{component}"] > limit for r in records)  # clipping was at work
    if strategy.endswith("nvme"):
        assert list((tmp_path / "nvme").rglob("*.swp")), "nothing was offloaded"


@pytest.mark.parametrize("strategy", ["zero0", "zero3", "zero3_offload_nvme"])
def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_to_the_bit(strategy, config_file, tmp_path):
    overrides = [f"deepspeed.config=ds_configs/{strategy}.json", "model.dropout=0.1"]
    if strategy.endswith("nvme"):
        (tmp_path / "nvme").mkdir()
        overrides.append(f"deepspeed.nvme_path={tmp_path / 'nvme'}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.run(config_file, [*overrides, f"run_dir={whole}"])

    overrides.append(f"run_dir={parts}")
    processes = ranks.start(config_file, overrides)
    ranks.stop_after(processes, parts, step=7)
    codes, outputs = ranks.finish(processes)
    assert codes == [75, 75], outputs
    (stopped,) = (parts / "checkpoints").iterdir()
    stopped_at = int(stopped.name.removeprefix("step_"))
    assert 7 <= stopped_at < 20
    ranks.run(config_file, overrides)

    expected, actual = ranks.training_records(whole), ranks.training_records(parts)
    for key in ("step", "loss", "grad_norm", "grad_norm_memory", "learning_rate", "solver_residual"):
        assert [r[key] for r in actual] == [r[key] for r in expected], key
    assert (parts / "report.html").exists()
    weights = [load_file(folder / "checkpoints/step_20/model/model.safetensors") for folder in (whole, parts)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [
        torch.load(folder / f"checkpoints/step_20/ranks/rank_{rank}.pt", weights_only=True)
        for rank in (0, 1)
        for folder in (whole, parts)
    ]
    for one, other in (states[:2], states[2:]):
        flat = [[t for micro in s["memories"] for layer in micro for t in layer] for s in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
        assert torch.equal(one["rng"], other["rng"])
