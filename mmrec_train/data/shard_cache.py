"""Remote shards as arrays: a bounded number of maps of cached files, and what is fetched ahead."""

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import xxhash

from mmrec_train.data.cache_folder import CacheFolder, CacheSettings
from mmrec_train.data.manifest import StoredFile
from mmrec_train.data.remote import Remote
from mmrec_train.errors import UserError

MAX_MAPS = 256  # each keeps a file descriptor, of which a process often has 1024


class _Map:
    """A mapped file and when it was last asked for."""

    __slots__ = ("array", "path", "used")

    def __init__(self, array: np.ndarray, path: Path) -> None:
        self.array, self.path, self.used = array, path, time.time()


class _Job(NamedTuple):
    """Files that a reader wants next."""

    reader: object
    files: tuple[StoredFile, ...]
    remote: Remote


class ShardCache:
    """A cache as one process uses it; `shard_cache` gives the process's only one. For any thread.

    Its methods raise UserError where a file cannot be fetched, does not arrive whole, or finds no room on the disk.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._folder = CacheFolder(settings, release=lambda: self._unmap(keep=0))
        self._max_ahead = settings.max_bytes // 2
        self._maps: dict[tuple[str, str], _Map] = {}  # by checksum and dtype
        self._wanted: WeakKeyDictionary[object, tuple[StoredFile, ...]] = WeakKeyDictionary()  # by reader
        self._jobs: deque[_Job] = deque()
        self._worker: threading.Thread | None = None
        self._books = threading.Lock()  # held to change these four

    def array(self, file: StoredFile, remote: Remote) -> np.ndarray:
        """The file's entries, memory-mapped, read-only; fetched where it is not cached."""
        mapped = self._maps.get((file.checksum, file.dtype)) or self._map(file, remote)
        mapped.used = time.time()
        return mapped.array

    def prefetch(self, reader: object, files: Iterable[StoredFile], remote: Remote) -> None:
        """Fetch, in the background, what `reader` wants next, and keep it until it wants something else.

        As many of `files` as fit into half of the cache, together with what other readers want.
        """
        with self._books:
            others = [file for other, wanted in self._wanted.items() if other is not reader for file in wanted]
            space, count = self._max_ahead - sum(file.size for file in others), MAX_MAPS // 2 - len(others)
            chosen: list[StoredFile] = []
            for file in dict.fromkeys(files):
                space -= file.size
                if space < 0 or len(chosen) >= count:
                    break
                chosen.append(file)
            self._wanted[reader] = tuple(chosen)
            self._jobs.append(_Job(reader, self._wanted[reader], remote))
            if self._worker is None:
                # A daemon: the end of the program does not wait for a download.
                self._worker = threading.Thread(target=self._work, name="shard prefetch", daemon=True)
                self._worker.start()

    def verify(self, file: StoredFile, remote: Remote) -> None:
        """Compare the cached copy with its checksum; a damaged one is fetched anew."""
        if xxhash.xxh3_128_hexdigest(self.array(file, remote).data) != file.checksum:
            with self._books:
                self._maps.pop((file.checksum, file.dtype), None)
            self._folder.path(file).unlink(missing_ok=True)
            self.array(file, remote)

    def small_files(self, files: Mapping[str, bytes]) -> Path:
        """A folder that holds these files, by name."""
        return self._folder.small_files(files)

    def _map(self, file: StoredFile, remote: Remote) -> _Map:
        with self._folder.open(file, remote) as whole:
            # The map keeps the descriptor. A plain array, since slices of a memmap cost more.
            mapped = _Map(np.asarray(np.memmap(whole, dtype=file.dtype, mode="r")), self._folder.path(file))
        with self._books:
            self._maps[file.checksum, file.dtype] = mapped
        self._unmap(keep=MAX_MAPS)
        return mapped

    def _unmap(self, keep: int) -> None:
        """Forget maps, least recently used first, until `keep` are left; not those that are wanted next."""
        with self._books:
            excess = len(self._maps) - keep
            if excess <= 0:
                return
            wanted = {(file.checksum, file.dtype) for files in self._wanted.values() for file in files}
            for key in sorted(self._maps.keys() - wanted, key=lambda key: self._maps[key].used)[:excess]:
                mapped = self._maps[key]
                with suppress(FileNotFoundError):  # somebody has cleared the folder
                    os.utime(mapped.path, (mapped.used, mapped.used))
                del self._maps[key], mapped

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            for file in job.files:
                if self._wanted.get(job.reader) is not job.files:
                    break  # it wants something else by now
                try:
                    self.array(file, job.remote)
                except UserError:
                    break  # the reader will meet it where it needs the file, and report it

    def _next_job(self) -> _Job | None:
        with self._books:
            if not self._jobs:
                self._worker = None
                return None
            return self._jobs.popleft()


@functools.cache
def shard_cache(settings: CacheSettings) -> ShardCache:
    """The process's only cache of these settings: data sets that share a folder know of each other's maps."""
    return ShardCache(settings)
