"""Remote shards on the local disk: fetched once for all processes of a host, within a limit of bytes.

    FOLDER/CHECKSUM                 a whole, verified file of any data set
    FOLDER/CHECKSUM.SIZE.tmp        one that is being downloaded
    FOLDER/locks/                   empty files, at most 257
    FOLDER/tokenizers/CHECKSUM/     small; not counted

A file in use is locked (flock, shared) through an open descriptor, which its memory map keeps. So what nobody uses is
what an exclusive lock can be had of: only that is removed, least recently used first. The locks of a process that was
killed are gone with it.
"""

import fcntl
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash
from filelock import FileLock

from mmrec_train.data.checksums import file_checksum, json_checksum
from mmrec_train.data.manifest import COPY_REMEDY, StoredFile
from mmrec_train.data.remote import DISK_FULL, Remote
from mmrec_train.errors import UserError

# Whatever else lies in the folder is left alone.
_OURS = re.compile(r"[0-9a-f]{32}(\.(?P<claimed>\d+)\.tmp)?")


@dataclass(frozen=True)
class CacheSettings:
    """Where remote shards are kept, and how many bytes of them at most. The folder should be on a local disk."""

    folder: Path = Path("~/.cache/mmrec_train/shards")
    max_bytes: int = 64 << 30


class CacheFolder:
    """The files of one cache. For any thread, beside any number of other processes.

    `release` is called where the limit cannot be kept: it gives up what this process has open but does not need.
    Methods raise UserError where a file cannot be fetched, does not arrive whole, or finds no room on the disk.
    """

    def __init__(self, settings: CacheSettings, release: Callable[[], None]) -> None:
        if settings.max_bytes < 1:
            raise UserError(f"the shard cache's limit is {settings.max_bytes} bytes; it must be positive")
        self._folder = settings.folder.expanduser()
        self._max_bytes = settings.max_bytes
        self._release = release
        self._warned = False

    def path(self, file: StoredFile) -> Path:
        """Where the whole file is, if it is cached."""
        return self._folder / file.checksum

    def open(self, file: StoredFile, remote: Remote) -> BinaryIO:
        """The whole file, fetched where it is not cached; in use as long as its descriptor or a map of it lives."""
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
            cached = self._open_cached(file)
            if cached is None:
                # Of all that want a file, one fetches it. Some files share a lock, which only makes one wait.
                with FileLock(self._folder / "locks" / file.checksum[:2]):
                    cached = self._open_cached(file) or self._fetch(file, remote)
        except OSError as error:
            raise self._unusable(error, file.size) from error
        return cached

    def small_files(self, files: Mapping[str, bytes]) -> Path:
        """A folder that holds these files, by name."""
        checksums = {name: xxhash.xxh3_128_hexdigest(content) for name, content in files.items()}
        folder = self._folder / "tokenizers" / json_checksum(checksums)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                    _write_at_once(folder / name, content)
        except OSError as error:
            raise self._unusable(error, sum(map(len, files.values()))) from error
        return folder

    def _open_cached(self, file: StoredFile) -> BinaryIO | None:
        try:
            cached = self.path(file).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(cached, fcntl.LOCK_SH)
        status = os.fstat(cached.fileno())
        if status.st_nlink == 0 or status.st_size != file.size:  # removed before the lock was had; damaged
            cached.close()
            return None
        os.utime(cached.fileno())
        return cached

    def _fetch(self, file: StoredFile, remote: Remote) -> BinaryIO:
        """Download, verify and keep the file; nothing stays of one that fails."""
        path = self._folder / f"{file.checksum}.{file.size}.tmp"
        arriving = self._reserve(path, file.size)
        try:
            _download(file, remote, path)
            os.fsync(arriving.fileno())
            with self._room:
                path.rename(self.path(file))
        except BaseException:
            with self._room:
                path.unlink(missing_ok=True)
            arriving.close()
            raise
        return arriving

    @property
    def _room(self) -> FileLock:
        """Held while files appear, get their names and are removed, so that all can be counted."""
        return FileLock(self._folder / "locks" / "room")

    def _reserve(self, path: Path, size: int) -> BinaryIO:
        """Make room for `size` bytes, and open the new file `path`, whose name claims them."""
        with self._room:
            excess = self._evict(size)
            if excess > 0:
                self._release()
                excess = self._evict(size)
            if excess > 0 and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the shard cache {self._folder} is {excess:,} bytes over its limit of {self._max_bytes:,}: that "
                    "much more is in use at once. Raise the limit, or shuffle fewer shards together.",
                    stacklevel=2,
                )
            arriving = path.open("w+b")
            fcntl.flock(arriving, fcntl.LOCK_SH)
            return arriving

    def _evict(self, size: int) -> int:
        """Remove unused files until `size` more bytes fit, and left-over downloads; returns the bytes that do not."""
        files = []
        for path in self._folder.iterdir():
            if (name := _OURS.fullmatch(path.name)) is not None:
                status, claimed = path.stat(), name["claimed"]
                files.append((claimed is None, status.st_mtime_ns, path, int(claimed or status.st_size)))
        excess = sum(length for *_, length in files) + size - self._max_bytes
        for whole, _, path, length in sorted(files):
            if (excess > 0 or not whole) and _remove_unused(path):
                excess -= length
        return excess

    def _unusable(self, error: OSError, size: int) -> UserError:
        if error.errno in DISK_FULL:
            return UserError(
                f"the disk of the shard cache {self._folder} is full: {size:,} more bytes are needed. Free some space, "
                "lower the cache's limit, or choose a folder on another disk."
            )
        return UserError(
            f"cannot use the shard cache {self._folder}: {error.strerror or error}. Choose another folder for it."
        )


def _download(file: StoredFile, remote: Remote, path: Path) -> None:
    """Copy the file over `path`, once again if it does not arrive whole."""
    for last in (False, True):
        try:
            remote.download(file.path, path)
        except FileNotFoundError:
            raise UserError(
                f"shard {remote.url}/{file.path} is missing, though the manifest lists it. {COPY_REMEDY}"
            ) from None
        damage = _damage(path, file)
        if damage is None:
            return
        if last:
            raise UserError(f"shard {remote.url}/{file.path} arrived {damage}, twice. {COPY_REMEDY}")


def _damage(path: Path, file: StoredFile) -> str | None:
    size = path.stat().st_size
    if size != file.size:
        return f"{'truncated' if size < file.size else 'too long'} ({size} bytes, the manifest says {file.size})"
    return None if file_checksum(path) == file.checksum else "corrupt (its checksum is not the manifest's)"


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process has it in use."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True


def _write_at_once(path: Path, content: bytes) -> None:
    """Write a file that others may read at any moment."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
