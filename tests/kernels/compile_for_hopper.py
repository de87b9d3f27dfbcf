"""Compiles the kernels for a Hopper GPU on a machine that has none, and launches nothing.

    python -m tests.kernels.compile_for_hopper

Of sequences of one token, whose sizes are constants to Triton wherever it may take them for such. Prints the name of
each kernel that it compiled.
"""

import os
from typing import Any
from unittest import mock

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from mmrec_kernels import backend, health

# of `health.CASES`, as many as have a part in compiling every kernel
CASES = [
    "linear_scan", "associative_scan_exponential", "gated_recurrence, headwise", "gated_recurrence, dense",
    "memory_attention", "memory_attention, pages",
]  # fmt: skip


class Hopper(DriverBase):
    """Says what to compile for. The last two methods have to be there, but only a launch or autotuning calls them."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError


def main() -> None:
    driver.set_active(Hopper())
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    sizes = health.Sizes(length=1, long=1, head_dim=16, queries=1, calls=1)
    with (
        mock.patch.dict(os.environ, {backend.VARIABLE: "triton"}),
        mock.patch.object(backend, "interpreted", return_value=True),  # lets tensors on the CPU through
        mock.patch.object(JITFunction, "run", compile_only),
        health.launches() as compiled,
    ):
        for name in CASES:
            problem = health.CASES[name](sizes)
            leaves = {key: leaf.float().requires_grad_() for key, leaf in problem.leaves.items()}
            result = problem.operation(**leaves, **problem.options)
            outputs = [result] if isinstance(result, torch.Tensor) else list(result[:2])
            torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
    print("\n".join(sorted(compiled)))


if __name__ == "__main__":
    main()
