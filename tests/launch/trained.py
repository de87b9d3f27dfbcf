"""Small trained-looking models and checkpoints, made without DeepSpeed, for what reads them."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from mmrec_train import checkpoint_files
from mmrec_train.data import load_tokenizer
from mmrec_train.data.manifest import read_manifest
from mmrec_train.model import MMRecConfig, MMRecForCausalLM
from tests.trainer.runs import SMALL_MODEL


def small_model(dataset: Path, seed: int = 0, noise: float = 0.1, **changes: Any) -> MMRecForCausalLM:
    """A model for a data set, with a vocabulary larger than the tokenizer's and no parameter left at zero."""
    manifest = read_manifest(dataset)
    shape = {key: value for key, value in SMALL_MODEL.items() if key != "preset"}
    config = MMRecConfig.from_preset("tiny", **shape, vocab_size=manifest.vocab_size + 64, **changes)
    config.bos_token_id, config.eos_token_id = manifest.bos_id, manifest.eos_id
    torch.manual_seed(seed)
    model = MMRecForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def write_checkpoint(run_dir: Path, step: int, model: MMRecForCausalLM, dataset: Path) -> Path:
    """A complete checkpoint as the trainer writes it, without what only the trainer reads."""
    transformers_logging.disable_progress_bar()
    folder = checkpoint_files.begin(run_dir, step)
    model.save_pretrained(folder / checkpoint_files.MODEL_FOLDER)
    load_tokenizer(dataset).save_pretrained(folder / checkpoint_files.MODEL_FOLDER)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return checkpoint_files.commit(folder, checkpoint_files.hash_files(folder, files))


def tear(checkpoint: Path) -> None:
    """Damages the weights, as a failing disk would."""
    weights = checkpoint / checkpoint_files.MODEL_FOLDER / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
