"""Where text comes from. A source can be read again from any place it has given, and then gives the same records."""

import gzip
import io
import json
import os
import platform
import re
import sqlite3
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import islice, zip_longest
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from mmrec_train.errors import UserError
from mmrec_train.preparation.records import MOST_DOCUMENTS, Batch, JsonLines, TextFiles, why_not_utf8
from mmrec_train.preparation.stored_list import StoredList
from mmrec_train.preparation.tables import ARROW_SUFFIX, PARQUET_SUFFIX, read_arrow, read_parquet

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SEPARATED_SUFFIXES = (".csv", ".tsv")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

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
_WIDE_WINDOW = "Frame requires too much memory"  # what zstd says of more than 128 MiB
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Position = dict[str, Any]  # JSON
Stock = Iterable[list[Any]]  # JSON: rows of a name and what must stay as it is; to be read more than once


class SourceUnavailable(UserError):
    """A source could not be reached; later it may be."""


class Piece(NamedTuple):
    """A batch of records, the position after it, and the part of the source up to there, in [0, 1] where known."""

    batch: Batch
    position: Position
    done: float | None


class Source(Protocol):
    """`size` is the number of bytes that hold the source, None where unknown: for the progress only. `has_fields` is
    whether there are records with fields, not only text files."""

    size: int | None
    has_fields: bool

    def take_stock(self, recorded: Stock | None) -> Stock:
        """What must stay as it is while the source is read. To be called first, with what it gave earlier, if it did.

        UserError where the source is no longer the recorded one.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """What the manifest says of the source."""
        ...

    def read(self, position: Position | None, batch_bytes: int) -> Iterator[Piece]:
        """The records after `position` (None: all), in batches of about `batch_bytes` and at least a record."""
        ...


def open_source(
    source: str,
    *,
    fields: Sequence[str],
    pattern: str | None = None,
    name: str | None = None,
    split: str | None = None,
) -> Source:
    """`source` is "stdlib", a file, a folder, or the name of a data set on the Hugging Face hub.

    `fields` are those that are needed of a record; `pattern` chooses files of a folder, `name` and `split` a part of a
    hub data set, `split` also one of a folder written by `save_to_disk`. UserError where nothing is found.
    """
    path = Path(source).expanduser()
    with _named(path):
        is_hub = source != "stdlib" and not path.exists()
    has_splits = is_hub or (path / "dataset_dict.json").is_file()
    if (name is not None and not is_hub) or (split is not None and not has_splits):
        raise UserError(f"--name and --split choose a part of a hub data set, but --source {source} is not one")
    if pattern is not None and (source == "stdlib" or not path.is_dir()):
        raise UserError(f"--pattern chooses files of a folder, but --source {source} is not a folder")
    if source == "stdlib":
        return standard_library()
    if has_splits and not is_hub:
        return _saved_split(path, split or "train", fields)
    if path.is_dir():
        if pattern is None and _is_saved(path):
            return _saved(path, fields)
        return _folder(path, fields, pattern)
    is_separated = _suffix(path)[0] in _SEPARATED_SUFFIXES
    if path.exists():
        if is_separated:
            raise UserError(
                f"--source {source}: CSV and TSV files are not read. Convert it to JSON lines or parquet, or give the "
                "name of a data set on the Hugging Face hub that holds it."
            )
        return FileSource([str(path)], fields, {"kind": "files", "path": source, "files": 1})
    if source.startswith(".") or not _HUB_NAME.fullmatch(source) or _kind(path) != "unknown" or is_separated:
        raise UserError(f"--source {source}: no such file or folder")
    from mmrec_train.preparation.hub import HubSource  # its library takes a second to import

    return HubSource(source, name, split or "train", fields)


def standard_library() -> "FileSource":
    """The source files of the running Python's standard library, one document a file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in _files_below(root, _STDLIB_SKIPPED)
        # Written when Python was built: names of that machine's folders.
        if file.endswith(".py") and not PurePath(file).name.startswith("_sysconfigdata")
    ]
    return FileSource(files, (), {"kind": "stdlib", "python": platform.python_version(), "files": len(files)})


