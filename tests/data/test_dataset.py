import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.checksums import file_checksum
from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.manifest import (
    Dtype,
    FileInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    write_manifest,
)
from mmrec_train.data.storage import LocalFolder
from mmrec_train.data.tokenizer import load_tokenizer, special_ids, train_tokenizer, vocab_size
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents

SHARD = "train/main/shard_00000"


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=30), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 100),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
def test_documents_come_back_from_any_shards(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, dtype: Dtype
) -> None:
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=shard_tokens, dtype=dtype)
    source = dataset.sources["main"]
    assert dataset.num_documents == source.num_documents == len(documents)
    assert dataset.num_tokens == source.num_tokens == sum(map(len, documents))
    for index, document in enumerate(documents):
        tokens = source.read(index)
        assert tokens.tolist() == document
        assert tokens.dtype == np.dtype(dtype)
        assert not tokens.flags.writeable


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    shard_tokens=st.integers(1, 60),
    draw=st.data(),
)
def test_places_of_any_documents_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, draw: st.DataObject
) -> None:
    documents = numbered_documents(lengths)
    source = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=shard_tokens).sources["main"]
    chosen = draw.draw(st.lists(st.integers(0, len(documents) - 1), max_size=50))
    places = source.locate(np.array(chosen, dtype=np.int64))
    found = [
        source.tokens(shard)[begin : begin + length].tolist() for shard, begin, length in zip(*places, strict=True)
    ]
    assert found == [documents[document] for document in chosen]
    assert all(part.dtype == np.int64 and part.shape == (len(chosen),) for part in places)


def test_sources_keep_their_documents_and_weights(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, {"b": [[1], [2]], "a.x": [[3, 4]]}, weights={"b": 0.5, "a.x": 2.0})
    assert list(dataset.sources) == ["b", "a.x"]
    assert dataset.sources["a.x"].read(0).tolist() == [3, 4]
    assert (dataset.sources["b"].weight, dataset.sources["a.x"].weight) == (0.5, 2.0)
    assert (dataset.num_documents, dataset.num_tokens) == (3, 4)


def test_a_source_without_documents_in_a_split_is_not_in_it(tmp_path: Path) -> None:
    manifest = write_documents(tmp_path, {"full": [[1]], "other": [[2]]}).manifest
    empty = manifest.sources["other"].model_copy(update={"splits": {}})
    write_manifest(tmp_path, manifest.model_copy(update={"sources": {**manifest.sources, "other": empty}}))
    assert list(open_dataset(tmp_path, "train", verify=True).sources) == ["full"]


def test_bytes_on_disk_are_as_documented(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1, 258], [3]], dtype="uint16")
    assert (tmp_path / f"{SHARD}.bin").read_bytes() == bytes([1, 0, 2, 1, 3, 0])
    assert np.frombuffer((tmp_path / f"{SHARD}.idx").read_bytes(), dtype="<i8").tolist() == [0, 2, 3]


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    source = write_documents(tmp_path, numbered_documents([4, 4, 4, 30, 1]), shard_tokens=8).sources["main"]
    assert [shard.tokens for shard in source.shards] == [8, 34, 1]
    assert source.first_document.tolist() == [0, 2, 4, 5]


def test_two_copies_have_one_fingerprint(tmp_path: Path) -> None:
    def fingerprint(dataset: TokenDataset) -> str:
        return dataset.sources["main"].fingerprint

    first = write_documents(tmp_path / "a", [[1, 2], [3]])
    same = write_documents(tmp_path / "b", [[1, 2], [3]])
    other_bounds = write_documents(tmp_path / "c", [[1], [2, 3]])
    other_tokens = write_documents(tmp_path / "d", [[1, 2], [4]])
    assert fingerprint(first) == fingerprint(same)
    other_tokenizer = first.manifest.model_copy(update={"tokenizer_fingerprint": "1" * 32})
    retokenized = TokenDataset(LocalFolder(tmp_path / "a"), "train", other_tokenizer)
    assert len({fingerprint(dataset) for dataset in (first, other_bounds, other_tokens, retokenized)}) == 4


