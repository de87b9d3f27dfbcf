"""Where text comes from. A source can be read repeatedly, and gives the same documents in the same order."""

import io
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from mmrec_train.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2")

# Not the library itself: tests (some in broken encodings on purpose), installed packages, programs.
_STDLIB_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "__pycache__",
    "idlelib",
    "lib2to3",
    "turtledemo",
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ROWS = 1000  # rows of a table decoded at once
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    text: str  # valid Unicode: can be encoded as UTF-8
    replaced: int  # how many U+FFFD stand for text that was not valid


class Source(Protocol):
    """`provenance` goes into the manifest; `text_bytes` is the length of all text where known beforehand."""

    provenance: dict[str, Any]
    text_bytes: int | None

    def __iter__(self) -> Iterator[Document]: ...


def open_source(
    source: str,
    *,
    text_field: str,
    pattern: str | None = None,
    name: str | None = None,
    split: str | None = None,
) -> Source:
    """`source` is "stdlib", a file, a folder, or the name of a data set on the Hugging Face hub.

    `pattern` chooses files of a folder, `name` and `split` a part of a hub data set. UserError where nothing is
    found.
    """
    path = Path(source).expanduser()
    is_hub = source != "stdlib" and not path.exists()
    if not is_hub and (name is not None or split is not None):
        raise UserError(f"--name and --split choose a part of a hub data set, but --source {source} is not one")
    if pattern is not None and (source == "stdlib" or not path.is_dir()):
        raise UserError(f"--pattern chooses files of a folder, but --source {source} is not a folder")
    if source == "stdlib":
        return standard_library()
    if path.is_dir():
        return _folder(path, text_field, pattern)
    if path.exists():
        return FileSource([path], text_field, {"kind": "files", "path": source, "files": 1})
    if source.startswith(".") or not _HUB_NAME.fullmatch(source) or _kind(path) != "unknown":
        raise UserError(f"--source {source}: no such file or folder")
    return HubSource(source, name, split or "train", text_field)


def standard_library() -> Source:
    """The source files of the running Python's standard library, one document a file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in _walk(root, _STDLIB_SKIPPED)
        # Written when Python was built: names of that machine's folders.
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    ]
    return FileSource(files, "", {"kind": "stdlib", "python": platform.python_version(), "files": len(files)})


def _folder(root: Path, text_field: str, pattern: str | None) -> Source:
    everything = _walk(root, set())
    if pattern is not None:
        files = [file for file in everything if file.relative_to(root).match(pattern)]
    else:
        files = [file for file in everything if _kind(file) != "unknown"]
    if not files:
        known = " ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, PARQUET_SUFFIX))
        wanted = (
            f"no file matches --pattern {pattern}" if pattern else f"no file ends in {known} (or these with .gz .zst)"
        )
        raise UserError(f"--source {root}: {wanted}. Choose the files to read with --pattern, for example '*.py'.")
    provenance = {
        "kind": "files",
        "path": str(root),
        "files": len(files),
        "files_skipped": len(everything) - len(files),
    }
    if pattern is not None:
        provenance["pattern"] = pattern
    return FileSource(files, text_field, provenance)


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """All files below `root` but hidden ones and those in the folders `skipped`, always in the same order."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _kind(path: PurePath) -> str:
    """One of text, jsonl, parquet and unknown: by the suffix, or the one before a compression's."""
    if path.suffix in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    elif path.suffix == PARQUET_SUFFIX:
        return "parquet"
    if path.suffix in JSON_LINES_SUFFIXES:
        return "jsonl"
    return "text" if path.suffix in TEXT_SUFFIXES else "unknown"


