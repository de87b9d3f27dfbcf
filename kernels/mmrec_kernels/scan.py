"""Linear scans over time: the public functions, their checks, custom ops and gradients.

`mmrec_kernels.scan_torch` computes them in PyTorch, `scan_triton` and `exponential_triton` in Triton.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec_kernels import exponential_triton, ops, scan_torch, scan_triton
from mmrec_kernels.backend import use_triton
from mmrec_kernels.checks import check_sequence, compute_dtype
from mmrec_kernels.scan_torch import BlockedScan, shift_left, shift_right

__all__ = [
    "BlockedScan",
    "associative_scan_exponential",
    "check_sequence",
    "compute_dtype",
    "linear_scan",
    "shift_left",
    "shift_right",
]


def _implementation(operation: str, kernels: ModuleType, gamma: Tensor, *others: Tensor | None) -> ModuleType:
    """`kernels`, or the PyTorch implementation if those cannot run."""
    double = any(t is not None and t.dtype == torch.float64 for t in (gamma, *others))
    return kernels if use_triton(operation, gamma.device, "inputs are fp64" if double else None) else scan_torch


def _linear_scan_forward(
    gamma: Tensor, x: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    scans = _implementation("linear_scan", scan_triton, gamma, x, initial)
    return scans.linear_scan_forward(gamma, x, initial, reset, reverse)


def _fake_linear_scan(gamma: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], dtype=compute_dtype(gamma.dtype, x.dtype))


def _linear_scan_backward(
    grad_h: Tensor,
    grad_final: Tensor,
    gamma: Tensor,
    h: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scans = _implementation("the gradient of linear_scan", scan_triton, gamma, h, initial)
    return scans.linear_scan_backward(grad_h, grad_final, gamma, h, initial, reset, reverse)


def _fake_linear_scan_backward(
    grad_h: Tensor,
    grad_final: Tensor,
    gamma: Tensor,
    h: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(gamma.dtype, h.dtype) if initial is None else initial.dtype
    return (
        h.new_empty(h.shape),
        gamma.new_empty(gamma.shape),
        h.new_empty(h.shape[0], h.shape[2], dtype=dtype),
    )


_linear_scan = ops.register("linear_scan", _linear_scan_forward, _fake_linear_scan)
_linear_scan_gradient = ops.register("linear_scan_backward", _linear_scan_backward, _fake_linear_scan_backward)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gamma: Tensor, x: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        with ops.below_autograd():
            h, final = _linear_scan(gamma, x, initial, reset, reverse)
        ctx.save_for_backward(gamma, h, initial, reset)
        ctx.reverse = reverse
        return h, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        gamma, h, initial, reset = ctx.saved_tensors
        grad_x, grad_gamma, grad_initial = _linear_scan_gradient(
            grad_h, grad_final, gamma, h, initial, reset, ctx.reverse
        )
        return grad_gamma, grad_x, None if initial is None else grad_initial, None, None


ops.differentiate("linear_scan", _LinearScan)


def linear_scan(
    gamma: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h_t = γ_t h_{t−1} + x_t along dim 1; with `reverse`, h_t = γ_t h_{t+1} + x_t.

    Args:
        gamma: Decays [B, T, D], any floating dtype.
        x: Inputs [B, T, D], any floating dtype.
        initial_state: State before the first token (after the last one in reverse) [B, D]; zeros if None.
        reset: [B, T] bool; where set, γ counts as zero.
        reverse: Scan from the last token to the first.

    Returns:
        h [B, T, D] in x's dtype and the state after the last scanned token [B, D] in fp32 (fp64 for fp64 inputs).
        Arithmetic is fp32 (fp64). Differentiable in gamma, x and initial_state; the gradient of gamma is computed from
        h as it is returned, so to the precision of x's dtype.

    Raises:
        ValueError: If the shapes do not agree or T is 0.
    """
    check_sequence("linear_scan", gamma, x, initial_state, reset)
    return _linear_scan(gamma, x, initial_state, reset, reverse)


def _exponential_scan_forward(gamma: Tensor, initial_log: Tensor | None) -> Tensor:
    scans = _implementation("associative_scan_exponential", exponential_triton, gamma, initial_log)
    return scans.exponential_scan_forward(gamma, initial_log)


def _fake_exponential_scan(gamma: Tensor, initial_log: Tensor | None) -> Tensor:
    return gamma.new_empty(gamma.shape, dtype=compute_dtype(gamma.dtype))


def _exponential_scan_backward(
    grad_y: Tensor, gamma: Tensor, y: Tensor, initial_log: Tensor | None
) -> tuple[Tensor, Tensor]:
    scans = _implementation("the gradient of associative_scan_exponential", exponential_triton, gamma, initial_log)
    return scans.exponential_scan_backward(grad_y, gamma, y, initial_log)


def _fake_exponential_scan_backward(
    grad_y: Tensor, gamma: Tensor, y: Tensor, initial_log: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = y.dtype if initial_log is None else initial_log.dtype
    return gamma.new_empty(gamma.shape), y.new_empty(y.shape[0], y.shape[2], dtype=dtype)


_exponential_scan = ops.register("exponential_scan", _exponential_scan_forward, _fake_exponential_scan)
_exponential_scan_gradient = ops.register(
    "exponential_scan_backward", _exponential_scan_backward, _fake_exponential_scan_backward
)


class _ExponentialScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gamma: Tensor, initial_log: Tensor | None) -> Tensor:
        with ops.below_autograd():
            y = _exponential_scan(gamma, initial_log)
        ctx.save_for_backward(gamma, y, initial_log)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gamma, y, initial_log = ctx.saved_tensors
        grad_gamma, grad_initial = _exponential_scan_gradient(grad_y, gamma, y, initial_log)
        return grad_gamma, None if initial_log is None else grad_initial


ops.differentiate("exponential_scan", _ExponentialScan)


def associative_scan_exponential(gamma: Tensor, initial_log: Tensor | None = None) -> Tensor:
    """Cumulative products Y_t = ∏_{i≤t} γ_i along dim 1, in log space.

    Each log γ and every running sum is clamped to [−50, 0], so a product never underflows below e⁻⁵⁰; the sum is
    carried from block to block.

    Args:
        gamma: [B, T, D], in [0, 1], any floating dtype.
        initial_log: Logarithm of the product before the first token [B, D]; 0 if None.

    Returns:
        [B, T, D] fp32 (fp64 for fp64 input), differentiable in both arguments.

    Raises:
        ValueError: If the shapes do not agree or T is 0.
    """
    if gamma.dim() != 3 or gamma.shape[1] == 0:
        raise ValueError(f"associative_scan_exponential: gamma is {list(gamma.shape)}, expected [B, T >= 1, D]")
    if initial_log is not None and initial_log.shape != gamma[:, 0].shape:
        raise ValueError(
            f"associative_scan_exponential: initial_log is {list(initial_log.shape)}, "
            f"expected {list(gamma[:, 0].shape)}"
        )
    return _exponential_scan(gamma, initial_log)
