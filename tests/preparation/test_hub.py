"""Data sets of a hub on this machine. In processes of their own: the libraries read the hub's address on import."""

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrec_train.data.dataset import open_dataset
from mmrec_train.data.manifest import read_manifest
from mmrec_train.data.tokenizer import Encoder, load_tokenizer, special_ids, train_tokenizer
from mmrec_train.errors import EXIT_OK, EXIT_USER_ERROR
from mmrec_train.preparation import hub
from tests.preparation.fake_hub import REVISION, fake_hub
from tests.preparation.killing import PROGRAM
from tests.preparation.texts import TEXTS, contents, prepare_texts, recipe_of, stored_texts

ROOT = Path(__file__).parents[2]
IMPATIENT = """
from datasets import config
from mmrec_train.preparation import hub
config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = hub._FIRST_WAIT = 0.1
"""
ROWS = [f"row {number} of the data set " * (number % 9 + 1) for number in range(700)]


def parquet(texts: list[str], first: int = 0, group: int = 1000) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"id": list(range(first, first + len(texts))), "body": texts})
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


FILES = {
    "data/train-00000-of-00002.parquet": parquet(ROWS[:300], group=70),
    "data/train-00001-of-00002.parquet": parquet(ROWS[300:], 300, group=1000),
    "data/test-00000-of-00001.parquet": parquet(["another split"]),
}
README = f"""---
dataset_info:
  features:
  - name: id
    dtype: int64
  - name: body
    dtype: string
  splits:
  - name: train
    num_bytes: {sum(map(len, ROWS))}
    num_examples: {len(ROWS)}
  - name: test
    num_bytes: 13
    num_examples: 1
---
"""


def run(arguments: list[str], endpoint: str, home: Path) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


