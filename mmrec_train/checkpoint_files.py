"""The files of a checkpoint: written so that whatever happens, the newest complete one is whole and is found.

A checkpoint is first written to `checkpoints/step_N.tmp`. When every file is on the disk, a manifest named
`COMPLETE` (each file's size and checksum, and the caller's `meta`) is added, and only then the folder is
renamed to `checkpoints/step_N`. A folder without a manifest that fits its files is torn: it is never loaded,
and never counts as one to keep.

Nothing here knows of ranks. Each rank calls `hash_files` for the files it wrote; after a barrier one rank
merges the entries and calls `commit`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from mmrec_train.disk import sync
from mmrec_train.errors import UserError

MANIFEST_NAME = "COMPLETE"
MODEL_FOLDER = "model"  # the weights in one piece, as Hugging Face loads them

_FOLDER_NAME = re.compile(r"step_(\d+)(\.tmp)?")


class FileEntry(TypedDict):
    """What the manifest says of one file: its bytes, and their XXH3-128 checksum in hexadecimal."""

    size: int
    xxh3_128: str


class Manifest(BaseModel):
    """The content of `COMPLETE`.

    `files` maps POSIX paths relative to the checkpoint to their entries; `meta` is the caller's JSON.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    step: int
    files: dict[str, FileEntry]
    meta: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The file: one canonical JSON text that ends with the checksum of everything else in it."""
        content = self.model_dump()
        content["xxh3_128"] = xxhash.xxh3_128_hexdigest(_canonical_json(content))
        return _canonical_json(content)

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Manifest":
        """Raises ValueError when a single bit is not as `to_bytes` wrote it."""
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        content.pop("xxh3_128", None)
        manifest = cls.model_validate(content)
        if manifest.to_bytes() != raw:
            raise ValueError("its checksum does not match")
        return manifest


def begin(run_dir: Path, step: int) -> Path:
    """Creates the empty folder `run_dir/checkpoints/step_N.tmp` to write to, clearing one left by a dead run.

    Raises UserError when `step_N` is there and complete: a checkpoint is never overwritten.
    """
    tmp = run_dir / "checkpoints" / f"step_{step}.tmp"
    _refuse_complete(_final_path(tmp))
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    return tmp


def hash_files(root: Path, relpaths: Iterable[str]) -> dict[str, FileEntry]:
    """Flushes files under `root` to the disk and describes them for `commit`.

    Flushing is done here because only the machine that wrote a file can be sure to flush it. The entries say
    what is on the disk, not what was meant to be: a writer that hides short writes needs a check of its own.
    """
    paths = sorted(relpaths)
    with ThreadPoolExecutor() as pool:  # xxhash and read() release the interpreter lock
        return dict(zip(paths, pool.map(lambda path: _sync_and_describe(root / path), paths), strict=True))


def commit(tmp: Path, entries: Mapping[str, FileEntry], *, meta: dict[str, Any] | None = None) -> Path:
    """Turns the folder `begin` made into the checkpoint `step_N` and returns its path.

    `entries` describe every file in the folder, merged from all ranks; `meta` is kept in the manifest. A torn
    `step_N` is replaced. Raises OSError when files are missing, extra or of another size than described, or
    when the disk fails, and UserError when a complete `step_N` is there; either way `tmp` stays unfinished
    and other checkpoints stay as they are.
    """
    _check_listing(tmp, entries)
    manifest = Manifest(step=_step_of(tmp), files=dict(sorted(entries.items())), meta=meta or {}).to_bytes()
    with open(tmp / MANIFEST_NAME, "wb") as file:
        file.write(manifest)
        file.flush()
        os.fsync(file.fileno())
    for folder in [tmp, *(path for path in tmp.rglob("*") if path.is_dir())]:
        sync(folder)

    final = _final_path(tmp)
    _refuse_complete(final)
    if final.exists():
        _delete(final)
    tmp.rename(final)
    sync(final.parent)
    return final


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`; looks at no other file.

    Raises UserError when it is absent, unreadable or damaged.
    """
    try:
        return _load_manifest(path)
    except ValueError as error:
        raise UserError(
            f"{error}. Resume from another checkpoint, or with --resume auto, which skips such ones."
        ) from error


