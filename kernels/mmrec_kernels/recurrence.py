"""The core recurrence h_t = z_t ⊙ σ(W h_{t−1}) + γ_t ⊙ h_{t−1}, solved in parallel over time.

With the gates fixed from a guess the recurrence is linear and a scan solves it; then the gates are computed again
(a Picard iteration whose only fixed point is the sequential recurrence: after n iterations the first n tokens are
exact). What has not converged after `max_iterations` is finished exactly, token by token, from the converged prefix.

The backward pass is implicit: nothing of the iteration is stored. The adjoint
λ_t = ∂L/∂h_t + γ_{t+1} λ_{t+1} + Wᵀ(s_{t+1} λ_{t+1}), with s = z ⊙ σ′(W h_{t−1}), is solved by the same iteration
run backwards in time; all gradients follow from λ.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec_kernels.matmul import matmul_fp32
from mmrec_kernels.scan import BlockedScan, check_sequence, compute_dtype, shift_left, shift_right

SOLVERS = ("auto", "picard", "sequential")


class GatedRecurrence(NamedTuple):
    """What `gated_recurrence` returns.

    Attributes:
        h: States [B, T, D] in z's dtype.
        final_state: State after the last token [B, D], fp32 (fp64 for fp64 inputs).
        iterations: Picard iterations of each row [B], int32; 0 where the row was computed sequentially.
        residual: Largest change of the row's last iteration relative to its largest state [B], fp32. Above the
            tolerance it means that the exact sequential finish ran.
    """

    h: Tensor
    final_state: Tensor
    iterations: Tensor
    residual: Tensor


def default_tolerance(dtype: torch.dtype) -> float:
    """The tolerance that matches the rounding of gate operands of this dtype."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3)


def gate_product(h: Tensor, weight: Tensor) -> Tensor:
    """W h for h [B, T, D] and a dense [D, D] or headwise [H, d, d] weight: operands in the weight's dtype, fp32 out."""
    batch, length, width = h.shape
    operand = h.to(weight.dtype)
    if weight.dim() == 2:
        return matmul_fp32(operand.reshape(1, -1, width), weight.mT.unsqueeze(0)).view(batch, length, width)
    heads = weight.shape[0]
    by_head = operand.reshape(batch * length, heads, -1).transpose(0, 1)
    return matmul_fp32(by_head, weight.mT).transpose(0, 1).reshape(batch, length, width)


