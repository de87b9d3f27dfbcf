"""Whatever happens while a checkpoint is written, kept or deleted, the newest whole one is found."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train import checkpoint_files
from mmrec_train.checkpoint_files import (
    MANIFEST_NAME,
    begin,
    commit,
    hash_files,
    latest_complete,
    prune,
    read_manifest,
    verify,
)
from mmrec_train.errors import UserError

CONTENT = {
    "model.safetensors": b"weights" * 100,
    "ranks/rank_0.safetensors": b"state of rank 0",
    "empty": b"",
}


def write(run_dir: Path, step: int, content: dict[str, bytes] = CONTENT, meta: dict[str, Any] | None = None) -> Path:
    tmp = begin(run_dir, step)
    for name, data in content.items():
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(data)
    return commit(tmp, hash_files(tmp, content), meta=meta)


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_committed_checkpoint_is_whole_and_tells_its_step_files_and_meta(tmp_path: Path) -> None:
    path = write(tmp_path, 30, meta={"wandb_run_id": "a1b2", "lanes": [1, 2]})

    assert path == tmp_path / "checkpoints" / "step_30"
    assert verify(path) == []
    manifest = read_manifest(path)
    assert (manifest.format, manifest.step) == (1, 30)
    assert manifest.meta == {"wandb_run_id": "a1b2", "lanes": [1, 2]}
    assert {name: entry["size"] for name, entry in manifest.files.items()} == {
        "model.safetensors": 700,
        "ranks/rank_0.safetensors": 15,
        "empty": 0,
    }
    # XXH3-128 of no bytes, from the algorithm's specification.
    assert manifest.files["empty"]["xxh3_128"] == "99aa06d3014798d86001c324468d497f"
    assert steps(tmp_path) == ["step_30"]


names = st.text("abcxyz_.0", min_size=1, max_size=8).filter(lambda name: name.strip(".") and name != MANIFEST_NAME)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(
    content=st.dictionaries(names, st.binary(max_size=300), max_size=4),
    meta=st.dictionaries(st.text(), json_values, max_size=4),
    step=st.integers(0, 10**9),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, bytes], meta: dict[str, Any], step: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    path = write(run_dir, step, content, meta)

    messages: list[str] = []
    assert latest_complete(run_dir, messages.append) == path
    assert messages == []
    assert {name: (path / name).read_bytes() for name in read_manifest(path).files} == content
    assert read_manifest(path).meta == meta
    shutil.rmtree(run_dir)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    path = write(run_dir, 1, meta={"tokens": 12345, "loss": 2.5})
    name = data.draw(st.sampled_from([MANIFEST_NAME, "model.safetensors", "ranks/rank_0.safetensors"]))
    raw = bytearray((path / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    (path / name).write_bytes(raw)

    problems = verify(path)
    assert len(problems) == 1
    assert name in problems[0]
    shutil.rmtree(run_dir)


def _truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _replace_by_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


TORN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "truncated file": (
        lambda path: _truncate(path / "ranks/rank_0.safetensors"),
        "rank_0.safetensors has 14 bytes, the manifest says 15",
    ),
    "grown file": (lambda path: (path / "empty").write_bytes(b"x"), "empty has 1 bytes, the manifest says 0"),
    "changed file": (
        lambda path: (path / "ranks/rank_0.safetensors").write_bytes(b"state of rank 1"),
        "its checksum does not match",
    ),
    "no manifest": (lambda path: (path / MANIFEST_NAME).unlink(), "it has no file COMPLETE"),
    "empty manifest": (lambda path: (path / MANIFEST_NAME).write_bytes(b""), "COMPLETE is damaged"),
    "garbage manifest": (
        lambda path: (path / MANIFEST_NAME).write_bytes(b"\xff\x00{"),
        "COMPLETE is damaged",
    ),
    "manifest of another kind": (
        lambda path: (path / MANIFEST_NAME).write_text("[1]"),
        "holds no JSON object",
    ),
    "truncated manifest": (lambda path: _truncate(path / MANIFEST_NAME), "COMPLETE is damaged"),
    "unreadable manifest": (
        lambda path: _replace_by_a_link_to_itself(path / MANIFEST_NAME),
        "COMPLETE cannot be read: Too many levels of symbolic links",
    ),
    "manifest of another step": (
        lambda path: shutil.copy(path.parent / "step_10" / MANIFEST_NAME, path / MANIFEST_NAME),
        "step_20 holds step 10",
    ),
    "interrupted": (lambda path: path.rename(path.with_suffix(".tmp")), "its writing was interrupted"),
}


@pytest.mark.parametrize("kind", TORN)
def test_a_torn_checkpoint_is_skipped_with_a_message_and_can_be_written_again(tmp_path: Path, kind: str) -> None:
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    tear, what_is_wrong = TORN[kind]
    tear(newer)

    messages: list[str] = []
    assert latest_complete(tmp_path, messages.append) == older
    assert len(messages) == 1
    assert "step_20" in messages[0]
    assert what_is_wrong in messages[0]

    assert write(tmp_path, 20, {"model.safetensors": b"again"}) == newer
    assert latest_complete(tmp_path, messages.append) == newer
    assert len(messages) == 1
    assert (newer / "model.safetensors").read_bytes() == b"again"
    assert steps(tmp_path) == ["step_10", "step_20"]


def test_the_newest_is_the_one_of_the_highest_step_not_of_the_last_name(tmp_path: Path) -> None:
    for step in (1000, 999, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / "step_5000").write_text("not a folder")
    (tmp_path / "checkpoints" / "step_best").mkdir()

    messages: list[str] = []
    assert latest_complete(tmp_path, messages.append) == tmp_path / "checkpoints" / "step_1000"
    assert messages == []


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest_complete(tmp_path, print) is None


def test_a_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    begun_early = begin(tmp_path, 20)
    (begun_early / "late").write_bytes(b"late")
    begun_early.rename(tmp_path / "aside")
    path = write(tmp_path, 20)

    with pytest.raises(UserError, match="step_20 is a complete checkpoint already"):
        begin(tmp_path, 20)
    (tmp_path / "aside").rename(begun_early)
    with pytest.raises(UserError, match="step_20 is a complete checkpoint already"):
        commit(begun_early, hash_files(begun_early, ["late"]))

    assert verify(path) == []
    assert (path / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]


def test_begin_clears_what_a_dead_run_left(tmp_path: Path) -> None:
    (begin(tmp_path, 20) / "leftover").write_bytes(b"old")
    assert list(begin(tmp_path, 20).iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "named"),
    [(["a"], "b"), (["a", "b", "c"], "c")],
    ids=["a file not described", "a described file not there"],
)
def test_commit_refuses_entries_that_are_not_the_files(tmp_path: Path, entries: list[str], named: str) -> None:
    tmp = begin(tmp_path, 20)
    for name in "abc":
        (tmp / name).write_bytes(b"data")
    described = hash_files(tmp, entries)
    (tmp / "c").unlink()

    with pytest.raises(OSError, match=rf"what was written is not what is there: {named}$"):
        commit(tmp, described)
    assert latest_complete(tmp_path, lambda message: None) is None


def test_commit_refuses_a_file_that_shrank_after_it_was_hashed(tmp_path: Path) -> None:
    tmp = begin(tmp_path, 20)
    (tmp / "a").write_bytes(b"data")
    described = hash_files(tmp, ["a"])
    _truncate(tmp / "a")
    with pytest.raises(OSError, match=r"what was written is not what is there: a$"):
        commit(tmp, described)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 10)

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_full_disk(path: Path, mode: str) -> Any:
        return FullDisk(path, "w") if "w" in mode else open(path, mode)

    monkeypatch.setattr(checkpoint_files, "open", open_on_full_disk, raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, 20)

    messages: list[str] = []
    assert latest_complete(tmp_path, messages.append) == older
    assert [("step_20" in message) for message in messages] == [True]
    monkeypatch.undo()
    assert verify(write(tmp_path, 20)) == []  # there is room again: the same step is written whole


def test_a_failing_flush_leaves_the_checkpoint_uncommitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 10)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, 20)
    assert latest_complete(tmp_path, lambda message: None) == older


# Dies by SIGKILL just before commit() opens the manifest (1), flushes the folder (2), renames it (3), or, with
# all done, flushes the rename (4).
KILLED_WRITER = """
    import os, pathlib, signal, sys
    from mmrec_train.checkpoint_files import begin, commit, hash_files

    run_dir, fatal_call = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    tmp = begin(run_dir, 20)
    (tmp / "model.safetensors").write_bytes(b"new weights")
    entries = hash_files(tmp, ["model.safetensors"])
    calls = 0

    def die_at_the_fatal_call(event, args):
        global calls
        if event == "os.rename" or (event == "open" and str(run_dir) in str(args[0])):
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_at_the_fatal_call)
    commit(tmp, entries)
