"""Time per token over the length of the sequence, at the width of the table (D = 4096), one row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch

from kernel_bench.measure import CheckFailed, Timing, implementation, measure, relative_error
from kernel_bench.problems import HEAD_DIM, PIECE, WINDOW, Case, gate_weight, gates, memory_inputs
from mmrec_kernels import gated_recurrence, linear_scan, memory_attention

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH, HEADS = 4096, 32
LENGTHS = [2**n for n in range(11, 21)]
CONSTANT_FROM, ALLOWED = 8192, 0.15
LONGEST_CALL = 1500.0  # ms; a curve ends before a call that would take longer
LAST = 64  # queries of the longest read that are compared with fp64


@dataclass
class Curve:
    """Timings of one pass of one operation by T, and why it ends where it does."""

    name: str
    timings: dict[int, Timing] = field(default_factory=dict)
    remark: str = ""

    def per_token(self) -> dict[int, float]:
        """Nanoseconds."""
        return {length: timing.ms * 1e6 / length for length, timing in self.timings.items()}

    def deviation(self) -> tuple[float, float] | None:
        """Smallest and largest time per token from 8K on, relative to that at 8K."""
        figures = self.per_token()
        if CONSTANT_FROM not in figures:
            return None
        ratios = [ns / figures[CONSTANT_FROM] for length, ns in figures.items() if length >= CONSTANT_FROM]
        return min(ratios), max(ratios)

    def verdict(self) -> str:
        deviation = self.deviation()
        if deviation is None:
            return "not measured"
        verdict = "met" if deviation[0] >= 1 - ALLOWED else "never slower"
        if deviation[1] > 1 + ALLOWED:
            verdict = "MISSED"
        return verdict + ("" if max(self.timings) == LENGTHS[-1] else ", not up to 1M")


def curves(operations: Sequence[str], say: Callable[[str], None]) -> Iterator[Curve]:
    """Measures the operations ("scan", "headwise", "dense", "memory"), forward and forward with backward.

    Raises:
        CheckFailed: If one call over 1M tokens disagrees with many calls over a part each.
    """
    recurrent = [name for name in ("scan", "headwise", "dense") if name in operations]
    if recurrent:
        gamma, z = gates(1, LENGTHS[-1], WIDTH, torch.bfloat16)
        for name in recurrent:
            yield from _both_passes(name, _recurrence(name, gamma, z), say)
        del gamma, z
        torch.cuda.empty_cache()
    if "memory" in operations:
        yield from _both_passes("memory", _memory, say)


def _recurrence(name: str, gamma: torch.Tensor, z: torch.Tensor) -> Callable[[int], Case]:
    def case(length: int) -> Case:
        # with B = 1 the first tokens are one contiguous piece, and one set of inputs serves every length
        parts = {"gamma": gamma[:, :length].detach(), "initial_state": gamma.new_zeros(1, WIDTH)}
        if name == "scan":
            return Case(name, linear_scan, parts | {"x": z[:, :length].detach()})
        weight = gate_weight(HEADS if name == "headwise" else 0, WIDTH, torch.bfloat16)
        return Case(name, gated_recurrence, parts | {"z": z[:, :length].detach(), "weight": weight}, {"tol": 1e-3})

    return case


def _memory(length: int) -> Case:
    tensors, options = memory_inputs(length, WIDTH // HEAD_DIM, torch.bfloat16)
    return Case("memory", memory_attention, tensors, options)


def _both_passes(name: str, make: Callable[[int], Case], say: Callable[[str], None]) -> Iterator[Curve]:
    for phase in ("forward", "forward + backward"):
        curve = Curve(f"{name}, {phase}")
        for length in LENGTHS:
            if curve.timings:
                longest = max(curve.timings)
                expected = curve.timings[longest].ms * length / longest
                if expected > LONGEST_CALL:
                    curve.remark = f"T = {length} would take {expected / 1e3:.1f} s a call"
                    break
            try:
                case = make(length)
                if length == LENGTHS[-1] and phase == "forward":
                    (_check_memory if name == "memory" else _check_recurrence)(case)
                curve.timings[length] = measure(case.forward if phase == "forward" else case.training, 10, 40)
            except torch.OutOfMemoryError:
                curve.remark = f"T = {length} does not fit in memory"
                break
            finally:
                case = None
                torch.cuda.empty_cache()
        say(f"{curve.name}: {', '.join(f'{ns:.1f}' for ns in curve.per_token().values())} ns a token {curve.remark}")
        yield curve


def _check_recurrence(case: Case) -> None:
    """One call over the whole length against calls over 64K tokens each that hand their state on."""
    gamma, sequence = case.leaves["gamma"].detach(), "x" if case.name == "scan" else "z"
    values = case.leaves[sequence].detach()
    others: dict[str, Any] = {k: v.detach() for k, v in case.leaves.items() if k == "weight"} | case.options
    whole = case.forward()
    state, part = case.leaves["initial_state"].detach().float(), 8 * PIECE
    for first in range(0, gamma.shape[1], part):
        piece = slice(first, first + part)
        with torch.no_grad():
            arguments = {"gamma": gamma[:, piece], sequence: values[:, piece], "initial_state": state}
            h, state = case.operation(**arguments, **others)[:2]
    for label, a, b in (("state", whole[1], state), ("last tokens", whole[0][:, -part:], h)):
        error = relative_error(a, b)
        # two solutions at tolerance 1e-3 may lie that far apart; a scan's differ by the rounding of fp32 carries
        limit = 1e-5 if case.name == "scan" and label == "state" else 1e-2
        if not error <= limit:
            raise CheckFailed(
                f"{case.name}, T = {gamma.shape[1]}: {label} of one call and of many differ by {error:.1e}"
            )


def _check_memory(case: Case) -> None:
    """The last queries of the longest read against the PyTorch path in fp64 for them alone."""
    actual = case.forward()[0][:, :, -LAST:]
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    leaves["q"] = leaves["q"][:, :, -LAST:]
    for name in ("window_k", "window_v"):
        leaves[name] = leaves[name][:, :, -(LAST + WINDOW) :]
    options = dict(case.options)
    for name in ("slot_start", "slot_stop", "window_start"):
        options[name] = options[name][:, -LAST:]
    with implementation("torch"), torch.no_grad():
        expected = memory_attention(**{name: leaf.double() for name, leaf in leaves.items()}, **options)[0]
    error = relative_error(actual, expected)
    if not error <= 1e-2:
        raise CheckFailed(f"memory, T = {LENGTHS[-1]}: relative error {error:.1e} of the last tokens is above 1e-2")


def draw(measured: list[Curve], path: Path, title: str) -> None:
    """Time per token over T, one line a curve, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    operations = list(dict.fromkeys(curve.name.split(",")[0] for curve in measured))
    for curve in measured:
        figures, color = curve.per_token(), f"C{operations.index(curve.name.split(',')[0])}"
        style = "-o" if curve.name.endswith("forward") else "--s"
        axes.plot(list(figures), list(figures.values()), style, color=color, label=curve.name, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="T, tokens in one call", ylabel="ns a token", title=title)
    axes.set_xticks(LENGTHS, [f"{n // 1024}K" if n < 2**20 else "1M" for n in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
