import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.dataset import TokenDataset, open_dataset
from mmrec_train.data.manifest import Dtype, read_manifest
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents


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
    assert dataset.num_documents == len(documents)
    assert dataset.num_tokens == sum(map(len, documents))
    assert dataset.document_lengths(np.arange(len(documents))).tolist() == [len(document) for document in documents]
    for index, document in enumerate(documents):
        assert dataset.document_length(index) == len(document)
        for start in (0, len(document) // 2, len(document)):
            for stop in {start, (start + len(document)) // 2, len(document)}:
                tokens = dataset.read(index, start, stop)
                assert tokens.tolist() == document[start:stop]
                assert tokens.dtype == np.dtype(dtype)


def test_bytes_on_disk_are_as_documented(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1, 258], [3]], dtype="uint16")
    assert (tmp_path / "train/shard_00000.bin").read_bytes() == bytes([1, 0, 2, 1, 3, 0])
    index = np.frombuffer((tmp_path / "train/shard_00000.idx").read_bytes(), dtype="<i8")
    assert index.tolist() == [0, 2, 3]


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([4, 4, 4, 30, 1]), shard_tokens=8)
    assert [shard.tokens for shard in dataset.manifest.splits["train"].shards] == [8, 34, 1]


def test_two_copies_have_one_fingerprint(tmp_path: Path) -> None:
    first = write_documents(tmp_path / "a", [[1, 2], [3]])
    same = write_documents(tmp_path / "b", [[1, 2], [3]])
    other_bounds = write_documents(tmp_path / "c", [[1], [2, 3]])
    other_tokens = write_documents(tmp_path / "d", [[1, 2], [4]])
    assert first.fingerprint == same.fingerprint
    other_tokenizer = first.manifest.model_copy(update={"tokenizer_fingerprint": "1" * 32})
    retokenized = TokenDataset(tmp_path / "a", "train", other_tokenizer)
    different = {dataset.fingerprint for dataset in (first, other_bounds, other_tokens, retokenized)}
    assert len(different) == 4


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
    damage(tmp_path / f"train/shard_00001.{suffix}")
    with pytest.raises(UserError, match=rf"train/shard_00001\.{suffix} {message}.*(Copy|prepare) the data set"):
        open_dataset(tmp_path, "train", verify=True)


def test_without_verify_a_flipped_bit_passes_but_a_truncated_shard_does_not(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1, 2, 3]])
    flip_bit(tmp_path / "train/shard_00000.bin")
    open_dataset(tmp_path, "train", verify=False)
    truncate(tmp_path / "train/shard_00000.bin")
    with pytest.raises(UserError, match="truncated"):
        open_dataset(tmp_path, "train", verify=False)


def test_not_a_data_set(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is not a prepared data set.*prepare_data\.py"):
            open_dataset(path, "train", verify=False)


def test_split_without_documents(tmp_path: Path) -> None:
    write_documents(tmp_path, [[1]])
    with pytest.raises(UserError, match=r"has no validation documents.*--validation-fraction"):
        open_dataset(tmp_path, "validation", verify=False)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"format": 1', '"format": 2', "format"),
        ('"dtype"', '"dtypo"', "dtypo|dtype"),
        ('"shard_00000"', '"../shard_0"', "name"),
        ("{", "", "the file"),
    ],
)
def test_damaged_manifest_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    write_documents(tmp_path, [[1, 2]])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=rf"manifest\.json: .*({named})"):
        read_manifest(tmp_path)


def test_manifest_that_contradicts_its_shards(tmp_path: Path) -> None:
    """Sizes and checksums fit the files, but not the number of tokens."""
    write_documents(tmp_path, [[1, 2]])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"dtype": "uint32"', '"dtype": "uint16"'))
    with pytest.raises(UserError, match="manifest, which is damaged"):
        open_dataset(tmp_path, "train", verify=True)


def test_unreadable_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path, [[1, 2]])
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").write_text("a file where the folder was")
    with pytest.raises(UserError, match=r"cannot read shard .*shard_00000\.bin"):
        open_dataset(tmp_path, "train", verify=False)
