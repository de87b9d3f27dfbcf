import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from mmrec_kernels import backend, health, linear_scan, reference

QUICK = health.INTERPRETED._replace(length=20, long=40, queries=6)
SCAN = "linear_scan"


@pytest.fixture
def cases(monkeypatch):
    """Two quick cases instead of all; on the CPU, also where there is a GPU."""
    names = (SCAN, "linear_scan, reverse")
    monkeypatch.setattr(health, "CASES", {name: health.CASES[name] for name in names})
    monkeypatch.setattr(health, "INTERPRETED", QUICK)
    return health.CASES


def replace_operation(monkeypatch, cases, operation):
    """Makes the first case run another operation."""
    make = cases[SCAN]

    def changed(sizes):
        problem = make(sizes)
        problem.operation = operation
        return problem

    monkeypatch.setitem(cases, SCAN, changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(health.CASES))
def test_pytorch_is_healthy(monkeypatch, name, dtype):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    sizes = health.INTERPRETED._replace(queries=20)
    outcome = health.examine(name, dtype, torch.device("cpu"), sizes, Counter())
    assert outcome.reason is None and outcome.path == "torch"
    assert 0 < outcome.error <= outcome.limit and outcome.milliseconds > 0


def test_the_path_is_that_of_the_kernels_that_ran(device, backend):
    seen = Counter()
    outcome = health.examine(SCAN, torch.float32, device, QUICK, seen)
    assert outcome.reason is None
    if backend == "torch":
        assert outcome.path == "torch" and not seen
    else:
        assert outcome.path == ("triton" if device.type == "cuda" else "interpreter") and seen


def test_the_table_and_exit_code_of_a_healthy_package(monkeypatch, cases, capsys):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert health.main(["--device", "cpu"]) == 0
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert "MMREC_KERNELS=torch" in head
    assert columns.split() == list(health.COLUMNS)
    assert [row.split()[-1] for row in rows] == ["ok"] * 4
    assert [row.split()[-6] for row in rows] == ["float32", "bfloat16"] * 2


@pytest.mark.parametrize(
    ("factor", "shown"), [(1 + 1e-4, "relative error 1.0e-04 of"), (float("nan"), "relative error nan of")]
)
def test_what_is_too_far_from_fp64_fails(monkeypatch, cases, capsys, factor, shown):
    monkeypatch.setenv(backend.VARIABLE, "torch")

    def wrong(gamma, x, initial_state, **options):
        h, final = linear_scan(gamma, x, initial_state, **options)
        return h, final * factor

    replace_operation(monkeypatch, cases, wrong)
    assert health.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert failed[0].startswith("FAILED linear_scan, float32: ") and shown in failed[0] and "above 1e-06" in failed[0]
    assert sum(line.endswith("FAILED") for line in lines) == len(failed)
    assert not any("reverse" in line for line in failed)


def test_an_operation_that_raises_does_not_keep_the_others_from_being_examined(monkeypatch, cases, capsys):
    monkeypatch.setenv(backend.VARIABLE, "torch")

    def broken(*_, **__):
        raise RuntimeError("out of shared memory")

    replace_operation(monkeypatch, cases, broken)
    assert health.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED linear_scan, float32: RuntimeError: out of shared memory" in out
    assert out.count("  ok") == 2


def test_a_silent_fallback_fails(monkeypatch, cases, capsys):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    replace_operation(monkeypatch, cases, reference.linear_scan)
    assert health.main(["--device", "cpu"]) == 1
    assert "FAILED linear_scan, float32: no kernel was launched, and no warning says why" in capsys.readouterr().out


def test_kernels_asked_for_where_none_can_run():
    """In a process of its own: whether kernels are interpreted is decided when they are imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mmrec_kernels.health", "--device", "cpu"]
    done = subprocess.run(
        command, env=environment | {backend.VARIABLE: "triton"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "no kernel can run: tensors are on cpu, and kernels run on CUDA devices" in done.stdout


def test_bad_settings_end_with_one_plain_message(monkeypatch, capsys):
    monkeypatch.setenv(backend.VARIABLE, "fast")
    assert health.main(["--device", "cpu"]) == 2
    assert "MMREC_KERNELS is 'fast'" in capsys.readouterr().err
    monkeypatch.setenv(backend.VARIABLE, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert health.main(["--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_infinite_outputs_must_be_infinite_too():
    expected = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    assert health._error(expected.float(), expected) == 0.0
    assert health._error(torch.tensor([1.0, 0.0]), expected) == float("inf")
    assert health._error(torch.tensor([float("nan"), -float("inf")]), expected) != 0.0
