"""The DeepSpeed file: its own mistakes, its contradictions with the run, and what DeepSpeed is given in the end."""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest

from mmrec_train.config import RunConfig, deepspeed_config, load_config, nvme_folder
from mmrec_train.config import deepspeed_keys as keys
from mmrec_train.config.deepspeed_file import shipped
from mmrec_train.errors import UserError

Write = Callable[[str, str], Path]


@pytest.fixture
def load(write: Write, minimal: str) -> Callable[..., RunConfig]:
    """Loads the minimal configuration with `text` as its DeepSpeed file, ds.json."""

    def load_with(text: str, *overrides: str) -> RunConfig:
        write("ds.json", text)
        path = write("run.yaml", minimal.replace("ds_configs/zero3.json", "ds.json"))
        return load_config(path, overrides)

    return load_with


STAGE3 = '{"zero_optimization": {"stage": 3,\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{\n"zero_optimisation": {}}',
            "ds.json:2: unknown DeepSpeed key 'zero_optimisation'; did you mean 'zero",
        ),
        ('{"amp": {}}', "ds.json:1: unknown DeepSpeed key 'amp'; valid: aio, checkpoint, "),
        (
            STAGE3 + '"reduce_bucket": 5}}',
            "ds.json:2: unknown DeepSpeed key 'zero_optimization.reduce_bucket'; did you",
        ),
        (
            STAGE3 + '"offload_param": {"devices": 1}}}',
            "ds.json:2: unknown DeepSpeed key 'zero_optimization.offload_pa",
        ),
        ('{"aio": {"blocks": 1}}', "ds.json:1: unknown DeepSpeed key 'aio.blocks'; did you mean 'block_size'?"),
        ('{\n"train_batch_size": 4}', "ds.json:2: train_batch_size is set by train.global_batch_size; remove it"),
        ('{"gradient_clipping": 1.0}', "ds.json:1: gradient_clipping is set by optimizer.clip; remove"),
        ('{"bf16": {"enabled": true}}', "ds.json:1: bf16 is set by train.precision; remove"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}', "ds.json:1: optimizer is set by the optimizer"),
        ('{"hybrid_engine": {"enabled": true}}', "ds.json:1: hybrid_engine has no effect on this trainer; remove"),
        ('{"aio": {},\n"aio": {}}', "ds.json:2: duplicate key 'aio' (first at ds.json:1)"),
        ('{"zero_optimization":\n true}', "ds.json:1: zero_optimization must be a JSON object, got True"),
        ('{"zero_optimization": {\n"stage": 4}}', "ds.json:2: stage must be 0, 1, 2 or 3, got 4"),
        (
            '{"zero_optimization": {"stage": 2,\n"offload_param": {"device": "cpu"}}}',
            "ds.json:2: offload_param to cpu needs ZeRO stage 3 or above, but stage is 2",
        ),
        (
            '{"zero_optimization": {"offload_optimizer": {\n"device": "cpu"}}}',
            "ds.json:2: offload_optimizer to cpu needs ZeRO stage 1 or above, but stage is 0",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}',
            "ds.json:1: offload_optimizer to nvme needs ZeRO stage 3 or above, but stage is 2",
        ),
        (
            STAGE3 + '"offload_param": {"device": "disk"}}}',
            "ds.json:2: offload_param.device must be one of none, cpu, nvme, got 'disk'",
        ),
        (
            STAGE3 + '"offload_param": {"device": "cpu",\n"nvme_path": "/x"}}}',
            "ds.json:3: nvme_path is set by deepspeed.nvme_path; remove",
        ),
        (
            STAGE3 + '"offload_optimizer": {"device": "nvme"}}}',
            "run.yaml:13: deepspeed.nvme_path is not set, but ds.json:2 puts offload_optimizer on NVMe; give a",
        ),
        ('{\n"zero_optimization": }', "ds.json:2: not valid JSON: "),
        ("[1]", "ds.json: the DeepSpeed file must be one JSON object"),
    ],
)
def test_mistakes_are_named_with_their_line(load: Callable[..., RunConfig], text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    assert relative(caught.value)[0].startswith(expected)


def relative(error: UserError) -> list[str]:
    """The lines of the message, with paths relative to the test's folder."""
    return str(error).replace(f"{Path.cwd()}/", "").splitlines()


def test_all_mistakes_are_in_one_message(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError) as caught:
        load('{"fp16": {"enabled": true},\n"zero": 1,\n"aio": {"x": 1}}', "schedule.warmup_steps=99")
    assert [line[:40] for line in relative(caught.value)] == [
        "--set schedule.warmup_steps=99: schedule",
        "ds.json:1: fp16 is set by train.precisio",
        "ds.json:2: unknown DeepSpeed key 'zero';",
        "ds.json:3: unknown DeepSpeed key 'aio.x'",
    ]


@pytest.mark.parametrize(
    "text", ["{}", '{"zero_optimization": null}', '{"zero_optimization": {"offload_param": null}}']
)
def test_what_a_file_leaves_out_is_off(load: Callable[..., RunConfig], text: str) -> None:
    config = load(text)
    settings = deepspeed_config(config, 1, config.model.to_model_config(None))
    assert settings["zero_optimization"].get("stage", 0) == 0
    assert settings["gradient_accumulation_steps"] == 2


def test_every_chunk_of_a_window_is_accumulated(load: Callable[..., RunConfig]) -> None:
    config = load("{}", "data.window_chunks=3")
    settings = deepspeed_config(config, 1, config.model.to_model_config(None))
    sizes = [settings[f"train_{name}"] for name in ("batch_size", "micro_batch_size_per_gpu")]
    assert (*sizes, settings["gradient_accumulation_steps"]) == (12, 2, 6)
    assert config.tokens_per_step == 4 * 3 * 8192


def test_auto_leaves_the_decision_to_the_run(load: Callable[..., RunConfig]) -> None:
    text = """{
        "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "steps_per_print": 7
    }"""
    config = load(text)
    settings = deepspeed_config(config, 2, config.model.to_model_config(None))
    assert settings == {
        "zero_optimization": {"stage": 2},
        "steps_per_print": 7,
        "wall_clock_breakdown": False,
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_deepspeed_takes_every_shipped_file(
    write: Write, minimal: str, tmp_path: Path, path: Path, precision: str
) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    overrides = [f"deepspeed.config={path}", f"deepspeed.nvme_path={tmp_path}", f"train.precision={precision}"]
    file = write("run.yaml", minimal)
    if path.stem == "zero0" and precision != "fp32":
        with pytest.raises(UserError) as caught:
            load_config(file, overrides)
        assert str(caught.value) == (
            f"--set train.precision={precision}: train.precision {precision} needs ZeRO, but ds_configs/zero0.json has "
            "stage 0; use fp32, or ds_configs/zero1.json"
        )
        return
    config = load_config(file, overrides)
    parsed = DeepSpeedConfig(deepspeed_config(config, 1, config.model.to_model_config(None)))
    assert parsed.zero_optimization_stage == int(path.stem[4])
    assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    assert parsed.float16_config.initial_dynamic_scale() == 2**16
    assert parsed.gradient_clipping == 0.0
    assert parsed.grad_accum_dtype == "fp32"
    device = path.stem.removeprefix("zero3_offload_") if "offload" in path.stem else None
    for offload in (parsed.zero_config.offload_param, parsed.zero_config.offload_optimizer):
        assert (offload and offload.device) == device
        assert not offload or offload.nvme_path == (nvme_folder(config) if device == "nvme" else None)
    assert parsed.zero_force_ds_cpu_optimizer == (device is not None)


def test_nvme_buffers_hold_the_largest_parameter(write: Write, minimal: str, tmp_path: Path) -> None:
    overrides = ["deepspeed.config=ds_configs/zero3_offload_nvme.json", f"deepspeed.nvme_path={tmp_path}"]
    config = load_config(write("run.yaml", minimal), overrides)
    model_config = config.model.to_model_config(100_000)
    settings = deepspeed_config(config, 2, model_config)
    # 192 wide; 100 000 rounded up to 100 032 embeddings, on two ranks
    assert settings["zero_optimization"]["offload_param"]["buffer_size"] == 192 * 100_032 // 2
    assert settings["zero_optimization"]["offload_param"]["nvme_path"] == str(nvme_folder(config))


def test_the_largest_parameter_is_not_larger_than_the_buffer(write: Write, minimal: str, tmp_path: Path) -> None:
    import torch

    from mmrec_train.model import MMRecForCausalLM

    overrides = ["deepspeed.config=ds_configs/zero3_offload_nvme.json", f"deepspeed.nvme_path={tmp_path}"]
    config = load_config(write("run.yaml", minimal), overrides)
    for vocab_size in (64, 5000):
        model_config = config.model.to_model_config(vocab_size)
        with torch.device("meta"):
            largest = max(parameter.numel() for parameter in MMRecForCausalLM(model_config).parameters())
        settings = deepspeed_config(config, 1, model_config)
        assert settings["zero_optimization"]["offload_param"]["buffer_size"] >= largest


def test_runs_do_not_share_nvme_files(write: Write, minimal: str) -> None:
    path = write("run.yaml", minimal)
    folders = [
        nvme_folder(load_config(path, ["deepspeed.nvme_path=/nvme", f"run_dir={run_dir}"]))
        for run_dir in ("runs/a", "runs/b", "other/a", str(Path("runs/a").absolute()))
    ]
    assert len(set(folders)) == 3
    assert folders[0] == folders[3]
    assert folders[0].parent == Path("/nvme")


def test_wrong_types_are_named_with_their_line(load: Callable[..., RunConfig]) -> None:
    config = load(
        '{"zero_optimization": {"stage": 3,\n"overlap_comm": "much",\n"offload_param": {\n"buffer_count": -1}}}'
    )
    with pytest.raises(UserError) as caught:
        deepspeed_config(config, 1, config.model.to_model_config(None))
    lines = relative(caught.value)
    assert lines[0].startswith("ds.json:2: zero_optimization.overlap_comm: Input should be a valid boolean")
    assert lines[1].startswith("ds.json:4: zero_optimization.offload_param.buffer_count: Input should be greater than")


class Recorder(dict[str, Any]):
    """A dictionary that remembers which keys were asked for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.asked: set[str] = set()

    def __copy__(self) -> "Recorder":
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def test_top_level_keys_are_those_that_deepspeed_reads() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    recorder = Recorder(train_batch_size=1)
    DeepSpeedConfig(recorder)
    known = keys.SUPPORTED | keys.UNUSED | keys.OWNED.keys()
    assert recorder.asked - _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() == known


def test_nested_keys_are_those_that_deepspeed_reads() -> None:
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def current(model: Any) -> Container[str]:
        """Names and aliases of a pydantic model's fields that are not deprecated."""
        fields = {
            name: field
            for name, field in model.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated")
        }
        return fields.keys() | {field.alias for field in fields.values() if field.alias}

    assert dict(keys.SECTIONS) == {
        ("zero_optimization",): current(DeepSpeedZeroConfig),
        ("zero_optimization", "offload_param"): current(DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization", "offload_optimizer"): current(DeepSpeedZeroOffloadOptimizerConfig),
        ("aio",): AIO_DEFAULT_DICT.keys(),
    }
