"""The core recurrence h_t = z_t ⊙ σ(W h_{t−1}) + γ_t ⊙ h_{t−1}, solved in parallel over time.

With the gates fixed from a guess the recurrence is linear and a scan solves it; then the gates are computed again
(a Picard iteration whose only fixed point is the sequential recurrence: after n iterations the first n tokens are
exact). What has not converged after `max_iterations` is finished exactly, token by token, from the converged prefix.

The backward pass is implicit: nothing of the iteration is stored. The adjoint
λ_t = ∂L/∂h_t + γ_{t+1} λ_{t+1} + Wᵀ(s_{t+1} λ_{t+1}), with s = z ⊙ σ′(W h_{t−1}), is solved by the same iteration
run backwards in time; all gradients follow from λ.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec_kernels import dense_triton, headwise_triton, ops, recurrence_torch
from mmrec_kernels.backend import use_triton
from mmrec_kernels.checks import check_sequence, compute_dtype
from mmrec_kernels.solver import SOLVERS, SolverSettings, default_tolerance


class GatedRecurrence(NamedTuple):
    """What `gated_recurrence` returns.

    Attributes:
        h: States [B, T, D] in z's dtype.
        final_state: State after the last token [B, D], fp32 (fp64 for fp64 inputs).
        iterations: Picard iterations of each row [B], int32; 0 where the row was computed token by token. The dense
            kernel iterates all rows until the last one has converged.
        residual: Largest change of the row's last iteration relative to its largest state [B], fp32 (headwise kernel:
            to the largest state of the head so far). Above the tolerance it means that the exact finish ran; the
            headwise kernel, whose tiles have to come closer than that one by one, runs it now and then below it, too.
    """

    h: Tensor
    final_state: Tensor
    iterations: Tensor
    residual: Tensor


def _implementation(z: Tensor, gamma: Tensor, weight: Tensor) -> ModuleType:
    unsupported = "inputs are fp64" if torch.float64 in (z.dtype, gamma.dtype, weight.dtype) else None
    if not use_triton("gated_recurrence", z.device, unsupported):
        return recurrence_torch
    return headwise_triton if headwise_triton.supports(weight) else dense_triton


def _forward(
    z: Tensor,
    gamma: Tensor,
    weight: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    solver: str,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = SolverSettings(solver, tolerance, max_iterations)
    reset = None if reset is None else reset.contiguous()
    h, *others = _implementation(z, gamma, weight).forward(z, gamma, weight, initial, reset, settings)
    return h.contiguous(), *others


def _fake_forward(z: Tensor, gamma: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch = z.shape[0]
    final = z.new_empty(batch, z.shape[2], dtype=compute_dtype(z.dtype, gamma.dtype, weight.dtype))
    iterations = z.new_empty(batch, dtype=torch.int32)
    return z.new_empty(z.shape), final, iterations, z.new_empty(batch, dtype=torch.float32)


def _backward(
    grad_h: Tensor,
    grad_final: Tensor,
    z: Tensor,
    gamma: Tensor,
    weight: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    h: Tensor,
    solver: str,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, gamma, weight and initial."""
    settings = SolverSettings(solver, tolerance, max_iterations)
    reset = None if reset is None else reset.contiguous()
    backward = _implementation(z, gamma, weight).backward
    gradients = backward(grad_h, grad_final, z, gamma, weight, initial, reset, h, settings)
    grad_z, grad_gamma, grad_weight, grad_initial = gradients
    grad_initial = grad_initial.to(initial.dtype).contiguous()
    return grad_z.contiguous(), grad_gamma.contiguous(), grad_weight.contiguous(), grad_initial


def _fake_backward(grad_h: Tensor, grad_final: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:4])  # z, gamma, weight, initial


_forward_op = ops.register("gated_recurrence", _forward, _fake_forward)
_backward_op = ops.register("gated_recurrence_backward", _backward, _fake_backward)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with ops.below_autograd():
            h, final, iterations, residual = _forward_op(*inputs)
        ctx.mark_non_differentiable(iterations, residual)
        ctx.save_for_backward(*inputs[:5], h)
        ctx.settings = inputs[5:]
        return h, final, iterations, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_final: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_backward_op(grad_h, grad_final, *ctx.saved_tensors, *ctx.settings), None, None, None, None


ops.differentiate("gated_recurrence", _Function)


def gated_recurrence(
    z: Tensor,
    gamma: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    solver: str = "auto",
    tol: float | None = None,
    max_iterations: int = 32,
) -> GatedRecurrence:
    """h_t = z_t ⊙ σ(W h_{t−1}) + γ_t ⊙ h_{t−1} along dim 1.

    z is used as given: MM-Rec passes 2 (1 − γ) z, which makes the recurrence contract at a rate that depends on
    neither γ nor T.

    Args:
        z: Inputs [B, T, D], any floating dtype.
        gamma: Decays [B, T, D], any floating dtype.
        weight: W, [D, D] (dense) or [H, d, d] (headwise, block-diagonal). Its dtype is that of the operands of W h;
            everything else is fp32 (fp64 if any input is fp64).
        initial_state: h before the first token [B, D]; zeros if None.
        reset: [B, T] bool; where set, h_{t−1} counts as zero in the gate as well as in the decay.
        solver: "picard" (the parallel iteration and its exact finish), "sequential" (token by token) or "auto"
            (whichever is faster).
        tol: Largest change of an iteration relative to the row's largest state at which the row is done;
            None for `default_tolerance(weight.dtype)`.
        max_iterations: Iterations before the exact sequential finish; the headwise kernel makes at most 32.

    Returns:
        `GatedRecurrence`; differentiable in z, gamma, weight and initial_state, also through final_state.

    Raises:
        ValueError: On shapes that do not agree, an unknown solver, or a tolerance or iteration count below their range.
    """
    check_sequence("gated_recurrence", gamma, z, initial_state, reset)
    width = z.shape[-1]
    headwise = weight.dim() == 3 and weight.shape[1] == weight.shape[2] and weight.shape[0] * weight.shape[1] == width
    if weight.shape != (width, width) and not headwise:
        raise ValueError(
            f"gated_recurrence: weight is {list(weight.shape)}, expected [D, D] or [H, d, d] of D = {width}"
        )
    if solver not in SOLVERS:
        raise ValueError(f"gated_recurrence: solver is {solver!r}, expected one of {', '.join(SOLVERS)}")
    tolerance = default_tolerance(weight.dtype) if tol is None else tol
    if not tolerance > 0 or max_iterations < 1:
        raise ValueError(
            f"gated_recurrence: tol {tolerance} must be positive, max_iterations {max_iterations} at least 1"
        )
    if initial_state is None:
        initial_state = torch.zeros_like(z[:, 0], dtype=compute_dtype(z.dtype, gamma.dtype, weight.dtype))
    return GatedRecurrence(*_forward_op(z, gamma, weight, initial_state, reset, solver, tolerance, max_iterations))
