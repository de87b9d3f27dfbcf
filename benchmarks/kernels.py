"""Measures the kernels beside what they are to be compared with, checks them first, and draws time per token over T.

    python benchmarks/kernels.py                        # everything; on one H100 four minutes and the curves over T
    python benchmarks/kernels.py --ops scan headwise --out results/

B = 1, T = 8192, D = 4096 (32 heads of 128), bf16, unless a row says otherwise. Before an operation is timed, its
outputs and all gradients are compared with fp64 (limit: twice the error of the PyTorch path in bf16, and the fp32
limits of docs/kernels.md) and repeated to the bit. Times are medians with a cold L2 cache, each taken twice; forward +
backward includes the gradients of every input. Baselines run in the same process: a device copy, chunk_hgrn of
flash-linear-attention (`pip install flash-linear-attention==0.6.0`), a token-by-token kernel, flash attention,
FlexAttention.

Exit codes: 0 done, also when a target is missed; 1 a check failed; 2 there is no GPU.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
import triton
from kernel_bench.baselines import DENSE_KEYS, flash_dense, flex_slots, flex_window, headwise_steps, hgrn
from kernel_bench.curve import LENGTHS, Curve, curves, draw
from kernel_bench.measure import (
    HEADER,
    CheckFailed,
    Row,
    check,
    check_repeats,
    implementation,
    measure,
    relative_error,
    table,
)
from kernel_bench.problems import HEAD_DIM, Case, by_head, gate_weight, gates, memory_inputs

from mmrec_kernels import backend, gated_recurrence, linear_scan, memory_attention, reference

OPERATIONS = ("scan", "headwise", "dense", "memory", "length")
LENGTH, WIDTH, HEADS = 8192, 4096, 32
FORWARD, BOTH = "forward", "forward + backward"
BEGIN = time.perf_counter()


def say(message: str) -> None:
    """Progress, to standard error."""
    print(f"[{time.perf_counter() - BEGIN:6.1f} s] {message}", file=sys.stderr, flush=True)


def scan(repeats: int) -> Iterator[Row]:
    inputs = gates(1, LENGTH, WIDTH, torch.bfloat16)
    leaves = {"gamma": inputs[0], "x": inputs[1], "initial_state": torch.randn(1, WIDTH, device="cuda")}
    case = Case("linear_scan", linear_scan, leaves)
    say(f"{case.name}: {check(case, literal=reference.linear_scan)}")
    for length in (65536, 127323):
        names = zip(("gamma", "x"), gates(1, length, 256, torch.float32), strict=True)
        long = Case(f"linear_scan in fp32, T = {length}", linear_scan, dict(names))
        say(f"{long.name}: {check(long, limit=1e-6)}")
    check_repeats(case, repeats)

    source = torch.randn(3 * LENGTH * WIDTH // 2, device="cuda").bfloat16()
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))
    forward, both = measure(case.forward), measure(case.training)
    yield Row(case.name, FORWARD, forward, 1.4 * copy.ms, f"{forward.ms / copy.ms:.2f} x the copy")
    yield Row("  device copy of its bytes", FORWARD, copy, None, f"{4 * source.numel() / copy.ms / 1e9:.2f} TB/s")
    yield Row(case.name, BOTH, both, 0.30)
    yield from yardstick("  chunk_hgrn", _hgrn_rows(case))


def yardstick(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows of somebody else's code: where it fails, one row says why, and the other figures are still taken."""
    try:
        yield from rows
    except Exception as error:
        yield Row(name, FORWARD, None, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.80}")


def _hgrn_rows(case: Case) -> Iterator[Row]:
    chunk_hgrn = hgrn()
    leaves = {"x": case.leaves["x"].detach(), "g": case.leaves["gamma"].detach().float().log().bfloat16()}
    baseline = Case("chunk_hgrn", lambda x, g: (chunk_hgrn(x, g)[0],), leaves)
    with implementation("torch"), torch.no_grad():
        expected, _ = linear_scan(leaves["g"].double().exp(), leaves["x"].double())
    error = relative_error(baseline.forward()[0], expected)
    yield Row("  chunk_hgrn", FORWARD, measure(baseline.forward), None, f"relative error {error:.1e}")
    yield Row("  chunk_hgrn", BOTH, measure(baseline.training))


