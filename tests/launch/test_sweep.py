"""launch/sweep.py: its file, its trials with a stand-in for training, and one real trial."""

import csv
import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.sweep
from launch.sweep import main
from mmrec_train.config import load_config, save_config
from mmrec_train.errors import UserError
from mmrec_train.monitoring import read_metrics
from mmrec_train.sweep import load_sweep
from tests.trainer.ranks import REPOSITORY

# Stands for `launch/local.py launch/pretrain.py`: "trains" to a loss that follows from its overrides, and appends its
# arguments to a log. `behaviour.json` says what happens instead, by trial.
STAND_IN = """
    import json, os, pathlib, signal, sys, time

    folder, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(arguments) + "\\n")
    values = {k: json.loads(v) for k, v in (a.split("=", 1) for a in arguments[arguments.index("--set") + 1 :])}
    run = pathlib.Path(values["run_dir"])
    behaviour = json.loads((folder / "behaviour.json").read_text()).get(run.name, "train")
    run.mkdir(parents=True, exist_ok=True)
    loss = {"dense": 3, "headwise": 4, "none": 5}[values["model.gate"]] + values["optimizer.learning_rate"]
    if behaviour == "diverge":
        loss = None
    with open(run / "metrics.jsonl", "w") as metrics:
        for step in (1, 2):
            extra = {"nonfinite": {"loss": "nan", "validation_loss": "nan"}} if loss is None and step == 2 else {}
            value = loss if step == 2 else 9.0
            metrics.write(json.dumps({"step": step, "loss": value, "validation_loss": value, **extra}) + "\\n")
    if behaviour.startswith("stopped by "):
        def stop(number, frame):
            (run / "signal").write_text(str(number))
            sys.exit(75)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, stop)
        os.kill(os.getppid(), int(behaviour.split()[-1]))
        time.sleep(50)
        sys.exit(1)
    sys.exit(int(behaviour) if behaviour.isdigit() else 0)
"""


