import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrec_train.errors import UserError
from mmrec_train.preparation.records import Document, Extraction, Template
from tests.preparation.reading import batch_size, documents, pieces, read, texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "file.parquet"
    table = pa.table({"id": list(range(2500)), "body": pa.array([f"row {i}" for i in range(2500)], kind)})
    pq.write_table(table, path, row_group_size=700)
    assert texts(path, text_field="body") == [f"row {i}" for i in range(2500)]


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: column text holds int64, not text"):
        read(path)
    with pytest.raises(UserError, match=r"a\.parquet: no field body; there are text\."):
        read(path, text_field="body")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        read(path)


def test_only_the_columns_that_are_needed_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "image": [b"x" * 100_000], "meta": [{"lang": "en", "y": 1}]}), path)
    extraction = Extraction(Template.of_field("text"), "meta.lang")
    [piece] = pieces(path, extraction)
    assert batch_size(piece) < 2000
    assert documents([piece], extraction) == [Document("a", 0, "en")]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    rows = [f"row {number}" for number in range(25)]
    whole = datasets.Dataset.from_dict({"text": rows, "n": list(range(25))})
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(tmp_path / "one") == rows
    splits = datasets.DatasetDict({"train": whole, "test": datasets.Dataset.from_dict({"text": ["held out"]})})
    splits.save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "several") == rows
    assert texts(tmp_path / "several", split="test") == ["held out"]
    with pytest.raises(UserError, match=r"several has no split dev; there are train, test"):
        texts(tmp_path / "several", split="dev")


def test_any_other_state_is_a_file_among_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "state.json").write_text('{"text": "a state"}')
    assert texts(tmp_path) == ["a", "a state"]


def test_a_dictionary_column_is_text(tmp_path: Path) -> None:
    column = pa.array(["a", "b", None, "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["a", "b", "", "a"]


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"a\.arrow: 2 columns are named text"):
        texts(tmp_path / "a.arrow")


def write_table(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_dictionary_is_not_sent_with_every_batch(tmp_path: Path, suffix: str) -> None:
    words = [f"{number} " * 100 for number in range(500)]
    table = pa.table({"text": pa.array(words).dictionary_encode()})
    path = tmp_path / f"a.{suffix}"
    write_table(table, path)
    extraction = Extraction(Template.of_field("text"))
    found = pieces(path, extraction, batch_bytes=20_000)
    assert [document.text for document in documents(found, extraction)] == words
    assert sum(batch_size(piece) for piece in found) < 1.5 * sum(map(len, words))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_nor_is_one_inside_of_records(tmp_path: Path, suffix: str) -> None:
    words = [f"{number} " * 100 for number in range(500)]
    entries = pa.array(words).dictionary_encode()
    ends = list(range(501))
    inner = {
        "t": entries,
        "list": pa.ListArray.from_arrays(ends, entries),
        "large": pa.LargeListArray.from_arrays(ends, entries),
        "pair": pa.FixedSizeListArray.from_arrays(entries, 1),
        "deep": pa.StructArray.from_arrays([entries], names=["t"]),
    }
    table = pa.table({"m": pa.StructArray.from_arrays(list(inner.values()), names=list(inner))})
    path = tmp_path / f"a.{suffix}"
    write_table(table, path)
    for field in ("m.t", "m.deep.t"):
        extraction = Extraction(Template.of_field(field))
        found = pieces(path, extraction, batch_bytes=100_000)
        assert [document.text for document in documents(found, extraction)] == words
        assert sum(batch_size(piece) for piece in found) < 1.5 * len(inner) * sum(map(len, words))


def test_views_of_text_are_cut_too(tmp_path: Path) -> None:
    words = [f"{number} " * 100 for number in range(500)]
    for kind in (pa.string_view(), pa.binary_view()):
        table = pa.table({"text": pa.array(words, kind)})
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        extraction = Extraction(Template.of_field("text"))
        found = pieces(tmp_path, extraction, batch_bytes=20_000)
        assert [document.text for document in documents(found, extraction)] == words
        assert sum(batch_size(piece) for piece in found) < 1.5 * sum(map(len, words))


def test_a_date_that_python_has_none_for(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "date": pa.array([2**60], pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "a.parquet")
    extraction = Extraction(Template.parse("{text} {date}"))
    with pytest.raises(UserError, match=r"a\.parquet: column date \(timestamp\[us\]\): .*Leave it out\.$"):
        documents(pieces(tmp_path / "a.parquet", extraction), extraction)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", {"_data_files": [{}]}, "its state.json lists no files"),
        ("state.json", {"_data_files": None}, "its state.json lists no files"),
        ("dataset_dict.json", {"splits": 3}, "has no split train; there are none"),
    ],
)
def test_a_saved_data_set_with_damaged_lists(tmp_path: Path, name: str, content: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        texts(tmp_path)
