import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.config import RunConfig, load_config, save_config
from mmrec_train.config.deepspeed_file import REPOSITORY, shipped
from mmrec_train.errors import UserError

Write = Callable[[str, str], Path]

CONFIGS = sorted(path for path in (REPOSITORY / "launch/configs").glob("*.yaml") if path.name != "base.yaml")


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_values_and_defaults(write: Write, minimal: str) -> None:
    config = load_config(write("run.yaml", minimal))
    assert config.run_dir == "runs/test"
    assert config.optimizer.learning_rate == 0.001
    assert config.optimizer.betas == (0.9, 0.95)
    clip = config.optimizer.clip
    assert (clip.global_, clip.memory, clip.decay, clip.gate) == (1.0, 1.0, 0.1, 0.5)
    assert config.data.chunk_len == 8192
    assert config.logging.wandb.mode == "offline"
    assert config.deepspeed.config == "ds_configs/zero3.json"
    assert config.model.to_model_config(1000).vocab_size == 1024


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        (9, "  stesp: 10", "run.yaml:9: unknown key 'train.stesp'; did you mean 'train.steps'?"),
        (9, "  learning_rate: 1", ":9: unknown key 'train.learning_rate'; did you mean 'optimizer.learning_rate'?"),
        (1, "lerning_rate: 1", "run.yaml:1: unknown key 'lerning_rate'; did you mean 'optimizer.learning_rate'?"),
        (3, "  xyzzy: 1", "run.yaml:3: unknown key 'model.xyzzy'; valid: preset, vocab_size, hidden_dim"),
        (9, "  steps: ten", 'run.yaml:9: train.steps: must be a valid integer, got "ten"'),
        (9, "  steps: 10.5", "run.yaml:9: train.steps: must be a valid integer, got 10.5"),
        (9, "  steps: true", "run.yaml:9: train.steps: must be a valid integer, got true"),
        (9, "  steps:", "run.yaml:9: train.steps: must be a valid integer, got null"),
        (9, "  steps: 0", "run.yaml:9: train.steps: must be greater than or equal to 1, got 0"),
        (7, '  learning_rate: "1e-3"', 'run.yaml:7: optimizer.learning_rate: must be a valid number, got "1e-3"'),
        (7, "  learning_rate: .nan", 'run.yaml:7: optimizer.learning_rate: must be a valid number, got ".nan"'),
        (3, "  preset: 3b", "run.yaml:3: model.preset: must be 'tiny', '125m', '350m', '1b' or '7b', got \"3b\""),
        (12, "  precision: no", "run.yaml:12: train.precision: must be 'bf16', 'fp16' or 'fp32', got \"no\""),
        (12, "  activation_checkpointing: 0", "12: train.activation_checkpointing: must be 'none', 'full' or a"),
        (1, "run_dir: [a]", 'run.yaml:1: run_dir: must be a valid string, got ["a"]'),
        (12, "  steps: 11", "run.yaml:12: duplicate key 'steps' (first at run.yaml:9)"),
        (10, "  global_batch_size: 5", "10: train.global_batch_size 5 is not divisible by train.micro_batch_size 2"),
        (9, "  steps: 1\nschedule: {warmup_steps: 1}\ntrain2:", ":11: unknown key 'train2'; did you mean 'train'?"),
        (5, "  path: x\n  sequence_len: 0", "6: data.sequence_len: must be null, a number of tokens ≥ 1, or a list of"),
        (5, "  path: x\n  sequence_len: [{step: 0}]", "6: data.sequence_len: must be null, a number of tokens"),
        (5, "  path: x\n  sequence_len: [{step: 1, tokens: 9}]", "6: data.sequence_len: the first stage must be that"),
        (
            5,
            "  path: x\n  sequence_len: [{step: 0, tokens: 9}, {step: 0, tokens: null}]",
            "6: data.sequence_len: the first stage must be that of step 0, and steps must rise",
        ),
        (5, "  path: x\n  sources: {}", "6: data.sources: must name a source, or be null for all of them, got {}"),
        (5, "  path: x\n  sources:\n    code: {weight: 0}", "7: data.sources.code.weight: must be greater than"),
        (5, "  path: x\n  sources: {code: {epoch: 1}}", "'data.sources.code.epoch'; did you mean 'data.sources.NAME."),
        (5, "  path: x\n  validation: {a/b: c}", "6: data.validation: a set's name is made of letters, digits, _ . an"),
        (5, "  path: x\n  order: stored", "6: data.order: must be 'shuffled' or 'by_length', got \"stored\""),
        (14, "  config: zero4.json", "14: deepspeed.config: no such file: zero4.json; in ds_configs, did you mean 'z"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(write: Write, minimal: str, line: int, text: str, expected: str) -> None:
    lines = minimal.splitlines()
    lines[line - 1] = text
    assert expected in message(write("run.yaml", "\n".join(lines)))


def test_a_mistake_costs_no_import_of_torch(write: Write, minimal: str) -> None:
    path = write("run.yaml", minimal.replace("steps", "stesp"))
    code = (
        "import sys\nfrom mmrec_train.config import load_config\nfrom mmrec_train.errors import UserError\n"
        f"try: load_config({str(path)!r})\nexcept UserError: sys.exit(3 if 'torch' in sys.modules else 4)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(REPOSITORY)}, check=False).returncode == 4
    )


def test_all_mistakes_are_in_one_message(write: Write, minimal: str) -> None:
    text = minimal.replace("steps: 10", "steps: ten").replace("data:\n  path: data/test\n", "") + "speling: 1\n"
    assert message(write("run.yaml", text), "train.seed=-1").splitlines() == [
        "run.yaml: missing key 'data': what is trained on",
        'run.yaml:7: train.steps: must be a valid integer, got "ten"',
        "--set train.seed=-1: train.seed: must be greater than or equal to 0, got -1",
        "run.yaml:13: unknown key 'speling'; valid: run_dir, model, data, optimizer, schedule, train, deepspeed, "
        "checkpoint, logging",
    ]


def test_a_missing_key_is_looked_for_in_its_section(write: Write, minimal: str) -> None:
    text = minimal.replace("  learning_rate: 1e-3\n", "  eps: 1e-8\n")
    expected = "run.yaml:6: missing key 'optimizer.learning_rate': peak learning rate, reached at the end of warm-up"
    assert message(write("run.yaml", text)) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("num_heads: 6\n  num_memories: 4", "run.yaml:4: model: num_heads 6 is not divisible by num_memories 4"),
        ("hidden_dim: 190", "run.yaml:4: model: hidden_dim 190 is not divisible by num_heads 4"),
        ("dropout: 1.0", "run.yaml:4: model: dropout is 1.0"),
        ("decay_half_life: [8, 1]", "run.yaml:4: model: decay_half_life is"),
    ],
)
def test_impossible_shapes(write: Write, minimal: str, model: str, expected: str) -> None:
    assert message(write("run.yaml", minimal.replace("preset: tiny", f"preset: tiny\n  {model}"))).startswith(expected)


