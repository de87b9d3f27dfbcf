import bz2
import codecs
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mmrec_train.errors import UserError
from mmrec_train.preparation.journal import open_journal
from mmrec_train.preparation.recipe import SourceChoice
from mmrec_train.preparation.records import Document, Extraction, Template
from mmrec_train.preparation.sources import SourceUnavailable, open_source, standard_library
from tests.preparation.reading import batch_size, documents, pieces, read, texts

TEXTS = ["first\nline", "zweite Zeile: äöü", "", "third 𝛾", "fourth " * 500]
# One stray byte; an overlong form, which counts a byte at a time; a U+FFFD that was in the text all along.
INVALID, REPAIRED, REPLACED = b"a\xffb\xc0\x80c\xef\xbf\xbd", "a\ufffdb\ufffd\ufffdc\ufffd", 3


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


def test_folder_is_read_in_a_fixed_order_and_unknown_files_are_counted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.jsonl", ".hidden.txt", ".git/x.txt", "image.png", "a-b/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert texts(tmp_path) == texts(tmp_path) == ["a/z.md", "a-b/c.txt", "a.jsonl", "b.txt"]
    provenance = open_source(str(tmp_path), fields=["text"]).provenance()
    assert (provenance["files"], provenance["files_skipped"]) == (4, 1)


