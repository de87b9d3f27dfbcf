"""The parts of benchmarks/kernels.py that need no GPU: a wrong problem, or a check that lets all pass, wastes one."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrec_kernels import gated_recurrence, linear_scan, reference
from mmrec_train.model.configuration import MMRecConfig
from mmrec_train.model.memory import ChunkPlan, MemoryState

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def part(monkeypatch):
    """Imports a module of benchmarks/kernel_bench."""
    monkeypatch.syspath_prepend(FOLDER)
    return lambda name: importlib.import_module(f"kernel_bench.{name}")


def test_without_a_gpu_it_ends_with_one_plain_message():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / "kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "benchmarks/kernels.py measures kernels on a CUDA GPU, and there is none here\n"


@pytest.mark.parametrize("length", [1, 64, 300, 2048])
def test_the_segment_rule_is_the_model_s(part, length):
    problems = part("problems")
    config = MMRecConfig(memory_slots=problems.SLOTS, segment_len=problems.SEGMENT, short_window=problems.WINDOW)
    state = MemoryState.empty(config, 1, torch.float32, "cpu")._replace(
        position=torch.tensor([problems.CARRIED]), slots_written=torch.tensor([problems.CARRIED // problems.SEGMENT])
    )
    plan = ChunkPlan.of(config, state, torch.zeros(1, length, dtype=torch.bool))
    for name, tensor in problems.segment_rule(length, "cpu").items():
        assert torch.equal(tensor, getattr(plan, name)), name


def test_the_gates_contract_and_have_their_half_lives(part):
    gamma, z = part("problems").gates(1, 20000, 10, torch.float64, "cpu")
    middle = gamma.logit().median(dim=1).values[0]
    expected = torch.logit(0.5 ** (1 / torch.logspace(0, 9, 10, base=2, dtype=torch.float64)))
    torch.testing.assert_close(middle, expected, atol=0.05, rtol=0)
    torch.testing.assert_close((z / (2 * (1 - gamma))).std(), torch.tensor(1.0).double(), atol=0.02, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_the_token_by_token_kernel_equals_the_loop(part):
    problems = part("problems")
    gamma, z = problems.gates(2, 9, 32, torch.float32, "cpu")
    weight, initial = problems.gate_weight(2, 32, torch.float32, "cpu"), torch.randn(2, 32)
    actual = part("baselines").headwise_steps(z, gamma, weight, initial)
    expected, _ = reference.gated_recurrence(*(x.double() for x in (z, gamma, weight, initial)))
    assert part("measure").relative_error(actual, expected) < 1e-6


def recurrence(problems, operation=gated_recurrence):
    gamma, z = problems.gates(2, 100, 16, torch.bfloat16, "cpu")
    leaves = {"z": z, "gamma": gamma, "weight": problems.gate_weight(2, 16, torch.bfloat16, "cpu")}
    leaves["initial_state"] = torch.randn(2, 16)
    return problems.Case("recurrence", operation, leaves, {"tol": 1e-3}, exact={"solver": "sequential"})


def test_a_right_result_passes_the_check(part, monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    measure, case = part("measure"), recurrence(part("problems"))
    assert "closest to its limit" in measure.check(case, literal=reference.gated_recurrence)
    measure.check_repeats(case, 3)
    assert os.environ["MMREC_KERNELS"] == "torch"


@pytest.mark.parametrize("wrong", ["forward", "gradient", "nan"])
def test_a_wrong_result_is_not_timed(part, monkeypatch, wrong):
    monkeypatch.setenv("MMREC_KERNELS", "torch")

    def operation(z, gamma, weight, initial_state, **options):
        if z.dtype == torch.bfloat16 and "solver" not in options and next(calls) == 0:
            if wrong == "gradient":
                weight = weight.detach() + 0 * weight
            result = gated_recurrence(z, gamma, weight, initial_state, **options)
            factor = {"forward": 1.05, "gradient": 1.0, "nan": float("nan")}[wrong]
            return (result.h * factor, result.final_state)
        return gated_recurrence(z, gamma, weight, initial_state, **options)

    calls = iter(range(100))  # the first is the one under test, the others are what it is compared with
    measure = part("measure")
    with pytest.raises(measure.CheckFailed, match="recurrence: relative error"):
        measure.check(recurrence(part("problems"), operation))


def test_a_bit_that_differs_is_found(part):
    problems, measure = part("problems"), part("measure")
    calls = iter(range(100))

    def unsteady(gamma, x):
        h, final = linear_scan(gamma, x)
        return h, final * (1 + 1e-6 * (next(calls) == 2))

    gamma, x = problems.gates(1, 10, 4, torch.float32, "cpu")
    with pytest.raises(measure.CheckFailed, match="of run 2 differs from run 0"):
        measure.check_repeats(problems.Case("scan", unsteady, {"gamma": gamma, "x": x}), 5)


def test_verdicts(part):
    measure, curve = part("measure"), part("curve")
    timing = measure.Timing(1.0, 0.01, 0.1)
    assert [measure.Row("a", "b", timing, target).verdict() for target in (1.0, 0.9, None)] == ["met", "MISSED", ""]

    def verdict(factors):
        lengths = curve.LENGTHS[: 2 + len(factors)]
        figures = [9.0, 9.0, *factors]
        timings = {n: measure.Timing(n * f, 0, 0) for n, f in zip(lengths, figures, strict=True)}
        return curve.Curve("c", timings).verdict()

    assert verdict([1.0] * 8) == "met"
    assert verdict([1.0] * 7 + [1.2]) == "MISSED"
    assert verdict([1.0] * 7 + [0.7]) == "never slower"
    assert verdict([1.0, 1.1]) == "met, not up to 1M"
    assert verdict([]) == "not measured"
