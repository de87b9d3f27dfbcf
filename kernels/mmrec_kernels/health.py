"""Do the operations work here, on which path, how exactly, how fast?

    python -m mmrec_kernels.health                    # on the GPU if there is one
    MMREC_KERNELS=triton TRITON_INTERPRET=1 python -m mmrec_kernels.health --device cpu
    compute-sanitizer --tool racecheck python -m mmrec_kernels.health --device cuda

Each operation runs forward and backward on a small problem, in fp32 and bf16 (fp16 in the interpreter); outputs and
gradients are compared with the plain loops in fp64 on the same inputs. The path is what really ran: "triton" or
"interpreter" if kernels of this package were launched, else "torch". MMREC_KERNELS is honoured.

Exit codes: 0 healthy; 1 an operation failed, or was further from fp64 than its limit; 2 bad arguments or settings.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from mmrec_kernels import (
    RingWrites,
    associative_scan_exponential,
    backend,
    build_pyramid,
    gated_recurrence,
    latest_pyramid,
    linear_scan,
    memory_attention,
    reference,
    select_pages,
    slots_in_pages,
    update_pyramid,
)

COLUMNS = ("operation", "dtype", "path", "error", "limit", "ms", "verdict")


class Sizes(NamedTuple):
    """Sizes of the problems.

    Attributes:
        length: Tokens; not a multiple of any block.
        long: Tokens of the scan that is long enough to be split over time.
        head_dim: Channels of a head, of which there are two.
        queries: Tokens of the memory reads.
        calls: How often each operation is run; the time is the median of all calls but the first, which compiles.
    """

    length: int
    long: int
    head_dim: int
    queries: int
    calls: int


COMPILED = Sizes(length=300, long=5000, head_dim=64, queries=150, calls=4)
INTERPRETED = Sizes(length=70, long=300, head_dim=16, queries=40, calls=1)
BATCH, HEADS = 2, 2


@dataclass
class Problem:
    """One call of an operation.

    Attributes:
        operation, expected: The function and the loop that defines it.
        leaves: Tensors it is differentiated by, fp64 on the CPU.
        options: All other arguments; `only` are those that the loop does not take.
        limit: Largest relative error for fp32 inputs.
        limit_16_bit: For 16-bit inputs: rounding of bf16 outputs is 2e-3, the rest is operands of matrix products.
    """

    operation: Callable[..., Any]
    expected: Callable[..., Any]
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    limit: float
    limit_16_bit: float = 1e-2
    only: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """A line of the table. `reason` says why it is not healthy; None if it is."""

    operation: str
    dtype: str
    path: str
    error: float | None
    limit: float
    milliseconds: float | None
    reason: str | None

    def cells(self) -> list[str]:
        error = "–" if self.error is None else f"{self.error:.1e}"
        duration = "–" if self.milliseconds is None else f"{self.milliseconds:.2f}"
        verdict = "ok" if self.reason is None else "FAILED"
        return [self.operation, self.dtype, self.path, error, f"{self.limit:.0e}", duration, verdict]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sequence(length: int, width: int, *, contracting: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """z (2 (1 − γ) z if contracting), γ and h₀ in fp64, and resets."""
    g = _generator(0)
    half_life = torch.logspace(0, 9, width, base=2, dtype=torch.float64)
    logit = torch.logit(0.5 ** (1 / half_life))
    gamma = torch.sigmoid(logit + torch.randn(BATCH, length, width, generator=g, dtype=torch.float64))
    z = torch.randn(BATCH, length, width, generator=g, dtype=torch.float64)
    if contracting:
        z = 2 * (1 - gamma) * z
    else:
        gamma = torch.full_like(gamma, 0.99)
    initial = torch.randn(BATCH, width, generator=g, dtype=torch.float64)
    reset = torch.rand(BATCH, length, generator=g) < 0.02
    return {"z": z, "gamma": gamma, "initial_state": initial}, reset


def _scan(length: int, width: int, *, reverse: bool) -> Problem:
    leaves, reset = _sequence(length, width)
    leaves["x"] = leaves.pop("z")
    options = {"reset": reset, "reverse": reverse}
    return Problem(linear_scan, reference.linear_scan, leaves, options, 1e-6)


def _exponential(sizes: Sizes) -> Problem:
    gamma = _sequence(sizes.length, HEADS * sizes.head_dim)[0]["gamma"]
    leaves = {"gamma": gamma, "initial_log": -torch.rand(BATCH, gamma.shape[-1], generator=_generator(1)).double()}
    return Problem(associative_scan_exponential, reference.associative_scan_exponential, leaves, {}, 1e-6)


def _recurrence(sizes: Sizes, shape: Sequence[int], *, finish: bool = False) -> Problem:
    """With `finish`, a problem that does not contract, so that what follows the iteration has to run."""
    length = sizes.queries if finish else sizes.length
    leaves, reset = _sequence(length, HEADS * sizes.head_dim, contracting=not finish)
    scale = (4 if finish else 1) * shape[-1] ** -0.5
    leaves["weight"] = scale * torch.randn(*shape, generator=_generator(2), dtype=torch.float64)
    options: dict[str, Any] = {"reset": reset}
    if not finish:
        return Problem(gated_recurrence, reference.gated_recurrence, leaves, options, 1e-5)
    options["max_iterations"] = 3
    # such a problem amplifies the rounding of its operands
    return Problem(gated_recurrence, reference.gated_recurrence, leaves, options, 1e-4, 6e-2, only=("max_iterations",))


def _read(sizes: Sizes, *, window: bool, pages: bool = False) -> Problem:
    """A ring of slots in random order, in one bank for all heads, and an interval of them for each query.

    If asked, a window with earlier tokens and a null slot; or the pages of slots that a query may see.
    """
    g, length, slots, carried = _generator(3), sizes.queries, 24, 11
    heads = (BATCH, HEADS)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    leaves = {"q": randn(*heads, length, sizes.head_dim)}
    leaves |= {name: randn(BATCH, 1, slots, HEADS * sizes.head_dim) for name in ("slots_k", "slots_v")}
    stop = torch.randint(0, slots + 1, (BATCH, length), generator=g)
    options: dict[str, Any] = {
        "slot_stamp": torch.stack([torch.randperm(slots, generator=g) for _ in range(BATCH)]),
        "slot_start": (stop - torch.randint(0, slots + 1, (BATCH, length), generator=g)).clamp_min(0),
        "slot_stop": stop,
    }
    if window:
        own = torch.arange(carried, carried + length)
        leaves |= {name: randn(*heads, carried + length, sizes.head_dim) for name in ("window_k", "window_v")}
        leaves |= {name: randn(HEADS, sizes.head_dim) for name in ("null_k", "null_v")}
        seen = torch.randint(0, length, (BATCH, length), generator=g)
        options |= {"window_start": (own - seen).clamp_min(0), "window": 20}
    if pages:
        chosen = torch.rand(*heads, length, slots // 4, generator=g).argsort(-1)[..., :3]
        options["pages"] = chosen.masked_fill(chosen == 0, -1)
    return Problem(memory_attention, reference.memory_attention, leaves, options, 1e-5)


def _hierarchy(sizes: Sizes) -> Problem:
    """A read of pages selected through a pyramid, so many that none is left out: equal to the read of all slots.

    Of the slots, the first 16 are a ring that the others are written to, one after another.
    """
    problem = _read(sizes, window=False)
    ring, slots = 16, problem.leaves["slots_k"].shape[2]
    stop = torch.randint(ring, slots + 1, (BATCH, sizes.queries), generator=_generator(4))
    stamp = torch.arange(slots).repeat(BATCH, 1)
    problem.options = {"slot_stamp": stamp, "slot_start": stop - ring, "slot_stop": stop}

    def read(
        q: Tensor, slots_k: Tensor, slots_v: Tensor, slot_stamp: Tensor, slot_start: Tensor, slot_stop: Tensor
    ) -> tuple[Tensor, Tensor]:
        filled = torch.full((BATCH,), ring, device=q.device)
        writes = RingWrites.of(ring, filled, slot_stamp[:, ring:], torch.full_like(filled, slots - ring))
        history = update_pyramid(build_pyramid(slots_k[:, :, :ring]), slots_k, writes)
        after = torch.cat([slots_k[:, :, ring:], slots_k[:, :, slots - ring : ring]], dim=2)
        if not all(
            torch.equal(a, b) for a, b in zip(latest_pyramid(history, writes), build_pyramid(after), strict=True)
        ):
            raise RuntimeError("update_pyramid and build_pyramid differ")
        pages = select_pages(q, history, writes, slot_stop=slot_stop, completed=slot_stop, topk_blocks=ring)
        k, v = (slots_in_pages(x, writes) for x in (slots_k, slots_v))
        return memory_attention(
            q, k, v, slot_stamp=writes.page_stamp, slot_start=slot_start, slot_stop=slot_stop, pages=pages
        )

    problem.operation = read
    return problem


def _headwise(sizes: Sizes, *, finish: bool = False) -> Problem:
    return _recurrence(sizes, (HEADS, sizes.head_dim, sizes.head_dim), finish=finish)


def _dense(sizes: Sizes, *, finish: bool = False) -> Problem:
    return _recurrence(sizes, (HEADS * sizes.head_dim, HEADS * sizes.head_dim), finish=finish)


CASES: dict[str, Callable[[Sizes], Problem]] = {
    "linear_scan": lambda s: _scan(s.length, HEADS * s.head_dim, reverse=False),
    "linear_scan, reverse": lambda s: _scan(s.length, HEADS * s.head_dim, reverse=True),
    "linear_scan, long and narrow": lambda s: _scan(s.long, 3, reverse=False),
    "associative_scan_exponential": _exponential,
    "gated_recurrence, headwise": _headwise,
    "gated_recurrence, headwise, exact finish": lambda s: _headwise(s, finish=True),
    "gated_recurrence, dense": _dense,
    "gated_recurrence, dense, exact finish": lambda s: _dense(s, finish=True),
    "memory_attention": lambda s: _read(s, window=True),
    "memory_attention, slots only": lambda s: _read(s, window=False),
    "memory_attention, pages": lambda s: _read(s, window=True, pages=True),
    "memory_attention of select_pages": _hierarchy,
}


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts the launches of this package's kernels, compiled or interpreted, by module and name."""
    counts: Counter[str] = Counter()
    kernels: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if module is not None and name.startswith("mmrec_kernels."):
            for value in list(vars(module).values()):
                # an autotuned kernel holds the plain one
                kernel = getattr(value, "fn", value) if type(value).__name__ == "Autotuner" else value
                if isinstance(kernel, (JITFunction, InterpretedFunction)):
                    kernels[id(kernel)] = kernel

    def counter(name: str) -> Callable[..., None]:
        return lambda *_, **__: counts.update([name])

    names = {key: f"{kernel.fn.__module__.split('.')[-1]}.{kernel.__name__}" for key, kernel in kernels.items()}
    hooks = [(kernel, counter(names[key])) for key, kernel in kernels.items()]
    for kernel, hook in hooks:
        kernel.add_pre_run_hook(hook)
    try:
        yield counts
    finally:
        for kernel, hook in hooks:
            kernel.pre_run_hooks.remove(hook)