def test_any_thread_reads(tmp_path: Path) -> None:
    write_documents(tmp_path, numbered_documents([3] * 50), shard_tokens=3)
    source = open_dataset(tmp_path, "train", verify=False).sources["main"]
    found: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda: found.append([source.read(document).tolist() for document in range(50)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [numbered_documents([3] * 50)] * 4


def test_mapped_shards_take_no_file_descriptors(tmp_path: Path) -> None:
    source = write_documents(tmp_path, numbered_documents([3] * 100), shard_tokens=3).sources["main"]
    before = psutil.Process().num_fds()
    for document in range(100):
        source.read(document)
    assert psutil.Process().num_fds() <= before + 2


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (truncate, "is truncated"),
        (lengthen, "is too long"),
        (flip_bit, "is corrupt"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, suffix: str, damage: Callable[[Path], None], message: str) -> None:
    write_documents(tmp_path, numbered_documents([5, 5, 5]), shard_tokens=5)
    damage(tmp_path / f"train/main/shard_00001.{suffix}")
    with pytest.raises(UserError, match=rf"train/main/shard_00001\.{suffix} {message}.*(Copy|prepare) the data set"):
        open_dataset(tmp_path, "train", verify=True)


def test_without_verify_a_flipped_bit_passes_but_a_truncated_shard_does_not(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1, 2, 3]])
    flip_bit(tmp_path / f"{SHARD}.bin")
    open_dataset(tmp_path, "train", verify=False)
    truncate(tmp_path / f"{SHARD}.bin")
    with pytest.raises(UserError, match="truncated"):
        open_dataset(tmp_path, "train", verify=False)


@pytest.mark.parametrize(("damage", "message"), [(Path.unlink, "is missing"), (truncate, "is truncated")])
def test_shards_that_are_damaged_after_opening(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_documents(tmp_path, [[1, 2, 3]])
    source = open_dataset(tmp_path, "train", verify=False).sources["main"]
    damage(tmp_path / f"{SHARD}.bin")
    with pytest.raises(UserError, match=message):
        source.read(0)


def test_every_damaged_file_of_a_shard_is_found(tmp_path: Path) -> None:
    source = write_documents(tmp_path, [[1, 2, 3]]).sources["main"]
    flip_bit(tmp_path / f"{SHARD}.bin")
    truncate(tmp_path / f"{SHARD}.idx")
    found = [str(error) for error in source.damage(0, contents=True)]
    assert len(found) == 2
    assert "shard_00000.bin is corrupt" in found[0]
    assert "shard_00000.idx is truncated" in found[1]


def test_not_a_data_set(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is not a prepared data set.*prepare_data\.py"):
            open_dataset(path, "train", verify=False)


def test_split_without_documents(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1]])
    with pytest.raises(UserError, match=r"has no validation documents.*--validation-fraction"):
        open_dataset(tmp_path, "validation", verify=False)


def test_unreadable_shard(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1, 2]])
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").write_text("a file where the folder was")
    with pytest.raises(UserError, match=r"cannot read shard .*shard_00000\.bin"):
        open_dataset(tmp_path, "train", verify=False)


