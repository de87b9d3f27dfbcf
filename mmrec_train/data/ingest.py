"""From text to a prepared data set: read, tokenize, split, write."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
from transformers import PreTrainedTokenizerBase

from mmrec_train.data.manifest import TOKENIZER_NAME, Dtype, Manifest, Split, write_manifest
from mmrec_train.data.shards import SHARD_TOKENS, SplitWriter
from mmrec_train.data.sources import Document, Source
from mmrec_train.data.tokenizer import (
    Encoder,
    fingerprint,
    pretrained_tokenizer,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from mmrec_train.errors import UserError
from mmrec_train.staging import staging

TOKENIZER_SAMPLE_BYTES = 64 << 20  # enough for a vocabulary of 32000, trained in under a minute
_BATCH_CHARACTERS = 1 << 20  # tokenized at once, on all cores


@dataclass
class Progress:
    """What one pass over the source has done so far."""

    stage: str
    text_bytes: int = 0  # of the UTF-8 text that was used
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0
    invalid_documents: int = 0
    replaced: int = 0


def prepare(
    source: Source,
    out: Path,
    *,
    tokenizer: str | int,
    validation_fraction: float,
    max_tokens: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Write `source` as a data set into the folder `out`, which appears only when it is complete.

    `tokenizer` is a name or folder, or the vocabulary size of one to train on the first TOKENIZER_SAMPLE_BYTES
    of the training documents. `validation_fraction` in [0, 1) of the documents are held out, chosen by a hash of
    their text: the same text is always on the same side, also in another data set. Reading stops with the
    document that brings the tokens to `max_tokens`.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction} is not in [0, 1)")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens {max_tokens} is not positive")
    with staging(out) as folder:
        stored = _store_tokenizer(folder, tokenizer, source, validation_fraction, on_progress)
        bos_id, eos_id = special_ids(stored)
        size = vocab_size(stored)
        dtype: Dtype = "uint16" if size <= 1 << 16 else "uint32"
        writers: dict[Split, SplitWriter] = {
            "train": SplitWriter(folder / "train", dtype, shard_tokens=shard_tokens),
            "validation": SplitWriter(folder / "validation", dtype, shard_tokens=shard_tokens),
        }
        counts = _write_documents(source, Encoder(stored), writers, validation_fraction, max_tokens, on_progress)
        splits = {name: writer.close() for name, writer in writers.items()}
        _check_splits({name: info.documents for name, info in splits.items()}, validation_fraction, source)
        manifest = Manifest(
            dtype=dtype,
            bos_id=bos_id,
            eos_id=eos_id,
            vocab_size=size,
            tokenizer_fingerprint=fingerprint(folder / TOKENIZER_NAME),
            source={
                **source.provenance,
                "validation_fraction": validation_fraction,
                "max_tokens": max_tokens,
            },
            empty_documents=counts.empty_documents,
            invalid_utf8_documents=counts.invalid_documents,
            invalid_utf8_replaced=counts.replaced,
            splits={name: info for name, info in splits.items() if info.documents},
        )
        write_manifest(folder, manifest)
    return manifest


def _store_tokenizer(
    folder: Path,
    tokenizer: str | int,
    source: Source,
    validation_fraction: float,
    on_progress: Callable[[Progress], None],
) -> PreTrainedTokenizerBase:
    """Put the tokenizer into the data set, and load it from there: what tokenizes is what readers get."""
    if isinstance(tokenizer, int):
        sample = _sample(source, validation_fraction, on_progress)
        train_tokenizer(sample, tokenizer).save_pretrained(folder / TOKENIZER_NAME)
    else:
        pretrained_tokenizer(tokenizer).save_pretrained(folder / TOKENIZER_NAME)
    return pretrained_tokenizer(str(folder / TOKENIZER_NAME))


def _sample(source: Source, validation_fraction: float, on_progress: Callable[[Progress], None]) -> Iterator[str]:
    progress = Progress("training the tokenizer")
    for document in source:
        if _split_of(document, validation_fraction) == "train":
            progress.text_bytes += len(document.text.encode())
            progress.documents += 1
            yield document.text
        on_progress(progress)
        if progress.text_bytes >= TOKENIZER_SAMPLE_BYTES:
            return


def _write_documents(
    source: Iterable[Document],
    encoder: Encoder,
    writers: dict[Split, SplitWriter],
    validation_fraction: float,
    max_tokens: int | None,
    on_progress: Callable[[Progress], None],
) -> Progress:
    progress = Progress("tokenizing")
    for batch in _batches(source):
        for document, tokens in zip(batch, encoder([document.text for document in batch]), strict=True):
            if not document.text:
                progress.empty_documents += 1
                continue
            writers[_split_of(document, validation_fraction)].add(tokens)
            progress.text_bytes += len(document.text.encode())
            progress.documents += 1
            progress.tokens += len(tokens)
            progress.invalid_documents += document.replaced > 0
            progress.replaced += document.replaced
            if max_tokens is not None and progress.tokens >= max_tokens:
                on_progress(progress)
                return progress
        on_progress(progress)
    return progress


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _split_of(document: Document, validation_fraction: float) -> Split:
    position = xxhash.xxh3_64_intdigest(document.text.encode()) / 2**64
    return "validation" if position < validation_fraction else "train"


def _check_splits(documents: dict[Split, int], validation_fraction: float, source: Source) -> None:
    total = sum(documents.values())
    if total == 0:
        raise UserError(f"the source holds no text: {source.provenance}. Nothing was written.")
    if documents["train"] == 0 or (validation_fraction > 0 and documents["validation"] == 0):
        empty = "train" if documents["train"] == 0 else "validation"
        raise UserError(
            f"with --validation-fraction {validation_fraction} none of the {total} documents falls into the "
            f"{empty} split. Give more documents, or change the fraction (0 makes no validation split). "
            "Nothing was written."
        )