def _run(
    function: Callable[..., Any], leaves: dict[str, Tensor], options: dict[str, Any], probes: list[Tensor]
) -> list[Tensor]:
    """Outputs, and gradients of their products with the probes; probes are drawn on first use."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    result = function(**leaves, **options)
    outputs = [result] if isinstance(result, Tensor) else list(result[:2])
    if not probes:
        for o in outputs:
            # a functional that a read of nothing (lse = −∞) leaves finite
            probe = torch.randn(o.shape, generator=_generator(6)).to(o) * o.isfinite()
            probes.append(probe)
    probes = [probe.to(o) for probe, o in zip(probes, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), probes)
    return [*(o.detach() for o in outputs), *gradients]


def _error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over finite expected elements; infinite or NaN where the others differ."""
    actual, finite = actual.double().cpu(), expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]):
        return float("inf")
    difference = torch.where(finite, actual - expected, 0.0)
    return (difference.norm() / torch.where(finite, expected, 0.0).norm().clamp_min(1e-30)).item()


def examine(name: str, dtype: torch.dtype, device: torch.device, sizes: Sizes, seen: Counter[str]) -> Outcome:
    """Runs one case in one dtype; adds the kernels that it launched to `seen`."""
    problem = CASES[name](sizes)
    limit = problem.limit if dtype == torch.float32 else problem.limit_16_bit
    leaves = {key: leaf.to(device, dtype) for key, leaf in problem.leaves.items()}
    options = {k: o.to(device) if isinstance(o, Tensor) else o for k, o in problem.options.items()}
    label = str(dtype).removeprefix("torch.")
    probes: list[Tensor] = []
    with launches() as counts, warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            runs = [
                _timed(lambda: _run(problem.operation, leaves, options, probes), device) for _ in range(sizes.calls)
            ]
        except Exception as failure:  # whatever it is, the other operations are examined too
            return Outcome(name, label, "–", None, limit, None, f"{type(failure).__name__}: {failure}")
    seen.update(counts)
    actual = runs[0][0]
    milliseconds = statistics.median([duration for _, duration in runs[1:]] or [runs[0][1]])
    path = ("triton" if device.type == "cuda" else "interpreter") if counts else "torch"
    wide = {key: leaf.double().cpu() for key, leaf in leaves.items()}
    shared = {key: option for key, option in problem.options.items() if key not in problem.only}
    expected = _run(problem.expected, wide, shared, [probe.cpu() for probe in probes])
    labels = [*(f"output {i}" for i in range(len(probes))), *(f"gradient of {key}" for key in leaves)]
    errors = [_error(a, e) for a, e in zip(actual, expected, strict=True)]
    error = max(errors, key=lambda e: float("inf") if e != e else e)
    reason = None
    if not error <= limit:
        reason = f"relative error {error:.1e} of {labels[errors.index(error)]} is above {limit:.0e}"
    elif path == "torch" and _kernels_expected(device):
        why = "; ".join(str(w.message) for w in raised if "runs in PyTorch" in str(w.message))
        if backend.mode() == "triton" or not why:
            reason = why or "no kernel was launched, and no warning says why"
    return Outcome(name, label, path, error, limit, milliseconds, reason)


