"""What a run will need, before anything is allocated: bytes on the GPU, in host memory and on NVMe, for each rank.

An estimate from the sizes that DeepSpeed 0.19 allocates for each ZeRO stage and offload, with P parameters, N ranks and
p = ⌈P/N⌉ a rank's share. Counted in bytes, with b = 2 (bf16, fp16) or 4 (fp32, the only precision at stage 0):

| | stage 0 | stage 1 | stage 2 | stage 3 |
|---|---|---|---|---|
| parameters | 4P | bP | bP | bp, and b·min(P, stage3_max_live_parameters) gathered |
| gradients | 4P | 4P and 4p (bf16: 4P and 2P) | 4p | 4p |
| optimizer: fp32 master weights and two moments | 8P | 12p | 12p | 12p (fp32: 8p) |
| buffers | b·reduce_bucket_size, twice where reduction overlaps; stage 3 also 4·min(p, sub_group_size) |

Offloading the optimizer moves its states and the gradients to the host; on NVMe its states and a copy of the gradients
are files, and the gradients stay in host memory too. fp32 with offload keeps separate master weights (12p). Offloading
parameters moves their shares. Not counted: the CUDA context and libraries (about 1 GB), fragmentation, Python.
"""

import io
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mmrec_train.config.checks import check_world, runs_on_gpu
from mmrec_train.config.deepspeed_settings import deepspeed_config
from mmrec_train.config.loading import config_yaml
from mmrec_train.config.schema import RunConfig

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from mmrec_train.model.configuration import MMRecConfig


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank by place; `pinned` is the page-locked part of `host`."""

    gpu: int = 0
    host: int = 0
    pinned: int = 0
    nvme: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*(getattr(self, place.name) + getattr(other, place.name) for place in fields(Bytes)))


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank, by what they hold. On the CPU all that would be on the GPU is in host memory."""

    parameters: Bytes
    gradients: Bytes
    optimizer: Bytes
    activations: Bytes
    memory_states: Bytes
    buffers: Bytes

    @property
    def total(self) -> Bytes:
        return sum((getattr(self, item.name) for item in fields(self)), Bytes())


