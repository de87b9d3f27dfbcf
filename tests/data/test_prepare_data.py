"""The command, as a user calls it."""

import io
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.prepare_data import main
from mmrec_train.data import LaneLoader, load_tokenizer, open_dataset
from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR
from tests.data.fake_hub import REVISION, fake_hub

ROOT = Path(__file__).parents[2]
STDLIB = Path(sysconfig.get_path("stdlib"))


def test_standard_library_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    command = ["--source", "stdlib", "--train-tokenizer", "512", "--max-tokens", "200000", "--out", str(out)]
    assert main([*command, "--validation-fraction", "0.1"]) == EXIT_OK
    dataset = open_dataset(out, "train", verify=True)
    loader = LaneLoader(dataset, num_lanes=4, chunk_len=64, seed=0, rank=0, world_size=1, micro_batch_size=4)
    [chunk] = loader.next_step()
    text = load_tokenizer(out).decode(chunk.input_ids[0, 1:])
    assert any(file.read_text(errors="replace").startswith(text) for file in STDLIB.rglob("*.py"))
    assert chunk.input_ids.max() < dataset.manifest.vocab_size == 512
    assert f"train: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens" in capsys.readouterr().out
    total = dataset.num_tokens + dataset.manifest.splits["validation"].tokens
    assert 200_000 <= total < 250_000


def test_summary_names_what_was_repaired_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(b"good \xff\xff bad")
    (source / "b.txt").write_bytes(b"")
    (source / "c.bin").write_bytes(b"")
    command = ["--source", str(source), "--train-tokenizer", "300", "--validation-fraction", "0"]
    assert main([*command, "--out", str(tmp_path / "out")]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 1 documents, ")
    assert "invalid UTF-8: 2 replacements by U+FFFD in 1 documents" in lines
    assert "left out: 1 documents without text" in lines
    assert "not read: 1 files of other kinds (see --pattern)" in lines


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--source",
        str(tmp_path / "absent.txt"),
        "--train-tokenizer",
        "300",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: --source {tmp_path}/absent.txt: no such file or folder\n"


def test_an_interrupt_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.prepare_data.prepare", interrupted)
    assert main(["--source", "stdlib", "--train-tokenizer", "300", "--out", str(tmp_path)]) == EXIT_FAILURE
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "body": texts}), buffer)
    return buffer.getvalue()


def test_hub_data_set(tmp_path: Path) -> None:
    """In a process of its own, because the libraries read the hub's address when they are imported."""
    texts = [f"row {number} of the data set" for number in range(50)]
    files = {
        "data/train-00000-of-00002.parquet": parquet(texts[:30]),
        "data/train-00001-of-00002.parquet": parquet(texts[30:]),
        "data/test-00000-of-00001.parquet": parquet(["another split"]),
    }
    usual = ["--source", "acme/texts", "--text-field", "body", "--train-tokenizer", "300"]
    good = [*usual, "--validation-fraction", "0", "--out", str(tmp_path / "out")]
    bad = [*usual, "--split", "nope", "--out", str(tmp_path / "bad")]
    with fake_hub("acme/texts", files) as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", f"from launch.prepare_data import main; print(main({good}), main({bad}))"],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.stdout.splitlines()[-1] == f"{EXIT_OK} {EXIT_USER_ERROR}", done.stderr
    dataset = open_dataset(tmp_path / "out", "train", verify=True)
    tokenizer = load_tokenizer(tmp_path / "out")
    stored = [dataset.read(i, 1, dataset.document_length(i)) for i in range(dataset.num_documents)]
    assert [tokenizer.decode(document) for document in stored] == texts
    assert dataset.manifest.source["revision"] == REVISION
    assert "Bad split: nope. Available splits: ['train', 'test']" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("running", [True, False])
def test_hub_without_the_data_set_and_without_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    with fake_hub("acme/texts", {}) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        command = ["--source", "acme/other", "--train-tokenizer", "300", "--out", str(tmp_path / "out")]
        exit_code = main(command) if running else None
    if not running:
        exit_code = main(command)
    assert exit_code == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: reading --source acme/other from the Hugging Face hub failed")
    assert ("404" in message) == running
