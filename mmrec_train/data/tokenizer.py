"""Tokenizers: train one, load one, tell whether two are the same."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.checksums import json_checksum
from mmrec_train.data.storage import data_folder
from mmrec_train.errors import UserError
from mmrec_train.plain_text import only_text

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT: with these any text can be written


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE (that of GPT-2) with one special token, END_OF_TEXT, which is both bos and eos.

    Little text may give fewer than `vocab_size` tokens. The same texts give the same tokenizer.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"--train-tokenizer {vocab_size} is too small: at least {MIN_VOCAB_SIZE} (every byte, one more)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder or the Hugging Face hub; UserError unless it is fast and has an eos token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises bare Exception from the Rust library
        raise UserError(
            f"cannot load the tokenizer {name}: {_one_line(error)} "
            "Give a folder with tokenizer.json and tokenizer_config.json, or a name on the Hugging Face hub."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer {name} has no tokenizer.json (it is a slow one); choose one that has")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name} has no end-of-sequence token; documents could not be told apart")
    return tokenizer


def load_tokenizer(path: str | Path, cache: CacheSettings | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that made the data set at `path`, a folder or a URL; UserError if it is absent or another one."""
    data = data_folder(path, cache)
    manifest, folder = data.manifest(), data.tokenizer()
    found = fingerprint(folder)
    if found != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{folder} is not the tokenizer that made this data set: its fingerprint is {found}, "
            f"the manifest says {manifest.tokenizer_fingerprint}. Put the original tokenizer back, or prepare the "
            "data set again."
        )
    tokenizer = pretrained_tokenizer(str(folder))
    if special_ids(tokenizer) != (manifest.bos_id, manifest.eos_id):
        raise UserError(
            f"{folder}: its bos and eos ids are {special_ids(tokenizer)}, the manifest says "
            f"{(manifest.bos_id, manifest.eos_id)}. Put the original tokenizer_config.json back."
        )
    if vocab_size(tokenizer) != manifest.vocab_size:
        raise UserError(
            f"{folder} has a vocabulary of {vocab_size(tokenizer)}, the manifest says {manifest.vocab_size}. Put the "
            "original manifest back, or prepare the data set again."
        )
    return tokenizer


def fingerprint(folder: Path) -> str:
    """xxh3_128 of the folder's tokenizer.json in canonical form (sorted keys, no spaces)."""
    path = folder / "tokenizer.json"
    try:
        return json_checksum(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise UserError(f"cannot read the tokenizer {path}: {reason}. Put the original tokenizer back.") from error


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(bos, eos) ids; a tokenizer without bos starts documents with eos. A prompt, too, starts with bos."""
    eos = tokenizer.eos_token_id
    bos = tokenizer.bos_token_id
    return (eos if bos is None else bos), eos


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id; `len(tokenizer)` is too small where the ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


class Encoder:
    """Turns texts into stored documents, [bos] + tokens. Changes settings of the tokenizer it is given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._bos, _ = special_ids(tokenizer)
        self._backend = only_text(tokenizer.backend_tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int64 array per text."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([self._bos, *encoding.ids], dtype=np.int64) for encoding in encodings]


def _one_line(error: Exception) -> str:
    """A library's message as one line that ends with a full stop; what is too long for one is left out."""
    line = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" …")
    return line if line.endswith((".", "…")) else line + "."
