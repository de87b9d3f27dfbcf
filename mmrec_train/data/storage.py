"""Where a data set lies: in a local folder, or at a URL, whose shards are cached on the local disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.manifest import (
    COPY_REMEDY,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    StoredFile,
    not_prepared,
    parse_manifest,
    read_manifest,
)
from mmrec_train.data.remote import Remote
from mmrec_train.data.shard_cache import ShardCache, shard_cache
from mmrec_train.errors import UserError

# All that a fast tokenizer needs. Many servers cannot list a folder, and some do not tell what is absent from what is
# forbidden: so nothing is asked for that may not be there.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class DataFolder(Protocol):
    """A data set's files. Every method raises UserError for what is missing or damaged; all are for any thread."""

    name: str

    def manifest(self) -> Manifest: ...

    def tokenizer(self) -> Path:
        """A local folder that holds the tokenizer."""

    def array(self, file: StoredFile) -> np.ndarray:
        """The entries of a file, memory-mapped, read-only. Once it is open this is a look-up in a dictionary."""

    def prefetch(self, reader: object, files: Iterable[StoredFile]) -> None:
        """Have `files` at hand soon: `reader` wants them next, and no longer what it wanted before."""

    def check(self, file: StoredFile, *, contents: bool) -> None:
        """Is the file there with its size and, with `contents`, its checksum?"""


def data_folder(path: str | Path, cache: CacheSettings | None = None) -> DataFolder:
    """The data set at `path`: a local folder (also `file://`), or any other URL that fsspec reads.

    A URL must be a string: `Path` makes one slash of two. `cache` is for URLs; None for its defaults.
    """
    if is_url(path):
        return RemoteFolder(str(path), shard_cache(cache or CacheSettings()))
    return LocalFolder(Path(str(path).removeprefix("file://")).expanduser())


def is_url(path: str | Path) -> bool:
    """Whether a data set at `path` is cached before it is read."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


class LocalFolder:
    """A data set in a local folder. Its files stay mapped, which takes no memory and no file descriptor."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self._folder = folder
        self._maps: dict[str, np.ndarray] = {}

    def manifest(self) -> Manifest:
        return read_manifest(self._folder)

    def tokenizer(self) -> Path:
        return self._folder / TOKENIZER_NAME

    def array(self, file: StoredFile) -> np.ndarray:
        found = self._maps.get(file.path)
        if found is None:
            self.check(file, contents=False)
            path = self._folder / file.path
            try:
                with pa.memory_map(str(path)) as mapped:  # np.memmap would keep the file open
                    found = np.frombuffer(mapped.read_buffer(), dtype=file.dtype)
            except OSError as error:
                raise UserError(f"cannot read shard {path}: {error.strerror or error}") from error
            self._maps[file.path] = found
        return found

    def prefetch(self, reader: object, files: Iterable[StoredFile]) -> None:
        """The system reads ahead by itself."""

    def check(self, file: StoredFile, *, contents: bool) -> None:
        path = self._folder / file.path
        try:
            size = path.stat().st_size
            if size != file.size:
                what = "truncated" if size < file.size else "too long"
                raise UserError(f"shard {path} is {what}: {size} bytes, the manifest says {file.size}. {COPY_REMEDY}")
            if contents and file_checksum(path) != file.checksum:
                raise UserError(f"shard {path} is corrupt: its checksum is not the manifest's. {COPY_REMEDY}")
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing, though the manifest lists it. {COPY_REMEDY}") from None
        except OSError as error:
            raise UserError(f"cannot read shard {path}: {error.strerror or error}. {COPY_REMEDY}") from error


class RemoteFolder:
    """A data set at a URL. A shard is fetched into `cache` when it is first used, and verified when it arrives."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._remote = Remote(url)
        self._cache = cache
        self.name = self._remote.url

    def manifest(self) -> Manifest:
        try:
            content = self._remote.read(MANIFEST_NAME)
        except FileNotFoundError:
            raise not_prepared(self.name) from None
        return parse_manifest(content.decode("utf-8", "replace"), f"{self.name}/{MANIFEST_NAME}")

    def tokenizer(self) -> Path:
        try:
            contents = {name: self._remote.read(f"{TOKENIZER_NAME}/{name}") for name in TOKENIZER_FILES}
        except FileNotFoundError as error:
            raise UserError(
                f"{self.name}/{TOKENIZER_NAME} lacks one of {', '.join(TOKENIZER_FILES)}. {COPY_REMEDY}"
            ) from error
        return self._cache.small_files(contents)

    def array(self, file: StoredFile) -> np.ndarray:
        return self._cache.array(file, self._remote)

    def prefetch(self, reader: object, files: Iterable[StoredFile]) -> None:
        self._cache.prefetch(reader, files, self._remote)

    def check(self, file: StoredFile, *, contents: bool) -> None:
        """With `contents` that of the server is read, also where it is cached; else nothing is asked of the server."""
        if contents:
            self._cache.verify(file, self._remote)