def test_warmup_must_leave_steps(write: Write, minimal: str) -> None:
    path = write("run.yaml", minimal + "schedule:\n  warmup_steps: 10\n")
    expected = "run.yaml:16: schedule.warmup_steps 10 leaves nothing of train.steps 10; lower it, or raise train.steps"
    assert message(path) == expected
    assert load_config(path, ["train.steps=11"]).train.steps == 11


def test_base_files_are_merged_deeply(write: Write, minimal: str) -> None:
    write("shared/root.yaml", minimal)
    write("shared/middle.yaml", "base: root.yaml\ntrain:\n  steps: 20\n  seed: 1\noptimizer: {betas: [0.8, 0.9]}\n")
    config = load_config(write("run.yaml", "base: shared/middle.yaml\nrun_dir: runs/upper\ntrain:\n  steps: 30\n"))
    assert (config.run_dir, config.train.steps, config.train.seed) == ("runs/upper", 30, 1)
    assert (config.train.global_batch_size, config.optimizer.betas) == (4, (0.8, 0.9))


def test_mistakes_in_a_base_are_named_there(write: Write, minimal: str) -> None:
    write("shared/root.yaml", minimal.replace("steps:", "stepps:"))
    text = message(write("run.yaml", "base: shared/root.yaml\ntrain:\n  seed: 1\n"))
    assert text.splitlines() == [
        "run.yaml:2: missing key 'train.steps': optimizer steps",
        "shared/root.yaml:9: unknown key 'train.stepps'; did you mean 'train.steps'?",
    ]