def store(folder: Path, tokens: np.ndarray, starts: np.ndarray, *, vocab_size: int = 1 << 16) -> None:
    """A data set of one uint16 shard with these contents, whatever they are, and a manifest that fits the files."""
    (folder / SHARD).parent.mkdir(parents=True)
    infos = {}
    for suffix, content in ((".bin", tokens), (".idx", starts.astype("<i8"))):
        path = folder / f"{SHARD}{suffix}"
        content.tofile(path)
        infos[suffix[1:]] = FileInfo(size=path.stat().st_size, xxh3_128=file_checksum(path))
    documents = len(starts) - 1
    shard = ShardInfo(name="shard_00000", documents=documents, tokens=len(tokens), bin=infos["bin"], idx=infos["idx"])
    split = SplitInfo(documents=documents, tokens=len(tokens), shards=(shard,))
    source = SourceInfo(
        weight=None,
        provenance={},
        left_out={},
        invalid_utf8_documents=0,
        invalid_utf8_replaced=0,
        splits={"train": split},
    )
    manifest = Manifest(
        dtype="uint16",
        bos_id=0,
        eos_id=0,
        vocab_size=vocab_size,
        tokenizer_fingerprint="0" * 32,
        preparation={},
        sources={"main": source},
    )
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 2, 5], r"shard_00000\.idx contradicts the manifest: it goes from 1 to 5, not from 0 to 5"),
        ([0, 2, 4], r"shard_00000\.idx contradicts the manifest: it goes from 0 to 4, not from 0 to 5"),
        ([0, 3, 2, 5], r"shard_00000\.idx contradicts the manifest: document 1 does not end after its start"),
        ([0, 1, 2, 2, 5], r"shard_00000\.idx contradicts the manifest: document 2 does not end after its start"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_starts_that_contradict_the_manifest(
    tmp_path: Path, starts: list[int], message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrec_train.data.dataset._BLOCK", block)
    store(tmp_path, np.arange(5, dtype="<u2"), np.array(starts))
    open_dataset(tmp_path, "train", verify=False)
    with pytest.raises(UserError, match=message + r".*docs/data_format\.md"):
        open_dataset(tmp_path, "train", verify=True)


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_documents_that_do_not_begin_with_bos(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec_train.data.dataset._BLOCK", block)
    store(tmp_path, np.array([0, 5, 0, 7, 8, 0], dtype="<u2"), np.array([0, 2, 3, 5, 6]))
    [mistake] = open_dataset(tmp_path, "train", verify=True).sources["main"].without_bos(0)
    assert re.search(r"shard_00000\.bin .*: document 2 begins with token 7, not with bos, 0", str(mistake))


def test_documents_that_begin_with_bos(tmp_path: Path) -> None:
    store(tmp_path, np.array([0, 5, 0, 0, 8, 0], dtype="<u2"), np.array([0, 2, 3, 5, 6]))
    assert not [*open_dataset(tmp_path, "train", verify=True).sources["main"].without_bos(0)]


def test_token_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    store(tmp_path, np.array([1, 2, 10, 3], dtype="<u2"), np.array([0, 4]), vocab_size=10)
    with pytest.raises(UserError, match=r"shard_00000\.bin .*token 2 is 10, in a vocabulary of 10"):
        open_dataset(tmp_path, "train", verify=True)


def resident_bytes() -> int:
    """Memory of this process that is not the page cache's."""
    [kilobytes] = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) << 10


def test_a_document_of_fifty_million_tokens_is_read_in_parts(tmp_path: Path) -> None:
    tokens = np.arange(50_000_010, dtype=np.uint32).astype("<u2")
    store(tmp_path, tokens, np.array([0, 5, 50_000_005, 50_000_010]))
    before = resident_bytes()
    source = open_dataset(tmp_path, "train", verify=True).sources["main"]
    places = source.locate(np.array([1, 2]))
    assert places.length.tolist() == [50_000_000, 5]
    document = source.read(1)
    for position in (0, 1, 20_000_000, 49_999_990):
        assert np.array_equal(document[position : position + 10], tokens[5 + position : 15 + position])
    assert len(document) == 50_000_000
    assert resident_bytes() - before < 20 << 20


def test_ten_million_documents_of_one_token(tmp_path: Path) -> None:
    count = 10_000_000
    tokens = np.arange(count, dtype=np.uint32).astype("<u2")
    store(tmp_path, tokens, np.arange(count + 1))
    before = resident_bytes()
    source = open_dataset(tmp_path, "train", verify=True).sources["main"]
    assert source.num_documents == count
    chosen = np.random.default_rng(0).integers(0, count, 4096)
    places = source.locate(chosen)
    assert np.array_equal(places.begin, chosen)
    assert (places.length == 1).all()
    assert np.array_equal(source.tokens(0)[places.begin], tokens[chosen])
    assert resident_bytes() - before < 40 << 20


def test_the_writer_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/data_format.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    texts = ["Where a document begins", "", "and where it ends: ümläut"]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    bos, eos = special_ids(tokenizer)
    documents = [tokenizer.encode(text) for text in texts]
    names["write_data_set"](tmp_path / "data", tmp_path / "tokenizer", documents, bos, eos, vocab_size(tokenizer))
    source = open_dataset(tmp_path / "data", "train", verify=True).sources["main"]
    assert [source.read(index).tolist() for index in range(3)] == [[bos, *document] for document in documents]
    assert load_tokenizer(tmp_path / "data").decode(source.read(2)[1:]) == texts[2]
