import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.config import RunConfig, check_machine, check_world, load_config
from mmrec_train.config.deepspeed_file import REPOSITORY
from mmrec_train.errors import UserError

Write = Callable[[str, str], Path]


@given(ranks=st.integers(1, 16), micro=st.integers(1, 16), accumulation=st.integers(1, 16))
def test_accumulation_covers_the_batch(ranks: int, micro: int, accumulation: int) -> None:
    batch = ranks * micro * accumulation
    overrides = [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"]
    assert check_world(load_config(REPOSITORY / "launch/configs/quickstart.yaml", overrides), ranks) == accumulation


@pytest.mark.parametrize(
    ("batch", "ranks", "nearest"), [(10, 4, "8 or 16"), (4, 4, "8"), (18, 3, None), (2, 1, None), (12, 5, "10 or 20")]
)
def test_a_batch_that_ranks_cannot_share(
    write: Write, minimal: str, batch: int, ranks: int, nearest: str | None
) -> None:
    config = load_config(write("run.yaml", minimal.replace("global_batch_size: 4", f"global_batch_size: {batch}")))
    if nearest is None:
        assert check_world(config, ranks) == batch // (2 * ranks)
        return
    with pytest.raises(UserError) as caught:
        check_world(config, ranks)
    assert str(caught.value) == (
        f"run.yaml:10: train.global_batch_size {batch} is not divisible by {ranks} ranks × train.micro_batch_size 2 "
        f"= {2 * ranks}; nearest: {nearest}"
    )


def test_lanes_cannot_forget_and_remember(write: Write, minimal: str) -> None:
    overrides = ["data.sequence_len=512", "model.memory_across_documents=true"]
    with pytest.raises(UserError, match="leave one of them out"):
        load_config(write("run.yaml", minimal), overrides)
    for override in overrides:
        load_config(write("run.yaml", minimal), [override])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, bool], None]:
    """Pretends that there is a GPU, or none, with or without bf16."""

    def pretend(available: bool, bf16: bool) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: available)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: bf16)

    return pretend


@pytest.mark.parametrize(
    ("available", "bf16", "overrides", "expected"),
    [
        (
            False,
            False,
            ["train.device=gpu"],
            "--set train.device=gpu: train.device is gpu, but PyTorch finds none here",
        ),
        (True, True, ["train.device=gpu"], None),
        (False, False, ["train.precision=bf16"], None),
        (True, False, ["train.precision=bf16"], "--set train.precision=bf16: train.precision is bf16, which this GPU"),
        (True, False, ["train.precision=bf16", "train.device=cpu"], None),
        (True, False, ["train.precision=fp16"], None),
        (
            True,
            True,
            ["train.precision=fp16", "train.device=cpu"],
            "--set train.precision=fp16: train.precision is fp16",
        ),
        (False, False, ["train.precision=fp16"], "--set train.precision=fp16: train.precision is fp16, which this CPU"),
    ],
)
def test_devices(
    write: Write,
    minimal: str,
    gpu: Callable[[bool, bool], None],
    monkeypatch: pytest.MonkeyPatch,
    available: bool,
    bf16: bool,
    overrides: list[str],
    expected: str | None,
) -> None:
    monkeypatch.setattr("mmrec_train.config.checks._cpu_has_fp16", lambda: False)
    gpu(available, bf16)
    config = load_config(write("run.yaml", minimal), overrides)
    if expected is None:
        check_machine(config)
    else:
        with pytest.raises(UserError) as caught:
            check_machine(config)
        assert str(caught.value).startswith(expected)


def machine_problems(config: RunConfig) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_machine(config)
    return str(caught.value).splitlines()


def test_folders(write: Write, minimal: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write("run.yaml", minimal)
    nvme = ["deepspeed.config=ds_configs/zero3_offload_nvme.json"]
    check_machine(load_config(path, ["deepspeed.nvme_path=/nowhere"]))  # not used
    check_machine(load_config(path, [*nvme, f"deepspeed.nvme_path={tmp_path}"]))
    assert not Path("runs").exists()

    config = load_config(path, [*nvme, "deepspeed.nvme_path=nowhere", "run_dir=run.yaml/x"])
    assert machine_problems(config) == [
        f"--set run_dir=run.yaml/x: run_dir run.yaml/x: {tmp_path}/run.yaml is not a folder; choose another run_dir",
        "--set deepspeed.nvme_path=nowhere: deepspeed.nvme_path nowhere is not a folder that can be written to",
    ]

    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda *_: False)
    config = load_config(path, [*nvme, f"deepspeed.nvme_path={tmp_path}"])
    assert machine_problems(config) == [
        f"run.yaml:1: run_dir runs/test: no permission to write to {tmp_path}",
        f"--set deepspeed.nvme_path={tmp_path}: deepspeed.nvme_path {tmp_path} is not a folder that can be written to",
    ]


@pytest.mark.parametrize(
    ("section", "dataset", "expected"),
    [("", 1000, 1024), ("", 64, 64), ("", None, 4096), ("vocab_size: 1001", 1000, 1001)],
)
def test_vocabulary(write: Write, minimal: str, section: str, dataset: int | None, expected: int) -> None:
    config = load_config(write("run.yaml", minimal.replace("preset: tiny", f"preset: tiny\n  {section}")))
    assert config.model.to_model_config(dataset).vocab_size == expected


def test_a_vocabulary_smaller_than_the_data_sets(write: Write, minimal: str) -> None:
    config = load_config(write("run.yaml", minimal), ["model.vocab_size=999"])
    with pytest.raises(UserError, match=r"model\.vocab_size is 999, but the data set has 1000 token ids"):
        config.model.to_model_config(1000)
