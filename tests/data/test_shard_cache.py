"""The cache of shards from a URL: fetched once, within its limit, prefetched, shared with other processes."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from mmrec_train.data import LaneLoader
from mmrec_train.data import shard_cache as shard_cache_module
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.data.views import head
from mmrec_train.errors import UserError
from mmrec_train.evaluation import FixedLanes
from tests.data.remote import Requests, leftovers, open_remote, remote_path, wait_until

SHARD = 136  # bytes of the largest shard of `documents`


def cached_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file())


def test_a_shard_is_fetched_once_also_by_the_next_process(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    for _ in range(2):
        shard_cache_module.shard_cache.cache_clear()  # as in another process
        source = open_remote(tmp_path).sources["main"]
        assert [source.read(index).tolist() for index in (3, 3, 4)] == [documents[3], documents[3], documents[4]]
    assert sorted(requests.fetched) == ["shard_00003.bin", "shard_00003.idx", "shard_00004.bin", "shard_00004.idx"]


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


def files_of(*shards: int) -> list[str]:
    return [f"shard_{shard:05d}.{kind}" for shard in shards for kind in ("idx", "bin")]


def prefetched() -> None:
    wait_until(lambda: not any(thread.name == "shard prefetch" for thread in threading.enumerate()))


def test_no_more_is_prefetched_than_fits_the_cache(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path, max_bytes=2 * SHARD).sources["main"]
    source.prefetch(range(10))
    prefetched()
    assert requests.fetched == [*files_of(0, 1), "shard_00002.idx"]


def test_the_next_group_is_prefetched_into_a_cache_of_two(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    """While the current one is read, and in the place of those before."""
    shards = open_remote(tmp_path).sources["main"].shards
    largest = sum(shard.bin.size + shard.idx.size for shard in shards[6:])
    source = open_remote(tmp_path, max_bytes=largest).sources["main"]
    for first in range(0, 10, 2):
        source.prefetch(shard for shard in range(first, first + 4) if shard < 10)
        prefetched()
        assert requests.fetched == files_of(*range(min(first + 4, 10)))
        for _ in range(2):
            assert [source.read(index).tolist() for index in (first, first + 1)] == documents[first : first + 2]
        assert requests.fetched == files_of(*range(min(first + 4, 10)))
        assert cached_bytes(tmp_path) <= largest


def test_training_finds_the_next_group_fetched(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    """Once a lane is in the documents of one group, those of the next are in the cache; none is fetched twice."""
    settings = StreamSettings(shuffle_shards=2)
    loader = LaneLoader(open_remote(tmp_path), settings, num_lanes=1, chunk_len=4, micro_batch_size=1)
    begins = {document[0]: number for number, document in enumerate(documents)}
    groups: list[set[int]] = []  # the documents, and so the shards, that have been begun, in pairs
    while len(groups) <= 2 * 5:
        [window] = loader.next_step()
        prefetched()
        for token in window.input_ids.flatten().tolist():
            if token in begins:
                if not groups or len(groups[-1]) == 2:
                    groups.append(set())
                groups[-1].add(begins[token])
        assert len(requests.fetched) == 4 * min(len(groups) + 1, 5)
        assert len(set(requests.fetched)) == len(requests.fetched)
        for group in groups:
            assert set(files_of(*group)) <= set(requests.fetched[: 4 * min(len(groups), 5)])


def test_more_is_prefetched_than_is_mapped(
    tmp_path: Path, documents: list[list[int]], requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache_module, "MAX_MAPS", 4)
    source = open_remote(tmp_path).sources["main"]
    source.prefetch(range(10))
    prefetched()
    assert requests.fetched == files_of(*range(10))
    assert Path("/proc/self/maps").read_text().count(str(tmp_path / "cache")) == 4
    assert [source.read(index).tolist() for index in range(10)] == documents
    assert len(requests.fetched) == 20


def test_readers_share_the_room(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    """What two of them want takes room once, and what one has given up takes none."""
    one, two = (open_remote(tmp_path, max_bytes=4 * SHARD).sources["main"] for _ in range(2))
    one.prefetch([6, 7, 8])
    two.prefetch([8, 7, 6, 9])
    prefetched()
    assert requests.fetched == files_of(6, 7, 8, 9)
    one.prefetch([])
    two.prefetch([0, 1, 2, 3])
    prefetched()
    assert requests.fetched == files_of(6, 7, 8, 9, 0, 1, 2, 3)


def test_a_validation_that_is_over_leaves_the_cache_to_others(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    dataset = open_remote(tmp_path, max_bytes=4 * SHARD)
    held_out = head(dataset, "main", 100)  # which a trainer keeps
    read = [chunk.input_ids.tolist() for chunk, _ in FixedLanes(held_out, chunk_len=100, batch=1)]
    assert read == [[[token for document in documents for token in document][:100]]]
    dataset.sources["main"].prefetch([6, 7, 8, 9])
    prefetched()
    assert requests.fetched[-8:] == files_of(6, 7, 8, 9)


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-1], "arrived truncated (91 bytes, the manifest says 92), twice"),
        (lambda whole: b"\xff" + whole[1:], "arrived corrupt (its checksum is not the manifest's), twice"),
        (None, "is missing, though the manifest lists it"),
    ],
)
def test_verification_finds_damage_of_which_the_cache_has_a_whole_copy(
    tmp_path: Path,
    documents: list[list[int]],
    requests: Requests,
    damage: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    source = open_remote(tmp_path).sources["main"]
    source.read(2)
    requests.fetched.clear()
    assert list(source.damage(2, contents=True)) == []
    assert requests.fetched == ["shard_00002.bin", "shard_00002.idx"]
    before = sorted((tmp_path / "cache").iterdir())
    files, path = fsspec.filesystem("memory"), remote_path("shard_00002.bin")
    whole = files.cat_file(path)
    files.rm(path)
    if damage is not None:
        files.pipe_file(path, damage(whole))
    [found] = source.damage(2, contents=True)
    assert str(found).startswith(f"shard {path} {message}. Copy the data set again")
    assert sorted((tmp_path / "cache").iterdir()) == before
    requests.fetched.clear()
    assert source.read(2).tolist() == documents[2]
    assert requests.fetched == []


def test_verification_fetches_what_is_not_cached_once(
    tmp_path: Path, documents: list[list[int]], requests: Requests
) -> None:
    source = open_remote(tmp_path).sources["main"]
    assert list(source.damage(2, contents=True)) == []
    assert requests.fetched == ["shard_00002.bin", "shard_00002.idx"]
