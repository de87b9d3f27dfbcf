"""A model with its tokenizer as a Hugging Face folder: of a run, a checkpoint or an export; needs no DeepSpeed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mmrec_train import checkpoint_files
from mmrec_train.data.tokenizer import pretrained_tokenizer
from mmrec_train.errors import UserError
from mmrec_train.model import MMRecConfig, MMRecForCausalLM


class Pretrained(NamedTuple):
    """What `load_pretrained` found: the model in evaluation mode, its tokenizer, the folder they were read from."""

    model: MMRecForCausalLM
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_weights(path: Path, report: Callable[[str], None]) -> Path:
    """The Hugging Face folder that a path names: itself, or that of a checkpoint, or of a run's newest complete one.

    `report` gets a line for each torn checkpoint that is skipped. Raises UserError where there is none.
    """
    if (path / "config.json").is_file():
        return path
    return checkpoint_files.resolve(path, report) / checkpoint_files.MODEL_FOLDER


def save_pretrained(
    model: MMRecForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a Hugging Face folder; `weights` are written instead of the model's own."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
        shutil.copymode(folder / "config.json", file)


def load_pretrained(path: Path, *, device: torch.device, report: Callable[[str], None]) -> Pretrained:
    """Loads a run folder, a checkpoint or a Hugging Face folder, in the precision it was saved in.

    Raises UserError where `find_weights` does, and for files that are damaged or of another kind of model.
    """
    folder = find_weights(path, report)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, MMRecConfig):
            raise UserError(f"{folder} holds a model of type {config.model_type}, not MM-Rec")
        model, loading = MMRecForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UserError(f"{folder} cannot be loaded: {reason}") from error
    # from_pretrained would fill in random weights for these
    wrong = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: its weights do not fit its config.json: {', '.join(wrong[:3])}{more}")
    return Pretrained(model.to(device).eval(), pretrained_tokenizer(str(folder)), folder)
