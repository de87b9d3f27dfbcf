"""Comparing with fp64, repeating to the bit, timing, and the rows of the table."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from kernel_bench.problems import Case
from mmrec_kernels import backend

FLOOR = 1e-6  # outputs in fp32 of bf16 problems: no closer than the fp32 limit is asked for
HEADER = ("operation", "pass", "ms", "spread", "host ms", "target", "verdict", "remark")


class CheckFailed(Exception):
    """A result is wrong, so its time means nothing."""


class Timing(NamedTuple):
    """Medians over cold-L2 runs on the device.

    Attributes:
        ms: Mean of two medians.
        spread: Their difference relative to it.
        host_ms: Time in which the host issues one call; near `ms` or above it, the device waits for the host.
    """

    ms: float
    spread: float
    host_ms: float


@dataclass
class Row:
    """One line of the table; `target` in milliseconds, None for baselines."""

    operation: str
    phase: str
    timing: Timing | None
    target: float | None = None
    remark: str = ""

    def verdict(self) -> str:
        if self.timing is None:
            return "not measured"
        if self.target is None:
            return ""
        return "met" if self.timing.ms <= self.target else "MISSED"

    def cells(self) -> list[str]:
        figures = ["–"] * 3
        if self.timing is not None:
            figures = [f"{self.timing.ms:.3f}", f"{100 * self.timing.spread:.1f} %", f"{self.timing.host_ms:.3f}"]
        target = "" if self.target is None else f"≤ {self.target:.3f}"
        return [self.operation, self.phase, *figures, target, self.verdict(), self.remark]

    def record(self) -> dict[str, Any]:
        timing = None if self.timing is None else self.timing._asdict()
        return asdict(self) | {"timing": timing, "verdict": self.verdict()}


def table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [list(header), ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def measure(function: Callable[[], Any], warmup: int = 25, rep: int = 100) -> Timing:
    """Times a function twice; warm-up and repetition last that many milliseconds each."""
    medians = [do_bench(function, warmup=warmup, rep=rep, return_mode="median") for _ in range(2)]
    mean = statistics.mean(medians)
    torch.cuda.synchronize()
    calls = max(1, min(10, int(rep / mean)))
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    host = (time.perf_counter() - begin) / calls * 1e3
    torch.cuda.synchronize()
    return Timing(mean, abs(medians[0] - medians[1]) / mean, host)


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Sets MMREC_KERNELS for a while."""
    before = os.environ.get(backend.VARIABLE)
    os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[backend.VARIABLE]
        else:
            os.environ[backend.VARIABLE] = before


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, NaN if anything is."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def check(case: Case, limit: float | None = None, literal: Callable[..., tuple[Tensor, Tensor]] | None = None) -> str:
    """Compares outputs and gradients with those of the PyTorch path in fp64, on the same inputs.

    Args:
        limit: Largest relative error allowed; None for twice the error of the PyTorch path in the
            case's dtype, or `FLOOR`.
        literal: The plain loop; its fp64 outputs take the place of the PyTorch path's.

    Returns:
        The largest errors, as text.

    Raises:
        CheckFailed: If an error is above its limit.
    """
    actual = case.training()
    with implementation("torch"):
        wide = case.in_dtype(torch.float64, **case.exact)
        expected = wide.training()
        plain = case.training() if limit is None else None
    if literal is not None:
        with torch.no_grad():
            expected[:2] = literal(**wide.leaves)
    worst, worst_limit, worst_label = 0.0, 1.0, ""
    for i, label in enumerate(case.labels()):
        error = relative_error(actual[i], expected[i])
        allowed = limit if plain is None else max(2 * relative_error(plain[i], expected[i]), FLOOR)
        if not error <= allowed:
            raise CheckFailed(f"{case.name}: relative error {error:.1e} of the {label} is above {allowed:.1e}")
        if error / allowed >= worst / worst_limit:
            worst, worst_limit, worst_label = error, allowed, label
    return f"closest to its limit: error {worst:.1e} ≤ {worst_limit:.1e} ({worst_label})"


def check_repeats(case: Case, repeats: int) -> None:
    """Runs forward and backward again and again.

    Raises:
        CheckFailed: If a bit differs.
    """
    first = case.training()
    for repeat in range(1, repeats):
        for label, a, b in zip(case.labels(), first, case.training(), strict=True):
            if not torch.equal(a, b):
                raise CheckFailed(f"{case.name}: the {label} of run {repeat} differs from run 0 in its bits")
