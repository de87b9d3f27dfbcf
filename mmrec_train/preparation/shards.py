"""Writing one source's part of a split as shards of whole documents, so that a killed writer can go on."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.manifest import Dtype, FileInfo, ShardInfo, SplitInfo
from mmrec_train.disk import sync
from mmrec_train.errors import UserError

SHARD_BYTES = 256 << 20  # few files, yet each is quickly hashed and copied


class OpenShard(NamedTuple):
    """What the unfinished shard holds."""

    documents: int
    tokens: int


class SplitWriter:
    """Appends documents to `folder`/shard_NNNNN.{bin,idx}; `close` returns what the manifest says of them.

    A shard ends with the document that brings it to `shard_bytes`. The folder is made for the first document, and the
    writer's own. Memory does not grow with the documents.

    To go on with what a killed writer wrote, give the `shards` it had finished and what `sync` returned last: all
    else in the folder is removed. UserError where less than that is there.
    """

    def __init__(
        self,
        folder: Path,
        dtype: Dtype,
        *,
        shard_bytes: int = SHARD_BYTES,
        shards: Sequence[ShardInfo] = (),
        unfinished: OpenShard | None = None,
    ) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = max(1, shard_bytes // self._dtype.itemsize)
        self._files: tuple[BinaryIO, BinaryIO] | None = None  # of the unfinished shard: tokens, ends of documents
        self._written = OpenShard(0, 0)
        if folder.exists():
            self._resume(unfinished)

    def add(self, document: np.ndarray) -> None:
        """Append one document: all its token ids, bos included; integers of any width."""
        self.extend(document, np.array([len(document)]))

    def extend(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: the ids of all, one after another, and the number of each one's, [n]."""
        ends = np.cumsum(lengths)
        first = 0  # document
        while first < len(ends):
            begin = ends[first - 1] if first else 0
            room = self._shard_tokens - self._written.tokens
            last = min(int(np.searchsorted(ends, begin + room)), len(ends) - 1)
            self._append(tokens[begin : ends[last]], ends[first : last + 1] - begin)
            first = last + 1

    def sync(self) -> OpenShard:
        """Bring all to the disk. Returns what the unfinished shard holds."""
        for file in self._files or ():
            _flush(file)
        return self._written

    def finish(self) -> None:
        """Finish the last shard."""
        if self._files is not None:
            self._finish_shard(*self._files)

    def close(self) -> SplitInfo:
        """Finish the last shard; there must be a document."""
        self.finish()
        return split_info(self.shards)

    def _resume(self, unfinished: OpenShard | None) -> None:
        kept = {f"{shard.name}.{suffix}" for shard in self.shards for suffix in ("bin", "idx")}
        if unfinished is not None and unfinished.documents:
            self._files = tokens, ends = self._open("r+b")
            _truncate(tokens, unfinished.tokens * self._dtype.itemsize)
            _truncate(ends, (unfinished.documents + 1) * 8)
            self._written = unfinished
            kept |= {f"{self._name}.bin", f"{self._name}.idx"}
        for file in self.folder.iterdir():
            if file.name not in kept:
                file.unlink()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name}.{suffix}"

    @property
    def _name(self) -> str:
        return f"shard_{len(self.shards):05d}"

    def _open(self, mode: Literal["xb", "r+b"]) -> tuple[BinaryIO, BinaryIO]:
        return self._path("bin").open(mode), self._path("idx").open(mode)

    def _append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Documents that belong to the same shard; `ends` counts from the first of their tokens."""
        if self._files is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = self._open("xb")
            sync(self.folder)
            self._files[1].write(bytes(8))
        self._files[0].write(np.ascontiguousarray(tokens, self._dtype).data)
        self._files[1].write((ends + self._written.tokens).astype("<i8").tobytes())
        self._written = OpenShard(self._written.documents + len(ends), self._written.tokens + int(ends[-1]))
        if self._written.tokens >= self._shard_tokens:
            self._finish_shard(*self._files)

    def _finish_shard(self, *files: BinaryIO) -> None:
        for file in files:
            _flush(file)  # a full disk shows here, not at the next power cut
            file.close()
        shard = ShardInfo(
            name=self._name,
            documents=self._written.documents,
            tokens=self._written.tokens,
            bin=_file_info(self._path("bin")),
            idx=_file_info(self._path("idx")),
        )
        self.shards.append(shard)
        self._files, self._written = None, OpenShard(0, 0)


def split_info(shards: Sequence[ShardInfo]) -> SplitInfo:
    return SplitInfo(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        shards=tuple(shards),
    )


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _truncate(file: BinaryIO, size: int) -> None:
    found = file.seek(0, os.SEEK_END)
    if found < size:
        raise UserError(
            f"{file.name} has {found} bytes, but {size} had been written. Remove its folder and start anew."
        )
    file.truncate(size)
    file.seek(size)


def _file_info(path: Path) -> FileInfo:
    return FileInfo(size=path.stat().st_size, xxh3_128=file_checksum(path))