def estimate(config: RunConfig, model_config: "MMRecConfig", world_size: int) -> Estimate:
    """What each of `world_size` ranks needs to train the model. Raises UserError on a configuration that cannot run."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from mmrec_train.model import accounting

    settings = deepspeed_config(config, world_size, model_config)
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    train = config.train
    element = 4 if train.precision == "fp32" else 2
    sizes = _Sizes(accounting.parameter_count(model_config), world_size, element, train.precision, zero)
    lanes = train.global_batch_size // world_size
    activations = accounting.activation_bytes(
        model_config, train.micro_batch_size, config.data.chunk_len, train.activation_checkpointing, element
    )
    result = Estimate(
        parameters=_parameters(sizes),
        gradients=_gradients(sizes),
        optimizer=_optimizer(sizes),
        activations=Bytes(gpu=activations),
        memory_states=Bytes(gpu=accounting.state_bytes(model_config, lanes, element)),
        buffers=_buffers(sizes),
    )
    return result if runs_on_gpu(config) else _on_cpu(result)


def describe(config: RunConfig, model_config: "MMRecConfig", world_size: int) -> str:
    """What `--dry-run` prints: the resolved configuration, the size of the run and the estimate, as plain text."""
    from mmrec_train.model import accounting

    step_tokens = config.tokens_per_step
    window = config.data.window_chunks
    table = Table(title=f"Estimate for each of {world_size} ranks, GB (10⁹ bytes)", title_justify="left")
    for heading in ("", "GPU", "host", "of it pinned", "NVMe"):
        table.add_column(heading, justify="right" if heading else "left")
    needed = estimate(config, model_config, world_size)
    rows = {item.name.replace("_", " "): getattr(needed, item.name) for item in fields(needed)}
    for name, row in (rows | {"total": needed.total}).items():
        table.add_row(name, *(f"{getattr(row, place.name) / 1e9:.3f}" for place in fields(row)))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return "\n".join(
        [
            config_yaml(config),
            f"parameters        {accounting.parameter_count(model_config):,}",
            f"vocabulary        {model_config.vocab_size:,}",
            f"steps             {config.train.steps:,}",
            f"tokens            {config.train.steps * step_tokens:,} ({step_tokens:,} a step)",
            f"micro-batches     {check_world(config, world_size)} a step and rank"
            + (f", each of {window} chunks" if window > 1 else ""),
            f"FLOPs             {accounting.flops_per_token(model_config):.3e} a token",
            "",
            text.getvalue(),
        ]
    )


@dataclass(frozen=True)
class _Sizes:
    parameters: int  # P
    world_size: int  # N
    element: int  # b
    precision: str
    zero: "DeepSpeedZeroConfig"

    @property
    def stage(self) -> int:
        return int(self.zero.stage)

    @property
    def share(self) -> int:
        """p: parameters of which a rank has gradients and optimizer states; all of them without ZeRO."""
        return -(-self.parameters // self.world_size) if self.stage else self.parameters

    def offload(self, name: str) -> tuple[str, bool]:
        """Where a part is offloaded to ("none", "cpu", "nvme"), and whether into pinned memory."""
        section = getattr(self.zero, name)
        return (str(section.device), bool(section.pin_memory)) if section else ("none", False)

    @property
    def sub_group(self) -> int:
        """Elements that the optimizer steps at a time, at ZeRO stage 3."""
        return min(self.share, int(self.zero.sub_group_size))


def _host(count: int, pinned: bool) -> Bytes:
    return Bytes(host=count, pinned=count if pinned else 0)


def _parameters(sizes: _Sizes) -> Bytes:
    if sizes.stage < 3:
        return Bytes(gpu=sizes.element * sizes.parameters)
    share = sizes.element * sizes.share
    gathered = Bytes(gpu=sizes.element * min(sizes.parameters, int(sizes.zero.max_live_parameters)))
    device, pinned = sizes.offload("offload_param")
    if device == "cpu":
        return gathered + _host(share, pinned)
    if device == "nvme":
        kept = sizes.element * min(sizes.share, int(sizes.zero.offload_param.max_in_cpu))
        return gathered + _host(kept, True) + Bytes(nvme=share - kept)
    # A single rank computes with its share; there is nothing to gather.
    return Bytes(gpu=share) + (gathered if sizes.world_size > 1 else Bytes())


def _gradients(sizes: _Sizes) -> Bytes:
    full, share = 4 * sizes.parameters, 4 * sizes.share
    device, pinned = sizes.offload("offload_optimizer")
    if device != "none":
        return _host(share, pinned) + Bytes(nvme=share if device == "nvme" else 0)
    if sizes.stage == 0:
        return Bytes(gpu=full)
    if sizes.stage == 1:
        return Bytes(gpu=full + (2 * sizes.parameters if sizes.precision == "bf16" else share))
    return Bytes(gpu=share)


def _optimizer(sizes: _Sizes) -> Bytes:
    device, pinned = sizes.offload("offload_optimizer")
    states = 12 * sizes.share
    if device == "nvme":
        return Bytes(nvme=states)
    if device == "cpu":
        # Stages 1 and 2 pin the master weights, stage 3 does not; the moments never are.
        return _host(states, False) + Bytes(pinned=4 * sizes.share if pinned and sizes.stage < 3 else 0)
    parameters_are_master = sizes.precision == "fp32" and (
        sizes.stage == 0 or (sizes.stage == 3 and sizes.offload("offload_param")[0] == "none")
    )
    return Bytes(gpu=8 * sizes.share if parameters_are_master else states)


def _buffers(sizes: _Sizes) -> Bytes:
    """Reduction, the step's scratch and the buffers that pages of NVMe pass through."""
    zero = sizes.zero
    bucket = sizes.element * int(zero.reduce_bucket_size)
    if sizes.stage == 0:
        return Bytes(gpu=sizes.element * min(sizes.parameters, int(zero.reduce_bucket_size)))
    if sizes.stage < 3:
        return Bytes(gpu=bucket * (2 if zero.overlap_comm else 1))
    buffers = Bytes(gpu=bucket)
    step = 4 * sizes.sub_group
    device, _ = sizes.offload("offload_optimizer")
    if device == "none":
        buffers += Bytes(gpu=step)
    elif device == "nvme":
        buffers += _host(step * int(zero.offload_optimizer.buffer_count), True)
    if sizes.offload("offload_param")[0] == "nvme":
        pages = int(zero.offload_param.buffer_count) * int(zero.offload_param.buffer_size)
        buffers += _host(sizes.element * pages, True)
    return buffers


def _on_cpu(needed: Estimate) -> Estimate:
    """The same run on the CPU, where GPU memory is host memory and only the NVMe buffers are page-locked."""

    def move(part: Bytes, pinned: int) -> Bytes:
        return replace(part, gpu=0, host=part.gpu + part.host, pinned=pinned)

    parts = {item.name: getattr(needed, item.name) for item in fields(needed)}
    return Estimate(**{name: move(part, part.pinned if name == "buffers" else 0) for name, part in parts.items()})