"""


@pytest.mark.parametrize(("fatal_call", "latest"), [(1, 10), (2, 10), (3, 10), (4, 20)])
def test_kill_9_while_committing_leaves_a_whole_one_as_the_latest(tmp_path: Path, fatal_call: int, latest: int) -> None:
    write(tmp_path, 10)
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(tmp_path), str(fatal_call)]
    root = Path(checkpoint_files.__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL

    messages: list[str] = []
    assert latest_complete(tmp_path, messages.append) == tmp_path / "checkpoints" / f"step_{latest}"
    assert len(messages) == (latest == 10)
    assert all("step_20.tmp: its writing was interrupted" in message for message in messages)
    assert verify(write(tmp_path, 30)) == []


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20, 10):
        write(tmp_path, step)
    prune(tmp_path, 2)
    assert steps(tmp_path) == ["step_100", "step_20"]
    prune(tmp_path, 2)
    assert steps(tmp_path) == ["step_100", "step_20"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        prune(tmp_path, 0)
    assert steps(tmp_path) == ["step_100", "step_20"]


@pytest.mark.parametrize("kind", TORN)
def test_prune_never_deletes_the_newest_whole_one(tmp_path: Path, kind: str) -> None:
    for step in (5, 10, 20):
        write(tmp_path, step)
    TORN[kind][0](tmp_path / "checkpoints" / "step_20")
    prune(tmp_path, 1)
    assert latest_complete(tmp_path, lambda message: None) == tmp_path / "checkpoints" / "step_10"
    assert "step_5" not in steps(tmp_path)


def test_prune_sweeps_torn_ones_behind_the_newest_whole_one(tmp_path: Path) -> None:
    for step in (5, 10, 30):
        write(tmp_path, step)
    begin(tmp_path, 7)
    begin(tmp_path, 40)
    (tmp_path / "checkpoints" / "step_10" / MANIFEST_NAME).unlink()
    prune(tmp_path, 2)
    assert steps(tmp_path) == ["step_30", "step_40.tmp", "step_5"]


def test_an_interrupted_deletion_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        write(tmp_path, step)

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step_10").iterdir()) == [
        "empty",
        "model.safetensors",
        "ranks",
    ]
    monkeypatch.undo()
    prune(tmp_path, 1)
    assert steps(tmp_path) == ["step_20"]


def test_reading_a_torn_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no file COMPLETE\. Resume from another checkpoint"):
        read_manifest(begin(tmp_path, 20))