def test_circles_and_missing_bases(write: Write) -> None:
    write("a.yaml", "run_dir: x\nbase: sub/b.yaml\n")
    write("sub/b.yaml", "base: ../a.yaml\n")
    assert message(Path("a.yaml")) == "sub/b.yaml:1: base files form a circle: a.yaml → sub/b.yaml → a.yaml"
    assert message(write("self.yaml", "base: self.yaml")).startswith("self.yaml:1: base files form a circle")
    assert message(write("c.yaml", "\nbase: sub/bb.yaml\n")) == (
        "c.yaml:2: base: no such file: sub/bb.yaml; did you mean sub/b.yaml?"
    )
    assert (
        message(write("d.yaml", "base: [a.yaml]\n"))
        == 'd.yaml:1: base must be the path of another file, got ["a.yaml"]'
    )


def test_files_that_are_no_configuration(write: Write, minimal: str, tmp_path: Path) -> None:
    write("runs.yaml", minimal)
    assert message(Path("run.yaml")) == "no such file: run.yaml; did you mean runs.yaml?"
    assert message(tmp_path).startswith(f"cannot read {tmp_path}: ")
    Path("latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    assert message(Path("latin.yaml")).startswith("cannot read latin.yaml: ")
    assert message(write("list.yaml", "- a\n")).startswith("list.yaml: must hold sections")
    assert message(write("empty.yaml", "# nothing\n")).splitlines()[0].startswith("empty.yaml: missing key 'run_dir'")
    assert message(write("tab.yaml", minimal + "\tx: 1\n")).startswith("tab.yaml:15: not valid YAML: ")


def test_overrides_beat_files(write: Write, minimal: str) -> None:
    write("base.yaml", minimal)
    path = write("run.yaml", "base: base.yaml\ntrain:\n  steps: 20\n")
    config = load_config(
        path,
        [
            "train.steps=40",
            "train.steps=50",
            "optimizer.learning_rate=2e-4",
            "optimizer.clip={global: 3, gate: 2.5}",
            "model.decay_half_life=[2, 64]",
            "logging.sample_prompt='a=b: c'",
            "model.dropout=",
        ],
    )
    assert (config.train.steps, config.optimizer.learning_rate) == (50, 2e-4)
    assert (config.optimizer.clip.global_, config.optimizer.clip.gate, config.optimizer.clip.decay) == (3.0, 2.5, 0.1)
    assert config.model.decay_half_life == (2.0, 64.0)
    assert (config.logging.sample_prompt, config.model.dropout) == ("a=b: c", None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "--set train.steps: must look like section.key=value"),
        ("=3", "--set =3: must look like section.key=value"),
        ("train..steps=3", "--set train..steps=3: must look like section.key=value"),
        ("base=other.yaml", "--set base=other.yaml: base is read from files only; name the file with --config"),
        ("train.stesp=3", "--set train.stesp=3: unknown key 'train.stesp'; did you mean 'train.steps'?"),
        ("train.steps=ten", '--set train.steps=ten: train.steps: must be a valid integer, got "ten"'),
        ("train.steps.x=1", '--set train.steps.x=1: train.steps: must be a valid integer, got {"x": 1}'),
        ("train=3", "--set train=3: train: must be a section of keys, got 3"),
        ("model.num_memories=3", "--set model.num_memories=3: model: num_heads 4 is not divisible by num_memories 3"),
        ("train.seed=[1", "--set train.seed=[1: not valid YAML: "),
        ("train={seed: 1, seed: 2}", "--set train={seed: 1, seed: 2}: duplicate key 'seed'"),
        (
            "deepspeed.config=zero3",
            "--set deepspeed.config=zero3: deepspeed.config: no such file: zero3; in ds_configs, did you mean 'zero",
        ),
    ],
)
def test_a_mistaken_override_is_named(write: Write, minimal: str, override: str, expected: str) -> None:
    assert message(write("run.yaml", minimal), override).startswith(expected)


