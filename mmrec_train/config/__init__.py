"""The configuration of a run: read, checked, completed for DeepSpeed, saved. See docs/configuration.md."""

from mmrec_train.config.checks import check_machine, check_world, runs_on_gpu
from mmrec_train.config.deepspeed_settings import deepspeed_config, nvme_folder
from mmrec_train.config.loading import load_config, save_config
from mmrec_train.config.schema import RunConfig

__all__ = [
    "RunConfig",
    "check_machine",
    "check_world",
    "deepspeed_config",
    "load_config",
    "nvme_folder",
    "runs_on_gpu",
    "save_config",
]