def _kernels_expected(device: torch.device) -> bool:
    return backend.mode() == "triton" or (backend.mode() == "auto" and device.type == "cuda")


def _timed(function: Callable[[], list[Tensor]], device: torch.device) -> tuple[list[Tensor], float]:
    """The result of a call and its milliseconds on the host's clock, its work on the device included."""
    begin = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, (time.perf_counter() - begin) * 1e3


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrec_kernels.health", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parsed = parser.parse_args(arguments)
    name = parsed.device if parsed.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        mode = backend.mode()
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device")
    except ValueError as error:
        print(f"mmrec_kernels.health: {error}", file=sys.stderr)
        return 2
    device, sizes = torch.device(name), INTERPRETED if name == "cpu" else COMPILED
    what = torch.cuda.get_device_name(device) if name == "cuda" else "CPU"
    print(f"{what}, torch {torch.__version__}, {backend.VARIABLE}={mode}; forward + backward, error against fp64")
    seen: Counter[str] = Counter()
    # NumPy, in which Triton's interpreter computes, has no bf16: products of such operands come out wrong
    dtypes = (torch.float32, torch.float16 if name == "cpu" and mode == "triton" else torch.bfloat16)
    outcomes = [examine(case, dtype, device, sizes, seen) for case in CASES for dtype in dtypes]
    print(*_table([list(COLUMNS), *(outcome.cells() for outcome in outcomes)]), sep="\n")
    if seen:
        print("kernels launched: " + ", ".join(f"{kernel} {count}x" for kernel, count in sorted(seen.items())))
    failed = [outcome for outcome in outcomes if outcome.reason is not None]
    for outcome in failed:
        print(f"FAILED {outcome.operation}, {outcome.dtype}: {outcome.reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
