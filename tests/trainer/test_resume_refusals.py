"""Going on from a checkpoint: which ones are refused, which are skipped, and that nothing is overwritten."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.pretrain import main
from mmrec_train import checkpoint_files
from mmrec_train.data.tokenizer import fingerprint
from tests.trainer import ranks
from tests.trainer.command import Command, Result, be_the_only_rank, content
from tests.trainer.runs import copy_with_other_documents, write_config

# Two steps with a checkpoint after each: seconds for the whole module.
SHORT = [
    "train.steps=2",
    "train.global_batch_size=2",
    "train.validate_every=0",
    "schedule.warmup_steps=1",
    "checkpoint.every=1",
    "logging.sample_tokens=0",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run folder with the checkpoints of steps 1 and 2, made by a run of one rank. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        be_the_only_rank(monkeypatch)
        assert main(["--config", str(write_config(folder, dataset)), "--set", *SHORT]) == 0
    return folder / "run"


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A copy of the finished run, where `pretrain` goes on."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def pretrain(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """The command with the finished run's settings, in this process."""
    command = Command(config_file, capsys, monkeypatch)

    def call(*overrides: str, resume: object = "auto") -> Result:
        return command(*SHORT, *overrides, options=("--resume", str(resume)))

    return call


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in ranks.training_records(run_dir)]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_who_may_read_a_file_of_a_checkpoint_may_read_all(finished: Path) -> None:
    files = [path for path in (finished / "checkpoints/step_2").rglob("*") if path.is_file()]
    assert "model.safetensors" in {path.name for path in files}
    assert len({path.stat().st_mode for path in files}) == 1


# ---- another setting than the checkpoint's


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["model.ffn_dim=64"], "model.ffn_dim is 48 in the checkpoint and 64 here"),
        (["model.gate=none"], "model.gate is dense in the checkpoint and none here"),
        (["model.num_layers=1"], "model.num_layers is 2 in the checkpoint and 1 here"),
        (["model.vocab_size=1024"], "model.vocab_size is 512 in the checkpoint and 1024 here"),
        (["train.micro_batch_size=2"], "train.micro_batch_size is 1 in the checkpoint and 2 here"),
        (["deepspeed.config=ds_configs/zero3.json"], "ZeRO stage is 0 in the checkpoint and 3 here"),
        (["train.precision=bf16", "deepspeed.config=ds_configs/zero1.json"], "train.precision is fp32"),
        (["data.seed=7"], "data.seed is 7 here and 0 there"),
        (["data.chunk_len=24"], "data.chunk_len is 24 here and 48 there"),
        (["data.window_chunks=2"], "data.window_chunks is 2 here and 1 there"),
        (["train.global_batch_size=4"], "lanes is 4 here and 2 there"),
    ],
)
def test_another_setting(pretrain: Callable[..., Result], run: Path, overrides: list[str], expected: str) -> None:
    before = content(run)
    message = pretrain(*overrides, "train.steps=3").refusal
    assert expected in message
    assert "start a new run" in message
    assert content(run) == before


def test_all_that_differs_is_named(pretrain: Callable[..., Result], run: Path) -> None:
    message = pretrain("model.ffn_dim=64", "model.memory_slots=4").refusal
    assert message.count(" in the checkpoint and ") == 2
    assert str(run / "checkpoints/step_2") in message


def test_another_number_of_ranks(run: Path, config_file: Path) -> None:
    """Two ranks: both end, by themselves, and one of them says why."""
    before = content(run)
    processes = ranks.start(config_file, SHORT, world_size=2)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    message = Result(2, "", "".join(outputs)).refusal
    assert "number of ranks is 1 in the checkpoint and 2 here" in message
    assert content(run) == before


