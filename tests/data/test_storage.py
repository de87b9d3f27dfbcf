"""Data sets at URLs, in a memory:// file system that can be made to fail."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data import shard_cache as shard_cache_module
from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.storage import data_folder, is_url
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents

URL = "memory://bucket/data"
PLENTY = 1 << 30
SHARD = 136  # bytes of the largest shard of `documents`


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("mmrec_train.data.remote.RETRY_PAUSES", (0.0, 0.0, 0.0))
    yield
    MemoryFileSystem.store.clear()


def upload(folder: Path, url: str = URL) -> None:
    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def remote_path(name: str) -> str:
    return f"{URL}/train/main/{name}"


@pytest.fixture
def documents(tmp_path: Path) -> list[list[int]]:
    """Ten documents of 21 to 30 tokens at URL, each in a shard of its own (.bin 84 to 120 bytes, .idx 16)."""
    documents = numbered_documents(range(21, 31))
    write_documents(tmp_path / "local", documents, shard_tokens=21)
    upload(tmp_path / "local")
    return documents


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


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    return Requests(monkeypatch)


def cached_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file())


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*.tmp"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:the shard cache")
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 60),
    max_bytes=st.sampled_from([1, 50, 150, 400, PLENTY]),
    draw=st.data(),
)
def test_documents_come_back_whatever_the_cache_holds(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, max_bytes: int, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = numbered_documents(lengths)
    local = write_documents(folder / "local", documents, shard_tokens=shard_tokens).sources["main"]
    upload(folder / "local")
    source = open_dataset(URL, "train", verify=True, cache=CacheSettings(folder / "cache", max_bytes)).sources["main"]
    assert source.fingerprint == local.fingerprint
    for chosen in draw.draw(st.lists(st.integers(0, len(documents) - 1), max_size=30)):
        if draw.draw(st.booleans()):
            source.prefetch(draw.draw(st.lists(st.integers(0, len(source.shards) - 1), max_size=4)))
        assert source.read(chosen).tolist() == documents[chosen]
    places, expected = (s.locate(np.arange(len(documents))) for s in (source, local))
    assert all(np.array_equal(found, wanted) for found, wanted in zip(places, expected, strict=True))


def test_a_shard_is_fetched_once_also_by_the_next_process(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    for _ in range(2):
        shard_cache_module.shard_cache.cache_clear()  # as in another process
        source = open_remote(tmp_path).sources["main"]
        assert [source.read(index).tolist() for index in (3, 3, 4)] == [documents[3], documents[3], documents[4]]
    assert sorted(requests.fetched) == ["shard_00003.bin", "shard_00003.idx", "shard_00004.bin", "shard_00004.idx"]


def test_opening_fetches_no_shard(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    open_remote(tmp_path)
    assert requests.fetched == []


def test_several_processes_fetch_a_shard_once(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    def note(path: str) -> None:
        with (tmp_path / "notes").open("a") as notes:
            notes.write(f"{path}\n")
        time.sleep(0.02)

    def read() -> None:
        source = open_remote(tmp_path).sources["main"]
        assert [source.read(document).tolist() for document in range(10)] == documents

    requests.before = note
    readers = [multiprocessing.get_context("fork").Process(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
        assert reader.exitcode == 0
    notes = (tmp_path / "notes").read_text().split()
    assert len(notes) == len(set(notes)) == 20
    assert leftovers(tmp_path) == []


def test_the_limit_is_kept_by_removing_what_was_used_longest_ago(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path, max_bytes=3 * SHARD).sources["main"]
    for index in (0, 1, 2, 0, 3):  # 1 makes room for 3
        assert source.read(index).tolist() == documents[index]
        assert cached_bytes(tmp_path) <= 3 * SHARD
    requests.fetched.clear()
    for index in (0, 2, 3):
        source.read(index)
    assert requests.fetched == []
    source.read(1)
    assert requests.fetched == ["shard_00001.idx", "shard_00001.bin"]


def test_what_is_in_use_is_not_removed(tmp_path: Path, documents: list[list[int]]) -> None:
    source = open_remote(tmp_path, max_bytes=150).sources["main"]
    with pytest.warns(UserWarning, match=r"cache .* over its limit of 150.*in use"):
        held = [source.read(index) for index in range(10)]
    assert [tokens.tolist() for tokens in held] == documents
    assert cached_bytes(tmp_path) >= 1000
    with warnings.catch_warnings(action="error"):  # said once
        source.read(0)
    del held
    source.read(0)
    source.read(1)
    assert cached_bytes(tmp_path) <= 150


def test_what_another_process_has_in_use_is_not_removed(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path, max_bytes=250).sources["main"]
    source.read(0)
    checksum = source.shards[0].bin.xxh3_128
    with (tmp_path / "cache" / checksum).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a map there would
        for index in range(1, 10):
            source.read(index)
        assert (tmp_path / "cache" / checksum).exists()
    for index in range(1, 10):
        source.read(index)
    assert not (tmp_path / "cache" / checksum).exists()


def test_a_removed_file_leaves_the_disk(tmp_path: Path, documents: list[list[int]]) -> None:
    """A map of an unlinked file would still occupy it."""
    source = open_remote(tmp_path, max_bytes=250).sources["main"]
    for index in range(10):
        source.read(index)
    maps = Path("/proc/self/maps").read_text()
    mapped = [line for line in maps.splitlines() if str(tmp_path / "cache") in line]
    assert 0 < len(mapped) <= 4
    assert not any("deleted" in line for line in mapped)


def test_a_bounded_number_of_shards_is_mapped(
    tmp_path: Path, documents: list[list[int]], requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache_module, "MAX_MAPS", 4)
    source = open_remote(tmp_path).sources["main"]
    for _ in range(2):
        for index in range(10):
            assert source.read(index).tolist() == documents[index]
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(tmp_path / "cache")) == 4
    assert len(requests.fetched) == 20


def test_foreign_files_in_the_folder_are_left_alone(tmp_path: Path, documents: list[list[int]]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("x" * 1000)
    source = open_remote(tmp_path, max_bytes=250).sources["main"]
    for index in range(10):
        source.read(index)
    assert (tmp_path / "cache" / "thesis.txt").exists()


def test_left_over_downloads_are_removed(tmp_path: Path, documents: list[list[int]]) -> None:
    source = open_remote(tmp_path).sources["main"]
    stale = tmp_path / "cache" / f"{'0' * 32}.1000.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"x" * 10)
    source.read(0)
    assert not stale.exists()


def test_prefetched_shards_are_there_and_stay(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    source = open_remote(tmp_path, max_bytes=6 * SHARD).sources["main"]
    source.prefetch([5, 6, 5])
    wait_until(lambda: len(requests.fetched) == 4)
    for index in (0, 1, 2, 3, 4, 7, 8, 9):
        source.read(index)
    assert cached_bytes(tmp_path) <= 6 * SHARD
    requests.fetched.clear()
    assert source.read(5).tolist() == documents[5]
    assert source.read(6).tolist() == documents[6]
    assert requests.fetched == []
    source.prefetch([])  # they are as others again
    for index in (0, 1, 2, 3, 4, 7, 8, 9):
        source.read(index)
    source.read(5)
    assert "shard_00005.bin" in requests.fetched


def test_no_more_is_prefetched_than_half_the_cache(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path, max_bytes=4 * SHARD).sources["main"]
    source.prefetch(range(10))
    wait_until(lambda: not any(thread.name == "shard prefetch" for thread in threading.enumerate()))
    expected = ["shard_00000.idx", "shard_00000.bin", "shard_00001.idx", "shard_00001.bin", "shard_00002.idx"]
    assert requests.fetched == expected


def test_a_newer_prefetch_replaces_the_one_under_way(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(path: str) -> None:
        begun.set()
        assert go_on.wait(60)

    requests.before = wait
    source = open_remote(tmp_path).sources["main"]
    source.prefetch([0, 1, 2])
    assert begun.wait(60)
    source.prefetch([7])
    go_on.set()
    wait_until(lambda: "shard_00007.bin" in requests.fetched)
    assert requests.fetched == ["shard_00000.idx", "shard_00007.idx", "shard_00007.bin"]


def test_a_prefetch_that_fails_is_reported_where_the_shard_is_needed(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path).sources["main"]
    requests.failures = 1000
    source.prefetch([3])
    wait_until(lambda: requests.failures == 996)
    assert source.name == "main"
    with pytest.raises(UserError, match=r"shard_00003\.idx failed 4 times"):
        source.read(3)
    requests.failures = 0
    assert source.read(3).tolist() == documents[3]


def test_prefetch_of_a_local_data_set_does_nothing(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1], [2]], shard_tokens=1).sources["main"].prefetch([0, 1])


def test_a_remote_that_times_out_twice_works(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    requests.failures = 2
    source = open_remote(tmp_path).sources["main"]
    requests.failures = 2
    assert source.read(4).tolist() == documents[4]


def test_pauses_grow(
    tmp_path: Path, documents: list[list[int]], requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr("mmrec_train.data.remote.RETRY_PAUSES", (1.0, 4.0, 16.0))
    monkeypatch.setattr("mmrec_train.data.remote.time.sleep", paused.append)
    requests.failures, requests.error = 100, ValueError("a library's own error")
    with pytest.raises(
        UserError, match=r"memory://bucket/data/manifest\.json failed 4 times.*a library's own error.*Check"
    ):
        open_remote(tmp_path)
    assert paused == [1.0, 4.0, 16.0]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_remote_shard_is_named(tmp_path: Path, documents: list[list[int]], suffix: str) -> None:
    fsspec.filesystem("memory").rm(remote_path(f"shard_00002.{suffix}"))
    source = open_remote(tmp_path).sources["main"]
    with pytest.raises(UserError, match=rf"memory://bucket/data/train/main/shard_00002\.{suffix} is missing"):
        source.read(2)
    assert source.read(3).tolist() == documents[3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"truncated \(91 bytes, the manifest says 92\), twice"),
        (lambda data: data + b"x", r"too long \(93 bytes, the manifest says 92\), twice"),
        (lambda data: b"\xff" + data[1:], "corrupt .*, twice"),
    ],
)
def test_a_damaged_remote_shard_is_named_and_not_kept(
    tmp_path: Path,
    documents: list[list[int]],
    requests: Requests,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    fs = fsspec.filesystem("memory")
    whole = fs.cat_file(remote_path("shard_00002.bin"))
    fs.pipe_file(remote_path("shard_00002.bin"), damage(whole))
    source = open_remote(tmp_path).sources["main"]
    with pytest.raises(UserError, match=rf"shard_00002\.bin arrived {message}.*Copy the data set again"):
        source.read(2)
    assert requests.fetched.count("shard_00002.bin") == 2
    assert leftovers(tmp_path) == []
    fs.pipe_file(remote_path("shard_00002.bin"), whole)
    assert source.read(2).tolist() == documents[2]


def test_a_shard_that_arrives_damaged_once_is_fetched_again(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    fs = fsspec.filesystem("memory")
    whole = fs.cat_file(remote_path("shard_00002.bin"))
    fs.pipe_file(remote_path("shard_00002.bin"), whole[:50])

    def repair(path: str) -> None:
        if requests.fetched.count("shard_00002.bin") == 2:
            fs.pipe_file(remote_path("shard_00002.bin"), whole)

    requests.before = repair
    assert open_remote(tmp_path).sources["main"].read(2).tolist() == documents[2]


def test_a_full_disk(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    def fill(path: str) -> None:
        [partial] = leftovers(tmp_path)
        partial.write_bytes(b"x" * 7)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = open_remote(tmp_path).sources["main"]
    requests.before = fill
    with pytest.raises(UserError, match=r"disk of the shard cache .*/cache is full: 16 more bytes.*Free some space"):
        source.read(0)
    assert leftovers(tmp_path) == []
    assert requests.fetched == ["shard_00000.idx"]  # not tried again
    requests.before = lambda path: None
    assert source.read(0).tolist() == documents[0]


def test_a_cache_folder_that_cannot_be_used(tmp_path: Path, documents: list[list[int]]) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot use the shard cache .*/cache: .*Choose another folder"):
        open_remote(tmp_path).sources["main"].read(0)


def test_a_limit_that_is_none(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(UserError, match="limit is 0 bytes"):
        open_remote(tmp_path, max_bytes=0)


def test_a_cached_file_of_wrong_size_is_fetched_again(tmp_path: Path, documents: list[list[int]]) -> None:
    checksum = open_remote(tmp_path).sources["main"].shards[0].bin.xxh3_128
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / checksum).write_bytes(b"half")
    assert open_remote(tmp_path).sources["main"].read(0).tolist() == documents[0]


def test_verification_finds_a_corrupt_cached_file_and_fetches_it_again(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path).sources["main"]
    source.read(0)
    path = tmp_path / "cache" / source.shards[0].bin.xxh3_128
    path.write_bytes(b"x" * 84)
    assert list(source.damage(0, contents=True)) == []
    assert source.read(0).tolist() == documents[0]
    assert requests.fetched.count("shard_00000.bin") == 2


def test_verification_names_every_damaged_remote_file(tmp_path: Path, documents: list[list[int]]) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file(remote_path("shard_00002.bin"), b"")
    fs.rm(remote_path("shard_00002.idx"))
    source = open_remote(tmp_path).sources["main"]
    found = [str(error) for shard in range(10) for error in source.damage(shard, contents=True)]
    assert ["shard_00002.bin arrived truncated" in found[0], "shard_00002.idx is missing" in found[1]] == [True, True]
    assert len(found) == 2


def test_data_sets_with_equal_names_do_not_mix(tmp_path: Path) -> None:
    for name, tokens in (("a", [1, 2]), ("b", [3, 4])):
        write_documents(tmp_path / name, [tokens])
        upload(tmp_path / name, f"memory://{name}")
    cache = CacheSettings(tmp_path / "cache", PLENTY)
    found = [open_dataset(f"memory://{name}", "train", verify=True, cache=cache) for name in "ab"]
    assert [dataset.sources["main"].read(0).tolist() for dataset in found] == [[1, 2], [3, 4]]


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory://bucket/data is not a prepared data set.*--out FOLDER"):
        open_remote(tmp_path)


def test_a_missing_library_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read s3://bucket/data, a package is missing: Install s3fs"):
        open_dataset("s3://bucket/data", "train", verify=True)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read foo://bucket/data: .*foo.*Known are .*memory"):
        open_dataset("foo://bucket/data", "train", verify=True)


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1, 2]])
    assert not is_url(f"file://{tmp_path}")
    dataset = open_dataset(f"file://{tmp_path}", "train", verify=True)
    assert dataset.sources["main"].read(0).tolist() == [1, 2]


def test_a_remote_tokenizer_is_copied_into_the_cache(tmp_path: Path, documents: list[list[int]]) -> None:
    fs = fsspec.filesystem("memory")
    cache = CacheSettings(tmp_path / "cache", PLENTY)
    with pytest.raises(UserError, match=r"memory://bucket/data/tokenizer lacks one of tokenizer\.json, tok"):
        data_folder(URL, cache).tokenizer()
    fs.pipe_file(f"{URL}/tokenizer/tokenizer.json", b"{}")
    fs.pipe_file(f"{URL}/tokenizer/tokenizer_config.json", b"[]")
    folder = data_folder(URL, cache).tokenizer()
    assert folder.is_relative_to(tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"[]",
    }
    (folder / "tokenizer.json").write_bytes(b"damaged")
    assert data_folder(URL, cache).tokenizer() == folder
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    fs.pipe_file(f"{URL}/tokenizer/tokenizer.json", b"[1]")
    assert data_folder(URL, cache).tokenizer() != folder


def test_a_local_tokenizer_is_where_it_is(tmp_path: Path) -> None:
    assert data_folder(tmp_path).tokenizer() == tmp_path / "tokenizer"
