"""Writing one source's part of a split as shards of whole documents."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.manifest import Dtype, FileInfo, ShardInfo, SplitInfo

SHARD_BYTES = 256 << 20  # few files, yet each is quickly hashed and copied


class SplitWriter:
    """Appends documents to `folder`/shard_NNNNN.{bin,idx}; `close` returns what the manifest says of them.

    A shard ends with the document that brings it to `shard_bytes`. The folder is made for the first document.
    """

    def __init__(self, folder: Path, dtype: Dtype, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = max(1, shard_bytes // self._dtype.itemsize)
        self._shards: list[ShardInfo] = []
        self._bin: BinaryIO | None = None
        self._starts: list[int] = [0]

    def add(self, document: np.ndarray) -> None:
        """Append one document: all its token ids, bos included; integers of any width."""
        if self._bin is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._bin = self._path("bin").open("xb")
        self._bin.write(document.astype(self._dtype).tobytes())
        self._starts.append(self._starts[-1] + len(document))
        if self._starts[-1] >= self._shard_tokens:
            self._finish_shard()

    def close(self) -> SplitInfo:
        self._finish_shard()
        return SplitInfo(
            documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            shards=tuple(self._shards),
        )

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self._name}.{suffix}"

    @property
    def _name(self) -> str:
        return f"shard_{len(self._shards):05d}"

    def _finish_shard(self) -> None:
        if self._bin is None:
            return
        _flush_and_close(self._bin)
        with self._path("idx").open("xb") as index:
            index.write(np.array(self._starts, dtype="<i8").tobytes())
            _flush_and_close(index)
        shard = ShardInfo(
            name=self._name,
            documents=len(self._starts) - 1,
            tokens=self._starts[-1],
            bin=_file_info(self._path("bin")),
            idx=_file_info(self._path("idx")),
        )
        self._shards.append(shard)
        self._bin, self._starts = None, [0]


def _flush_and_close(file: BinaryIO) -> None:
    """Close a file whose bytes are on the disk: a full disk shows here, not at the next power cut."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _file_info(path: Path) -> FileInfo:
    return FileInfo(size=path.stat().st_size, xxh3_128=file_checksum(path))
