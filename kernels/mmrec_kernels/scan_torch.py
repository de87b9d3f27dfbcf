"""First-order linear scans over time in plain PyTorch, blocked, with a carry from block to block.

A block of `BLOCK` tokens is scanned step by step for all blocks at once; the blocks' last states are then scanned the
same way, level by level, and each block adds what it inherits. The work is O(T), the number of sequential steps
O(BLOCK · log T / log BLOCK), and nothing is ever divided by a vanishing product of decays.
"""

import math

import torch
from torch import Tensor

from mmrec_kernels.checks import compute_dtype

BLOCK = 32
SUM_BLOCK = 1024
MIN_LOG = -50.0  # clamp of logarithms of decays and of their running sums
MIN_PRODUCT = math.exp(MIN_LOG)


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


def linear_scan_forward(
    gamma: Tensor, x: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] in x's dtype and the final state [B, D]; arguments as in `mmrec_kernels.linear_scan`."""
    if reverse:
        flipped = None if reset is None else reset.flip(1)
        h, final = linear_scan_forward(gamma.flip(1), x.flip(1), initial, flipped, False)
        return h.flip(1), final
    dtype = compute_dtype(gamma.dtype, x.dtype)
    start = torch.zeros_like(x[:, 0], dtype=dtype) if initial is None else initial.to(dtype)
    h = BlockedScan(_forgetting(gamma.to(dtype), reset))(x.to(dtype), start)
    return h.to(x.dtype), h[:, -1].clone()


def linear_scan_backward(
    grad_h: Tensor,
    grad_final: Tensor,
    gamma: Tensor,
    h: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and the initial state, from those of h and the final state; h is what forward returned."""
    if reverse:
        flipped = None if reset is None else reset.flip(1)
        grad_x, grad_gamma, grad_initial = linear_scan_backward(
            grad_h.flip(1), grad_final, gamma.flip(1), h.flip(1), initial, flipped, False
        )
        return grad_x.flip(1), grad_gamma.flip(1), grad_initial
    dtype = compute_dtype(gamma.dtype, h.dtype)
    start = torch.zeros_like(h[:, 0], dtype=dtype) if initial is None else initial.to(dtype)
    grad = grad_h.to(dtype, copy=True)
    grad[:, -1] += grad_final
    decay = _forgetting(gamma.to(dtype), reset)
    adjoint = BlockedScan(shift_left(decay).flip(1))(grad.flip(1), torch.zeros_like(start)).flip(1)
    grad_gamma = _forgetting(adjoint * shift_right(h.to(dtype), start), reset)
    grad_initial = adjoint[:, 0] * decay[:, 0]
    return (
        adjoint.to(h.dtype),
        grad_gamma.to(gamma.dtype),
        grad_initial.to(dtype if initial is None else initial.dtype),
    )


def _forgetting(x: Tensor, reset: Tensor | None) -> Tensor:
    """x [B, T, D] with zeros at resets."""
    return x if reset is None else x.masked_fill(reset.unsqueeze(-1), 0.0)


def exponential_scan_forward(gamma: Tensor, initial: Tensor | None) -> Tensor:
    """Products [B, T, D]; arguments as in `mmrec_kernels.associative_scan_exponential`."""
    dtype = compute_dtype(gamma.dtype)
    log = gamma.to(dtype).clamp(MIN_PRODUCT, 1.0).log()
    start = torch.zeros_like(log[:, 0]) if initial is None else initial.to(dtype).clamp(MIN_LOG, 0.0)
    return _running_sums(log, start).clamp_(MIN_LOG, 0.0).exp_()


def exponential_scan_backward(
    grad_y: Tensor, gamma: Tensor, y: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of gamma and the initial logarithm; y is what forward returned."""
    # a sum that is clamped passes nothing on; those after it are clamped as well
    grad_sum = (grad_y * y).masked_fill(y <= MIN_PRODUCT * (1 + 1e-5), 0.0)
    grad_log = _running_sums(grad_sum.flip(1), torch.zeros_like(grad_sum[:, 0])).flip(1)
    decay = gamma.to(y.dtype)
    grad_gamma = (grad_log / decay).masked_fill((decay < MIN_PRODUCT) | (decay > 1.0), 0.0)
    grad_initial = grad_log[:, 0].clone()
    if initial is not None:
        grad_initial = grad_initial.masked_fill((initial < MIN_LOG) | (initial > 0.0), 0.0).to(initial.dtype)
    return grad_gamma.to(gamma.dtype), grad_initial


def _running_sums(x: Tensor, start: Tensor) -> Tensor:
    """start + Σ_{i ≤ t} x_i for x [B, T, D], summed in blocks, which keeps fp32 accurate over long sequences."""
    batch, length, width = x.shape
    blocks = -(-length // SUM_BLOCK)
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * SUM_BLOCK - length))
    sums = padded.view(batch, blocks, SUM_BLOCK, width).cumsum(2)
    before = torch.cat([start.unsqueeze(1), sums[:, :-1, -1]], dim=1).cumsum(1)
    return (sums + before.unsqueeze(2)).view(batch, blocks * SUM_BLOCK, width)[:, :length].contiguous()
