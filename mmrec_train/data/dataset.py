"""Reading a prepared data set: memory-mapped documents of token ids."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrec_train.data.checksums import file_checksum, json_checksum
from mmrec_train.data.manifest import Dtype, FileInfo, Manifest, ShardInfo, Split, read_manifest
from mmrec_train.errors import UserError


@dataclass(frozen=True)
class _Shard:
    tokens: np.ndarray  # [tokens], the manifest's dtype, memory-mapped
    starts: np.ndarray  # [documents + 1], int64, memory-mapped


class TokenDataset:
    """One split's documents, numbered 0 .. num_documents - 1 through all shards. Made by `open_dataset`.

    Attributes: `manifest`; `num_documents`, `num_tokens` (of this split, bos tokens included); `fingerprint`,
    which depends on the tokens, the document bounds and the tokenizer, not on where the data set lies or came
    from.
    """

    def __init__(self, folder: Path, split: Split, manifest: Manifest) -> None:
        info = manifest.splits[split]
        self.manifest = manifest
        self.num_documents = info.documents
        self.num_tokens = info.tokens
        self.fingerprint = json_checksum(
            [
                manifest.dtype,
                manifest.eos_id,
                manifest.tokenizer_fingerprint,
                [[shard.bin.xxh3_128, shard.idx.xxh3_128] for shard in info.shards],
            ]
        )
        self._shards = [_map_shard(folder / split / shard.name, shard, manifest.dtype) for shard in info.shards]
        self._first_document = np.cumsum([0] + [shard.documents for shard in info.shards])

    def document_length(self, document: int) -> int:
        """Number of tokens of a document, bos included."""
        return int(self.document_lengths(np.array([document]))[0])

    def document_lengths(self, documents: np.ndarray) -> np.ndarray:
        """Lengths of many documents at once: [n] integers -> [n] int64."""
        shard_of = self._shard_of(documents)
        lengths = np.empty(len(documents), dtype=np.int64)
        for number in np.unique(shard_of):
            chosen = shard_of == number
            local = documents[chosen] - self._first_document[number]
            starts = self._shards[number].starts
            lengths[chosen] = starts[local + 1] - starts[local]
        return lengths

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, 0 <= start <= stop <= length: a read-only view, in the stored dtype."""
        number = int(self._shard_of(np.array([document]))[0])
        shard = self._shards[number]
        local = document - self._first_document[number]
        begin, end = int(shard.starts[local]), int(shard.starts[local + 1])
        assert 0 <= start <= stop <= end - begin, f"document {document}: [{start}, {stop}) of {end - begin} tokens"
        return shard.tokens[begin + start : begin + stop]

    def _shard_of(self, documents: np.ndarray) -> np.ndarray:
        assert len(documents) == 0 or (documents.min() >= 0 and documents.max() < self.num_documents)
        return np.searchsorted(self._first_document, documents, side="right") - 1


def open_dataset(path: str | Path, split: Split, *, verify: bool) -> TokenDataset:
    """Open one split of a data set made by `launch/prepare_data.py`.

    Existence and size of every shard are always checked; `verify` also compares all checksums, which reads every
    byte. Raises UserError for a missing, truncated or (with `verify`) corrupt shard, a split without documents,
    and a folder that is not a data set.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    info = manifest.splits.get(split)
    if info is None or info.documents == 0:
        raise UserError(
            f"{folder} has no {split} documents. Prepare it again with more documents"
            + (" and --validation-fraction above 0." if split == "validation" else ".")
        )
    for shard in info.shards:
        for suffix, expected in (("bin", shard.bin), ("idx", shard.idx)):
            _check_file(folder / split / f"{shard.name}.{suffix}", expected, verify=verify)
    return TokenDataset(folder, split, manifest)


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


def _map_shard(stem: Path, shard: ShardInfo, dtype: Dtype) -> _Shard:
    def map_file(suffix: str, stored: np.dtype, count: int) -> np.ndarray:
        path = stem.with_suffix(suffix)
        if path.stat().st_size != count * stored.itemsize:
            raise UserError(
                f"{path} holds {path.stat().st_size} bytes, but {count} entries of {stored.itemsize} bytes follow "
                "from the manifest, which is damaged. Prepare the data set again."
            )
        return np.memmap(path, dtype=stored, mode="r", shape=(count,))

    return _Shard(
        tokens=map_file(".bin", np.dtype(dtype).newbyteorder("<"), shard.tokens),
        starts=map_file(".idx", np.dtype("<i8"), shard.documents + 1),
    )
