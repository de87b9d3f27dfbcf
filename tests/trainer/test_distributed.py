"""Ranks that find each other, and what they take from DeepSpeed."""

from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init

import mmrec_train.trainer.distributed  # noqa: F401  (mends Init)
from mmrec_train.errors import EXIT_USER_ERROR
from tests.trainer import ranks
from tests.trainer.command import Result
from tests.trainer.runs import copy_with_other_documents


def test_ranks_of_different_runs_are_refused(tmp_path: Path, dataset: Path, config_file: Path) -> None:
    """As on two hosts with copies of configuration and data of their own, of which one is not up to date."""
    other = copy_with_other_documents(dataset, tmp_path / "data")
    processes = ranks.start_differing(config_file, [], [f"data.path={other}", "optimizer.learning_rate=3e-3"])
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_USER_ERROR] * 2
    message = Result(EXIT_USER_ERROR, "", "".join(outputs)).refusal
    assert "rank 1" in message
    assert "optimizer.learning_rate is 0.003 there and 0.01 on rank 0" in message
    assert f"data.path is {other} there and {dataset} on rank 0" in message
    assert message.count("documents.training.main is ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cpu_has_fp16", [True, False])
def test_partitions_are_of_the_dtype_asked_for(
    cpu_has_fp16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: cpu_has_fp16)
    init = object.__new__(Init)  # as it is at the beginning of its __init__
    init._set_dtype(None, dtype)
    assert init.dtype == dtype