def test_the_deepspeed_file_is_looked_up_beside_the_file_that_names_it(
    write: Write, minimal: str, tmp_path: Path
) -> None:
    own = minimal.replace("ds_configs/zero3.json", "own.json")
    write("sub/own.json", '{"zero_optimization": {"stage": 1}}')
    write("sub/run.yaml", own)
    config = load_config(write("upper.yaml", "base: sub/run.yaml\nrun_dir: runs/upper\n"))
    assert config.deepspeed.config == str(tmp_path / "sub/own.json")
    assert load_config(write("run.yaml", minimal)).deepspeed.config == "ds_configs/zero3.json"
    outside = minimal.replace("ds_configs", str(REPOSITORY / "ds_configs"))
    assert load_config(write("run.yaml", outside)).deepspeed.config == "ds_configs/zero3.json"


def test_marks_stay_with_the_configuration(write: Write, minimal: str) -> None:
    config = load_config(write("run.yaml", minimal), ["train.seed=3"])
    assert str(config.mark("data.path")) == "run.yaml:5"
    assert str(config.mark("data.chunk_len")) == "run.yaml:4"
    assert str(config.mark("train.seed")) == "--set train.seed=3"
    assert str(RunConfig.model_validate(config.model_dump(by_alias=True)).mark("data.path")) == "data.path"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("deepspeed", shipped(), ids=lambda path: path.stem)
def test_every_shipped_file_loads(path: Path, deepspeed: Path, tmp_path: Path) -> None:
    overrides = [f"deepspeed.config={deepspeed}", f"deepspeed.nvme_path={tmp_path}"]
    config = load_config(path, [*overrides, *(["train.precision=fp32"] if deepspeed.stem == "zero0" else [])])
    assert config.run_dir == f"runs/{path.stem}"
    saved = tmp_path / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert list(tmp_path.iterdir()) == [saved]


def test_the_sizes_are_those_of_the_model_package() -> None:
    from mmrec_train.model import PRESETS

    assert {path.stem for path in CONFIGS} == {"quickstart", *PRESETS}
    for path in CONFIGS:
        preset = load_config(path).model.preset
        assert preset == ("tiny" if path.stem == "quickstart" else path.stem)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: "~" not in text)
SMALL = st.floats(1e-12, 1.0, exclude_max=True)


@given(
    run_dir=TEXT,
    prompt=TEXT,
    name=st.none() | TEXT,
    rate=SMALL,
    betas=st.tuples(SMALL, SMALL),
    clip=st.floats(1e-6, 1e6),
    half_life=st.none() | st.tuples(SMALL, st.floats(1.0, 1e6)),
    checkpointing=st.sampled_from(["none", "full"]) | st.integers(1, 99),
    tensorboard=st.booleans(),
)
def test_a_saved_configuration_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    run_dir: str,
    prompt: str,
    name: str | None,
    rate: float,
    betas: tuple[float, float],
    clip: float,
    half_life: tuple[float, float] | None,
    checkpointing: str | int,
    tensorboard: bool,
) -> None:
    config = load_config(REPOSITORY / "launch/configs/quickstart.yaml")
    values = config.model_dump(by_alias=True) | {"run_dir": run_dir}
    values["optimizer"] |= {"learning_rate": rate, "betas": betas}
    values["optimizer"]["clip"]["global"] = clip
    values["model"]["decay_half_life"] = half_life
    values["train"]["activation_checkpointing"] = checkpointing
    values["logging"] |= {"sample_prompt": prompt, "tensorboard": tensorboard}
    values["logging"]["wandb"]["name"] = name
    config = RunConfig.model_validate(values)
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config


def test_saving_replaces_the_file_as_a_whole(write: Write, minimal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write("run.yaml", minimal))
    target = write("out/config.yaml", "old")
    monkeypatch.setattr(
        "mmrec_train.config.loading.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_config(config, target)
    assert [path.read_text() for path in target.parent.iterdir()] == ["old"]


def test_configurations_cannot_be_changed(write: Write, minimal: str) -> None:
    config = load_config(write("run.yaml", minimal))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_docs_explain_every_key() -> None:
    from mmrec_train.config.loading import descriptions

    text = (REPOSITORY / "docs/configuration.md").read_text("utf-8")
    missing = [key for key in descriptions() if f"`{key}`" not in text]
    assert missing == []
