"""The estimate against numbers worked out by hand: 1000 parameters, 3 ranks, so a share of 334."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmrec_train.config import load_config
from mmrec_train.config.preflight import Bytes, describe, estimate
from mmrec_train.model import accounting

Write = Callable[[str, str], Path]

STAGE0, STAGE1, STAGE2 = (f'"stage": {stage}, "reduce_bucket_size": 100' for stage in range(3))
OVERLAP = '"overlap_comm": true'
STAGE3 = '"stage": 3, "reduce_bucket_size": 100, "sub_group_size": 200, "stage3_max_live_parameters": 600'
TO_CPU = '"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}'
TO_NVME = (
    '"offload_param": {"device": "nvme", "buffer_count": 8, "buffer_size": 50, "max_in_cpu": 34}, '
    '"offload_optimizer": {"device": "nvme", "buffer_count": 4}'
)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces the model's accounting by round numbers and gives the arguments it was called with."""
    calls: list[tuple[Any, ...]] = []

    def record(result: int) -> Callable[..., int]:
        def called(config: object, *rest: Any) -> int:
            calls.append(rest)
            return result

        return called

    monkeypatch.setattr(accounting, "parameter_count", lambda config: 1000)
    monkeypatch.setattr(accounting, "activation_bytes", record(70))
    monkeypatch.setattr(accounting, "state_bytes", record(30))
    return calls


def gpu(count: int) -> Bytes:
    return Bytes(gpu=count)


@pytest.mark.parametrize(
    ("zero", "precision", "ranks", "parameters", "gradients", "optimizer", "buffers"),
    [
        (STAGE0, "fp32", 3, gpu(4000), gpu(4000), gpu(8000), gpu(400)),
        (STAGE1, "fp32", 3, gpu(4000), gpu(5336), gpu(4008), gpu(400)),
        (STAGE1, "bf16", 3, gpu(2000), gpu(6000), gpu(4008), gpu(200)),
        (STAGE1, "fp16", 3, gpu(2000), gpu(5336), gpu(4008), gpu(200)),
        (f"{STAGE2}, {OVERLAP}", "bf16", 3, gpu(2000), gpu(1336), gpu(4008), gpu(400)),
        (STAGE3, "fp32", 3, gpu(4 * 934), gpu(1336), gpu(8 * 334), gpu(400 + 800)),
        (STAGE3, "bf16", 3, gpu(2 * 934), gpu(1336), gpu(4008), gpu(200 + 800)),
        (STAGE3, "bf16", 1, gpu(2000), gpu(4000), gpu(12000), gpu(200 + 800)),
        (
            f'{STAGE2}, "offload_optimizer": {{"device": "cpu"}}',
            "bf16", 3, gpu(2000), Bytes(host=1336, pinned=1336), Bytes(host=4008, pinned=1336), gpu(200),
        ),
        (
            f"{STAGE3}, {TO_CPU}",
            "bf16", 3, Bytes(1200, 668, 668), Bytes(host=1336, pinned=1336), Bytes(host=4008), gpu(200),
        ),
        (
            f"{STAGE3}, {TO_CPU}".replace('"cpu"', '"cpu", "pin_memory": false'),
            "fp32", 3, Bytes(2400, 1336, 0), Bytes(host=1336), Bytes(host=4008), gpu(400),
        ),
        (
            f"{STAGE3}, {TO_NVME}",
            "bf16", 3, Bytes(1200, 68, 68, 600), Bytes(0, 1336, 1336, 1336), Bytes(nvme=4008),
            Bytes(200, 3200 + 800, 3200 + 800),
        ),
    ],
)  # fmt: skip
def test_bytes_by_place(
    write: Write,
    minimal: str,
    sizes: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    zero: str,
    precision: str,
    ranks: int,
    parameters: Bytes,
    gradients: Bytes,
    optimizer: Bytes,
    buffers: Bytes,
) -> None:
    monkeypatch.setattr("mmrec_train.config.preflight.runs_on_gpu", lambda config: True)
    write("ds.json", f'{{"zero_optimization": {{{zero}}}}}')
    batch = ["train.global_batch_size=6", f"train.micro_batch_size={6 // ranks}"]
    overrides = ["deepspeed.config=ds.json", "deepspeed.nvme_path=/nvme", f"train.precision={precision}", *batch]
    config = load_config(write("run.yaml", minimal), overrides)
    needed = estimate(config, config.model.to_model_config(None), ranks)
    assert (needed.parameters, needed.gradients) == (parameters, gradients)
    assert (needed.optimizer, needed.buffers) == (optimizer, buffers)
    assert (needed.activations, needed.memory_states) == (gpu(70), gpu(30))
    assert needed.total == parameters + gradients + optimizer + buffers + gpu(100)
    # activations of a micro-batch; states of every lane of the rank
    element = 4 if precision == "fp32" else 2
    assert sizes == [(6 // ranks, 8192, "none", element), (6 // ranks, element)]


def test_states_are_kept_for_every_accumulated_lane(write: Write, minimal: str, sizes: list[tuple[Any, ...]]) -> None:
    overrides = ["train.global_batch_size=12", "train.activation_checkpointing=2", "data.chunk_len=64"]
    config = load_config(write("run.yaml", minimal), overrides)
    estimate(config, config.model.to_model_config(None), 3)
    assert sizes == [(2, 64, 2, 4), (4, 4)]


def test_on_the_cpu_everything_is_host_memory(
    write: Write, minimal: str, sizes: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("ds.json", f'{{"zero_optimization": {{{STAGE3}, {TO_NVME}}}}}')
    overrides = [
        "deepspeed.config=ds.json",
        "deepspeed.nvme_path=/nvme",
        "train.device=cpu",
        "train.global_batch_size=6",
    ]
    config = load_config(write("run.yaml", minimal), overrides)
    needed = estimate(config, config.model.to_model_config(None), 3)
    assert needed.parameters == Bytes(host=2400 + 136, nvme=1200)
    assert needed.gradients == Bytes(host=1336, nvme=1336)
    assert needed.buffers == Bytes(host=400 + 3200 + 1600, pinned=3200 + 1600)
    assert needed.total.gpu == 0


def test_description(write: Write, minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write("run.yaml", minimal), ["data.chunk_len=100", "train.device=cpu"])
    model_config = config.model.to_model_config(1000)
    text = describe(config, model_config, 2)
    assert "  learning_rate: 0.001\n" in text
    assert f"parameters        {accounting.parameter_count(model_config):,}\n" in text
    assert "vocabulary        1,024\n" in text
    assert "tokens            4,000 (400 a step)\n" in text
    assert "steps             10\n" in text
    total = estimate(config, model_config, 2).total
    last = text.splitlines()[-2]
    assert last.split("│")[1:-1] == [" total         ", *(f" {part:>{width}} " for part, width in _cells(total))]


def _cells(total: Bytes) -> list[tuple[str, int]]:
    return [("0.000", 5), (f"{total.host / 1e9:.3f}", 5), ("0.000", 12), ("0.000", 5)]
