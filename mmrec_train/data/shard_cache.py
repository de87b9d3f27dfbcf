"""Remote shards as arrays: a bounded number of maps of cached files, and what is fetched ahead."""

import functools
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from mmrec_train.data.cache_folder import CacheFolder, CacheSettings
from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.manifest import StoredFile
from mmrec_train.data.remote import Remote
from mmrec_train.errors import UserError

MAX_MAPS = 256  # each keeps a file descriptor, of which a process often has 1024

_Key = tuple[str, str]  # a file's checksum and dtype: what it holds, wherever it came from


class _Map:
    """A mapped file and when it was last asked for."""

    __slots__ = ("array", "path", "used")

    def __init__(self, array: np.ndarray, path: Path) -> None:
        self.array, self.path, self.used = array, path, time.time()


class _Job(NamedTuple):
    """Files that a reader wants next."""

    reader: object
    files: dict[_Key, StoredFile]
    remote: Remote


class ShardCache:
    """A cache as one process uses it; `shard_cache` gives the process's only one. For any thread.

    Its methods raise UserError where a file cannot be fetched, does not arrive whole, or finds no room on the disk.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._folder = CacheFolder(settings, self._release)
        self._max_bytes = settings.max_bytes
        self._maps: dict[_Key, _Map] = {}
        self._wanted: WeakKeyDictionary[object, dict[_Key, StoredFile]] = WeakKeyDictionary()  # by reader
        self._jobs: deque[_Job] = deque()
        self._worker: threading.Thread | None = None
        self._books = threading.Lock()  # held to change these four

    def array(self, file: StoredFile, remote: Remote) -> np.ndarray:
        """The file's entries, memory-mapped, read-only; fetched where it is not cached."""
        mapped = self._maps.get(_key(file)) or self._map(file, remote)
        mapped.used = time.time()
        return mapped.array

    def prefetch(self, reader: object, files: Iterable[StoredFile], remote: Remote) -> None:
        """Fetch, in the background, what `reader` wants next, and keep it until it wants something else.

        As many of `files`, the first of them first, as fit into the cache together with what other readers want. So
        what is fetched takes the place of what nobody wants any more.
        """
        with self._books:
            self._wanted.pop(reader, None)
            taken = {key: file.size for wanted in self._wanted.values() for key, file in wanted.items()}
            space = self._max_bytes - sum(taken.values())
            chosen: dict[_Key, StoredFile] = {}
            for file in files:
                key = _key(file)
                space -= 0 if key in taken else file.size
                if space < 0:
                    break
                taken[key], chosen[key] = file.size, file
            self._wanted[reader] = chosen
            self._jobs.append(_Job(reader, chosen, remote))
            if self._worker is None:
                # A daemon: the end of the program does not wait for a download.
                self._worker = threading.Thread(target=self._work, name="shard prefetch", daemon=True)
                self._worker.start()

    def verify(self, file: StoredFile, remote: Remote) -> None:
        """Compare the remote file and its cached copy with the checksum; a damaged copy is fetched anew."""
        copy = self._folder.path(file)
        found = _readable_checksum(copy)
        if found == file.checksum:
            self._verify_remote(file, remote)
            return
        if found is not None:
            with self._books:
                self._maps.pop(_key(file), None)
            copy.unlink(missing_ok=True)
        self.array(file, remote)  # verified when it arrives

    def small_files(self, files: Mapping[str, bytes]) -> Path:
        """A folder that holds these files, by name."""
        return self._folder.small_files(files)

    def _verify_remote(self, file: StoredFile, remote: Remote) -> None:
        """UserError unless the file arrives whole, in a cache for this alone: the copy may be the last whole one."""
        folder = self._folder.path(file).parent
        try:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                CacheFolder(CacheSettings(Path(scratch), file.size), release=lambda: None).open(file, remote).close()
        except OSError as error:
            raise UserError(
                f"cannot use the shard cache {folder}: {error.strerror or error}. Choose another folder for it."
            ) from error

    def _map(self, file: StoredFile, remote: Remote) -> _Map:
        with self._folder.open(file, remote) as whole:
            # The map keeps the descriptor. A plain array, since slices of a memmap cost more.
            mapped = _Map(np.asarray(np.memmap(whole, dtype=file.dtype, mode="r")), self._folder.path(file))
        with self._books:
            self._maps[_key(file)] = mapped
            by_use = sorted(self._maps, key=lambda key: self._maps[key].used)
            self._unmap(by_use[:-MAX_MAPS])
        return mapped

    def _release(self) -> None:
        """Give up what nobody wants next, so that it can make room."""
        with self._books:
            self._unmap(self._maps.keys() - {key for wanted in self._wanted.values() for key in wanted})

    def _unmap(self, keys: Iterable[_Key]) -> None:
        """Forget these maps, and note at their files when they were last used. The books must be held."""
        for key in keys:
            mapped = self._maps.pop(key)
            with suppress(FileNotFoundError):  # somebody has cleared the folder
                os.utime(mapped.path, (mapped.used, mapped.used))

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            for file in job.files.values():
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


def _key(file: StoredFile) -> _Key:
    return file.checksum, file.dtype


def _readable_checksum(path: Path) -> str | None:
    try:
        return file_checksum(path)
    except OSError:
        return None  # not there, or who opens it will report why


@functools.cache
def shard_cache(settings: CacheSettings) -> ShardCache:
    """The process's only cache of these settings: data sets that share a folder know of each other's maps."""
    return ShardCache(settings)
