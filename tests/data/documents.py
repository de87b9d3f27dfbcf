"""Data sets for tests, written from token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.manifest import Dtype, Manifest, SourceInfo, Split, write_manifest
from mmrec_train.preparation.shards import SplitWriter

EOS = 0


def write_documents(
    folder: Path,
    documents: Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]],
    *,
    shard_tokens: int = 100,
    dtype: Dtype = "uint32",
    weights: dict[str, float] | None = None,
    split: Split = "train",
) -> TokenDataset:
    """Store `documents` (token ids as they are to be read, bos included) as one split of a data set.

    A plain list is the only source, "main"; a dictionary has the documents of several, and `weights` their weights.
    """
    sources = documents if isinstance(documents, Mapping) else {"main": documents}
    infos = {}
    for name, texts in sources.items():
        writer = SplitWriter(folder / split / name, dtype, shard_bytes=shard_tokens * np.dtype(dtype).itemsize)
        for document in texts:
            writer.add(np.array(document))
        infos[name] = SourceInfo(
            weight=(weights or {}).get(name),
            provenance={"kind": "test"},
            left_out={},
            invalid_utf8_documents=0,
            invalid_utf8_replaced=0,
            splits={split: writer.close()},
        )
    manifest = Manifest(
        dtype=dtype,
        bos_id=EOS,
        eos_id=EOS,
        vocab_size=max(1 << 16, 1 + max(max(document) for texts in sources.values() for document in texts)),
        tokenizer_fingerprint="0" * 32,
        preparation={},
        sources=infos,
    )
    write_manifest(folder, manifest)
    return open_dataset(folder, split, verify=True)


def numbered_documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these lengths in which no token id occurs twice."""
    starts = np.cumsum([1, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]
