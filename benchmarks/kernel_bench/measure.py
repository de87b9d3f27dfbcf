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

from kernel_bench.problems import Case
from mmrec_kernels import backend

FLOOR = 1e-6  # outputs in fp32 of bf16 problems: no closer than the fp32 limit is asked for
CLEARED_BYTES = 256 * 2**20
HEADER = ("operation", "pass", "ms", "spread", "host ms", "target", "verdict", "remark")


class CheckFailed(Exception):
    """A result is wrong, so its time means nothing."""


class Timing(NamedTuple):
    """Medians over cold-L2 runs on the device.

    Attributes:
        ms: Mean of two medians.
        spread: Their difference relative to it.
        host_ms: Time in which the host issues one call; above `ms`, calls one after another wait for the host.
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


def measure(function: Callable[[], Any], warmup: float = 25.0, rep: float = 100.0) -> Timing:
    """Times a function on the device, twice; warm-up and each repetition last that many milliseconds.

    Before each call a buffer larger than the L2 cache is overwritten, as often as it takes the host to issue the call:
    the device never waits for the host, as in training, where calls are queued ahead. What the host needs is timed
    by itself.
    """
    host = _host_ms(function, warmup)
    cache = torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda")
    clearings = 1 + int(1.5 * host / _device_ms(cache.zero_, cache, 5, 1))
    calls = max(3, int(rep / _device_ms(function, cache, 5, clearings)))
    medians = [_device_ms(function, cache, calls, clearings) for _ in range(2)]
    mean = statistics.mean(medians)
    return Timing(mean, abs(medians[0] - medians[1]) / mean, host)


def _host_ms(function: Callable[[], Any], warmup: float) -> float:
    """Median time in which the host issues one call."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < warmup:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def _device_ms(function: Callable[[], Any], cache: Tensor, calls: int, clearings: int) -> float:
    """Median time of a call on the device, each begun with the L2 cache cold and while the device is busy."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in events:
        for _ in range(clearings):
            cache.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


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
