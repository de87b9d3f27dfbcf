"""The read of the memories: softmax attention over slots, a short window and a null slot, merged by log-sum-exp."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec_kernels.matmul import matmul_fp32
from mmrec_kernels.scan import compute_dtype

QUERY_BLOCK = 512  # queries whose scores exist at one time


def _blocks(length: int, keys: int, band: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the range of keys that any of its queries may see."""
    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        offset = keys - length
        seen = slice(0, keys) if band is None else slice(max(0, offset + first - band + 1), offset + last)
        blocks.append((slice(first, last), seen))
    return blocks


def _scores(q: Tensor, k: Tensor, stamp: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Scaled scores [B, H, t, n] in fp32, −∞ where the key's stamp lies outside the query's [start, stop)."""
    batch, heads, _, width = q.shape
    scores = matmul_fp32(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (batch, heads)) * width**-0.5
    stamp = stamp[:, None, None, :]
    hidden = (stamp < start[:, None, :, None]) | (stamp >= stop[:, None, :, None])
    return scores.masked_fill_(hidden, float("-inf"))


def _bmm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, m, k] @ [B, H, k, n] with operands rounded to dtype and an fp32 result."""
    product = matmul_fp32(a.to(dtype).flatten(0, 1), b.to(dtype).flatten(0, 1))
    return product.unflatten(0, a.shape[:2])


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stamp: Tensor,
        start: Tensor,
        stop: Tensor,
        band: int | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q.dtype)
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        for rows, seen in _blocks(q.shape[2], k.shape[2], band):
            scores = _scores(q[:, :, rows], k[:, :, seen], stamp[:, seen], start[:, rows], stop[:, rows])
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = (scores - _finite(lse[:, :, rows]).unsqueeze(-1)).exp_()
            out[:, :, rows] = _bmm(weights, v[:, :, seen], v.dtype)
        ctx.save_for_backward(q, k, v, stamp, start, stop, out, lse)
        ctx.band = band
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, stamp, start, stop, out, lse = ctx.saved_tensors
        grad_q = torch.empty_like(out)
        grad_k, grad_v = (
            torch.zeros(k.shape, dtype=out.dtype, device=k.device),
            torch.zeros_like(v, dtype=out.dtype),
        )
        delta = (grad_out * out).sum(-1) - grad_lse
        for rows, seen in _blocks(q.shape[2], k.shape[2], ctx.band):
            scores = _scores(q[:, :, rows], k[:, :, seen], stamp[:, seen], start[:, rows], stop[:, rows])
            weights = (scores - _finite(lse[:, :, rows]).unsqueeze(-1)).exp_()
            grad = grad_out[:, :, rows]
            grad_v[:, :, seen] += _bmm(weights.mT, grad, v.dtype)
            grad_weights = _bmm(grad, v[:, :, seen].mT, v.dtype)
            grad_scores = weights * (grad_weights - delta[:, :, rows].unsqueeze(-1)) * q.shape[-1] ** -0.5
            grad_q[:, :, rows] = _bmm(grad_scores, k[:, :, seen], k.dtype)
            grad_k[:, :, seen] += _bmm(grad_scores.mT, q[:, :, rows], q.dtype)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for queries that see nothing (−∞), whose weights then come out as exp(−∞) = 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: Tensor,
    stop: Tensor,
    stamp: Tensor | None = None,
    band: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which each query sees the keys whose stamp lies in an interval of its own.

    Args:
        q: Queries [B, H, T, d].
        k, v: Keys and values [B, H, K, d].
        start, stop: [B, T] int64; query t sees keys with start_t ≤ stamp < stop_t.
        stamp: [B, K] int64, the keys' stamps in any order; None for their index.
        band: Promise that the queries belong to the last T keys and none sees further back than the `band` keys that
            end with its own: the work is then O(T·band). None: any query may see any key.

    Returns:
        out [B, H, T, d] in q's dtype and lse [B, H, T], the log of the sum of exponentiated scores, in fp32 (fp64 for
        fp64). A query that sees nothing has out 0 and lse −∞. Differentiable in q, k and v, also through lse.
        Scores are scaled by 1/√d; softmax and accumulation are fp32; peak memory is O(T), not O(T·K).
    """
    if stamp is None:
        stamp = torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1)
    return _IntervalAttention.apply(q, k, v, stamp, start, stop, band)


def merge_partial_reads(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over disjoint sets of keys from the reads of each set: out [B, H, T, d] and lse [B, H, T]."""
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses)
    lse = stacked.logsumexp(0)
    weights = (stacked - _finite(lse)).exp().unsqueeze(-1)
    return sum(w * o for w, o in zip(weights, outs, strict=True)), lse


@lru_cache(maxsize=8)
def _rotary_table(
    length: int, width: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [length, d/2] of the angles i·θ^(−2j/d), which are taken in fp64: exact for long chunks too."""
    inverse = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * inverse
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [B, H, n, d]; component i is paired with component i + d/2 (Su et al. 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def memory_attention(
    q: Tensor,
    slots_k: Tensor,
    slots_v: Tensor,
    *,
    slot_stamp: Tensor,
    slot_start: Tensor,
    slot_stop: Tensor,
    window_k: Tensor | None = None,
    window_v: Tensor | None = None,
    window_start: Tensor | None = None,
    window: int = 0,
    null_k: Tensor | None = None,
    null_v: Tensor | None = None,
    rope_theta: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """One softmax over the visible slots, the last `window` tokens and a null slot.

    Args:
        q: Queries [B, H, T, d], normalised as the caller likes, without positions.
        slots_k, slots_v: Slots [B, H, K, d] in any order (a ring, say).
        slot_stamp: [B, K] int64, the chronological number of each slot.
        slot_start, slot_stop: [B, T] int64; query t sees the slots with slot_start_t ≤ stamp < slot_stop_t.
        window_k, window_v: Keys and values of the tokens [B, H, n + T, d], the last T being those of the queries,
            without positions: rotary ones are applied here (they depend on differences only).
        window_start: [B, T] int64, index into window_k of the first token query t may see (its document's first).
        window: Tokens a query sees of window_k, its own included.
        null_k, null_v: Key and value of the null slot [H, d], seen by every query.
        rope_theta: Base of the rotary positions.

    Returns:
        out [B, H, T, d] in q's dtype; lse [B, H, T], fp32 (fp64 for fp64), with which partial reads merge exactly.
    """
    out, lse = interval_attention(q, slots_k, slots_v, start=slot_start, stop=slot_stop, stamp=slot_stamp)
    outs, lses = [out], [lse]
    if window_k is not None and window_v is not None and window_start is not None:
        length, keys = q.shape[2], window_k.shape[2]
        cos, sin = _rotary_table(keys, q.shape[-1], rope_theta, lse.dtype, q.device)
        own = torch.arange(keys - length, keys, device=q.device)
        out, lse = interval_attention(
            _rotate(q, cos[-length:], sin[-length:]),
            _rotate(window_k, cos, sin),
            window_v,
            start=torch.maximum(window_start, own - window + 1),
            stop=(own + 1).expand_as(window_start),
            band=window,
        )
        outs.append(out)
        lses.append(lse)
    if null_k is not None and null_v is not None:
        score = (q * null_k.to(q.dtype).unsqueeze(1)).sum(-1, dtype=lse.dtype) * q.shape[-1] ** -0.5
        outs.append(null_v.to(q.dtype)[None, :, None, :].expand_as(q))
        lses.append(score)
    out, lse = merge_partial_reads(outs, lses)
    return out.to(q.dtype), lse
