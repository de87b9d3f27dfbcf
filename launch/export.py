"""Export a checkpoint as one Hugging Face folder: weights in safetensors, configuration and tokenizer."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from mmrec_train.data.tokenizer import fingerprint
from mmrec_train.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mmrec_train.model import MMRecForCausalLM
from mmrec_train.monitoring.formatting import format_bytes
from mmrec_train.pretrained import load_pretrained, save_pretrained
from mmrec_train.staging import staging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN_OR_DIR",
        help="a run folder (its newest complete checkpoint), a checkpoint, or another Hugging Face folder of a model",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="HF_DIR", help="folder to create")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


def export(checkpoint: Path, out: Path) -> None:
    """Writes the folder `out`, which appears only after it has been read back and found equal.

    Raises UserError for a checkpoint that cannot be loaded, an `out` that holds something, and a disk that fails.
    """
    with staging(out) as folder:
        model, tokenizer, source = load_pretrained(
            checkpoint, device=torch.device("cpu"), report=lambda line: print(line, file=sys.stderr)
        )
        save_pretrained(model, tokenizer, folder)
        _verify(folder, model, source)
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{source} → {out}: {model.num_parameters():,} parameters in {model.dtype}, {format_bytes(size)}")


def _verify(folder: Path, model: MMRecForCausalLM, source: Path) -> None:
    """Loads what was written as its users will; raises UserError where it is not the model that was meant."""
    try:
        written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"what was written cannot be read back, the disk may fail: {error}") from error
    meant = model.state_dict()
    wrong = [name for name in sorted(meant.keys() | written.keys()) if not _same(meant.get(name), written.get(name))]
    if fingerprint(folder) != fingerprint(source):
        wrong.append("the tokenizer")
    if wrong:
        raise UserError(f"what was written reads back differently, the disk may fail: {', '.join(wrong[:3])}")


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are there and the same to the bit, NaN included."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


if __name__ == "__main__":
    sys.exit(main())
