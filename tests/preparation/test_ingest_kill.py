"""Killed at any moment, an ingest goes on without losing or doubling a document."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrec_train.data.tokenizer import train_tokenizer
from mmrec_train.preparation.ingest import Settings, prepare
from mmrec_train.preparation.recipe import Recipe
from tests.preparation.killing import PROGRAM
from tests.preparation.texts import TEXTS, contents, recipe_of, write_lines

ROOT = Path(__file__).parents[2]


def request(folder: Path, recipe: Recipe, tokenizer: str | int, settings: dict[str, Any]) -> dict[str, bytes]:
    """Write what is to be prepared for `killing`, prepare it undisturbed, and return the data set's files."""
    value = {"recipe": recipe.model_dump(mode="json"), "tokenizer": tokenizer, "settings": settings}
    (folder / "request.json").write_text(json.dumps(value))
    undisturbed = Settings(1, settings["shard_bytes"])
    prepare(recipe, folder / "undisturbed", tokenizer=tokenizer, settings=undisturbed)
    return contents(folder / "undisturbed")


def killing(folder: Path, how: str, *arguments: object) -> list[int]:
    command = [sys.executable, "-c", PROGRAM, how, str(folder), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return list(map(int, done.stdout.split()))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Three sources of different forms, with filters, duplicates and a limit."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, *TEXTS[::3], ""])
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = {"body": [f"row {number} " * (number % 30) for number in range(300)], "id": list(range(300))}
    pq.write_table(pa.table(table), tmp_path / "table.parquet", row_group_size=70)
    (tmp_path / "files").mkdir()
    for number in range(60):
        (tmp_path / f"files/{number:02}.txt").write_text(f"file {number} " * (number % 9))
    sources: dict[str, dict[str, Any]] = {
        "lines": {"source": str(tmp_path / "lines.jsonl.gz"), "filters": {"max_characters": 150}},
        "table": {"source": str(tmp_path / "table.parquet"), "text_field": "body", "max_tokens": 6000},
        "files": {"source": str(tmp_path / "files")},
    }
    return recipe_of(sources, deduplicate=True, validation_fraction=0.2)


def test_fifty_kills_at_random_moments(tmp_path: Path, recipe: Recipe) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "tokenizer")
    settings = {"shard_bytes": 3000, "batch_bytes": 600, "commit_seconds": 0}
    undisturbed = request(tmp_path, recipe, str(tmp_path / "tokenizer"), settings)
    assert len([name for name in undisturbed if name.endswith(".bin")]) >= 10
    kills, of_two_processes = killing(tmp_path, "random", 11, 50, 0.2)
    assert kills >= 50 and of_two_processes >= 10
    whole = sorted(tmp_path.glob("whole_*"))
    assert whole
    for folder in whole:
        assert contents(folder) == undisturbed
    assert not [path for folder in tmp_path.glob(".*.partial") for path in folder.iterdir()]


def test_killed_before_every_step(tmp_path: Path) -> None:
    """From the first note in the journal to the last file removed, the training of a tokenizer included."""
    source = write_lines(tmp_path / "lines.jsonl", TEXTS[:9])
    settings = {"shard_bytes": 300, "batch_bytes": 500, "commit_seconds": 0}
    recipe = recipe_of(source, deduplicate=True, validation_fraction=0.2)
    undisturbed = request(tmp_path, recipe, 260, settings)
    [steps] = killing(tmp_path, "steps")
    assert steps > 25
    for number in range(steps + 1):
        assert contents(tmp_path / f"whole_{number}") == undisturbed, f"killed before step {number}"
    left = [list(folder.iterdir()) for folder in tmp_path.glob(".*.partial")]
    assert left in ([], [[]])  # an empty one of the child that was killed before it removed that


def test_workers_end_with_a_killed_parent_and_the_next_one_goes_on(tmp_path: Path, recipe: Recipe) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "tokenizer")
    settings = {"shard_bytes": 3000, "batch_bytes": 600, "commit_seconds": 0}
    undisturbed = request(tmp_path, recipe, str(tmp_path / "tokenizer"), settings)
    program = (
        "import sys; from pathlib import Path; from tests.preparation.killing import start, was_killed\n"
        "folder = Path(sys.argv[1]); sys.exit(was_killed(start(folder, folder / 'out', processes=2)))"
    )
    parent = psutil.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    committed = tmp_path / ".out.partial/data/train/lines/shard_00001.idx"
    deadline = time.monotonic() + 100
    while not committed.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    [child] = parent.children()
    workers = [process for process in child.children() if "spawn_main" in " ".join(process.cmdline())]
    assert len(workers) == 2
    child.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2 and not alive
    assert parent.wait(30) == 1
    assert not (tmp_path / "out").exists()
    prepare(recipe, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"), settings=Settings(1, 3000))
    assert contents(tmp_path / "out") == undisturbed