def test_files_are_sorted_by_the_names_that_lead_to_them(tmp_path: Path) -> None:
    broken = os.fsdecode(b"\xff.txt")  # not UTF-8: half a surrogate pair in Python
    names = ["a/b.txt", "a-b/c.txt", "a.txt", "a/b/c.txt", "a/b-c.txt", "\ufffd.txt", "\U00010000.txt", broken, "é.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    stock = open_source(str(tmp_path), fields=()).take_stock(None)
    found = [str(Path(path).relative_to(tmp_path)) for path, *_ in stock]
    assert found == sorted(names, key=lambda name: Path(name).parts)


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    """As Python counts it: SQLite has caches of a fixed size."""
    folder, journal_file = tmp_path / "many", tmp_path / "journal.sqlite"
    folder.mkdir()
    extraction = Extraction(Template.of_field("text"))

    def peak(count: int) -> int:
        journal_file.unlink(missing_ok=True)
        tracemalloc.start()
        try:
            with open_journal(journal_file) as journal:
                journal.set_stock("main", open_source(str(folder), fields=()).take_stock(None))
                source = open_source(str(folder), fields=())
                source.take_stock(journal.stock("main"))
                assert sum(len(list(piece.batch.documents(extraction))) for piece in source.read(None, 100)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def least_peak(count: int) -> int:
        for number in range(count):
            (folder / f"document-{number:06d}.txt").write_bytes(b"a")
        return min(peak(count) for _ in range(2))  # once in a while Python's own table of names is made anew

    few, many = least_peak(500), least_peak(2500)
    assert (many - few) / 2000 < 30  # bytes per file


def test_pattern_chooses_files_and_reads_unknown_ones_as_text(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.py").write_text("print()")
    (tmp_path / "b.txt").write_text("not chosen")
    assert texts(tmp_path, pattern="*.py") == ["print()"]
    source = open_source(str(tmp_path), fields=["text"], pattern="*.py")
    assert source.provenance()["pattern"] == "*.py"
    source.take_stock(None)
    assert source.size == 7


def test_standard_library_is_real_text_without_tests() -> None:
    source = standard_library()
    source.take_stock(None)
    assert source.size is not None and source.size > 5_000_000
    extraction = Extraction(Template.of_field("text"))
    found = documents(list(source.read(None, 1 << 20)), extraction)
    assert len(found) == source.provenance()["files"]
    assert any("class JSONDecoder" in document.text for document in found)
    assert sum(document.replaced for document in found) == 0


def test_invalid_utf8_is_replaced_and_counted_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(INVALID)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + INVALID + b'"}')
    column = pa.array([INVALID], pa.binary())
    invalid_strings = pa.StringArray.from_buffers(1, column.buffers()[1], column.buffers()[2])
    pq.write_table(pa.table({"text": invalid_strings}), tmp_path / "c.parquet")
    assert read(tmp_path) == [Document(REPAIRED, REPLACED)] * 3


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(json_lines(), suffix)
    for damaged in (whole[:-5], b"not compressed at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"cannot read .*a\.jsonl{suffix}: "):
            read(path)


def test_gzip_files_padded_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(compress(json_lines(), ".gz") + bytes(1000))
    assert texts(tmp_path) == TEXTS


def test_gzip_files_with_damage_inside_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(TEXTS[4].encode())
    for damaged in (whole[:10] + b"\xff" + whole[11:], whole[:-8] + bytes(8), whole + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read .*a\.txt\.gz: "):
            texts(path)


def test_zstd_with_too_wide_a_window_is_named(tmp_path: Path) -> None:
    content = b"a"
    one_block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + one_block)  # a window of 2 GiB
    with pytest.raises(
        UserError, match=r"cannot read .*a\.txt\.zst: .*too much memory.*\. Recompress it without --long\.$"
    ):
        texts(tmp_path)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.jsonl").write_text('{"text": "three"}')
    table = pa.table({"text": ["four"]})
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.OSFile(str(tmp_path / "e.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / os.fsdecode(b"\xff" + os.fsencode(path.name)))
    assert texts(tmp_path) == ["one", "two", "three", "four", "four"]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "absent.txt", "absent.jsonl", "./absent", "a/b/c"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(str(missing), fields=["text"])
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no file ends in \.txt"):
        open_source(str(tmp_path), fields=["text"])
    with pytest.raises(UserError, match=r"no file matches --pattern \*\.py"):
        open_source(str(tmp_path), fields=["text"], pattern="*.py")


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_tables_of_separated_values_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(str(path), fields=["text"])
    path.write_text("title,text\n")
    with pytest.raises(UserError, match=rf"--source .*{name}: CSV .* not read\. Convert it to JSON lines or parquet"):
        open_source(str(path), fields=["text"])


def test_choices_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    for choice in ({"name": "en"}, {"split": "test"}):
        with pytest.raises(UserError, match="--name and --split choose a part of a hub data set"):
            open_source(str(tmp_path), fields=["text"], **choice)
    with pytest.raises(UserError, match="--pattern chooses files of a folder"):
        open_source("stdlib", fields=["text"], pattern="*.py")


@pytest.mark.parametrize(("option", "value"), [("text_field", "body"), ("template", "{title}: {body}")])
def test_fields_of_text_files_are_refused(tmp_path: Path, option: str, value: str) -> None:
    (tmp_path / "a.txt").write_text("no fields")
    choice = SourceChoice.model_validate({"source": str(tmp_path), option: value})
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} names fields of records, .* text files only"):
        choice.open()
    (tmp_path / "b.jsonl").write_text('{"title": "t", "body": "b"}\n')
    assert choice.open().has_fields


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("ein Text".encode(encoding))
    why = "it is text in UTF-16 or UTF-32:" if encoding in ("utf-16", "utf-32") else "there are zero bytes in it;"
    with pytest.raises(UserError, match=rf"cannot read .*a\.txt: .*{why} convert it to UTF-8.* --pattern\.$"):
        texts(path)
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode(encoding))
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: not JSON \(.*{why} convert it to UTF-8"):
        texts(path)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(mark + "文字".encode("utf-16-le")))
    with pytest.raises(UserError, match=r"a\.txt\.gz: it is text in UTF-16 or UTF-32: convert it to UTF-8\."):
        texts(tmp_path)


def test_a_zero_byte_far_into_a_text_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000 + b"\0")
    assert texts(tmp_path) == ["x" * 100_000 + "\0"]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    for source, choice in ((path, {}), (tmp_path, {"pattern": "*.bin"})):
        with pytest.raises(UserError, match=r"cannot read .*model\.bin: it is not text: there are zero bytes in it"):
            texts(source, **choice)


def test_the_page_about_a_data_set_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("# About")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("a note")
    assert texts(tmp_path) == ["# About", "a note"]
    pq.write_table(pa.table({"text": ["a row"]}), tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert texts(tmp_path) == texts(".") == ["a note", "a row"]


def every_form(folder: Path, many: int) -> dict[str, tuple[Path, Any]]:
    """Sources of `many` records each with a title, a body and an inner language, some of them null."""
    records: list[dict[str, Any]] = [
        {"title": f"t{n}", "body": f"body {n} " * (n % 50), "n": n, "meta": {"lang": None if n % 5 == 0 else "en"}}
        for n in range(many)
    ]
    table = pa.Table.from_pylist(records)
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.zst").write_bytes(compress(lines, ".zst"))
    pq.write_table(table, folder / "c.parquet", row_group_size=many // 3)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=many // 4)
    with pa.OSFile(str(folder / "e.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=many // 4)
    expected = [Document(f"{r['title']}\n{r['body']}|{r['n']}", 0, r["meta"]["lang"]) for r in records]
    return {path.name: (path, expected) for path in sorted(folder.iterdir())} | {"all": (folder, expected * 5)}


@pytest.mark.parametrize("batch_bytes", [1, 3000, 1 << 20])
def test_every_form_gives_the_same_and_can_be_gone_on_with_from_every_place(tmp_path: Path, batch_bytes: int) -> None:
    extraction = Extraction(Template.parse("{title}\n{body}|{n}"), "meta.lang")
    for name, (path, expected) in every_form(tmp_path, 60 if batch_bytes == 1 else 300).items():
        found = pieces(path, extraction, batch_bytes=batch_bytes)
        assert documents(found, extraction) == expected, name
        shares = [piece.done for piece in found if piece.done is not None]
        assert len(shares) == len(found)
        assert shares == sorted(shares) and 0.99 < shares[-1] <= 1
        for number in range(0, len(found), 1 + len(found) // 12):
            position = json.loads(json.dumps(found[number].position))
            rest = pieces(path, extraction, position, batch_bytes=batch_bytes)
            before = len(documents(found[: number + 1], extraction))
            assert documents(rest, extraction) == expected[before:], (name, number)


def test_batches_are_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    records = [{"text": "x" * (100 if number % 50 else 30_000)} for number in range(2000)]
    for name, sink in (("a.jsonl", None), ("b.parquet", pq.write_table)):
        path = tmp_path / name
        if sink is None:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            sink(pa.Table.from_pylist(records), path)
        found = pieces(path, Extraction(Template.of_field("text")), None, 20_000)
        sizes = [batch_size(piece) for piece in found]
        assert sum(sizes) > 1_300_000
        assert max(sizes) < 20_000 + 41_000  # a record more, and what a table says of its columns
        assert sorted(sizes)[len(sizes) // 2] > 5_000


def test_batches_are_of_no_more_documents_than_can_be_treated_at_once(tmp_path: Path) -> None:
    folder, lines = tmp_path / "folder", tmp_path / "a.jsonl"
    folder.mkdir()
    for number in range(2500):
        (folder / f"{number:04}.txt").write_text("x" * (number % 3))
    lines.write_text("".join(f'{{"text": "{"x" * (number % 3)}"}}\n' for number in range(2500)))
    extraction = Extraction(Template.of_field("text"))
    for source in (folder, lines):
        found = pieces(source, extraction)
        assert [len(documents([piece], extraction)) for piece in found] == [1000, 1000, 500]
        assert [document.text for document in documents(found, extraction)] == ["x" * (n % 3) for n in range(2500)]
        rest = pieces(source, extraction, found[0].position)
        assert [(piece.batch, piece.position) for piece in rest] == [(p.batch, p.position) for p in found[1:]]


def test_a_file_that_changes_is_an_error(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.txt"
    path.write_text('{"text": "a"}\n' * 1000)
    source = open_source(str(path), fields=["text"])
    recorded = json.loads(json.dumps(list(source.take_stock(None))))
    assert list(open_source(str(path), fields=["text"]).take_stock(recorded)) == recorded
    reading = source.read(None, 100)
    next(reading)
    with path.open("a") as file:
        file.write('{"text": "b"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was read"):
        list(reading)
    with pytest.raises(UserError, match=r"a\.jsonl was changed \(14000 bytes then, 14014 now\)"):
        open_source(str(path), fields=["text"]).take_stock(recorded)
    recorded = open_source(str(tmp_path), fields=["text"]).take_stock(None)
    other.write_text("new")
    with pytest.raises(UserError, match=r"b\.txt was not there"):
        open_source(str(tmp_path), fields=["text"]).take_stock(recorded)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl is not read any more"):
        open_source(str(tmp_path), fields=["text"]).take_stock(recorded)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("b")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(folder)
    assert texts(folder) == ["a", "b"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed: Permission denied"):
        texts(tmp_path)


def test_patterns_of_files_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("a.md", "deep/b.md", "deep/er/c.md", "deep/d.txt"):
        (tmp_path / name).write_text(name)
    for pattern in ("*.md", "**/*.md"):
        assert texts(tmp_path, pattern=pattern) == ["a.md", "deep/b.md", "deep/er/c.md"]
    with pytest.raises(UserError, match=r"--pattern \. names no files"):
        texts(tmp_path, pattern=".")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train/**/*.txt", ["more/train/d.txt", "train/a.txt", "train/x/b.txt", "train/x/y/c.txt"]),
        ("train/**/y/*.txt", ["train/x/y/c.txt"]),
        ("**/train/**/**/[bc].txt", ["train/x/b.txt", "train/x/y/c.txt"]),
        ("train/**", ["more/train/d.txt", "train/a.txt", "train/x/b.txt", "train/x/y/c.txt"]),
        ("train/*.txt", ["more/train/d.txt", "train/a.txt"]),
        ("**", ["more/d.txt", "more/train/d.txt", "train/a.txt", "train/x/b.txt", "train/x/y/c.txt"]),
    ],
)
def test_two_stars_are_any_number_of_folders(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("train/a.txt", "train/x/b.txt", "train/x/y/c.txt", "more/train/d.txt", "more/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, pattern=pattern) == expected


def test_suffixes_in_capitals_and_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.TXT.GZ").write_bytes(gzip.compress(b"three"))
    os.mkfifo(tmp_path / "pipe.txt")
    assert texts(tmp_path) == ["one", "two", "three"]


def test_what_the_system_refuses_may_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = open_source(str(path), fields=())
    path.unlink()
    with pytest.raises(SourceUnavailable, match=r"cannot read .*a\.txt: No such file or directory\.$"):
        source.take_stock(None)
