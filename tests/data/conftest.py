"""A data set at a URL. See `remote`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.documents import numbered_documents, write_documents
from tests.data.remote import Requests, upload


@pytest.fixture
def memory_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty memory:// file system, asked again without a pause."""
    monkeypatch.setattr("mmrec_train.data.remote.RETRY_PAUSES", (0.0, 0.0, 0.0))
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture
def documents(tmp_path: Path, memory_files: None) -> list[list[int]]:
    """Ten documents of 21 to 30 tokens at URL, each in a shard of its own (.bin 84 to 120 bytes, .idx 16)."""
    documents = numbered_documents(range(21, 31))
    write_documents(tmp_path / "local", documents, shard_tokens=21)
    upload(tmp_path / "local")
    return documents


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    return Requests(monkeypatch)
