"""First-order linear scans over time in plain PyTorch, blocked, with a carry from block to block.

A block of `BLOCK` tokens is scanned step by step for all blocks at once; the blocks' last states are then scanned the
same way, level by level, and each block adds what it inherits. The work is O(T), the number of sequential steps
O(BLOCK · log T / log BLOCK), and nothing is ever divided by a vanishing product of decays.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 32
MIN_LOG = -50.0  # clamp of logarithms of decays and of their running sums


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any of the dtypes is, else fp32: the arithmetic of scans, decays, gates and softmax."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class BlockedScan:
    """h_t = γ_t h_{t−1} + x_t for one γ and many x: the products of decays are computed once.

    Args:
        gamma: [B, T, D], fp32 or fp64.
    """

    def __init__(self, gamma: Tensor):
        batch, length, width = gamma.shape
        self.blocks = length // BLOCK if length > BLOCK else 0
        done = self.blocks * BLOCK
        self.tail = gamma[:, done:].unbind(1)
        if self.blocks:
            whole = gamma[:, :done].reshape(batch, self.blocks, BLOCK, width)
            self.gamma = whole.unbind(2)
            self.decay = torch.empty_like(whole)
            products = self.decay.unbind(2)
            products[0].copy_(self.gamma[0])
            for i in range(1, BLOCK):
                torch.mul(products[i - 1], self.gamma[i], out=products[i])
            self.carry = BlockedScan(products[-1])

    def __call__(self, x: Tensor, initial: Tensor) -> Tensor:
        """Returns h [B, T, D] for x [B, T, D] and the state [B, D] before the first token."""
        h = torch.empty_like(x)
        done = self.blocks * BLOCK
        if self.blocks:
            batch, _, width = x.shape
            shape = (batch, self.blocks, BLOCK, width)
            local = h[:, :done].view(shape)
            states, inputs = local.unbind(2), x[:, :done].view(shape).unbind(2)
            states[0].copy_(inputs[0])
            for i in range(1, BLOCK):
                torch.addcmul(inputs[i], self.gamma[i], states[i - 1], out=states[i])
            ends = self.carry(states[-1].contiguous(), initial)
            inherited = torch.cat([initial.unsqueeze(1), ends[:, :-1]], dim=1)
            local.addcmul_(self.decay, inherited.unsqueeze(2))
            initial = ends[:, -1]
        for gamma, value, state in zip(self.tail, x[:, done:].unbind(1), h[:, done:].unbind(1), strict=True):
            torch.addcmul(value, gamma, initial, out=state)
            initial = state
        return h


def shift_right(h: Tensor, initial: Tensor) -> Tensor:
    """The state before each token: [initial, h_0, …, h_{T−2}]."""
    return torch.cat([initial.unsqueeze(1), h[:, :-1]], dim=1)


def shift_left(x: Tensor) -> Tensor:
    """The value of the next token, zero after the last: [x_1, …, x_{T−1}, 0]."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gamma: Tensor, x: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(gamma.dtype, x.dtype, initial.dtype)
        h = BlockedScan(gamma.to(dtype))(x.to(dtype), initial.to(dtype))
        ctx.save_for_backward(gamma, h, initial)
        ctx.x_dtype = x.dtype
        return h.to(x.dtype), h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_final: Tensor) -> tuple[Tensor, ...]:
        gamma, h, initial = ctx.saved_tensors
        grad = grad_h.to(h.dtype, copy=True)
        grad[:, -1] += grad_final
        decay = gamma.to(h.dtype)
        adjoint = BlockedScan(shift_left(decay).flip(1))(grad.flip(1), torch.zeros_like(grad[:, 0])).flip(1)
        grad_gamma = adjoint * shift_right(h, initial.to(h.dtype))
        grad_initial = adjoint[:, 0] * decay[:, 0]
        return grad_gamma.to(gamma.dtype), adjoint.to(ctx.x_dtype), grad_initial.to(initial.dtype)


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
        reset: [B, T] bool; where set, the state that enters the token counts as zero.
        reverse: Scan from the last token to the first.

    Returns:
        h [B, T, D] in x's dtype and the state after the last scanned token [B, D] in fp32 (fp64 for fp64 inputs).
        Arithmetic is fp32 (fp64). Differentiable in gamma, x and initial_state.

    Raises:
        ValueError: If the shapes do not agree or T is 0.
    """
    check_sequence("linear_scan", gamma, x, initial_state, reset)
    if reverse:
        flipped = None if reset is None else reset.flip(1)
        h, final = linear_scan(gamma.flip(1), x.flip(1), initial_state, reset=flipped)
        return h.flip(1), final
    if initial_state is None:
        initial_state = torch.zeros_like(x[:, 0], dtype=compute_dtype(gamma.dtype, x.dtype))
    if reset is not None:
        gamma = gamma.masked_fill(reset.unsqueeze(-1), 0.0)
    return _LinearScan.apply(gamma, x, initial_state)


def check_sequence(name: str, gamma: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> None:
    """Raises ValueError unless gamma and x are [B, T ≥ 1, D], initial_state [B, D] and reset [B, T] bool."""
    if x.dim() != 3 or gamma.shape != x.shape:
        raise ValueError(f"{name}: gamma {list(gamma.shape)} and its input {list(x.shape)} must both be [B, T, D]")
    batch, length, width = x.shape
    if length == 0:
        raise ValueError(f"{name}: the sequence is empty (T = 0)")
    if initial_state is not None and initial_state.shape != (batch, width):
        raise ValueError(f"{name}: initial_state is {list(initial_state.shape)}, expected {[batch, width]}")
    if reset is not None and (reset.shape != (batch, length) or reset.dtype != torch.bool):
        raise ValueError(f"{name}: reset is {list(reset.shape)} {reset.dtype}, expected {[batch, length]} torch.bool")


def associative_scan_exponential(gamma: Tensor, initial_log: Tensor | None = None) -> Tensor:
    """Cumulative products Y_t = ∏_{i≤t} γ_i along dim 1, in log space.

    Each log γ and every running sum is clamped to [−50, 0], so a product never underflows below e⁻⁵⁰; the sum is
    carried from block to block.

    Args:
        gamma: [B, T, D], in [0, 1], any floating dtype.
        initial_log: Logarithm of the product before the first token [B, D]; 0 if None.

    Returns:
        [B, T, D] fp32 (fp64 for fp64 input), differentiable in both arguments.
    """
    if gamma.dim() != 3 or gamma.shape[1] == 0:
        raise ValueError(f"associative_scan_exponential: gamma is {list(gamma.shape)}, expected [B, T >= 1, D]")
    dtype = compute_dtype(gamma.dtype)
    log = gamma.to(dtype).clamp(torch.tensor(MIN_LOG, dtype=torch.float64).exp().item(), 1.0).log()
    total = torch.zeros_like(log[:, 0]) if initial_log is None else initial_log.to(dtype).clamp(MIN_LOG, 0.0)
    blocks = []
    for block in log.split(_EXPONENTIAL_BLOCK, dim=1):
        sums = (block.cumsum(1) + total.unsqueeze(1)).clamp(MIN_LOG, 0.0)
        blocks.append(sums)
        total = sums[:, -1]
    return torch.cat(blocks, dim=1).exp()


_EXPONENTIAL_BLOCK = 1024
