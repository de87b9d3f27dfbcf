"""The command, as a user calls it."""

import re
import sysconfig
from pathlib import Path

import pytest

from launch.prepare_data import main
from mmrec_train.data import LaneLoader, load_tokenizer, open_dataset
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR
from tests.preparation.fake_hub import fake_hub
from tests.preparation.texts import TEXTS, stored_texts, write_lines

STDLIB = Path(sysconfig.get_path("stdlib"))


def test_standard_library_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    command = ["--source", "stdlib", "--train-tokenizer", "512", "--max-tokens", "200000", "--out", str(out)]
    assert main([*command, "--validation-fraction", "0.1"]) == EXIT_OK
    dataset = open_dataset(out, "train", verify=True)
    loader = LaneLoader(dataset, StreamSettings(), num_lanes=4, chunk_len=64, micro_batch_size=4)
    [chunk] = loader.next_step()
    end = [*chunk.reset[0, 1:].tolist(), True].index(True) + 1  # of the first document, in the chunk
    text = load_tokenizer(out).decode(chunk.input_ids[0, 1:end])
    assert any(file.read_text(errors="replace").startswith(text) for file in STDLIB.rglob("*.py"))
    assert chunk.input_ids.max() < dataset.manifest.vocab_size == 512
    assert f"train: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens" in capsys.readouterr().out
    total = dataset.num_tokens + dataset.manifest.sources["main"].splits["validation"].tokens
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
    assert "left out: 1 empty" in lines
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

    monkeypatch.setattr("mmrec_train.preparation.ingest.prepare", interrupted)
    assert main(["--source", "stdlib", "--train-tokenizer", "300", "--out", str(tmp_path)]) == EXIT_FAILURE
    assert capsys.readouterr().err == "interrupted; run the same command to go on\n"


@pytest.mark.parametrize("running", [True, False])
def test_hub_without_the_data_set_and_without_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    monkeypatch.setattr("mmrec_train.preparation.hub._FIRST_WAIT", 0.01)
    with fake_hub({"acme/texts": {}}) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        command = ["--source", "acme/other", "--train-tokenizer", "300", "--out", str(tmp_path / "out")]
        exit_code = main(command) if running else None
    if not running:
        exit_code = main(command)
    assert exit_code == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: reading --source acme/other from the Hugging Face hub failed")
    assert ("404" in message) == running


def test_options_of_one_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"title": f"t{n % 5}", "body": "b" * n, "meta": {"lang": ["en", "de", "fr"][n % 3]}, "n": n} for n in range(30)
    ]
    source, out = write_lines(tmp_path / "a.jsonl", records), tmp_path / "out"
    command = ["--source", str(source), "--template", "{title}\n{body}", "--language", "meta.lang=en,de"]
    command += ["--min-characters", "8", "--max-characters", "25", "--deduplicate", "--processes", "1"]
    command += ["--train-tokenizer", "300", "--validation-fraction", "0", "--out", str(out)]
    assert main(command) == EXIT_OK
    expected = [f"t{n % 5}\n" + "b" * n for n in range(30) if n % 3 < 2 and 8 <= 3 + n <= 25]
    assert stored_texts(out) == expected
    assert "left out: 4 too short, 4 too long, 10 language" in capsys.readouterr().out


def test_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "a.jsonl", ["one", "two", ""])
    write_lines(tmp_path / "b.jsonl", ["two", "three"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sources:\n  a: {source: a.jsonl, weight: 3}\n  b: {source: b.jsonl, weight: 1}\ndeduplicate: true\n"
    )
    command = ["--recipe", str(recipe), "--train-tokenizer", "300", "--processes", "1", "--out", str(tmp_path / "out")]
    recipe.write_text(recipe.read_text() + "validation_fraction: none\n")
    assert main(command) == EXIT_USER_ERROR
    assert "recipe.yaml:5: validation_fraction: must be a valid number" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace("none", "0").replace("b.jsonl", "absent.jsonl"))
    assert main(command) == EXIT_USER_ERROR
    assert re.fullmatch(
        r"error: sources\.b: --source .*absent\.jsonl: no such file or folder\n", capsys.readouterr().err
    )
    recipe.write_text(recipe.read_text().replace("absent.jsonl", "b.jsonl"))
    assert main(command) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" documents")[0] for line in lines[:1]] == ["a, train: 2"]
    assert "a, left out: 1 empty" in lines and "b, left out: 1 duplicate" in lines
    assert stored_texts(tmp_path / "out", source="b") == ["three"]


def test_options_that_belong_into_the_recipe_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--recipe", "r.yaml", "--deduplicate", "--text-field", "x", "--train-tokenizer", "300", "--out", "out"]
    with pytest.raises(SystemExit):
        main(command)
    assert "--text-field, --deduplicate: write that into the recipe, r.yaml" in capsys.readouterr().err


def test_progress_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    command = ["--source", str(source), "--train-tokenizer", "300", "--processes", "1", "--out", str(tmp_path / "out")]
    assert main(command) == EXIT_OK
    shown = capsys.readouterr().err
    assert "training the tokenizer" in shown and "200 documents" in shown and "tokens/s" in shown and "0:00:00" in shown


def test_progress_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.prepare_data._SECONDS_BETWEEN_LINES", 0.0)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text("some words " * 200_000)
    (tmp_path / "real").mkdir()
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "real")  # an empty folder, which the data set takes the place of
    command = ["--source", str(texts), "--train-tokenizer", "300", "--out", str(out), "--processes", "1"]
    assert main([*command, "--validation-fraction", "0"]) == 0
    lines = capsys.readouterr().err
    assert re.search(
        r"^\w.*: \d documents, .* MB, [\d,]+ tokens, [\d,]+ tokens/s, \d+%, \d:\d\d:\d\d left$", lines, re.M
    )
    assert (tmp_path / "real/manifest.json").exists()


def test_a_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--source", "stdlib", "--train-tokenizer", "300", "--out", str(tmp_path / "out"), "--processes", "0"])
    assert "argument --processes: 0 is not at least 1" in capsys.readouterr().err