def _weight_gradient(grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """Σ grad_t h_tᵀ over batch and time, in the shape and dtype of the weight."""
    width = h.shape[-1]
    heads = weight.shape[0] if weight.dim() == 3 else 1
    grad = grad.to(weight.dtype).reshape(-1, heads, width // heads).permute(1, 2, 0)
    h = h.to(weight.dtype).reshape(-1, heads, width // heads).transpose(0, 1)
    return matmul_fp32(grad, h).view(weight.shape).to(weight.dtype)


class _Solution(NamedTuple):
    value: Tensor
    iterations: Tensor
    residual: Tensor


def _picard(
    guess: Tensor,
    update: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor, Tensor, int], Tensor],
    importance: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> _Solution:
    """Iterates value ← update(value) until every row has converged, and finishes exactly the rows that have not.

    Rows [b] of the value [B, T, D] are independent: one that has converged is left as it is, and one that holds NaN or
    Inf ends its iteration (its residual is NaN) without holding up the others.

    Args:
        finish: (value, rows, first) → value with the given rows computed exactly from token `first` on.
        importance: Weights [B, T, D] of the norm that the change is measured in; ones if None.
    """
    batch, length, _ = guess.shape
    value = guess
    iterations = torch.zeros(batch, dtype=torch.int32, device=guess.device)
    residual = torch.full((batch,), float("inf"), device=guess.device)
    active = torch.ones(batch, dtype=torch.bool, device=guess.device)
    token_change = torch.zeros(batch, length, dtype=guess.dtype, device=guess.device)
    all_active = True
    for _ in range(min(max_iterations, length)):
        new = update(value)
        change, size = new - value, new
        if importance is not None:
            change, size = change.mul_(importance), new * importance
        row_change = torch.linalg.vector_norm(change, float("inf"), dim=2)
        scale = torch.linalg.vector_norm(size, float("inf"), dim=(1, 2)).clamp_min(torch.finfo(guess.dtype).tiny)
        new_residual, new_token_change = row_change.amax(1) / scale, row_change / scale.unsqueeze(1)
        if all_active:
            value, token_change, residual = new, new_token_change, new_residual.float()
        else:
            value = torch.where(active.view(-1, 1, 1), new, value)
            token_change = torch.where(active.view(-1, 1), new_token_change, token_change)
            residual = torch.where(active, new_residual.float(), residual)
        iterations += active
        active = active & (residual > tolerance)
        # the one place where the host waits for the device: whether to go on
        any_active, all_active = torch.stack([active.any(), active.all()]).tolist()
        if not any_active:
            break
    else:
        if max_iterations >= length:  # after T iterations every token is exact, whatever the last change was
            return _Solution(value, iterations, torch.where(active, 0.0, residual))
        rows = active.nonzero().squeeze(1)
        unsettled = (token_change[rows] > tolerance).any(0)
        first = int(unsettled.nonzero()[0])  # exists: these rows' residuals, the maxima over tokens, exceed it
        value = finish(value, rows, max(first, max_iterations))
    return _Solution(value, iterations, residual)


class _Gated(torch.autograd.Function):
    """The recurrence with the state before resets already forgotten: γ is zero there, `keep` masks the gate's input."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor,
        weight: Tensor,
        initial: Tensor,
        keep: Tensor,
        solver: str,
        tolerance: float,
        max_iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = compute_dtype(z.dtype, gamma.dtype, weight.dtype)
        source, start = z.to(dtype), initial.to(dtype)
        decay = gamma.to(dtype) * keep
        if solver == "sequential" or (solver == "auto" and z.shape[1] == 1):
            h = _forward_steps(torch.empty_like(source), source, decay, weight, start, keep, first=0)
            iterations = torch.zeros(z.shape[0], dtype=torch.int32, device=z.device)
            residual = torch.zeros(z.shape[0], device=z.device)
        else:
            scan = BlockedScan(decay)

            def update(guess: Tensor) -> Tensor:
                gate = torch.sigmoid(gate_product(shift_right(guess, start) * keep, weight))
                return scan(gate.mul_(source), start)

            def finish(value: Tensor, rows: Tensor, first: int) -> Tensor:
                part = _forward_steps(value[rows], source[rows], decay[rows], weight, start[rows], keep[rows], first)
                return value.index_copy(0, rows, part)

            guess = scan(source / 2, start)
            h, iterations, residual = _picard(guess, update, finish, None, tolerance, max_iterations)
        ctx.save_for_backward(z, gamma, weight, initial, keep, h)
        ctx.settings = (solver, tolerance, max_iterations)
        ctx.mark_non_differentiable(iterations, residual)
        return h.to(z.dtype), h[:, -1].clone(), iterations, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_final: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        z, gamma, weight, initial, keep, h = ctx.saved_tensors
        dtype = h.dtype
        before = shift_right(h, initial.to(dtype)) * keep
        gate = torch.sigmoid(gate_product(before, weight))
        slope = z.to(dtype) * gate * (1 - gate)
        grad = grad_h.to(dtype, copy=True)
        grad[:, -1] += grad_final
        adjoint = _solve_adjoint(grad, gamma.to(dtype), slope, weight, keep, *ctx.settings)
        grad_gate = adjoint * slope
        grad_gamma = adjoint * before
        first = slice(0, 1)
        grad_initial = keep[:, first] * (
            gamma[:, first].to(dtype) * adjoint[:, first] + gate_product(grad_gate[:, first], weight.mT)
        )
        return (
            (adjoint * gate).to(z.dtype),
            grad_gamma.to(gamma.dtype),
            _weight_gradient(grad_gate, before, weight),
            grad_initial.squeeze(1).to(initial.dtype),
            None,
            None,
            None,
            None,
        )


def _forward_steps(
    h: Tensor, z: Tensor, decay: Tensor, weight: Tensor, initial: Tensor, keep: Tensor, first: int
) -> Tensor:
    """Fills h [B, T, D] from token `first` on, one token after another; earlier tokens are taken as they are."""
    h = h.clone()
    state = (h[:, first - 1] if first else initial).unsqueeze(1)
    for t in range(first, h.shape[1]):
        now = slice(t, t + 1)
        gate = torch.sigmoid(gate_product(state * keep[:, now], weight))
        state = torch.addcmul(z[:, now] * gate, decay[:, now], state)
        h[:, now] = state
    return h


def _solve_adjoint(
    grad: Tensor,
    gamma: Tensor,
    slope: Tensor,
    weight: Tensor,
    keep: Tensor,
    solver: str,
    tolerance: float,
    max_iterations: int,
) -> Tensor:
    """λ [B, T, D] for the gradients that reach each state from outside.

    The iteration runs in reversed time. Its change is measured in (1 − γ) λ: slow channels have adjoints larger by
    1 / (1 − γ), and it is this product that the map contracts and that the gradients of z and W_g consist of.
    """
    transposed = weight.mT
    # in reversed time: what token t receives from token t + 1
    decay, factor = (shift_left(x).flip(1) for x in (gamma * keep, slope * keep))
    source = grad.flip(1)
    start = torch.zeros_like(grad[:, 0])

    def steps(adjoint: Tensor, rows: Tensor, first: int) -> Tensor:
        adjoint = adjoint.clone()
        state = (adjoint[rows, first - 1] if first else start[rows]).unsqueeze(1)
        for t in range(first, adjoint.shape[1]):
            now = slice(t, t + 1)
            through_gate = gate_product(factor[rows, now] * state, transposed)
            state = torch.addcmul(source[rows, now] + through_gate, decay[rows, now], state)
            adjoint[rows, now] = state
        return adjoint

    if solver == "sequential" or (solver == "auto" and grad.shape[1] == 1):
        every_row = torch.arange(grad.shape[0], device=grad.device)
        return steps(torch.empty_like(grad), every_row, 0).flip(1)

    scan = BlockedScan(decay)

    def update(adjoint: Tensor) -> Tensor:
        # factor[τ] belongs to the token that sends, so it multiplies the adjoint of the token before in reversed time
        return scan(source + gate_product(factor * shift_right(adjoint, start), transposed), start)

    def finish(adjoint: Tensor, rows: Tensor, first: int) -> Tensor:
        warnings.warn(
            f"the adjoint of gated_recurrence did not converge in {max_iterations} iterations; "
            f"finished exactly, token by token, from token {first} of {adjoint.shape[1]} (counted from the end)",
            RuntimeWarning,
            stacklevel=2,
        )
        return steps(adjoint, rows, first)

    importance = (1 - gamma).flip(1)
    return _picard(scan(source, start), update, finish, importance, tolerance, max_iterations).value.flip(1)


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
            (sequential for a single token, Picard otherwise).
        tol: Largest change of an iteration relative to the row's largest state at which the row is done;
            None for `default_tolerance(weight.dtype)`.
        max_iterations: Iterations before the exact sequential finish.

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
    if tolerance <= 0 or max_iterations < 1:
        raise ValueError(
            f"gated_recurrence: tol {tolerance} must be positive, max_iterations {max_iterations} at least 1"
        )
    dtype = compute_dtype(z.dtype, gamma.dtype, weight.dtype)
    if initial_state is None:
        initial_state = torch.zeros_like(z[:, 0], dtype=dtype)
    keep = torch.ones_like(z[:, :, :1], dtype=dtype)
    if reset is not None:
        keep = keep.masked_fill(reset.unsqueeze(-1), 0.0)
    return GatedRecurrence(*_Gated.apply(z, gamma, weight, initial_state, keep, solver, tolerance, max_iterations))
