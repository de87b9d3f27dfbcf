"""Data sets in a memory:// file system that can be made to fail."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.dataset import TokenDataset, open_dataset

URL = "memory://bucket/data"
PLENTY = 1 << 30


def upload(folder: Path, url: str = URL) -> None:
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def remote_path(name: str) -> str:
    return f"{URL}/train/main/{name}"


def open_remote(tmp_path: Path, max_bytes: int = PLENTY) -> TokenDataset:
    return open_dataset(URL, "train", verify=True, cache=CacheSettings(tmp_path / "cache", max_bytes))


class Requests:
    """Counts the shards that are fetched; the first `failures` requests of any kind raise `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetched: list[str] = []
        self.failures = 0
        self.error: Exception = TimeoutError("timed out")
        self.before: Callable[[str], None] = lambda path: None
        get_file, cat_file = MemoryFileSystem.get_file, MemoryFileSystem.cat_file

        def counted_get_file(fs: MemoryFileSystem, path: str, target: str, **options: Any) -> None:
            self.fetched.append(path.rsplit("/", 1)[1])
            self.before(path)
            self._fail()
            get_file(fs, path, target, **options)

        def counted_cat_file(fs: MemoryFileSystem, path: str, **options: Any) -> bytes:
            self._fail()
            return cat_file(fs, path, **options)

        monkeypatch.setattr(MemoryFileSystem, "get_file", counted_get_file)
        monkeypatch.setattr(MemoryFileSystem, "cat_file", counted_cat_file)

    def _fail(self) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise self.error


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*.tmp"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
