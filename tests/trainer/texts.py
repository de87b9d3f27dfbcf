"""Small data sets of text with a tokenizer of their own, written without the ingest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from transformers import PreTrainedTokenizerBase

from mmrec_train.data import Encoder, special_ids
from mmrec_train.data.manifest import TOKENIZER_NAME, Manifest, SourceInfo, Split, SplitInfo, write_manifest
from mmrec_train.data.tokenizer import fingerprint, pretrained_tokenizer, train_tokenizer, vocab_size
from mmrec_train.preparation.shards import SplitWriter

Texts = Mapping[str, Mapping[str, Sequence[str]]]  # documents by split and source


def write_texts(
    out: Path, texts: Texts, *, vocab: int = 300, tokenizer: Path | None = None, shard_tokens: int = 2000
) -> Path:
    """A data set of `texts`. The tokenizer is that of a folder, or trained on all of them."""
    everything = [text for sources in texts.values() for documents in sources.values() for text in documents]
    made = train_tokenizer(everything, vocab) if tokenizer is None else pretrained_tokenizer(str(tokenizer))
    out.mkdir(parents=True)
    made.save_pretrained(out / TOKENIZER_NAME)
    bos, eos = special_ids(made)
    names = dict.fromkeys(name for sources in texts.values() for name in sources)
    manifest = Manifest(
        dtype="uint16",
        bos_id=bos,
        eos_id=eos,
        vocab_size=vocab_size(made),
        tokenizer_fingerprint=fingerprint(out / TOKENIZER_NAME),
        preparation={},
        sources={name: _write_source(out, texts, name, made, shard_tokens) for name in names},
    )
    write_manifest(out, manifest)
    return out


def _write_source(
    out: Path, texts: Texts, name: str, tokenizer: PreTrainedTokenizerBase, shard_tokens: int
) -> SourceInfo:
    splits: dict[Split, SplitInfo] = {}
    for split in get_args(Split):
        if name in texts.get(split, {}):
            writer = SplitWriter(out / split / name, "uint16", shard_bytes=2 * shard_tokens)
            for document in Encoder(tokenizer)(list(texts[split][name])):
                writer.add(document)
            splits[split] = writer.close()
    return SourceInfo(
        weight=None,
        provenance={"kind": "test"},
        left_out={},
        invalid_utf8_documents=0,
        invalid_utf8_replaced=0,
        splits=splits,
    )