class Sweeper:
    """Sweep files in a folder, and the command with the stand-in."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config
        self.file = folder / "sweep.yaml"
        self.sweep_dir = folder / "out"
        (folder / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
        self.behave()

    def behave(self, **behaviour: str) -> None:
        """What trials do instead of training, by gate (dense=..., none=...)."""
        by_trial = {f"learning_rate=0.01,gate={gate}": value for gate, value in behaviour.items()}
        (self.folder / "behaviour.json").write_text(json.dumps(by_trial))

    def write(self, **content: Any) -> Path:
        self.file.write_text(
            yaml.safe_dump({"config": str(self.config), "sweep_dir": str(self.sweep_dir)} | content, sort_keys=False)
        )
        return self.file

    def write_gates(self) -> Path:
        return self.write(
            overrides={"train.steps": 7},
            grid={"optimizer.learning_rate": [0.01], "model.gate": ["none", "dense", "headwise"]},
        )

    def run(self, *options: str) -> int:
        return main([str(self.file), *options])

    def started(self) -> list[str]:
        """The gates of all starts so far."""
        log = self.folder / "log.jsonl"
        starts = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [argument.split('"')[1] for start in starts for argument in start if argument.startswith("model.gate=")]

    def rows(self) -> list[dict[str, str]]:
        with open(self.sweep_dir / "results.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def sweeper(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeper:
    command = (sys.executable, str(tmp_path / "stand_in.py"), str(tmp_path))
    monkeypatch.setattr(launch.sweep, "LOCAL_COMMAND", command)
    return Sweeper(tmp_path, config_file)


# ---- the file


def test_a_grid_is_every_combination(sweeper: Sweeper) -> None:
    grid = {"optimizer.learning_rate": [0.001, 2e-5], "model.gate": ["dense", "none"]}
    sweep = load_sweep(sweeper.write(overrides={"train.steps": 7, "train.seed": 3}, grid=grid))
    assert [trial.name for trial in sweep.trials] == [
        f"learning_rate={rate},gate={gate}" for rate in ("0.001", "2e-05") for gate in ("dense", "none")
    ]
    last = sweep.trials[-1]
    assert last.run_dir == sweeper.sweep_dir / "trials/learning_rate=2e-05,gate=none"
    assert (last.config.optimizer.learning_rate, last.config.model.gate) == (2e-5, "none")
    assert (last.config.train.steps, last.config.train.seed) == (7, 3)
    assert load_config(sweep.config_path, last.arguments) == last.config


def test_a_list_and_the_names_of_its_trials(sweeper: Sweeper) -> None:
    choices = [
        {},
        {"train.seed": 1},
        {"data.seed": 1},
        {"optimizer.betas": [0.9, 0.99]},
        {"logging.sample_prompt": "a/b, c=d" + "x" * 300},
        {"logging.sample_prompt": "a/b, c=d" + "x" * 301},
    ]
    trials = load_sweep(sweeper.write(list=choices)).trials
    assert [trial.name for trial in trials[:4]] == [
        "unchanged",
        "train.seed=1",
        "data.seed=1",
        "betas=%5B0.9%2C%200.99%5D",
    ]
    assert trials[4].name != trials[5].name and all("/" not in trial.name for trial in trials)
    assert all(len(trial.name) < 200 for trial in trials)


def test_random_draws(sweeper: Sweeper) -> None:
    def draws(trials: int, seed: int) -> list[dict[str, Any]]:
        parameters = {
            "optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "scale": "log"},
            "optimizer.weight_decay": {"low": 0.0, "high": 0.5},
            "train.seed": {"low": 1, "high": 4},
            "model.gate": ["dense", "none"],
        }
        random = {"trials": trials, "seed": seed, "parameters": parameters}
        return [trial.choice for trial in load_sweep(sweeper.write(random=random)).trials]

    many = draws(40, seed=0)
    assert many[:5] == draws(5, seed=0) != draws(5, seed=1)
    rates = sorted(choice["optimizer.learning_rate"] for choice in many)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-1
    assert 1e-4 < math.sqrt(rates[19] * rates[20]) < 1e-2  # the median of a linear draw would be 5e-2
    assert all(0 <= choice["optimizer.weight_decay"] <= 0.5 for choice in many)
    assert {choice["train.seed"] for choice in many} == {1, 2, 3, 4}
    assert {choice["model.gate"] for choice in many} == {"dense", "none"}


def test_equal_draws_are_one_trial(sweeper: Sweeper) -> None:
    random = {"trials": 20, "parameters": {"model.gate": ["dense", "none"]}}
    assert len(load_sweep(sweeper.write(random=random)).trials) == 2


GRID = {"model.gate": ["dense"]}


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"girds": GRID}, "sweep.yaml:3: unknown key 'girds'; did you mean 'grid'?"),
        (
            {"random": {"trials": 3, "trails": 3, "parameters": GRID}},
            "unknown key 'random.trails'; did you mean 'trials'?",
        ),
        (
            {"random": {"trials": 3, "parameters": {"train.seed": {"low": 1, "high": 4, "hgih": 4}}}},
            "unknown key 'random.parameters.train.seed.hgih'; did you mean 'high'?",
        ),
        ({"random": {"trials": 3, "parameters": {"train.seed": {"low": 4, "high": 1}}}}, "low must be less than high"),
        (
            {"random": {"trials": 3, "parameters": {"optimizer.eps": {"low": 0, "high": 1, "scale": "log"}}}},
            "low must be above 0 on a log scale",
        ),
        ({"random": {"trials": 0, "parameters": GRID}}, "random.trials: must be greater than or equal to 1, got 0"),
        ({"grid": {"model.gate": "dense"}}, 'grid.model.gate: must be a valid list, got "dense"'),
        ({"grid": {"model.gate": []}}, "grid.model.gate: List should have at least 1 item"),
        ({}, "needs one of grid, random and list, has none"),
        ({"grid": GRID, "list": [GRID]}, "needs one of grid, random and list, has grid and list"),
        ({"list": [{"run_dir": "x"}]}, "run_dir is each trial's own"),
        (
            {"grid": {"model.gaet": ["dense"]}},
            "trial gaet=dense: --set model.gaet=\"dense\": unknown key 'model.gaet'; did you mean 'model.gate'?",
        ),
        ({"grid": {"model.num_heads": [3]}}, "hidden_dim 32 is not divisible by num_heads 3"),
        ({"grid": GRID, "config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"grid": GRID, "sweep_dir": None}, "sweep_dir: must be a valid string, got null"),
    ],
)
def test_a_mistake_is_one_message(
    sweeper: Sweeper, capsys: pytest.CaptureFixture[str], content: dict[str, Any], expected: str
) -> None:
    sweeper.write(**content)
    assert sweeper.run() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and expected in printed.err and printed.err.count("\n") == 1
    assert not sweeper.sweep_dir.exists() and sweeper.started() == []


def test_files_that_are_no_sweeps(sweeper: Sweeper, capsys: pytest.CaptureFixture[str]) -> None:
    for text, expected in (
        ("grid: [", "sweep.yaml:1: not valid YAML"),
        ("- 1", "must hold keys"),
        ("config: a\nconfig: b\ngrid: {a: [1]}\nsweep_dir: x", "sweep.yaml:2: duplicate key 'config'"),
        ("config: a\ngrid: {a: [1]}", "missing key 'sweep_dir'"),
    ):
        sweeper.file.write_text(text)
        assert sweeper.run() == 2
        assert expected in capsys.readouterr().err
    sweeper.file.unlink()
    assert sweeper.run() == 2
    assert capsys.readouterr().err == f"error: no such file: {sweeper.file}\n"


def test_the_shipped_sweeps_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = sorted((REPOSITORY / "launch/sweeps").glob("*.yaml"))
    assert files
    monkeypatch.chdir(tmp_path)  # away from what was run in the repository
    for file in files:
        assert len(load_sweep(file).trials) > 1


# ---- running


def test_trials_run_one_after_another_and_are_ranked(sweeper: Sweeper, capfd: pytest.CaptureFixture[str]) -> None:
    sweeper.write_gates()
    assert sweeper.run("--ranks", "3") == 0
    assert sweeper.started() == ["none", "dense", "headwise"]
    first = json.loads((sweeper.folder / "log.jsonl").read_text().splitlines()[0])
    assert first == [
        *("--ranks", "3", str(REPOSITORY / "launch/pretrain.py"), "--config", str(sweeper.config), "--set"),
        *("train.steps=7", "optimizer.learning_rate=0.01", 'model.gate="none"'),
        f'run_dir="{sweeper.sweep_dir}/trials/learning_rate=0.01,gate=none"',
    ]
    rows = sweeper.rows()
    assert [row["model.gate"] for row in rows] == ["dense", "headwise", "none"]
    assert rows[0] == {
        "trial": "learning_rate=0.01,gate=dense",
        "optimizer.learning_rate": "0.01",
        "model.gate": "dense",
        "status": "finished",
        "step": "2",
        "loss": "3.01",
        "validation_loss": "3.01",
    }
    assert (sweeper.sweep_dir / "plot.png").read_bytes().startswith(b"\x89PNG")
    table = capfd.readouterr().out
    assert table.index("3.0100") < table.index("4.0100") < table.index("5.0100")


def test_finished_trials_are_skipped_and_failed_ones_run_again(
    sweeper: Sweeper, capfd: pytest.CaptureFixture[str]
) -> None:
    sweeper.write_gates()
    sweeper.behave(none="1", dense="diverge")
    assert sweeper.run() == 1
    assert "gate=none: failed with exit code 1" in capfd.readouterr().err
    rows = sweeper.rows()  # what diverged is last, whatever its earlier losses
    assert [(row["model.gate"], row["status"], row["loss"]) for row in rows] == [
        ("headwise", "finished", "4.01"),
        ("none", "failed", "5.01"),
        ("dense", "finished", "NaN"),
    ]
    sweeper.behave()
    assert sweeper.run() == 0
    assert sweeper.started() == ["none", "dense", "headwise", "none"]
    assert {row["status"] for row in sweeper.rows()} == {"finished"}


def test_bad_input_ends_the_sweep(sweeper: Sweeper) -> None:
    sweeper.write_gates()
    sweeper.behave(dense="2")
    assert sweeper.run() == 2
    assert sweeper.started() == ["none", "dense"]
    assert {row["model.gate"]: row["status"] for row in sweeper.rows()} == {
        "none": "finished",
        "dense": "failed",
        "headwise": "waiting",
    }


@pytest.mark.parametrize("number", [2, 15, 10])
def test_a_stop_signal_is_passed_on_and_the_sweep_goes_on_later(sweeper: Sweeper, number: int) -> None:
    sweeper.write_gates()
    sweeper.behave(dense=f"stopped by {number}")
    assert sweeper.run() == 75
    stopped = sweeper.sweep_dir / "trials/learning_rate=0.01,gate=dense"
    assert (stopped / "signal").read_text() == str(number)
    assert {row["model.gate"]: row["status"] for row in sweeper.rows()} == {
        "none": "finished",
        "dense": "interrupted",
        "headwise": "waiting",
    }
    sweeper.behave()
    assert sweeper.run() == 0
    assert sweeper.started() == ["none", "dense", "dense", "headwise"]


def test_a_trial_of_another_configuration_is_not_mixed_in(sweeper: Sweeper) -> None:
    [trial] = load_sweep(sweeper.write(grid=GRID, overrides={"train.steps": 7})).trials
    trial.run_dir.mkdir(parents=True)
    save_config(trial.config, trial.run_dir / "config.yaml")
    assert load_sweep(sweeper.file).trials == (trial,)
    sweeper.write(grid=GRID, overrides={"train.steps": 8})
    with pytest.raises(UserError, match=r"gate=dense was begun with .*: train.steps was 7 and is 8 now. Choose"):
        load_sweep(sweeper.file)


def test_a_real_trial(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through launch/local.py and launch/pretrain.py; a second start finds it finished."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content = {
        "config": config_file.name,
        "sweep_dir": str(tmp_path / "out"),
        "overrides": {
            "train": {"steps": 2, "validate_every": 2},
            "schedule.warmup_steps": 0,
            "logging.sample_tokens": 0,
        },
        "list": [{"optimizer.learning_rate": 1e-3}],
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main([str(file), "--ranks", "1"]) == 0
    assert "checkpoint: " in capfd.readouterr().out
    assert main([str(file)]) == 0
    again = capfd.readouterr().out
    assert "trial 1/1: learning_rate=0.001: finished already" in again and "checkpoint: " not in again

    with open(tmp_path / "out/results.csv", newline="") as results:
        [row] = csv.DictReader(results)
    assert (row["status"], row["step"]) == ("finished", "2")
    records = read_metrics(tmp_path / "out/trials/learning_rate=0.001")
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert float(row["validation_loss"]) == losses[-1]