def recurrence_case(
    name: str, batch: int, heads: int, dtype: torch.dtype, tol: float, weight_dtype: torch.dtype
) -> Case:
    gamma, z = gates(batch, LENGTH, WIDTH, dtype)
    leaves = {
        "z": z,
        "gamma": gamma,
        "weight": gate_weight(heads, WIDTH, weight_dtype),
        "initial_state": torch.randn(batch, WIDTH, device="cuda"),
    }
    return Case(name, gated_recurrence, leaves, {"tol": tol}, exact={"solver": "sequential"})


def convergence(case: Case) -> str:
    """Iterations and residual of a run, and whether the residual is as the target asks."""
    result = case.forward()
    iterations, residual = result[2].max().item(), result[3].max().item()
    if not residual <= case.options["tol"]:
        raise CheckFailed(f"{case.name}: residual {residual:.1e} is above {case.options['tol']:.0e}")
    return f"iterations {iterations}, residual {residual:.1e}"


def recurrence(name: str, heads: int, targets: dict[int, tuple[float, float]], repeats: int) -> Iterator[Row]:
    """Rows of one kind of gate; targets are (forward, forward + backward) in ms by batch size."""
    single = recurrence_case(f"{name} in fp32", 1, heads, torch.float32, 1e-6, torch.float32)
    say(f"{single.name}: {check(single, limit=1e-5)}; {convergence(single)}")
    del single
    for batch, (forward, both) in targets.items():
        case = recurrence_case(f"{name}, B = {batch}", batch, heads, torch.bfloat16, 1e-3, torch.bfloat16)
        remark = convergence(case)
        say(f"{case.name}: {check(case, literal=reference.gated_recurrence)}; {remark}")
        check_repeats(case, repeats)
        yield Row(case.name, FORWARD, measure(case.forward), forward, remark)
        yield Row(case.name, BOTH, measure(case.training), both)
        if heads:
            yield _steps_row(case)
    model = recurrence_case(f"{name}, z and γ in fp32", 1, heads, torch.float32, 1e-3, torch.bfloat16)
    remark = f"as the model calls it; {convergence(model)}"
    yield Row(f"  {model.name}", FORWARD, measure(model.forward), None, remark)
    yield Row(f"  {model.name}", BOTH, measure(model.training))


def _steps_row(case: Case) -> Row:
    leaves = {name: leaf.detach() for name, leaf in case.leaves.items()}
    inputs = (leaves["z"], leaves["gamma"], leaves["weight"], leaves["initial_state"])
    expected, _ = reference.gated_recurrence(*(leaf.double() for leaf in inputs))
    error = relative_error(headwise_steps(*inputs), expected)
    timings = {warps: measure(lambda warps=warps: headwise_steps(*inputs, num_warps=warps)) for warps in (4, 8)}
    warps = min(timings, key=lambda n: timings[n].ms)
    name = f"  token by token, B = {inputs[0].shape[0]}"
    return Row(name, FORWARD, timings[warps], None, f"{warps} warps, relative error {error:.1e}")


def headwise(repeats: int) -> Iterator[Row]:
    yield from recurrence("gated_recurrence headwise", HEADS, {1: (0.9, 2.5), 4: (2.0, 6.0)}, repeats)


def dense(repeats: int) -> Iterator[Row]:
    yield from recurrence("gated_recurrence dense", 0, {1: (2.2, 6.5)}, repeats)


def memory(repeats: int) -> Iterator[Row]:
    tensors, options = memory_inputs(LENGTH, HEADS, torch.bfloat16)
    case = Case("memory_attention", memory_attention, tensors, options)
    say(f"{case.name}: {check(case)}")
    single = case.in_dtype(torch.float32)
    single.name = "memory_attention in fp32"
    say(f"{single.name}: {check(single, limit=1e-5)}")
    del single
    check_repeats(case, repeats)

    q = case.leaves["q"].detach().contiguous()
    keys, values = (torch.randn(1, HEADS, DENSE_KEYS, HEAD_DIM, device="cuda").bfloat16() for _ in range(2))
    dense_read = _attention_case("flash attention", flash_dense, q, keys, values)
    flash = {FORWARD: measure(dense_read.forward), BOTH: measure(dense_read.training)}
    own = {FORWARD: measure(case.forward), BOTH: measure(case.training)}
    for phase in (FORWARD, BOTH):
        yield Row(
            case.name, phase, own[phase], 1.25 * flash[phase].ms, f"{own[phase].ms / flash[phase].ms:.2f} x flash"
        )
        yield Row(f"  flash attention, dense over {DENSE_KEYS} keys", phase, flash[phase])
    yield from yardstick("  FlexAttention", _flex_rows(case, q))


