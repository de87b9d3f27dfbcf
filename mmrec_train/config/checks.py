"""What keys, number of ranks and machine demand of each other. All of it runs before any process group."""

import os
from collections.abc import Iterator
from pathlib import Path

from mmrec_train.config import deepspeed_file
from mmrec_train.config.marked_yaml import Problem, raise_problems
from mmrec_train.config.schema import RunConfig


def combination_problems(config: RunConfig) -> Iterator[Problem]:
    """Keys that are valid one by one but not together, on any machine."""
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        yield _batch_problem(config, train.micro_batch_size, f"train.micro_batch_size {train.micro_batch_size}")
    if config.schedule.warmup_steps >= train.steps:
        yield Problem(
            config.mark("schedule.warmup_steps"),
            f"schedule.warmup_steps {config.schedule.warmup_steps} leaves nothing of "
            f"train.steps {train.steps}; lower it, or raise train.steps",
        )
    if config.data.sequence_len is not None and config.model.memory_across_documents:
        yield Problem(
            config.mark("data.sequence_len"),
            "data.sequence_len makes lanes forget, and model.memory_across_documents makes them remember; "
            "leave one of them out",
        )


def check_world(config: RunConfig, world_size: int) -> int:
    """The number of micro-batches that each of `world_size` ranks accumulates for one optimizer step.

    Raises UserError where the batch cannot be split so.
    """
    train = config.train
    per_pass = world_size * train.micro_batch_size
    if train.global_batch_size % per_pass:
        parts = f"{world_size} ranks × train.micro_batch_size {train.micro_batch_size} = {per_pass}"
        raise_problems([_batch_problem(config, per_pass, parts)])
    return train.global_batch_size // per_pass


def check_machine(config: RunConfig) -> None:
    """Raises UserError where this machine lacks what the configuration demands: GPU, precision, writable folders."""
    raise_problems([*_device_problems(config), *_folder_problems(config)])


def runs_on_gpu(config: RunConfig) -> bool:
    """Whether the run uses GPUs: `train.device`, where `auto` takes them if there are any."""
    import torch  # not at the top: it takes seconds, which a misspelt key should not

    return config.train.device == "gpu" or (config.train.device == "auto" and torch.cuda.is_available())


def _device_problems(config: RunConfig) -> Iterator[Problem]:
    import torch

    precision = config.train.precision
    if config.train.device == "gpu" and not torch.cuda.is_available():
        yield Problem(
            config.mark("train.device"),
            "train.device is gpu, but PyTorch finds none here; use auto or cpu, or mend CUDA",
        )
    elif runs_on_gpu(config) and precision == "bf16" and not torch.cuda.is_bf16_supported():
        yield Problem(config.mark("train.precision"), "train.precision is bf16, which this GPU lacks; use fp16 or fp32")
    elif not runs_on_gpu(config) and precision == "fp16" and not _cpu_has_fp16():
        yield Problem(config.mark("train.precision"), "train.precision is fp16, which this CPU lacks; use bf16 or fp32")


def _cpu_has_fp16() -> bool:
    """DeepSpeed's own condition for training in fp16 on the CPU."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _folder_problems(config: RunConfig) -> Iterator[Problem]:
    checkpoints = Path(config.run_dir).absolute() / "checkpoints"
    existing = next(folder for folder in (checkpoints, *checkpoints.parents) if os.path.exists(folder))
    if not existing.is_dir():
        yield Problem(
            config.mark("run_dir"),
            f"run_dir {config.run_dir}: {existing} is not a folder; choose another run_dir",
        )
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem(config.mark("run_dir"), f"run_dir {config.run_dir}: no permission to write to {existing}")

    zero = deepspeed_file.zero_section(config)
    nvme_path = config.deepspeed.nvme_path
    uses_nvme = "nvme" in (deepspeed_file.offload_device(zero, name) for name in deepspeed_file.OFFLOADS)
    if uses_nvme and nvme_path and not (os.path.isdir(nvme_path) and os.access(nvme_path, os.W_OK | os.X_OK)):
        yield Problem(
            config.mark("deepspeed.nvme_path"),
            f"deepspeed.nvme_path {nvme_path} is not a folder that can be written to",
        )


def _batch_problem(config: RunConfig, divisor: int, parts: str) -> Problem:
    size = config.train.global_batch_size
    below, above = size // divisor * divisor, -(-size // divisor) * divisor
    nearest = f"{below} or {above}" if below else str(above)
    message = f"train.global_batch_size {size} is not divisible by {parts}; nearest: {nearest}"
    return Problem(config.mark("train.global_batch_size"), message)
