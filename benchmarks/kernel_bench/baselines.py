"""What the kernels are measured against: other ways to do the same work, or as much of it as they can."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernel_bench.problems import SLOTS, WINDOW


@triton.jit
def _headwise_steps(z, gamma, weight, initial, h, length, heads: tl.constexpr, dim: tl.constexpr):
    """h_t = z_t ⊙ σ(W h_{t−1}) + γ_t ⊙ h_{t−1}, one program per row and head, W in registers, token by token."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    channel = tl.arange(0, dim)
    w = tl.load(weight + (head * dim + channel[:, None]) * dim + channel[None, :]).to(tl.float32)
    state = tl.load(initial + program * dim + channel).to(tl.float32)
    here = row * length * heads * dim + head * dim + channel
    z_next, gamma_next = tl.load(z + here), tl.load(gamma + here)
    for t in range(length):
        z_now, gamma_now = z_next.to(tl.float32), gamma_next.to(tl.float32)
        # the loads of the next token do not wait for the state of this one
        more = (channel >= 0) & (t + 1 < length)
        z_next = tl.load(z + here + heads * dim, mask=more)
        gamma_next = tl.load(gamma + here + heads * dim, mask=more)
        product = tl.sum(w * state[None, :], axis=1)
        state = z_now * tl.sigmoid(product) + gamma_now * state
        tl.store(h + here, state)
        here += heads * dim


def headwise_steps(z: Tensor, gamma: Tensor, weight: Tensor, initial: Tensor, num_warps: int = 8) -> Tensor:
    """States [B, T, D] in z's dtype; z and γ [B, T, D], W [H, d, d] with d a power of two, initial [B, D]."""
    batch, length, _ = z.shape
    heads, dim, _ = weight.shape
    h = torch.empty_like(z)
    _headwise_steps[(batch * heads,)](z, gamma, weight, initial, h, length, heads, dim, num_warps=num_warps)
    return h


def hgrn() -> Callable[..., Any]:
    """`chunk_hgrn(x, log_gamma)` of flash-linear-attention, a linear recurrence; ImportError if it is not installed."""
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn


def flash_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every key: PyTorch's flash attention."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def flex_slots(options: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over the slots under the segment rule, compiled; its mask is made here, outside the timing."""
    stamp, start, stop = options["slot_stamp"], options["slot_start"], options["slot_stop"]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (stamp[b, key] >= start[b, query]) & (stamp[b, key] < stop[b, query])

    return _flex(visible, start.shape[1], stamp.shape[1], stamp.device)


def flex_window(length: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over the last `WINDOW` tokens of [carried window, chunk], without rotary positions, compiled."""

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = query + WINDOW
        return (key <= own) & (key > own - WINDOW)

    return _flex(visible, length, WINDOW + length, device)


def _flex(visible: Any, queries: int, keys: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    mask = create_block_mask(visible, None, None, queries, keys, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


DENSE_KEYS = SLOTS + WINDOW  # as many keys as a token of `memory_inputs` sees, the null slot aside