def _folder(root: Path, fields: Sequence[str], pattern: str | None) -> "FileSource":
    everything = _files_below(root, set())
    if pattern is not None:
        wanted_parts = PurePath(pattern).parts
        if not wanted_parts:
            raise UserError(f"--pattern {pattern} names no files; give one such as '*.py'")
        anywhere = ("**", *wanted_parts)  # below any folder
        files = stored(file for file in everything if _matches(PurePath(file).relative_to(root).parts, anywhere))
    else:
        files = stored(file for file in everything if _kind(file) != "unknown")
        if any(_kind(file) != "text" for file in files):  # a hub data set's folder has a page about it
            files = stored(file for file in files if file != str(root / "README.md"))
    if not files:
        known = " ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES, PARQUET_SUFFIX, ARROW_SUFFIX))
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
    return FileSource(files, fields, provenance)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the names that lead to a file are as in `pattern`, in which ** is any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _saved_split(root: Path, split: str, fields: Sequence[str]) -> "FileSource":
    """One split of what `datasets.DatasetDict.save_to_disk` wrote."""
    listed = _read_json(root / "dataset_dict.json").get("splits")
    splits = [str(name) for name in listed] if isinstance(listed, list) else []
    if split not in splits:
        found = ", ".join(splits) or "none"
        raise UserError(f"--source {root} has no split {split}; there are {found}. Choose with --split.")
    return _saved(root / split, fields)


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.Dataset.save_to_disk` wrote the folder: others, too, have files named state.json."""
    state = folder / "state.json"
    with _named(state):
        return state.is_file() and b'"_data_files"' in state.read_bytes()


def _saved(root: Path, fields: Sequence[str]) -> "FileSource":
    """What `datasets.Dataset.save_to_disk` wrote: the rows in their order, which is that of its list of files."""
    listed = _read_json(root / "state.json").get("_data_files")
    try:
        files = [str(root / file["filename"]) for file in listed or ()]
    except (KeyError, TypeError):
        files = []
    if not files:
        raise UserError(f"--source {root}: its state.json lists no files. Write it again with save_to_disk.")
    return FileSource(files, fields, {"kind": "files", "path": str(root), "files": len(files)})


def _read_json(path: Path) -> dict[str, Any]:
    with _named(path):
        value = json.loads(path.read_text("utf-8"))
    return value if isinstance(value, dict) else {}


def _files_below(root: Path, skipped: set[str]) -> StoredList:
    """The paths of `_walk`, sorted by the names that lead to a file."""
    return stored(_walk(root, skipped), _sorting_key)


def _sorting_key(file: str) -> bytes:
    """Sorts as the path's parts do: no name has a zero byte, and UTF-8 keeps the order of characters."""
    return file.replace(os.sep, "\0").encode("utf-8", "surrogatepass")


def stored(values: Iterable[Any], key: Callable[[Any], bytes] | None = None) -> StoredList:
    """`values`, sorted by `key` where there is one, in a temporary file that goes with the list."""
    # Without a name: on the disk only where it is larger than SQLite's cache, 2 MB. The library that trains a tokenizer
    # reads its texts, and so this list, in another thread.
    database = sqlite3.connect("", check_same_thread=False)
    database.execute("CREATE TABLE list (key PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    rows = ((key(value) if key else number, json.dumps(value)) for number, value in enumerate(values))
    try:
        database.executemany("INSERT INTO list VALUES (?, ?)", rows)
    except sqlite3.OperationalError as error:
        raise SourceUnavailable(
            f"cannot write a temporary list of files: {error}. Make room for it, or choose another folder with the "
            "environment variable SQLITE_TMPDIR."
        ) from error
    return StoredList(database, "SELECT value FROM list ORDER BY key")


def _walk(root: Path, skipped: set[str]) -> Iterator[str]:
    """All files below `root` but hidden ones and those in the folders `skipped`; of a folder in any order.

    Links are followed, to a folder once. UserError for a folder that cannot be read.
    """
    folders, seen = [str(root)], set()
    while folders:
        folder = folders.pop()
        subfolders = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if os.path.isdir(entry.path):
                        if entry.name not in skipped:
                            subfolders.append(entry.path)
                    # a pipe would never end; a link to nothing is reported when it is read
                    elif os.path.isfile(entry.path) or not os.path.exists(entry.path):
                        yield str(Path(entry.path))  # without ./
        except OSError as error:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}. Make it readable.") from error
        folders += sorted(subfolders, reverse=True)


def _kind(file: str | Path) -> str:
    """One of text, jsonl, parquet, arrow and unknown: by the suffix, or the one before a compression's."""
    suffix, is_compressed = _suffix(file)
    if suffix in (PARQUET_SUFFIX, ARROW_SUFFIX) and not is_compressed:
        return suffix[1:]
    if suffix in JSON_LINES_SUFFIXES:
        return "jsonl"
    return "text" if suffix in TEXT_SUFFIXES else "unknown"


def _suffix(file: str | Path) -> tuple[str, bool]:
    """The suffix in lower case, and whether that of a compression follows."""
    stem, suffix = os.path.splitext(os.fspath(file).lower())
    return (os.path.splitext(stem)[1], True) if suffix in COMPRESSIONS else (suffix, False)


class _Place(NamedTuple):
    """Files before `file` are done. Of it, `offset` bytes (tables: rows), which are `line` lines."""

    file: int = 0
    offset: int = 0
    line: int = 0


class FileSource:
    """Local files: text (one document a file), JSON lines (one a line), parquet and Arrow tables (one a row)."""

    def __init__(self, files: Iterable[str], fields: Sequence[str], provenance: dict[str, Any]) -> None:
        self._files = files
        self._fields = fields
        self._provenance = provenance
        self._stock: Stock = ()
        self.size: int | None = None
        self.has_fields = any(_kind(file) not in ("text", "unknown") for file in files)

    def take_stock(self, recorded: Stock | None) -> Stock:
        self._stock = stored([file, *_size_and_time(Path(file))] for file in self._files)
        self.size = sum(size for _, size, _ in self._stock)
        if recorded is not None and (difference := _difference(recorded, self._stock)):
            raise UserError(f"the input is no longer what was begun with: {difference}.")
        return self._stock

    def provenance(self) -> dict[str, Any]:
        return self._provenance

    def read(self, position: Position | None, batch_bytes: int) -> Iterator[Piece]:
        assert self.size is not None, "take_stock comes first"
        start = _Place(**position) if position else _Place()
        before = 0  # bytes of earlier files
        texts: list[bytes] = []
        waiting = 0  # bytes of texts
        for number, (path, size, time) in enumerate(self._stock):
            if number < start.file:
                before += size
                continue
            file = Path(path)
            _check_unchanged(file, size, time)
            with _named(file):
                if _kind(file) in ("text", "unknown"):
                    texts.append(_read_text(file))
                    waiting += len(texts[-1])
                else:
                    if texts:
                        yield self._piece(TextFiles(texts), _Place(number), before)
                        texts, waiting = [], 0
                    place = start if number == start.file else _Place(number)
                    for batch, after, part in self._read_file(file, place, batch_bytes):
                        yield self._piece(batch, after, before + part * size)
            _check_unchanged(file, size, time)
            before += size
            if waiting >= batch_bytes or len(texts) == MOST_DOCUMENTS:
                yield self._piece(TextFiles(texts), _Place(number + 1), before)
                texts, waiting = [], 0
        if texts:
            yield self._piece(TextFiles(texts), _Place(number + 1), before)

    def _piece(self, batch: Batch, place: _Place, read_bytes: float) -> Piece:
        assert self.size is not None
        return Piece(batch, place._asdict(), min(1.0, read_bytes / max(1, self.size)))

    def _read_file(self, file: Path, start: _Place, batch_bytes: int) -> Iterator[tuple[Batch, _Place, float]]:
        """Batches of a file, the place after each, and the part of the file up to there."""
        if _kind(file) == "jsonl":
            for lines, offset, part in _read_json_lines(file, start.offset, start.line, batch_bytes):
                yield lines, _Place(start.file, offset, lines.first_line - 1 + lines.data.count(b"\n")), part
        else:
            read = read_parquet if _kind(file) == "parquet" else read_arrow
            for rows, offset, part in read(file, self._fields, start.offset, batch_bytes):
                yield rows, _Place(start.file, offset), part


def _check_unchanged(file: Path, *size_and_time: int) -> None:
    if _size_and_time(file) != list(size_and_time):
        raise UserError(f"{file} was changed while it was read.")


def _size_and_time(file: Path) -> list[int]:
    with _named(file):
        status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _difference(before: Stock, now: Stock) -> str | None:
    """The first difference between two lists of files, in words."""
    for then, later in zip_longest(before, now):
        if then == later:
            continue
        if then and later and then[0] == later[0]:
            return f"{then[0]} was changed ({then[1]} bytes then, {later[1]} now)"
        if then and not _lists(now, then[0]):
            return f"{then[0]} is not read any more"
        if later and not _lists(before, later[0]):
            return f"{later[0]} was not there"
        return "the files come in another order"
    return None


def _lists(stock: Stock, path: str) -> bool:
    return any(path == listed for listed, *_ in stock)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of reading (no permission; a damaged archive or table) as UserError with the file's name.

    What the operating system refuses may be mended without a change of the file: SourceUnavailable.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.strerror:
            raise SourceUnavailable(f"cannot read {file}: {error.strerror}.") from error
        remedy = " Recompress it without --long." if _WIDE_WINDOW in str(error) else ""
        raise UserError(f"cannot read {file}: {str(error).rstrip('.')}.{remedy}") from error


class _Stream(io.BufferedReader):
    """A file's bytes, decompressed by its suffix: also concatenated frames, and truncated ones are reported."""

    def __init__(self, path: Path) -> None:
        self._raw_file = pa.OSFile(os.fsencode(path))
        self._size = max(1, self._raw_file.size())
        compression = COMPRESSIONS.get(path.suffix.lower())
        super().__init__(_decompressed(self._raw_file, compression) if compression else self._raw_file)
        self.is_compressed = compression is not None

    @property
    def part(self) -> float:
        """How much of the file has been read, in [0, 1]."""
        return self._raw_file.tell() / self._size

    def skip(self, size: int) -> None:
        """Go on behind the first `size` bytes."""
        if not self.is_compressed:
            self.seek(size)
            return
        while size:
            skipped = len(self.read(min(size, 1 << 20)))
            if not skipped:
                raise ValueError("it ends before the place that had been reached")
            size -= skipped


def _decompressed(file: pa.NativeFile, compression: str) -> Any:
    if compression == "gzip":  # Arrow does not read files that are padded with zeros
        return gzip.GzipFile(fileobj=file)
    return pa.CompressedInputStream(file, compression)


def _read_text(path: Path) -> bytes:
    with _Stream(path) as stream:
        text = stream.read()
    if reason := why_not_utf8(text):
        raise ValueError(f"{reason}. Choose the files to read with --pattern")
    return text


def _read_json_lines(path: Path, offset: int, line: int, batch_bytes: int) -> Iterator[tuple[JsonLines, int, float]]:
    """Blocks of whole lines, the place after each in bytes, and the part of the file up to there."""
    with _Stream(path) as stream:
        stream.skip(offset)
        while lines := _next_lines(stream, batch_bytes):
            data = b"".join(lines)
            offset += len(data)
            yield JsonLines(str(path), line + 1, data), offset, stream.part
            line += len(lines)


def _next_lines(stream: _Stream, batch_bytes: int) -> list[bytes]:
    lines, size = [], 0
    for line in islice(stream, MOST_DOCUMENTS):
        lines.append(line)
        size += len(line)
        if size >= batch_bytes:
            break
    return lines
