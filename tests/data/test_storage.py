"""Data sets at URLs: what is read, asked again, verified and named when it is missing or damaged."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.dataset import open_dataset
from mmrec_train.data.storage import data_folder, is_url
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents
from tests.data.remote import PLENTY, URL, Requests, leftovers, open_remote, remote_path, upload

pytestmark = pytest.mark.usefixtures("memory_files")


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


def test_opening_fetches_no_shard(tmp_path: Path, documents: list[list[int]], requests: Requests) -> None:
    open_remote(tmp_path)
    assert requests.fetched == []


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


def test_a_server_that_does_not_answer_is_named() -> None:
    """Some libraries connect before the first request."""
    with socket.socket() as unused:  # bound, but it does not listen
        unused.bind(("127.0.0.1", 0))
        url = f"ftp://127.0.0.1:{unused.getsockname()[1]}/data"
        with pytest.raises(UserError, match=rf"reading {url} failed 4 times.*Connection refused\. Check the address"):
            open_dataset(url, "train", verify=True)


def test_a_server_that_does_not_answer_is_asked_again(
    tmp_path: Path, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Exception] = [ConnectionRefusedError(), TimeoutError(), OSError("busy")]
    connect = fsspec.core.url_to_fs

    def late(url: str) -> Any:
        if answers:
            raise answers.pop()
        return connect(url)

    monkeypatch.setattr("fsspec.core.url_to_fs", late)
    assert open_remote(tmp_path).sources["main"].read(4).tolist() == documents[4]
    assert answers == []


def test_what_a_url_leads_into_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read zip://data::file://.*/absent\.zip: .*No such file"):
        open_dataset(f"zip://data::file://{tmp_path}/absent.zip", "train", verify=True)


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