@pytest.fixture
def own_data(tmp_path: Path, dataset: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def test_another_data_set(pretrain: Callable[..., Result], run: Path, tmp_path: Path, dataset: Path) -> None:
    other = copy_with_other_documents(dataset, tmp_path / "data")
    before = content(run)
    message = pretrain(f"data.path={other}", "train.steps=3").refusal
    assert "documents of main is" in message and "start a new run" in message
    assert content(run) == before


def test_another_tokenizer(pretrain: Callable[..., Result], run: Path, own_data: Path) -> None:
    path = own_data / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))
    manifest = json.loads((own_data / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = fingerprint(path.parent)
    (own_data / "manifest.json").write_text(json.dumps(manifest))

    before = content(run)
    message = pretrain(f"data.path={own_data}", "train.steps=3").refusal
    assert f"tokenizer is {fingerprint(run / 'checkpoints/step_2/model')} in the checkpoint" in message
    assert f"{manifest['tokenizer_fingerprint']} here" in message
    assert content(run) == before


def test_the_same_data_set_elsewhere_is_the_same(pretrain: Callable[..., Result], run: Path, own_data: Path) -> None:
    assert pretrain(f"data.path={own_data}", "train.steps=3").code == 0
    assert steps(run) == [1, 2, 3]


# ---- --resume


def test_never_where_there_are_checkpoints(pretrain: Callable[..., Result], run: Path) -> None:
    before = content(run)
    message = pretrain(resume="never").refusal
    assert f"{run} holds checkpoints and --resume is never" in message
    assert content(run) == before


def nowhere(folder: Path) -> Path:
    return folder / "nowhere"


def a_file(folder: Path) -> Path:
    return folder / "run/config.yaml"


def another_folder(folder: Path) -> Path:
    return folder / "run/checkpoints/step_2/model"


def a_run_without_checkpoints(folder: Path) -> Path:
    (folder / "other/checkpoints").mkdir(parents=True)
    return folder / "other"


def a_torn_one(folder: Path) -> Path:
    (folder / "run/checkpoints/step_2/run.json").unlink()
    return folder / "run/checkpoints/step_2"


def a_corrupt_one(folder: Path) -> Path:
    file = folder / "run/checkpoints/step_2/ranks/rank_0.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    return folder / "run/checkpoints/step_2"


@pytest.mark.parametrize(
    "make, expected",
    [
        (nowhere, "is neither a run folder nor a checkpoint"),
        (a_file, "is neither a run folder nor a checkpoint"),
        (another_folder, "is not a complete checkpoint: it has no file COMPLETE"),
        (a_run_without_checkpoints, "holds no complete checkpoint"),
        (a_torn_one, "run.json cannot be read: No such file"),
        (a_corrupt_one, "rank_0.pt has changed since it was written"),
    ],
)
def test_a_path_that_is_no_checkpoint(
    pretrain: Callable[..., Result], run: Path, tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    path = make(tmp_path)
    before = content(run)
    message = pretrain("train.steps=3", resume=path).refusal
    assert str(path) in message and expected in message
    assert content(run) == before


def test_a_path_older_than_the_run_folders_newest(pretrain: Callable[..., Result], run: Path) -> None:
    """Going on would come to a step whose checkpoint is there already, after training for nothing."""
    before = content(run)
    assert "holds step_2" in pretrain("train.steps=3", resume=run / "checkpoints/step_1").refusal
    assert content(run) == before


def test_a_path_in_another_run_begins_a_run_of_its_own(
    pretrain: Callable[..., Result], finished: Path, tmp_path: Path
) -> None:
    before = content(finished)
    assert pretrain(resume=finished / "checkpoints/step_1").code == 0
    assert content(finished) == before
    assert (steps(tmp_path / "run"), checkpoints(tmp_path / "run")) == ([2], ["step_2"])
    weights = "checkpoints/step_2/model/model.safetensors"
    assert content(tmp_path / "run")[weights] == before[weights]


def test_the_newest_checkpoint_by_its_path_or_its_run(pretrain: Callable[..., Result], run: Path) -> None:
    assert pretrain("train.steps=3", resume=run).code == 0
    assert pretrain("train.steps=4", resume=run / "checkpoints/step_3").code == 0
    assert (steps(run), checkpoints(run)) == ([1, 2, 3, 4], ["step_2", "step_3", "step_4"])


# ---- torn checkpoints


def test_torn_checkpoints_are_skipped_for_an_older_one(pretrain: Callable[..., Result], run: Path) -> None:
    finished = content(run)
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_2", folder / "step_3.tmp")
    (folder / "step_3.tmp/COMPLETE").unlink()
    state = next((folder / "step_2/deepspeed").rglob("*.pt"))
    state.write_bytes(state.read_bytes()[:-1])

    lines = [
        f"Skipping checkpoint {folder}/step_3.tmp: its writing was interrupted",
        f"Skipping checkpoint {folder}/step_2: {state} has {state.stat().st_size} bytes, the manifest says",
    ]
    result = pretrain()
    assert (result.code, result.errors) == (0, "")
    assert all(result.out.count(line) == (run / "log.txt").read_text().count(line) == 1 for line in lines)
    # step 2 again, from step 1, in the torn one's place
    assert steps(run) == [1, 2]
    assert checkpoint_files.verify(folder / "step_2") == []
    weights = "checkpoints/step_2/model/model.safetensors"
    assert content(run)[weights] == finished[weights]


def test_a_finished_run_has_nothing_left_to_do(pretrain: Callable[..., Result], run: Path) -> None:
    before = content(run)
    assert pretrain().code == 0
    after = content(run)
    unchanged = [name for name in before if name.startswith("checkpoints/") or name == "metrics.jsonl"]
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert checkpoints(run) == ["step_1", "step_2"]