def verify(path: Path, *, checksums: bool = True) -> list[str]:
    """What is wrong with the checkpoint at `path`; empty when it is whole.

    Every file's presence, size and (unless `checksums` is off) content is compared with the manifest.
    """
    try:
        manifest = _load_manifest(path)
    except ValueError as error:
        return [str(error)]
    problems = []
    match = _FOLDER_NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        problems.append(f"{path} holds step {manifest.step}")
    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(_check_file, path / name, entry, checksums) for name, entry in manifest.files.items()]
    return problems + [problem for check in checks if (problem := check.result()) is not None]


def latest_complete(run_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none.

    `report` gets a line for each newer one that is skipped, with what is wrong with it.
    """
    for path in _newest_first(run_dir):
        problems = ["its writing was interrupted"] if path.suffix == ".tmp" else verify(path)
        if not problems:
            return path
        report(f"Skipping checkpoint {path}: {'; '.join(problems)}")
    return None


def resolve(path: Path, report: Callable[[str], None]) -> Path:
    """The complete checkpoint that a path names: itself, or the newest one of a run folder. Raises UserError."""
    if (path / "checkpoints").is_dir():
        newest = latest_complete(path, report)
        if newest is None:
            raise UserError(f"{path} holds no complete checkpoint")
        return newest
    if not path.is_dir():
        raise UserError(f"{path} is neither a run folder nor a checkpoint (checkpoints/step_N in a run folder)")
    problems = verify(path)
    if problems:
        raise UserError(f"{path} cannot be used: " + "; ".join(problems))
    return path


def prune(run_dir: Path, keep_last: int) -> None:
    """Deletes complete checkpoints but the newest `keep_last`, and torn ones older than the newest complete.

    Nothing is deleted unless a newer checkpoint has been read back whole, so a run always keeps one to go on
    from. Torn folders newer than that stay: they may be in the making, and `begin` and `commit` replace them.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; it must be at least 1")
    kept = 0
    for path in _newest_first(run_dir):
        # The newest one is proven by its checksums; behind it, presence and sizes are enough.
        complete = path.suffix != ".tmp" and not verify(path, checksums=kept == 0)
        if complete and kept < keep_last:
            kept += 1
        elif kept > 0:
            _delete(path)


def _newest_first(run_dir: Path) -> list[Path]:
    """All checkpoint folders, finished or not, highest step first; of one step, the finished first."""
    folders = [
        path for path in (run_dir / "checkpoints").glob("step_*") if _FOLDER_NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(folders, key=lambda path: (-_step_of(path), path.suffix))


def _step_of(path: Path) -> int:
    match = _FOLDER_NAME.fullmatch(path.name)
    assert match is not None, f"{path} is not named like a checkpoint"
    return int(match[1])


def _final_path(tmp: Path) -> Path:
    assert tmp.suffix == ".tmp", f"{tmp} was not made by begin()"
    return tmp.with_suffix("")


def _load_manifest(path: Path) -> Manifest:
    """As `read_manifest`, with a ValueError that only says what is wrong."""
    file = path / MANIFEST_NAME
    try:
        return Manifest.from_bytes(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete checkpoint: it has no file {MANIFEST_NAME}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}") from error


def _refuse_complete(path: Path) -> None:
    if path.exists() and not verify(path):
        raise UserError(
            f"{path} is a complete checkpoint already and is not overwritten. "
            "Choose another run_dir, or move the checkpoint away."
        )


def _check_listing(root: Path, entries: Mapping[str, FileEntry]) -> None:
    on_disk = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and path != root / MANIFEST_NAME
    }
    described = {path: entry["size"] for path, entry in entries.items()}
    if on_disk != described:
        differing = sorted({name for name, _ in on_disk.items() ^ described.items()})
        raise OSError(f"{root}: what was written is not what is there: {', '.join(differing)}")


def _check_file(path: Path, entry: FileEntry, checksums: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path} has {size} bytes, the manifest says {entry['size']}"
        if checksums and _checksum(path) != entry["xxh3_128"]:
            return f"{path} has changed since it was written: its checksum does not match"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None


def _sync_and_describe(path: Path) -> FileEntry:
    sync(path)
    return FileEntry(size=path.stat().st_size, xxh3_128=_checksum(path))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _delete(path: Path) -> None:
    """Removes a checkpoint, its manifest first: an interruption leaves a torn one, never a wrong one."""
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)


def _canonical_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
