"""What `deepspeed.initialize` is given: the DeepSpeed file, completed by the run configuration."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrec_train.config import deepspeed_file
from mmrec_train.config.checks import check_world
from mmrec_train.config.deepspeed_keys import OWNED
from mmrec_train.config.marked_yaml import Problem, raise_problems
from mmrec_train.config.schema import RunConfig

if TYPE_CHECKING:
    from mmrec_train.model.configuration import MMRecConfig

STEPS_PER_PRINT = 10**12  # never: DeepSpeed's own step lines would break the progress display


def deepspeed_config(config: RunConfig, world_size: int, model_config: "MMRecConfig") -> dict[str, Any]:
    """The whole DeepSpeed configuration of one rank of `world_size`.

    `model_config` is the model that will be trained; it sizes the NVMe buffers where the file says "auto".
    Raises UserError on a file that is wrong by itself or contradicts the run configuration.
    """
    # every chunk of a window has a backward pass of its own: to DeepSpeed, one more micro-batch to accumulate
    accumulation = check_world(config, world_size) * config.data.window_chunks
    raise_problems(deepspeed_file.problems(config))
    settings = {key: value for key, value in deepspeed_file.read(config, []).plain().items() if key not in OWNED}
    zero = settings["zero_optimization"] = settings.get("zero_optimization") or {}
    _place_offload(zero, config, world_size, model_config)
    train = config.train
    settings = {"steps_per_print": STEPS_PER_PRINT, "wall_clock_breakdown": False} | _without_auto(settings)
    settings |= {
        "train_batch_size": train.global_batch_size * config.data.window_chunks,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "data_types": {"grad_accum_dtype": "fp32"},  # the default is the model's
        "gradient_clipping": 0.0,  # the trainer clips, by component and as a whole; DeepSpeed's default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": deepspeed_file.offload_device(zero, "offload_optimizer") != "none",
    }
    _check_types(settings["zero_optimization"], config)
    return settings


def nvme_folder(config: RunConfig) -> Path:
    """The run's own folder below `deepspeed.nvme_path`: DeepSpeed's file names are the same in every run."""
    assert config.deepspeed.nvme_path is not None
    run_dir = Path(config.run_dir).absolute()
    digest = hashlib.sha256(bytes(run_dir)).hexdigest()[:8]
    return Path(config.deepspeed.nvme_path).absolute() / f"{run_dir.name}-{digest}"


def _place_offload(zero: dict[str, Any], config: RunConfig, world_size: int, model_config: "MMRecConfig") -> None:
    for name in deepspeed_file.OFFLOADS:
        if deepspeed_file.offload_device(zero, name) == "nvme":
            zero[name]["nvme_path"] = str(nvme_folder(config))
            if zero[name].get("buffer_size") == "auto":
                largest = _largest_parameter(model_config)
                zero[name]["buffer_size"] = -(-largest // world_size)


def _largest_parameter(model_config: "MMRecConfig") -> int:
    """Elements that no parameter of the model has more of: embedding, fused projections, fused feed-forward."""
    width = model_config.hidden_dim
    return width * max(model_config.vocab_size, 4 * width, 2 * model_config.ffn_dim)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """The section without its "auto" values, which DeepSpeed then takes for its defaults."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def _check_types(zero: dict[str, Any], config: RunConfig) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # not at the top: it takes seconds
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        document = deepspeed_file.read(config, [])
        problems = []
        for details in error.errors():
            path = ("zero_optimization", *details["loc"])
            message = f"{'.'.join(map(str, path))}: {details['msg']}, got {details['input']!r}"
            problems.append(Problem(document.mark_of(path), message))
        raise_problems(problems)
