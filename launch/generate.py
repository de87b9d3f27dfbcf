"""Let a checkpoint continue a text. It is printed as it is written; memory and time a token do not grow with it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.generation import BaseStreamer

from mmrec_train.data import special_ids
from mmrec_train.data.tokenizer import Encoder, vocab_size
from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR, UserError
from mmrec_train.pretrained import Pretrained, default_device, load_pretrained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with command-line `arguments` (default: the process's own); returns the exit code."""
    options = _parse_arguments(arguments)
    try:
        _check(options)
        pretrained = load_pretrained(
            options.checkpoint, device=default_device(), report=lambda line: print(line, file=sys.stderr)
        )
        generate(pretrained, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print()
        return EXIT_FAILURE
    return EXIT_OK


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="RUN_OR_DIR",
        help="a run folder (its newest complete checkpoint), a checkpoint, or a Hugging Face folder made by export.py",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the beginning of the text; may be empty")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="stop here, if the text ends no earlier")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1: likelier tokens only (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=50, help="draw from this many likeliest tokens; 0: all (default: 50)"
    )
    parser.add_argument("--seed", type=int, help="of the draws (default: another text each time)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time, draw none")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1")
    if not options.temperature > 0:
        raise UserError(f"--temperature is {options.temperature}; it must be above 0 (--greedy for the limit at 0)")
    if options.top_k < 0:
        raise UserError(f"--top-k is {options.top_k}; it must be 0 (all tokens) or more")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not valid UTF-8") from error


@torch.inference_mode()
def generate(pretrained: Pretrained, options: argparse.Namespace) -> None:
    """Prints the prompt and its continuation, up to the end of the text or `max_new_tokens`."""
    model, tokenizer, _ = pretrained
    # as a document of the training data begins: bos, and no special tokens in the text
    prompt = torch.from_numpy(Encoder(tokenizer)([options.prompt])[0]).unsqueeze(0).to(model.device)
    _, eos = special_ids(tokenizer)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if not options.greedy:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=options.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
        # entries that only fill up the vocabulary to a round size stand for no text
        suppress_tokens=list(range(vocab_size(tokenizer), model.config.vocab_size)) or None,
        streamer=_Printer(tokenizer.backend_tokenizer),
        **sampling,
    )


class _Printer(BaseStreamer):
    """Prints tokens as soon as they are whole characters; unlike transformers' own streamers it keeps no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def put(self, value: Tensor) -> None:
        """The prompt [1, T], then each new token [1]."""
        for token in value.flatten().tolist():
            print(self._stream.step(self._tokenizer, token) or "", end="", flush=True)

    def end(self) -> None:
        print()


if __name__ == "__main__":
    sys.exit(main())
