import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.data.sources import Document, decode_utf8, open_source, standard_library
from mmrec_train.errors import UserError

TEXTS = ["first\nline", "zweite Zeile: äöü", "", "third 𝛾", "fourth " * 500]
# One stray byte; an overlong form, which counts a byte at a time; a U+FFFD that was in the text all along.
INVALID, REPAIRED, REPLACED = b"a\xffb\xc0\x80c\xef\xbf\xbd", "a\ufffdb\ufffd\ufffdc\ufffd", 3


def read(source: Path | str, **choice: str) -> list[Document]:
    return list(open_source(str(source), text_field=choice.pop("text_field", "text"), **choice))


def texts(source: Path | str, **choice: str) -> list[str]:
    return [document.text for document in read(source, **choice)]


def json_lines(field: str = "text") -> bytes:
    return b"\n\n".join(json.dumps({field: text, "id": number}).encode() for number, text in enumerate(TEXTS))


def compress(data: bytes, suffix: str) -> bytes:
    """In two frames, as parallel compressors and `cat a.gz b.gz` write."""
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, ".bz2": bz2.compress}[suffix]
    return pack(data[:100]) + pack(data[100:])


@pytest.mark.parametrize("suffix", [".txt", ".md", ".anything", ""])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert texts(path) == ["one\ntwo\n"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.jsonl{suffix}"
    path.write_bytes(compress(json_lines("body"), suffix) if suffix else json_lines("body"))
    assert texts(path, text_field="body") == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
def test_compressed_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.txt{suffix}"
    path.write_bytes(compress(TEXTS[4].encode(), suffix))
    assert texts(path) == [TEXTS[4]]
    assert open_source(str(path), text_field="text").text_bytes is None


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "file.parquet"
    table = pa.table({"id": list(range(2500)), "body": pa.array([f"row {i}" for i in range(2500)], kind)})
    pq.write_table(table, path, row_group_size=700)
    assert texts(path, text_field="body") == [f"row {i}" for i in range(2500)]


def test_folder_is_read_in_a_fixed_order_and_unknown_files_are_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.jsonl", ".hidden.txt", ".git/x.txt", "image.png", "a-b/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    source = open_source(str(tmp_path), text_field="text")
    assert [document.text for document in source] == ["a/z.md", "a-b/c.txt", "a.jsonl", "b.txt"]
    assert [document.text for document in source] == [document.text for document in source]
    assert source.provenance["files"] == 4
    assert source.provenance["files_skipped"] == 1


def test_pattern_chooses_files_and_reads_unknown_ones_as_text(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("print()")
    (tmp_path / "b.txt").write_text("not chosen")
    source = open_source(str(tmp_path), text_field="text", pattern="*.py")
    assert [document.text for document in source] == ["print()"]
    assert source.provenance["pattern"] == "*.py"
    assert source.text_bytes == 7


def test_standard_library_is_real_text_without_tests() -> None:
    source = standard_library()
    assert source.text_bytes is not None
    assert source.text_bytes > 5_000_000
    documents = list(source)
    assert len(documents) == source.provenance["files"]
    assert any("class JSONDecoder" in document.text for document in documents)
    assert sum(document.replaced for document in documents) == 0


@given(st.binary(max_size=40))
def test_decoding_counts_exactly_what_it_replaces(data: bytes) -> None:
    document = decode_utf8(data)
    whole = data.removeprefix(b"\xef\xbb\xbf")
    if document.replaced == 0:
        assert document.text.encode() == whole
    else:
        with pytest.raises(UnicodeDecodeError):
            whole.decode()
    assert document.text.count("\ufffd") == document.replaced + whole.count("\ufffd".encode())


@given(st.text())
def test_decoding_leaves_valid_text_alone(text: str) -> None:
    assert decode_utf8(text.encode()) == Document(text.removeprefix("\ufeff"), 0)


def test_invalid_utf8_is_replaced_and_counted_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(INVALID)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + INVALID + b'"}')
    column = pa.array([INVALID], pa.binary())
    invalid_strings = pa.StringArray.from_buffers(1, column.buffers()[1], column.buffers()[2])
    pq.write_table(pa.table({"text": invalid_strings}), tmp_path / "c.parquet")
    assert read(tmp_path) == [Document(REPAIRED, REPLACED)] * 3


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "x\ud800y \ud83d\ude00"}')
    assert read(path) == [Document("x\ufffdy 😀", 1)]


def test_null_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    pq.write_table(pa.table({"text": pa.array([None, "x"], pa.string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([None], pa.null())}), tmp_path / "c.parquet")
    assert texts(tmp_path) == ["", "", "x", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"line 2: not JSON \(Expecting value\)"),
        ('["text"]', "line 1: not a JSON object"),
        ('{"body": "a", "id": 1}', "line 1: no field text; there are body, id. Choose one with --text-field"),
        ('{"text": 3}', "line 1: field text is not text but int"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        read(path)


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


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(json_lines(), suffix)
    for damaged in (whole[:-5], b"not compressed at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"cannot read .*a\.jsonl{suffix}: "):
            read(path)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "absent.txt", "absent.jsonl", "./absent", "a/b/c"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(str(missing), text_field="text")
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no file ends in \.txt"):
        open_source(str(tmp_path), text_field="text")
    with pytest.raises(UserError, match=r"no file matches --pattern \*\.py"):
        open_source(str(tmp_path), text_field="text", pattern="*.py")


def test_choices_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    for choice in ({"name": "en"}, {"split": "test"}):
        with pytest.raises(UserError, match="--name and --split choose a part of a hub data set"):
            open_source(str(tmp_path), text_field="text", **choice)
    with pytest.raises(UserError, match="--pattern chooses files of a folder"):
        open_source("stdlib", text_field="text", pattern="*.py")