def _attention_case(name: str, function: Callable[..., torch.Tensor], *qkv: torch.Tensor) -> Case:
    leaves = dict(zip(("q", "k", "v"), (x.detach() for x in qkv), strict=True))
    return Case(name, lambda q, k, v: (function(q, k, v),), leaves)


def _flex_rows(case: Case, q: torch.Tensor) -> Iterator[Row]:
    slots = flex_slots(case.options)
    slots_k, slots_v = (by_head(case.leaves[name]).contiguous() for name in ("slots_k", "slots_v"))
    window = flex_window(LENGTH, q.device)
    parts = {
        "slots": _attention_case("FlexAttention, slots", slots, q, slots_k, slots_v),
        "window": _attention_case(
            "FlexAttention, window",
            window,
            q,
            case.leaves["window_k"].contiguous(),
            case.leaves["window_v"].contiguous(),
        ),
    }
    for phase in (FORWARD, BOTH):
        total = 0.0
        for part in parts.values():
            # without no_grad also forward: one compiled graph serves both
            timing = measure(part.training if phase == BOTH else lambda part=part: part.operation(**part.leaves))
            total += timing.ms
            yield Row(f"  {part.name}", phase, timing, None, "mask made beforehand")
        say(f"FlexAttention, slots and window, {phase}: {total:.3f} ms without merging, rotary positions and null slot")


def environment() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    found = {
        "GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "MMREC_KERNELS": backend.mode(),
    }
    try:
        found["flash-linear-attention"] = metadata.version("fla-core")
    except metadata.PackageNotFoundError:
        found["flash-linear-attention"] = "not installed"
    return found


def report(rows: list[Row], measured: list[Curve], failures: list[str], out: Path) -> None:
    """Prints the tables; writes them with the settings as kernels.json, and the figure beside it."""
    settings = environment()
    print("\n" + " · ".join(f"{name}: {value}" for name, value in settings.items()) + "\n")
    if rows:
        print(table(HEADER, [row.cells() for row in rows]) + "\n")
    if measured:
        print(
            table(("ns a token", *map(str, LENGTHS), "from 8K on", "verdict", "remark"), _curve_cells(measured)) + "\n"
        )
        draw(measured, out / "kernels_length.png", f"D = {WIDTH}, B = 1, bf16, {torch.cuda.get_device_name()}")
    for failure in failures:
        print(f"FAILED: {failure}")
    out.mkdir(parents=True, exist_ok=True)
    curve_records = {
        c.name: {"ns_per_token": c.per_token(), "verdict": c.verdict(), "remark": c.remark} for c in measured
    }
    result = {
        "settings": settings,
        "seconds": time.perf_counter() - BEGIN,
        "rows": [row.record() for row in rows],
        "length": curve_records,
        "failures": failures,
    }
    (out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"written to {out}")


def _curve_cells(measured: list[Curve]) -> list[list[str]]:
    lines = []
    for curve in measured:
        figures, deviation = curve.per_token(), curve.deviation()
        cells = [f"{figures[n]:.1f}" if n in figures else "–" for n in LENGTHS]
        shown = "–" if deviation is None else f"{deviation[0]:.2f} to {deviation[1]:.2f}"
        lines.append([curve.name, *cells, shown, curve.verdict(), curve.remark])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--repeats", type=int, default=100, help="runs that must agree in every bit (default 100)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="folder of table and figure"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py measures kernels on a CUDA GPU, and there is none here", file=sys.stderr)
        sys.exit(2)

    torch.manual_seed(0)
    rows: list[Row] = []
    measured: list[Curve] = []
    failures: list[str] = []
    for name in arguments.ops:
        try:
            if name == "length":
                for curve in curves([op for op in arguments.ops if op != "length"] or OPERATIONS, say):
                    measured.append(curve)
            else:
                for row in {"scan": scan, "headwise": headwise, "dense": dense, "memory": memory}[name](
                    arguments.repeats
                ):
                    rows.append(row)
                    say(" ".join(row.cells()[:3]))
        except CheckFailed as failure:
            failures.append(f"{failure}; not timed")
            say(failures[-1])
        except KeyboardInterrupt:
            failures.append(f"{name}: interrupted, and what comes after it was not begun")
            break
        except Exception as error:  # what the other operations gave is printed all the same
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()
    report(rows, measured, failures, arguments.out)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
