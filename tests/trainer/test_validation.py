"""Validation sets: what is counted, that ranks agree, and that training does not notice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmrec_train.data import open_dataset
from mmrec_train.evaluation import Evaluation, combine, evaluate
from mmrec_train.model import MMRecForCausalLM
from mmrec_train.monitoring import Record, read_metrics
from mmrec_train.trainer.validation import metrics
from tests.trainer import ranks
from tests.trainer.command import Command, Result
from tests.trainer.texts import write_texts

SETTINGS = ["train.steps=2", "schedule.warmup_steps=1", "train.validate_every=2", "logging.sample_tokens=0"]
TOKENS = 1500


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; the held-out documents of the first have more than TOKENS, one of them beyond the first bucket."""
    numbers = [" ".join(map(str, range(i, i + 3 + i % 40))) for i in range(200)]
    words = [f"the word {i} " * (1 + i % 17) for i in range(200)]
    long = " ".join(map(str, range(1000, 1900)))
    texts = {
        "train": {"numbers": numbers, "words": words},
        "validation": {"numbers": [*numbers[:3], long, *numbers[3:40]], "words": words[:30]},
    }
    return write_texts(tmp_path_factory.mktemp("validation") / "data", texts)


@pytest.fixture
def pretrain(
    config_file: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    command = Command(config_file, capsys, monkeypatch)
    settings = [*SETTINGS, f"data.path={data}", f"train.validation_tokens={TOKENS}"]
    return lambda *overrides: command(*settings, *overrides)


def validations(run_dir: Path) -> list[Record]:
    return [record for record in read_metrics(run_dir) if "validation_loss" in record]


def evaluated(run_dir: Path, data: Path, step: int = 2, tokens: int = TOKENS) -> dict[str, Evaluation]:
    """The same by the code that evaluates checkpoints, one document at a time."""
    model = MMRecForCausalLM.from_pretrained(run_dir / f"checkpoints/step_{step}/model").eval()
    return evaluate(model, open_dataset(data, "validation", verify=False), chunk_len=4000, batch=1, tokens=tokens)


def assert_same(record: Record, expected: dict[str, Evaluation]) -> None:
    """A record of validation against evaluations by the sets' names."""
    numbers = {key: value for key, value in record.items() if key != "step"}
    assert numbers == pytest.approx(metrics(expected), rel=1e-5)
    assert record["validation_loss"] == pytest.approx(combine(expected.values()).loss, rel=1e-5)


@pytest.mark.parametrize("lanes, chunk_len", [(1, 48), (3, 700)])
def test_a_validation_is_an_evaluation_of_each_source(
    pretrain: Callable[..., Result], data: Path, tmp_path: Path, lanes: int, chunk_len: int
) -> None:
    settings = [f"train.micro_batch_size={lanes}", f"train.global_batch_size={lanes}", f"data.chunk_len={chunk_len}"]
    result = pretrain(*settings)
    assert result.code == 0, result
    expected = evaluated(tmp_path / "run", data)
    sources = open_dataset(data, "validation", verify=False).sources
    assert sources["numbers"].num_tokens > TOKENS > sources["words"].num_tokens
    assert {name: result.tokens for name, result in expected.items()} == {
        "numbers": TOKENS,
        "words": sources["words"].num_tokens,
    }
    first, last = validations(tmp_path / "run")
    assert (first["step"], last["step"]) == (0, 2)
    assert_same(last, expected)
    assert {key for key in last if "numbers" in key} == {
        "validation/numbers/loss",
        "validation/numbers/perplexity",
        "validation/numbers/loss_0-1K",
        "validation/numbers/loss_1-8K",
        "validation/numbers/perplexity_0-1K",
        "validation/numbers/perplexity_1-8K",
    }
    assert first.keys() == last.keys()


def test_two_ranks_that_share_every_weight(config_file: Path, data: Path, tmp_path: Path) -> None:
    """ZeRO-3: lanes of the ranks end at different times, and each weight is there only while both ask for it."""
    overrides = [*SETTINGS, f"data.path={data}", f"train.validation_tokens={TOKENS}"]
    port = ranks.free_port()
    ranks.run(config_file, [*overrides, "deepspeed.config=ds_configs/zero3.json"], port=port)
    assert_same(validations(tmp_path / "run")[-1], evaluated(tmp_path / "run", data))
    # DeepSpeed's buffers in shared memory went with the processes
    assert not list(Path("/dev/shm").glob(f"*127.0.0.1_{port}_*"))


def test_training_does_not_notice(pretrain: Callable[..., Result], tmp_path: Path) -> None:
    runs = tmp_path / "with", tmp_path / "without"
    for run_dir, every in zip(runs, (1, 0), strict=True):
        settings = [f"train.validate_every={every}", "train.validation_tokens=200", "train.steps=4"]
        assert pretrain(f"run_dir={run_dir}", *settings).code == 0
    assert len(validations(runs[0])) == 5
    curves = [[record["loss"] for record in ranks.training_records(run_dir)] for run_dir in runs]
    assert curves[0] == curves[1]


def test_named_sets(pretrain: Callable[..., Result], data: Path, dataset: Path, tmp_path: Path) -> None:
    """Several data sets, of which one has several sources and one has no validation split."""
    own = ["numbers one", "numbers two"]
    other = write_texts(tmp_path / "other", {"train": {"main": own}})
    (other / "tokenizer/tokenizer.json").write_bytes((data / "tokenizer/tokenizer.json").read_bytes())
    refusal = pretrain(f"data.validation={{other: {other}}}").refusal
    assert f"data.validation.other: {other} was made with another tokenizer than {data}" in refusal

    fresh = write_texts(tmp_path / "fresh", {"train": {"main": own}}, tokenizer=data / "tokenizer")
    result = pretrain(f"data.validation={{both: {data}, fresh: {fresh}}}")
    assert result.code == 0, result
    whole = evaluated(tmp_path / "run", data)
    model = MMRecForCausalLM.from_pretrained(tmp_path / "run/checkpoints/step_2/model").eval()
    [alone] = evaluate(model, open_dataset(fresh, "train", verify=False), chunk_len=50, batch=1).values()
    expected = {"both.numbers": whole["numbers"], "both.words": whole["words"], "fresh": alone}
    assert_same(validations(tmp_path / "run")[-1], expected)


def test_only_sources_that_are_trained_on(pretrain: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    assert pretrain("data.sources={words: {}}").code == 0
    assert_same(validations(tmp_path / "run")[-1], {"validation": evaluated(tmp_path / "run", data)["words"]})


def test_documents_that_are_trained_on_are_no_validation_set(pretrain: Callable[..., Result], tmp_path: Path) -> None:
    only_train = write_texts(tmp_path / "only", {"train": {"main": ["some text"] * 200}})
    data = [f"data.path={only_train}", f"data.validation={{same: {only_train}}}"]
    assert f"data.validation.same: {only_train} has no validation split" in pretrain(*data).refusal
