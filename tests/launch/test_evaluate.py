"""launch/evaluate.py and the evaluation below it, against a plain loop over documents."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from launch.evaluate import main
from mmrec_train.data import TokenDataset, open_dataset
from mmrec_train.data.views import head
from mmrec_train.evaluation import Evaluation, FixedLanes, combine, evaluate, losses_by_position
from mmrec_train.model import MMRecForCausalLM
from tests.data.documents import numbered_documents, write_documents
from tests.launch.trained import small_model, tear, write_checkpoint
from tests.trainer.texts import write_texts

LENGTHS = (1300, 3, 700, 1, 90, 1500, 400, 2, 33)  # characters


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Documents of very different lengths; the two longest pass the first position bucket."""
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for length in LENGTHS]
    return write_texts(tmp_path_factory.mktemp("evaluate") / "data", {"train": {"main": texts}})


@pytest.fixture(scope="module")
def model(data: Path) -> MMRecForCausalLM:
    return small_model(data)


@torch.no_grad()
def losses_one_by_one(model: MMRecForCausalLM, dataset: TokenDataset) -> list[list[float]]:
    """Of each document alone, the loss of every token, from whole logits."""
    result = []
    [source] = dataset.sources.values()
    for document in range(source.num_documents):
        tokens = torch.tensor(source.read(document).tolist())
        logits = model(input_ids=tokens.unsqueeze(0)).logits[0]
        labels = torch.cat([tokens[1:], torch.tensor([dataset.manifest.eos_id])])
        result.append([-F.log_softmax(row, -1)[label].item() for row, label in zip(logits, labels, strict=True)])
    return result


@pytest.fixture(scope="module")
def expected(model: MMRecForCausalLM, data: Path) -> list[list[float]]:
    return losses_one_by_one(model, open_dataset(data, "train", verify=False))


