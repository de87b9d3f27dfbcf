"""The recurrence and its adjoint in PyTorch: Picard iterations of scans over the whole sequence.

Used on CPUs, for fp64, and as the yardstick of the kernels. The host asks the device once an iteration whether to go
on.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec_kernels.checks import compute_dtype
from mmrec_kernels.matmul import gate_product, gate_weight_gradient
from mmrec_kernels.scan_torch import BlockedScan, shift_left, shift_right
from mmrec_kernels.solver import MIN_IMPORTANCE, SolverSettings


class _Solution(NamedTuple):
    value: Tensor
    iterations: Tensor
    residual: Tensor


def _picard(
    guess: Tensor,
    update: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor, Tensor, int], Tensor],
    importance: Tensor | None,
    settings: SolverSettings,
) -> _Solution:
    """Iterates value ← update(value) until every row has converged, and finishes exactly the rows that have not.

    Rows [b] of the value [B, T, D] are independent: one that has converged is left as it is, and one that holds NaN or
    Inf ends its iteration (its residual is NaN) without holding up the others.

    Args:
        finish: (value, rows, first) → value with the given rows computed exactly from token `first` on.
        importance: Weights [B, T, D] of the norm that the change is measured in; ones if None.
    """
    tolerance, max_iterations = settings.tolerance, settings.max_iterations
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


def _token_by_token(settings: SolverSettings, length: int) -> bool:
    return settings.solver == "sequential" or (settings.solver == "auto" and length == 1)


def _keep(reset: Tensor | None, z: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, 1]: 0 where the state before the token is forgotten, else 1."""
    keep = torch.ones_like(z[:, :, :1], dtype=dtype)
    return keep if reset is None else keep.masked_fill(reset.unsqueeze(-1), 0.0)


def forward(
    z: Tensor, gamma: Tensor, weight: Tensor, initial: Tensor, reset: Tensor | None, settings: SolverSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, final state, iterations and residual; see `mmrec_kernels.gated_recurrence`."""
    dtype = compute_dtype(z.dtype, gamma.dtype, weight.dtype)
    keep = _keep(reset, z, dtype)
    source, start = z.to(dtype), initial.to(dtype)
    decay = gamma.to(dtype) * keep
    if _token_by_token(settings, z.shape[1]):
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

        h, iterations, residual = _picard(scan(source / 2, start), update, finish, None, settings)
    final = h[:, -1].clone()
    return h.to(z.dtype), final, iterations, residual


def backward(
    grad_h: Tensor,
    grad_final: Tensor,
    z: Tensor,
    gamma: Tensor,
    weight: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    h: Tensor,
    settings: SolverSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, gamma, weight and the initial state."""
    dtype = compute_dtype(z.dtype, gamma.dtype, weight.dtype)
    keep = _keep(reset, z, dtype)
    before = shift_right(h.to(dtype), initial.to(dtype)) * keep
    gate = torch.sigmoid(gate_product(before, weight))
    slope = z.to(dtype) * gate * (1 - gate)
    grad = grad_h.to(dtype, copy=True)
    grad[:, -1] += grad_final
    adjoint = _solve_adjoint(grad, gamma.to(dtype), slope, weight, keep, settings)
    grad_gate = adjoint * slope * keep
    first = slice(0, 1)
    grad_initial = keep[:, first] * gamma[:, first].to(dtype) * adjoint[:, first]
    grad_initial += keep[:, first] * gate_product(grad_gate[:, first], weight.mT)
    return (
        (adjoint * gate).to(z.dtype),
        (adjoint * before).to(gamma.dtype),
        gate_weight_gradient(grad_gate, h.to(dtype), initial.to(dtype), weight),
        grad_initial.squeeze(1).to(initial.dtype),
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
    settings: SolverSettings,
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

    if _token_by_token(settings, grad.shape[1]):
        every_row = torch.arange(grad.shape[0], device=grad.device)
        return steps(torch.empty_like(grad), every_row, 0).flip(1)

    scan = BlockedScan(decay)

    def update(adjoint: Tensor) -> Tensor:
        # factor[τ] belongs to the token that sends, so it multiplies the adjoint of the token before in reversed time
        return scan(source + gate_product(factor * shift_right(adjoint, start), transposed), start)

    def finish(adjoint: Tensor, rows: Tensor, first: int) -> Tensor:
        warnings.warn(
            f"the adjoint of gated_recurrence did not converge in {settings.max_iterations} iterations; "
            f"finished exactly, token by token, from token {first} of {adjoint.shape[1]} (counted from the end)",
            RuntimeWarning,
            stacklevel=2,
        )
        return steps(adjoint, rows, first)

    importance = (1 - gamma).clamp_min(MIN_IMPORTANCE).flip(1)
    return _picard(scan(source, start), update, finish, importance, settings).value.flip(1)
