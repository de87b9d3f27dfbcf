"""Where text comes from. A source can be read again from any place it has given, and then gives the same records."""

import gzip
import io
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from mmrec_train.errors import UserError
from mmrec_train.preparation.records import MOST_DOCUMENTS, Batch, JsonLines, TextFiles, why_not_utf8
from mmrec_train.preparation.tables import ARROW_SUFFIX, PARQUET_SUFFIX, read_arrow, read_parquet

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
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
Stock = list[list[Any]]  # JSON: rows of a name and what must stay as it is


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
    if path.exists():
        return FileSource([path], fields, {"kind": "files", "path": source, "files": 1})
    if source.startswith(".") or not _HUB_NAME.fullmatch(source) or _kind(path) != "unknown":
        raise UserError(f"--source {source}: no such file or folder")
    from mmrec_train.preparation.hub import HubSource  # its library takes a second to import

    return HubSource(source, name, split or "train", fields)


def standard_library() -> "FileSource":
    """The source files of the running Python's standard library, one document a file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in _walk(root, _STDLIB_SKIPPED)
        # Written when Python was built: names of that machine's folders.
        if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
    ]
    return FileSource(files, (), {"kind": "stdlib", "python": platform.python_version(), "files": len(files)})


def _folder(root: Path, fields: Sequence[str], pattern: str | None) -> "FileSource":
    everything = _walk(root, set())
    if pattern is not None:
        wanted_parts = PurePath(pattern).parts
        if not wanted_parts:
            raise UserError(f"--pattern {pattern} names no files; give one such as '*.py'")
        # Below any folder, as if it began with **
        files = [file for file in everything if _matches(file.relative_to(root).parts, ("**", *wanted_parts))]
    else:
        files = [file for file in everything if _kind(file) != "unknown"]
        if any(_kind(file) != "text" for file in files):  # a hub data set's folder has a page about it
            files = [file for file in files if file != root / "README.md"]
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
        files = [root / file["filename"] for file in listed or ()]
    except (KeyError, TypeError):
        files = []
    if not files:
        raise UserError(f"--source {root}: its state.json lists no files. Write it again with save_to_disk.")
    return FileSource(files, fields, {"kind": "files", "path": str(root), "files": len(files)})


def _read_json(path: Path) -> dict[str, Any]:
    with _named(path):
        value = json.loads(path.read_text("utf-8"))
    return value if isinstance(value, dict) else {}


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """All files below `root` but hidden ones and those in the folders `skipped`, always in the same order.

    Links are followed, to a folder once. UserError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}. Make it readable.") from error

    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if name not in skipped and not name.startswith("."))
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        # a pipe would never end; a link to nothing is reported when it is read
        files += [path for path in paths if path.is_file() or not path.exists()]
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def _kind(path: PurePath) -> str:
    """One of text, jsonl, parquet, arrow and unknown: by the suffix, or the one before a compression's."""
    path = path.with_name(path.name.lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    elif path.suffix in (PARQUET_SUFFIX, ARROW_SUFFIX):
        return path.suffix[1:]
    if path.suffix in JSON_LINES_SUFFIXES:
        return "jsonl"
    return "text" if path.suffix in TEXT_SUFFIXES else "unknown"


class _Place(NamedTuple):
    """Files before `file` are done. Of it, `offset` bytes (tables: rows), which are `line` lines."""

    file: int = 0
    offset: int = 0
    line: int = 0


class FileSource:
    """Local files: text (one document a file), JSON lines (one a line), parquet and Arrow tables (one a row)."""

    def __init__(self, files: Sequence[Path], fields: Sequence[str], provenance: dict[str, Any]) -> None:
        self._files = files
        self._fields = fields
        self._provenance = provenance
        self._stock: Stock = []
        self.size: int | None = None
        self.has_fields = any(_kind(file) not in ("text", "unknown") for file in files)

    def take_stock(self, recorded: Stock | None) -> Stock:
        self._stock = [[str(file), *_size_and_time(file)] for file in self._files]
        self.size = sum(size for _, size, _ in self._stock)
        if recorded is not None and recorded != self._stock:
            raise UserError(f"the input is no longer what was begun with: {_difference(recorded, self._stock)}.")
        return self._stock

    def provenance(self) -> dict[str, Any]:
        return self._provenance

    def read(self, position: Position | None, batch_bytes: int) -> Iterator[Piece]:
        assert self._stock and self.size is not None, "take_stock comes first"
        start = _Place(**position) if position else _Place()
        before = sum(size for _, size, _ in self._stock[: start.file])
        texts: list[bytes] = []
        waiting = 0  # bytes of texts
        for number in range(start.file, len(self._files)):
            file, size = self._files[number], self._stock[number][1]
            self._check_unchanged(number)
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
            self._check_unchanged(number)
            before += size
            if waiting >= batch_bytes or len(texts) == MOST_DOCUMENTS:
                yield self._piece(TextFiles(texts), _Place(number + 1), before)
                texts, waiting = [], 0
        if texts:
            yield self._piece(TextFiles(texts), _Place(len(self._files)), before)

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

    def _check_unchanged(self, number: int) -> None:
        path, *before = self._stock[number]
        if _size_and_time(Path(path)) != before:
            raise UserError(f"{path} was changed while it was read.")


def _size_and_time(file: Path) -> list[int]:
    with _named(file):
        status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _difference(before: Stock, now: Stock) -> str:
    """The first difference between two lists of files, in words."""
    then, later = ({path: rest for path, *rest in stock} for stock in (before, now))
    for path in {**then, **later}:
        if path not in later:
            return f"{path} is not read any more"
        if path not in then:
            return f"{path} was not there"
        if then[path] != later[path]:
            return f"{path} was changed ({then[path][0]} bytes then, {later[path][0]} now)"
    return "the files come in another order"


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
