"""Reading a prepared data set: memory-mapped documents of token ids."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmrec_train.data.checksums import file_checksum, json_checksum
from mmrec_train.data.manifest import FileInfo, Manifest, ShardInfo, Split, SplitInfo, read_manifest
from mmrec_train.errors import UserError


class Places(NamedTuple):
    """Where documents lie, one entry each: shard number, first token in the shard, number of tokens; all [n] int64."""

    shard: np.ndarray
    begin: np.ndarray
    length: np.ndarray


class SourceDocuments:
    """One source's documents of one split, numbered 0 .. num_documents - 1 through its shards.

    Attributes: `name`; `weight` (see `SourceInfo`); `shards`; `first_document` [shards + 1] int64, the number of each
    shard's first document; `num_documents`, `num_tokens` (bos tokens included); `fingerprint`, which depends on the
    tokens and the document bounds, not on where the data set lies or came from.
    """

    def __init__(self, folder: Path, name: str, weight: float | None, info: SplitInfo, manifest: Manifest) -> None:
        self.name = name
        self.weight = weight
        self.shards = info.shards
        self.num_documents = info.documents
        self.num_tokens = info.tokens
        self.first_document = np.cumsum([0] + [shard.documents for shard in info.shards])
        self.fingerprint = json_checksum(
            [
                manifest.dtype,
                manifest.eos_id,
                manifest.tokenizer_fingerprint,
                [[shard.bin.xxh3_128, shard.idx.xxh3_128] for shard in info.shards],
            ]
        )
        self._folder = folder
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.tokens = cache(self._map_tokens)
        self.starts = cache(self._map_starts)

    def locate(self, documents: np.ndarray) -> Places:
        """Where `documents` lie: [n] integers in [0, num_documents)."""
        assert len(documents) == 0 or (documents.min() >= 0 and documents.max() < self.num_documents)
        shard = np.searchsorted(self.first_document, documents, side="right") - 1
        begin = np.empty(len(documents), dtype=np.int64)
        length = np.empty(len(documents), dtype=np.int64)
        for number in np.unique(shard):
            chosen = shard == number
            local = documents[chosen] - self.first_document[number]
            starts = self.starts(int(number))
            begin[chosen] = starts[local]
            length[chosen] = starts[local + 1] - begin[chosen]
        return Places(shard, begin, length)

    def read(self, document: int) -> np.ndarray:
        """All tokens of one document: a read-only view, in the stored dtype."""
        shard, begin, length = (int(part[0]) for part in self.locate(np.array([document])))
        return self.tokens(shard)[begin : begin + length]

    def _map_tokens(self, shard: int) -> np.ndarray:
        """[tokens] of a shard, in the stored dtype, memory-mapped."""
        return self._map(self.shards[shard], ".bin", self._dtype, self.shards[shard].tokens)

    def _map_starts(self, shard: int) -> np.ndarray:
        """[documents + 1] int64, memory-mapped: where a shard's documents start, then its number of tokens."""
        return self._map(self.shards[shard], ".idx", np.dtype("<i8"), self.shards[shard].documents + 1)

    def _map(self, shard: ShardInfo, suffix: str, dtype: np.dtype, count: int) -> np.ndarray:
        return np.memmap(self._folder / f"{shard.name}{suffix}", dtype=dtype, mode="r", shape=(count,))


class TokenDataset:
    """One split of a data set. Made by `open_dataset`.

    Attributes: `manifest`; `sources` by name, in the manifest's order, those that have documents in this split;
    `num_documents`, `num_tokens` of all.
    """

    def __init__(self, folder: Path, split: Split, manifest: Manifest) -> None:
        self.manifest = manifest
        self.sources: Mapping[str, SourceDocuments] = {
            name: SourceDocuments(folder / split / name, name, source.weight, source.splits[split], manifest)
            for name, source in manifest.sources.items()
            if split in source.splits
        }
        self.num_documents = sum(source.num_documents for source in self.sources.values())
        self.num_tokens = sum(source.num_tokens for source in self.sources.values())


def open_dataset(path: str | Path, split: Split, *, verify: bool) -> TokenDataset:
    """Open one split of a data set made by `launch/prepare_data.py`.

    Existence and size of every shard are always checked; `verify` also compares all checksums, which reads every
    byte. Raises UserError for a missing, truncated or (with `verify`) corrupt shard, a split without documents,
    and a folder that is not a data set.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if not any(split in source.splits for source in manifest.sources.values()):
        raise UserError(
            f"{folder} has no {split} documents. Prepare it again with more documents"
            + (" and --validation-fraction above 0." if split == "validation" else ".")
        )
    for name, source in manifest.sources.items():
        for shard in source.splits[split].shards if split in source.splits else ():
            stem = folder / split / name / shard.name
            _check_counts(stem, shard, np.dtype(manifest.dtype).itemsize)
            for suffix, expected in ((".bin", shard.bin), (".idx", shard.idx)):
                _check_file(stem.with_name(stem.name + suffix), expected, verify=verify)
    return TokenDataset(folder, split, manifest)


def _check_counts(stem: Path, shard: ShardInfo, itemsize: int) -> None:
    for suffix, size, count, width in (
        (".bin", shard.bin.size, shard.tokens, itemsize),
        (".idx", shard.idx.size, shard.documents + 1, 8),
    ):
        if size != count * width:
            raise UserError(
                f"{stem}{suffix} holds {size} bytes, but {count} entries of {width} bytes follow "
                "from the manifest, which is damaged. Prepare the data set again."
            )


def _check_file(path: Path, expected: FileInfo, *, verify: bool) -> None:
    remedy = "Copy the data set again from where it was whole, or prepare it again."
    try:
        size = path.stat().st_size
        if size != expected.size:
            what = "truncated" if size < expected.size else "too long"
            raise UserError(f"shard {path} is {what}: {size} bytes, the manifest says {expected.size}. {remedy}")
        if verify and file_checksum(path) != expected.xxh3_128:
            raise UserError(f"shard {path} is corrupt: its checksum is not the manifest's. {remedy}")
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing, though the manifest lists it. {remedy}") from None
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror or error}. {remedy}") from error
