"""Reading a prepared data set: memory-mapped documents of token ids."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.checksums import json_checksum
from mmrec_train.data.manifest import FileInfo, Manifest, Split, SplitInfo, StoredFile
from mmrec_train.data.storage import DataFolder, data_folder, is_url
from mmrec_train.errors import UserError

_BLOCK = 1 << 20  # entries checked at once


class Places(NamedTuple):
    """Where documents lie, one entry each: shard number, first token in the shard, number of tokens; all [n] int64."""

    shard: np.ndarray
    begin: np.ndarray
    length: np.ndarray


class SourceDocuments:
    """One source's documents of one split, numbered 0 .. num_documents - 1 through its shards. For any thread.

    Attributes: `name`; `weight` (see `SourceInfo`); `shards`; `first_document` [shards + 1] int64, the number of each
    shard's first document; `num_documents`, `num_tokens` (bos tokens included); `fingerprint`, which depends on the
    tokens and the document bounds, not on where the data set lies or came from.

    Reading raises UserError where a file is missing or damaged, or cannot be fetched.
    """

    def __init__(
        self, folder: DataFolder, split: Split, name: str, weight: float | None, info: SplitInfo, manifest: Manifest
    ) -> None:
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
        self._vocab_size = manifest.vocab_size
        self._bos = manifest.bos_id
        dtype = np.dtype(manifest.dtype).newbyteorder("<").str
        self._bins = [_stored(f"{split}/{name}/{shard.name}.bin", shard.bin, dtype) for shard in info.shards]
        self._idxs = [_stored(f"{split}/{name}/{shard.name}.idx", shard.idx, "<i8") for shard in info.shards]

    def tokens(self, shard: int) -> np.ndarray:
        """[tokens] of a shard, in the stored dtype, memory-mapped."""
        return self._folder.array(self._bins[shard])

    def starts(self, shard: int) -> np.ndarray:
        """[documents + 1] int64, memory-mapped: where a shard's documents start, then its number of tokens."""
        return self._folder.array(self._idxs[shard])

    def locate(self, documents: np.ndarray) -> Places:
        """Where `documents` lie: [n] integers in [0, num_documents)."""
        assert len(documents) == 0 or (documents.min() >= 0 and documents.max() < self.num_documents)
        shard = np.searchsorted(self.first_document, documents, side="right") - 1
        local = documents - self.first_document[shard]
        begin = np.empty(len(documents), dtype=np.int64)
        end = np.empty(len(documents), dtype=np.int64)
        by_shard = np.argsort(shard, kind="stable")
        numbers, firsts = np.unique(shard[by_shard], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(by_shard, firsts)[1:], strict=True):
            starts = self.starts(number)
            begin[chosen] = starts[local[chosen]]
            end[chosen] = starts[local[chosen] + 1]
            # files are not read whole before a run: a damaged index shows here
            if len(wrong := np.flatnonzero((begin[chosen] < 0) | (end[chosen] <= begin[chosen]))):
                raise self._empty(number, int(local[chosen][wrong[0]]))
            if end[chosen].max() > self.shards[number].tokens:
                message = f"a document ends at {end[chosen].max()}, of {self.shards[number].tokens} tokens"
                raise self._mistake(self._idxs[number], message)
        return Places(shard, begin, end - begin)

    def lengths(self, shard: int, first: int, last: int) -> np.ndarray:
        """[n] int64: tokens of the documents [first, last) of a shard; UserError where one has none."""
        lengths = np.diff(self.starts(shard)[first : last + 1])
        if len(empty := np.flatnonzero(lengths < 1)):
            raise self._empty(shard, first + int(empty[0]))
        return lengths

    def read(self, document: int) -> np.ndarray:
        """All tokens of one document: a read-only view, in the stored dtype."""
        shard, begin, length = (int(part[0]) for part in self.locate(np.array([document])))
        return self.tokens(shard)[begin : begin + length]

    def prefetch(self, shards: Iterable[int]) -> None:
        """Say which shards are needed next, the first of them first: in the background, remote ones are fetched."""
        self._folder.prefetch(self, (file for shard in shards for file in (self._idxs[shard], self._bins[shard])))

    def damage(self, shard: int, *, contents: bool) -> Iterator[UserError]:
        """What is wrong with a shard's files: existence and size; with `contents` checksums, starts and token ids."""
        found = False
        for file in (self._bins[shard], self._idxs[shard]):
            try:
                self._folder.check(file, contents=contents)
            except UserError as error:
                found = True
                yield error
        if contents and not found:
            yield from self._contradictions(shard)

    def without_bos(self, shard: int) -> Iterator[UserError]:
        """The first document of a shard, which is not damaged, that does not begin with bos, if there is one."""
        starts, tokens = self.starts(shard)[:-1], self.tokens(shard)
        for first in range(0, len(starts), _BLOCK):
            begins = tokens[starts[first : first + _BLOCK]]
            if len(others := np.flatnonzero(begins != self._bos)):
                document, token = first + int(others[0]), int(begins[others[0]])
                message = f"document {document} begins with token {token}, not with bos, {self._bos}"
                yield self._mistake(self._bins[shard], message)
                break

    def _contradictions(self, shard: int) -> Iterator[UserError]:
        """What is wrong in files that are as they were written."""
        index, starts, tokens = self._idxs[shard], self.starts(shard), self.tokens(shard)
        if starts[0] != 0 or starts[-1] != len(tokens):
            yield self._mistake(index, f"it goes from {starts[0]} to {starts[-1]}, not from 0 to {len(tokens)}")
        try:
            for first in range(0, len(starts) - 1, _BLOCK):
                self.lengths(shard, first, min(first + _BLOCK, len(starts) - 1))
        except UserError as mistake:
            yield mistake
        for first in range(0, len(tokens), _BLOCK):
            unknown = np.flatnonzero(tokens[first : first + _BLOCK] >= self._vocab_size)
            if len(unknown):
                place = first + int(unknown[0])
                message = f"token {place} is {tokens[place]}, in a vocabulary of {self._vocab_size}"
                yield self._mistake(self._bins[shard], message)
                break

    def _empty(self, shard: int, document: int) -> UserError:
        return self._mistake(self._idxs[shard], f"document {document} does not end after its start")

    def _mistake(self, file: StoredFile, message: str) -> UserError:
        return UserError(
            f"shard {self._folder.name}/{file.path} contradicts the manifest: {message}. What wrote the data set is at "
            "fault; docs/data_format.md says what is expected."
        )