@pytest.mark.parametrize("batch, chunk_len", [(1, 4000), (3, 17), (5, 256), (12, 100)])
def test_the_loss_is_that_of_a_plain_loop(
    model: MMRecForCausalLM,
    data: Path,
    expected: list[list[float]],
    batch: int,
    chunk_len: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmrec_train.model.loss.LOSS_SLICE_TOKENS", 50)
    dataset = open_dataset(data, "train", verify=False)
    [result] = evaluate(model, dataset, chunk_len=chunk_len, batch=batch).values()
    everything = [loss for document in expected for loss in document]
    assert result.tokens == len(everything) == dataset.num_tokens
    assert result.loss == pytest.approx(sum(everything) / len(everything), rel=1e-6)

    beginning = [loss for document in expected for loss in document[:1024]]
    later = [loss for document in expected for loss in document[1024:]]
    first, second = result.by_position
    assert (first.start, first.stop, first.tokens) == (0, 1024, len(beginning))
    assert (second.start, second.stop, second.tokens) == (1024, 8192, len(later))
    assert len(later) > 100
    assert first.loss == pytest.approx(sum(beginning) / len(beginning), rel=1e-6)
    assert second.loss == pytest.approx(sum(later) / len(later), rel=1e-6)


def test_every_bucket_begins_at_its_edge(
    model: MMRecForCausalLM, data: Path, expected: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrec_train.evaluation.POSITION_EDGES", (0, 1, 7, 600))
    [result] = evaluate(model, open_dataset(data, "train", verify=False), chunk_len=64, batch=4).values()
    assert [(b.start, b.stop) for b in result.by_position] == [(0, 1), (1, 7), (7, 600), (600, None)]
    assert combine([result]) == result
    for bucket in result.by_position:
        losses = [loss for document in expected for loss in document[bucket.start : bucket.stop]]
        assert bucket.tokens == len(losses)
        assert bucket.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_documents_beyond_every_edge(tmp_path: Path, batch: int) -> None:
    """Losses are made of token ids: a model would take long for a document of more than 100K tokens."""

    def losing(*, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(loss=input_ids % 977, memory_states=())

    documents = numbered_documents([500, 140_000, 33_000, 1, 8193])
    lanes = FixedLanes(head(write_documents(tmp_path, documents), "main", None), chunk_len=8192, batch=batch)
    result = Evaluation.of(torch.stack(list(losses_by_position(losing, lanes, torch.device("cpu")))).sum(0))
    edges = [(0, 1024), (1024, 8192), (8192, 32768), (32768, 102400), (102400, None)]
    assert [(bucket.start, bucket.stop) for bucket in result.by_position] == edges
    for bucket in result.by_position:
        losses = [token % 977 for document in documents for token in document[bucket.start : bucket.stop]]
        assert bucket.tokens == len(losses)
        assert bucket.loss == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize("batch, chunk_len", [(1, 20), (3, 64), (5, 999)])
@pytest.mark.parametrize("limit", [1, 50, 1101, 1102, 2000])
def test_a_limit_of_tokens_takes_the_first_ones_and_their_true_labels(
    model: MMRecForCausalLM, data: Path, expected: list[list[float]], limit: int, batch: int, chunk_len: int
) -> None:
    """Where the last document is cut, its last token still predicts the one that follows it."""
    seen: list[int] = []
    dataset = open_dataset(data, "train", verify=False)
    results = evaluate(model, dataset, chunk_len=chunk_len, batch=batch, tokens=limit, on_progress=seen.append)
    [result] = results.values()
    first = [loss for document in expected for loss in document][:limit]
    assert result.tokens == seen[-1] == limit
    assert result.loss == pytest.approx(sum(first) / limit, rel=1e-6)


def test_a_limit_beyond_the_split_takes_all_of_it(model: MMRecForCausalLM, data: Path) -> None:
    dataset = open_dataset(data, "train", verify=False)
    [result] = evaluate(model, dataset, chunk_len=500, batch=2, tokens=10**9).values()
    assert result.tokens == dataset.num_tokens


def test_sources_are_evaluated_one_by_one(model: MMRecForCausalLM, data: Path, tmp_path: Path) -> None:
    texts = {"train": {"b": ["some words"] * 3, "a": ["other, longer words"] * 50}}
    dataset = open_dataset(write_texts(tmp_path / "two", texts), "train", verify=False)
    results = evaluate(model, dataset, chunk_len=16, batch=2, tokens=40)
    assert {name: result.tokens for name, result in results.items()} == {
        name: min(40, source.num_tokens) for name, source in dataset.sources.items()
    }
    alone = {name: evaluate(model, head(dataset, name, 40), chunk_len=64, batch=1)[name] for name in dataset.sources}
    for name, result in results.items():
        assert result.loss == pytest.approx(alone[name].loss, rel=1e-6)
    everything = combine(results.values())
    assert everything.tokens == sum(result.tokens for result in results.values())
    assert everything.loss == pytest.approx(
        sum(result.loss * result.tokens for result in results.values()) / everything.tokens
    )


def test_logits_never_exist_for_a_whole_chunk(
    model: MMRecForCausalLM, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrec_train.model.loss.LOSS_SLICE_TOKENS", 32)
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.shape[0]))
    evaluate(model, open_dataset(data, "train", verify=False), chunk_len=100, batch=2)
    hook.remove()
    assert max(sizes) == 32


# ---- the command


def test_json_and_table_of_a_run_folder(
    model: MMRecForCausalLM,
    data: Path,
    expected: list[list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_checkpoint(tmp_path / "run", 5, small_model(data, seed=1), data)
    write_checkpoint(tmp_path / "run", 20, model, data)
    command = ["--checkpoint", str(tmp_path / "run"), "--data", str(data), "--split", "train"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    everything = [loss for document in expected for loss in document]
    loss = sum(everything) / len(everything)
    assert printed["tokens"] == len(everything)
    assert list(printed["sources"]) == ["main"]
    assert printed["loss"] == pytest.approx(loss, rel=1e-6)
    assert printed["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert [(b["start"], b["stop"]) for b in printed["by_position"]] == [(0, 1024), (1024, 8192)]
    assert printed["by_position"][1]["perplexity"] == pytest.approx(
        math.exp(printed["by_position"][1]["loss"]), rel=1e-9
    )

    assert main(command) == 0
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["all", f"{len(everything):,}", f"{loss:.4f}", f"{math.exp(loss):.2f}"] in rows
    assert [row[0] for row in rows if row and row[0] in ("0–1K", "1K–8K")] == ["0–1K", "1K–8K"]


def test_several_sources_have_a_table_each_and_one_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"validation": {"prose": ["some words"] * 9, "code": ["x = 1; y = 22"] * 7}}
    data = write_texts(tmp_path / "data", texts)
    write_checkpoint(tmp_path / "run", 1, small_model(data), data)
    command = ["--checkpoint", str(tmp_path / "run"), "--data", str(data), "--tokens", "20"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    parts = printed["sources"]
    assert {name: part["tokens"] for name, part in parts.items()} == {"prose": 20, "code": 20}
    assert printed["tokens"] == 40 and [b["tokens"] for b in printed["by_position"]] == [40]
    assert printed["loss"] == pytest.approx((parts["prose"]["loss"] + parts["code"]["loss"]) / 2)

    assert main(command) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line in ("prose", "code", "all sources")] == ["prose", "code", "all sources"]


def test_a_model_that_diverged_still_gives_json(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = small_model(data)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    write_checkpoint(tmp_path, 1, broken, data)
    command = ["--checkpoint", str(tmp_path), "--data", str(data), "--split", "train", "--tokens", "10"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["loss"] is None and printed["perplexity"] is None


def refusal(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_a_torn_checkpoint_is_skipped_or_refused(
    model: MMRecForCausalLM, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, 5, model, data)
    newest = write_checkpoint(tmp_path, 20, model, data)
    tear(newest)
    options = ["--data", str(data), "--split", "train", "--tokens", "10"]
    assert "step_20/model/model.safetensors has changed" in refusal(capsys, "--checkpoint", str(newest), *options)
    assert main(["--checkpoint", str(tmp_path), *options]) == 0
    assert f"Skipping checkpoint {newest}" in capsys.readouterr().err


def test_bad_input_is_one_message(
    model: MMRecForCausalLM, data: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "run", 1, model, data) / "model"
    good = ["--checkpoint", str(folder), "--data", str(data)]
    assert f"{tmp_path}/nowhere is neither a run folder" in refusal(
        capsys, "--checkpoint", str(tmp_path / "nowhere"), "--data", str(data), "--split", "train"
    )
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    assert "holds no complete checkpoint" in refusal(
        capsys, "--checkpoint", str(tmp_path / "empty"), "--data", str(data), "--split", "train"
    )
    assert "has no validation documents" in refusal(capsys, *good)
    assert "is not a prepared data set" in refusal(capsys, "--checkpoint", str(folder), "--data", str(tmp_path))
    assert "made with another tokenizer" in refusal(capsys, "--checkpoint", str(folder), "--data", str(dataset))
    assert "--batch is 0" in refusal(capsys, *good, "--batch", "0")


def test_a_hugging_face_folder_that_does_not_fit(
    model: MMRecForCausalLM, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "run", 1, model, data) / "model"
    command = ["--checkpoint", str(folder), "--data", str(data), "--split", "train"]
    config = folder / "config.json"
    original = json.loads(config.read_text())

    config.write_text(json.dumps(original | {"num_layers": 3}))
    assert "its weights do not fit its config.json: model.layers.2" in refusal(capsys, *command)
    config.write_text(json.dumps(original | {"model_type": "gpt2"}))
    assert "holds a model of type gpt2, not MM-Rec" in refusal(capsys, *command)
    config.write_text(json.dumps(original | {"num_heads": 3}))
    assert "cannot be loaded: hidden_dim 32 is not divisible by num_heads 3" in refusal(capsys, *command)
    config.write_text(json.dumps(original | {"ffn_dim": 40}))
    assert "cannot be loaded" in refusal(capsys, *command)
    config.write_text("{")
    assert "cannot be loaded" in refusal(capsys, *command)
    config.write_text(json.dumps(original))
    (folder / "model.safetensors").write_bytes(b"{}")
    assert "cannot be loaded" in refusal(capsys, *command)