def prepare(commands: list[list[str]], endpoint: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """Runs launch/prepare_data.py with each of the arguments in turn; the last line printed has the exit codes."""
    program = f"{IMPATIENT}from launch.prepare_data import main\nprint(*[main(command) for command in {commands}])"
    return run(["-c", program], endpoint, home)


@dataclass(frozen=True)
class Prepared:
    """Of each command the exit code and, in a folder of its name, the data set; how often troubled paths were asked."""

    folder: Path
    codes: dict[str, int]
    errors: str
    asked: dict[str, int]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Data sets that one process prepared one after another: its imports take seconds.

    The hub has a tokenizer, too. It has trouble with one of the data sets: with the question which commit is the
    latest, and with each file. It gives no answer first, then an error.
    """
    folder = tmp_path_factory.mktemp("hub")
    lines = "".join(json.dumps({"body": text, "meta": {"n": n}, "other": [n]}) + "\n" for n, text in enumerate(ROWS))
    data_sets = {
        "acme/parquet": FILES,
        "acme/lines": {"train.jsonl.gz": gzip.compress(lines.encode())},
        "acme/troubled": FILES,
    }
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300).save_pretrained(tokenizer)
    body, trained = ["--text-field", "body"], ["--train-tokenizer", "300"]
    options = {
        "parquet": ["--source", "acme/parquet", *body, *trained],
        "no_split": ["--source", "acme/parquet", *body, *trained, "--split", "nope"],
        "lines": ["--source", "acme/lines", "--template", "{meta.n}: {body}", *trained],
        "troubled": ["--source", "acme/troubled", *body, *trained],
        "tokenizer": ["--source", "acme/parquet", *body, "--tokenizer", "acme/tok"],
        "no_tokenizer": ["--source", "acme/parquet", *body, "--tokenizer", "acme/absent"],
    }
    usual = ["--processes", "1", "--validation-fraction", "0"]
    commands = [[*command, *usual, "--out", str(folder / name)] for name, command in options.items()]

    files = [f"/datasets/acme/troubled/resolve/{REVISION}/{file}" for file in FILES]
    asked = dict.fromkeys(["/api/datasets/acme/troubled", *files], 0)

    def trouble(path: str) -> int | float | None:
        if path not in asked:
            return None
        asked[path] += 1
        return {1: 1.3, 2: 503}.get(asked[path])

    with fake_hub(data_sets, trouble, {"acme/tok": contents(tokenizer)}) as endpoint:
        done = prepare(commands, endpoint, folder / "home")
    assert done.returncode == 0, done.stderr
    codes = map(int, done.stdout.splitlines()[-1].split())
    return Prepared(folder, dict(zip(options, codes, strict=True)), done.stderr, asked)


def test_a_data_set_in_parquet(prepared: Prepared) -> None:
    assert prepared.codes["parquet"] == EXIT_OK, prepared.errors
    assert stored_texts(prepared.folder / "parquet") == ROWS
    assert read_manifest(prepared.folder / "parquet").sources["main"].provenance == {
        "kind": "hub",
        "dataset": "acme/parquet",
        "name": None,
        "split": "train",
        "revision": REVISION,
        "text_field": "body",
    }


def test_a_split_that_there_is_not(prepared: Prepared) -> None:
    assert prepared.codes["no_split"] == EXIT_USER_ERROR, prepared.errors
    assert "Bad split: nope. Available splits: ['train', 'test']" in prepared.errors
    assert "Traceback" not in prepared.errors
    found = sorted(path.name for path in prepared.folder.iterdir())
    assert found == ["home", "lines", "parquet", "tokenizer", "troubled"]


def test_a_data_set_in_compressed_lines_with_a_template(prepared: Prepared) -> None:
    assert prepared.codes["lines"] == EXIT_OK, prepared.errors
    assert stored_texts(prepared.folder / "lines") == [f"{number}: {text}" for number, text in enumerate(ROWS)]


def test_a_hub_that_times_out_and_fails_and_then_answers(prepared: Prepared) -> None:
    assert prepared.codes["troubled"] == EXIT_OK, prepared.errors
    assert stored_texts(prepared.folder / "troubled") == ROWS
    assert all(count >= 3 for path, count in prepared.asked.items() if "test-" not in path)


def test_a_tokenizer_by_its_name(prepared: Prepared) -> None:
    assert prepared.codes["tokenizer"] == EXIT_OK, prepared.errors
    data, original = prepared.folder / "tokenizer", train_tokenizer(TEXTS, 300)
    stored = load_tokenizer(data)
    assert special_ids(stored) == special_ids(original)
    assert stored.get_vocab() == original.get_vocab()
    texts = [*ROWS, *TEXTS, "<|endoftext|> is text; äöü and 漢字 are, too"]
    expected = [tokens.tolist() for tokens in Encoder(original)(texts)]
    assert [tokens.tolist() for tokens in Encoder(stored)(texts)] == expected
    source = open_dataset(data, "train", verify=True).sources["main"]
    assert [source.read(document).tolist() for document in range(source.num_documents)] == expected[: len(ROWS)]
    assert read_manifest(data).preparation["tokenizer"] == "acme/tok"


def test_a_tokenizer_that_there_is_not(prepared: Prepared) -> None:
    assert prepared.codes["no_tokenizer"] == EXIT_USER_ERROR, prepared.errors
    [message] = [line for line in prepared.errors.splitlines() if "acme/absent" in line]
    assert message.startswith("error: cannot load the tokenizer acme/absent: acme/absent is not a local folder and ")
    assert "hf auth login" in message  # where it is private
    remedy = "Give a folder with tokenizer.json and tokenizer_config.json, or a name on the Hugging Face hub."
    assert message.endswith(f" {remedy} Nothing was written.")
    assert "Traceback" not in prepared.errors


PROGRESS = """
import json
import sys
from contextlib import suppress
from pathlib import Path
from mmrec_train.preparation.ingest import Settings, prepare
from tests.preparation.texts import recipe_of

def note(progress):
    reports.append((progress.documents, progress.done))
    if len(reports) == 4:
        raise KeyboardInterrupt

folder, *data_sets = sys.argv[1:]
settings = Settings(1, batch_bytes=10_000, commit_seconds=0)
for number, name in enumerate(data_sets):
    recipe = recipe_of({"main": {"source": name, "text_field": "body"}})
    out, reports = Path(folder, str(number)), []
    while not out.exists():
        with suppress(KeyboardInterrupt):
            prepare(recipe, out, tokenizer=str(Path(folder, "tokenizer")), settings=settings, on_progress=note)
    print(json.dumps(reports))
"""


def test_how_much_is_done_where_the_data_set_tells_its_rows(tmp_path: Path) -> None:
    """The rows of the split are the whole, before and after an interrupt; where it does not tell, it is not known."""
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "tokenizer")
    data_sets = {"acme/described": {**FILES, "README.md": README.encode()}, "acme/bare": FILES}
    with fake_hub(data_sets) as endpoint:
        done = run(["-c", PROGRESS, str(tmp_path), *data_sets], endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    described, bare = map(json.loads, done.stdout.splitlines())
    assert len(described) >= 8
    assert [part for _, part in described] == [documents / len(ROWS) for documents, _ in described]
    assert described[-1] == [len(ROWS), 1.0]
    assert [documents for documents, _ in bare] == [documents for documents, _ in described]
    assert {part for _, part in bare} == {None}


READ = """
import sys
from pathlib import Path
from mmrec_train.data.cache_folder import CacheSettings
from mmrec_train.data.dataset import open_dataset
from mmrec_train.errors import UserError
for number, url in enumerate(sys.argv[2:]):
    try:
        dataset = open_dataset(url, "train", verify=True, cache=CacheSettings(Path(sys.argv[1], str(number))))
        source = dataset.sources["main"]
        print([source.read(document).tolist() for document in range(source.num_documents)])
    except UserError as error:
        print(error)
"""


def test_a_prepared_data_set_on_the_hub(tmp_path: Path) -> None:
    """By hf:// at the newest commit and at a named one; and one that is not there."""
    prepare_texts(tmp_path / "tokens", TEXTS)
    source = open_dataset(tmp_path / "tokens", "train", verify=True).sources["main"]
    documents = [source.read(document).tolist() for document in range(source.num_documents)]
    files = {f"prepared/{name}": content for name, content in contents(tmp_path / "tokens").items()}
    urls = [f"hf://datasets/acme/tokens{path}" for path in ("/prepared", f"@{REVISION}/prepared", "/elsewhere")]
    with fake_hub({"acme/tokens": files}) as endpoint:
        done = run(["-c", READ, str(tmp_path / "cache"), *urls], endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    newest, named, missing = done.stdout.splitlines()
    assert json.loads(newest) == json.loads(named) == documents
    assert missing.startswith(f"{urls[2]} is not a prepared data set: it has no manifest.json")


def test_rows_are_gathered_up_to_a_size_and_no_further() -> None:
    read = []

    def tables() -> Iterator[pa.Table]:
        for number, size in enumerate([10, 10, 500, 10, 10]):
            read.append(number)
            yield pa.table({"body": ["x" * size]})

    gathered = [(table["body"].to_pylist(), len(read)) for table in hub._gathered(tables(), 300)]
    assert [(list(map(len, texts)), count) for texts, count in gathered] == [([10, 10, 500], 3), ([10, 10], 5)]
    many = [pa.table({"body": [""] * 300})] * 9
    assert [len(table) for table in hub._gathered(many, 10**9)] == [1200, 1200, 300]


def test_killed_in_the_middle_of_the_stream(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "tokenizer")
    settings = {"shard_bytes": 3000, "batch_bytes": 1000, "commit_seconds": 0}
    source = {"source": "acme/texts", "text_field": "body"}
    value: dict[str, Any] = {"recipe": recipe_of({"main": source}).model_dump(mode="json"), "settings": settings}
    (tmp_path / "request.json").write_text(json.dumps({**value, "tokenizer": str(tmp_path / "tokenizer")}))
    with fake_hub({"acme/texts": FILES}) as endpoint:
        done = run(["-c", PROGRAM, "random", str(tmp_path), "3", "6", "1.2"], endpoint, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    kills, of_two_processes = map(int, done.stdout.split())
    assert kills >= 6 and of_two_processes >= 1
    whole = sorted(tmp_path.glob("whole_*"))
    for folder in whole:
        assert stored_texts(folder) == ROWS
        assert contents(folder) == contents(whole[0])
