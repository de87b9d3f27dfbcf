"""Saving and restoring ZeRO-3 optimizer states that live on NVMe.

DeepSpeed copies its swap files into a checkpoint and, on resume, back under an engine that has already swapped in the
states of a new run; groups too small to be swapped are then lost. Here every group is read through the swapper and
stored as plain tensors, and written back the same way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def is_swapped(engine: Any) -> bool:
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


def save(engine: Any, folder: Path, rank: int) -> None:
    """Writes this rank's fp32 weights, moments and counters to `folder/optimizer_RANK_GROUP.pt`, a file per group."""
    optimizer = engine.optimizer
    for group in range(len(optimizer.fp16_groups)):
        with _in_memory(optimizer, group) as parameter:
            state = {key: _copy(value) for key, value in optimizer.optimizer.state[parameter].items()}
            torch.save({"parameter": _copy(parameter.data), "state": state}, folder / _file_name(rank, group))
    counters = {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "micro_steps": engine.micro_steps,
        "loss_scaler": vars(optimizer.loss_scaler),
    }
    torch.save(counters, folder / f"counters_{rank}.pt")


def restore(engine: Any, folder: Path, rank: int) -> None:
    """Reads what `save` wrote into an engine of the same topology, and sets its compute weights from the fp32 ones."""
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp16_groups)):
        stored = torch.load(folder / _file_name(rank, group), map_location="cpu", weights_only=True)
        with _in_memory(optimizer, group) as parameter:
            parameter.data.copy_(stored["parameter"])
            state = optimizer.optimizer.state[parameter]
            for key, value in stored["state"].items():
                if torch.is_tensor(state.get(key)) and state[key].shape == value.shape:
                    state[key].data.copy_(value)
                else:  # a counter, or a moment that the first step would have created
                    state[key] = value
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()
    counters = torch.load(folder / f"counters_{rank}.pt", weights_only=True)
    vars(optimizer.loss_scaler).update(counters.pop("loss_scaler"))
    for name, value in counters.items():
        setattr(engine, name, value)


@contextmanager
def _in_memory(optimizer: Any, group: int) -> Iterator[torch.nn.Parameter]:
    """The flat fp32 parameter of a group, with its states, swapped in; what the body changes is swapped out again."""
    timers: set[str] = set()
    optimizer._prepare_sub_group(group, timers)
    try:
        yield optimizer.fp32_partitioned_groups_flat[group]
    finally:
        optimizer._release_sub_group(group, timers)


def _copy(value: Any) -> Any:
    return value.detach().clone().cpu() if torch.is_tensor(value) else value


def _file_name(rank: int, group: int) -> str:
    return f"optimizer_{rank}_{group}.pt"