class FileSource:
    """Local files: text (one document a file), JSON lines (one a line) and parquet (one a row)."""

    def __init__(self, files: Sequence[Path], text_field: str, provenance: dict[str, Any]) -> None:
        self._files = files
        self._text_field = text_field
        kinds = {_kind(file) for file in files}
        if kinds & {"jsonl", "parquet"}:
            provenance = {**provenance, "text_field": text_field}
        self.provenance = provenance
        all_plain = kinds <= {"text", "unknown"} and not any(file.suffix in COMPRESSED_SUFFIXES for file in files)
        self.text_bytes = sum(file.stat().st_size for file in files) if all_plain else None

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            kind = _kind(file)
            try:
                if kind == "parquet":
                    yield from _read_parquet(file, self._text_field)
                elif kind == "jsonl":
                    yield from _read_json_lines(file, self._text_field)
                else:
                    with _open(file) as stream:
                        yield decode_utf8(stream.read())
            except (OSError, pa.ArrowException) as error:  # no permission; a damaged archive or table
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise UserError(f"cannot read {file}: {reason}") from error


class HubSource:
    """A data set on the Hugging Face hub, streamed: nothing but the rows that are read is downloaded."""

    text_bytes: int | None = None

    def __init__(self, dataset: str, name: str | None, split: str, text_field: str) -> None:
        self._dataset, self._name, self._split, self._text_field = dataset, name, split, text_field
        self.provenance: dict[str, Any] = {
            "kind": "hub",
            "dataset": dataset,
            "name": name,
            "split": split,
            "revision": self._latest_revision(),
            "text_field": text_field,
        }

    def _latest_revision(self) -> str | None:
        """The commit to read: named, so that every reading sees the same rows and the manifest says which."""
        try:
            return HfApi().dataset_info(self._dataset).sha
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise self._unreadable(error) from error

    def __iter__(self) -> Iterator[Document]:
        import datasets  # takes seconds to import, and is only needed here

        where = f"{self._dataset} (split {self._split})"
        try:
            stream = datasets.load_dataset(
                self._dataset,
                self._name,
                split=self._split,
                revision=self.provenance["revision"],
                streaming=True,
            )
            for table in stream.with_format("arrow").iter(batch_size=_ROWS):
                yield from _column_documents(table, self._text_field, where)
        except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
            # The network, an unknown name or split, rows that do not parse.
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(
            f"reading --source {self._dataset} from the Hugging Face hub failed (no local file or folder has that "
            f"name): {reason} Check the name, --name, --split and the network; private data sets need "
            "`hf auth login`."
        )


def decode_utf8(data: bytes) -> Document:
    """Decode, with U+FFFD for what is not UTF-8, and drop a byte order mark."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return Document(data.decode("utf-8"), 0)
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return Document(text, text.count("\ufffd") - data.count("\ufffd".encode()))


def _open(path: Path) -> io.BufferedReader:
    """Open for reading, decompressed by suffix. Arrow reads concatenated frames and reports truncated ones."""
    stream = pa.input_stream(str(path), compression="detect")
    return io.BufferedReader(stream)


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            decoded = decode_utf8(line)
            try:
                record = json.loads(decoded.text)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{path}, line {number}: not JSON ({reason}); one object a line is expected") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; one object a line is expected")
            if text_field not in record:
                raise UserError(_no_field(f"{path}, line {number}", text_field, list(record)))
            text = record[text_field]
            if text is not None and not isinstance(text, str):
                raise UserError(f"{path}, line {number}: field {text_field} is not text but {type(text).__name__}")
            # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
            text, halves = _SURROGATE.subn("\ufffd", text or "")
            yield Document(text, decoded.replaced + halves)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    with pq.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            raise UserError(_no_field(str(path), text_field, file.schema_arrow.names))
        for batch in file.iter_batches(batch_size=_ROWS, columns=[text_field]):
            yield from _column_documents(pa.Table.from_batches([batch]), text_field, str(path))


def _column_documents(table: pa.Table, text_field: str, where: str) -> Iterator[Document]:
    if text_field not in table.column_names:
        raise UserError(_no_field(where, text_field, table.column_names))
    column = table.column(text_field)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(f"{where}: column {text_field} holds {kind}, not text")
    # As bytes: Arrow does not check that strings are UTF-8, and one that is not would stop the whole table.
    for value in column.cast(pa.large_binary()):
        yield decode_utf8(value.as_py() or b"")


def _no_field(where: str, text_field: str, fields: Sequence[str]) -> str:
    found = ", ".join(fields) or "none"
    return f"{where}: no field {text_field}; there are {found}. Choose one with --text-field."