def _stored(path: str, info: FileInfo, dtype: str) -> StoredFile:
    return StoredFile(path, info.size, info.xxh3_128, dtype)


class TokenDataset:
    """One split of a data set, its files unchecked. `open_dataset` makes one and checks it.

    Attributes: `manifest`; `sources` by name, in the manifest's order, those that have documents in this split;
    `num_documents`, `num_tokens` of all.
    """

    def __init__(self, folder: DataFolder, split: Split, manifest: Manifest) -> None:
        self.manifest = manifest
        self.sources: Mapping[str, SourceDocuments] = {
            name: SourceDocuments(folder, split, name, source.weight, source.splits[split], manifest)
            for name, source in manifest.sources.items()
            if split in source.splits
        }
        self.num_documents = sum(source.num_documents for source in self.sources.values())
        self.num_tokens = sum(source.num_tokens for source in self.sources.values())


def open_dataset(path: str | Path, split: Split, *, verify: bool, cache: CacheSettings | None = None) -> TokenDataset:
    """Open one split of a data set: a local folder, or any URL that fsspec reads.

    In a local folder, existence and size of every shard are checked; `verify` also compares all checksums and looks
    into the indices, which reads every byte. From a URL only the manifest is read, whatever `verify` says: a shard is
    verified when it arrives in `cache`. Raises UserError for a missing, truncated or (with `verify`) corrupt shard,
    a split without documents, and what is not a data set.
    """
    folder = data_folder(path, cache)
    manifest = folder.manifest()
    if not any(split in source.splits for source in manifest.sources.values()):
        raise UserError(
            f"{folder.name} has no {split} documents. Prepare it again with more documents"
            + (" and --validation-fraction above 0." if split == "validation" else ".")
        )
    dataset = TokenDataset(folder, split, manifest)
    for source in dataset.sources.values():
        for shard in range(len(source.shards)):
            for problem in source.damage(shard, contents=verify and not is_url(path)):
                raise problem
    return dataset
