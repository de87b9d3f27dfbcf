"""The read of the memories: one softmax over slots, a short window and a null slot."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmrec_kernels import attention_torch, attention_triton, ops
from mmrec_kernels.attention_torch import PAGE, Gradients, Read, merge_partial_reads
from mmrec_kernels.backend import use_triton
from mmrec_kernels.checks import compute_dtype
from mmrec_kernels.triton_rows import with_rows

LONGEST_WINDOW = 2**30  # kernels add it to the number of a token, in 32 bits

__all__ = ["PAGE", "memory_attention", "merge_partial_reads"]


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
    pages: Tensor | None = None,
    rope_theta: float = 10000.0,
) -> tuple[Tensor, Tensor]:
    """One softmax over the visible slots, the last `window` tokens and a null slot.

    q, slots and window may have any strides and any mix of floating dtypes; they are computed in the widest. Scores
    are scaled by 1/√d; softmax and accumulation are fp32 (fp64 for fp64). Peak memory is O(T). Differentiable in q,
    slots, window and null slot, through out and lse, with the same bits every time.

    Args:
        q: Queries [B, H, T, d], normalised as the caller likes, without positions; d even.
        slots_k, slots_v: Slots [B, R, K, E] in any order (a ring, say), E = d·H/R: head i reads bank ⌊i·R/H⌋, its own
            d-wide slice. With R = H that is [B, H, K, d].
        slot_stamp: [B, K] int64, the chronological number of each slot.
        slot_start, slot_stop: [B, T] int64; query t sees the slots with slot_start_t ≤ stamp < slot_stop_t.
        window_k, window_v: Keys and values of the tokens [B, H, n + T, d], the last T being those of the queries,
            without positions: rotary ones are applied here (they depend on differences only). None for no window.
        window_start: [B, T] int64, index into window_k of the first token query t may see (its document's first).
        window: Tokens a query sees of window_k, its own included; from 2³⁰ on, all.
        null_k, null_v: Key and value of the null slot [H, d], seen by every query. None for no null slot.
        pages: [B, H, T, P] int64; page p is slots 4p to 4p + 3, and a query sees slots of its own pages only. All
            different, but for −1 and those beyond the last slot, which are no pages. The work is then O(P) a query.
            None: every page.
        rope_theta: Base of the rotary positions.

    Returns:
        out [B, H, T, d] in q's dtype; lse [B, H, T], the logarithm of the softmax's denominator, fp32 (fp64 for fp64),
        with which partial reads merge exactly. A query that sees nothing has out 0 and lse −∞.

    Raises:
        ValueError: If shapes do not agree, only some of the arguments of a part are given, or the window is negative.
    """
    if window < 0:
        raise ValueError(f"memory_attention: window is {window}, must not be negative")
    window = min(window, LONGEST_WINDOW)
    read = Read(
        q, slots_k, slots_v, slot_stamp, slot_start, slot_stop,
        window_k, window_v, window_start, null_k, null_v, pages, window, rope_theta,
    )  # fmt: skip
    _check(read)
    dtype = q.dtype
    for x in (slots_k, slots_v, window_k, window_v):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    out, lse = _forward_op(
        with_rows(q.to(dtype)),
        with_rows(slots_k.to(dtype)),
        with_rows(slots_v.to(dtype)),
        slot_stamp,
        slot_start,
        slot_stop,
        None if window_k is None else with_rows(window_k.to(dtype)),
        None if window_v is None else with_rows(window_v.to(dtype)),
        window_start,
        null_k,
        null_v,
        pages,
        window,
        rope_theta,
    )
    return out.to(q.dtype), lse


def _check(read: Read) -> None:
    """Raises ValueError as `memory_attention` says."""
    if read.q.dim() != 4 or 0 in read.q.shape or read.q.shape[-1] % 2:
        raise ValueError(f"memory_attention: q is {list(read.q.shape)}, expected [B, H, T, d] with d even, none 0")
    for names in (("window_k", "window_v", "window_start"), ("null_k", "null_v")):
        absent = [name for name in names if getattr(read, name) is None]
        if absent and len(absent) < len(names):
            raise ValueError(f"memory_attention: {absent[0]} is missing; {', '.join(names)} go together")
    batch, heads, length, width = read.q.shape
    banks, slots = read.slots_k.shape[1:3] if read.slots_k.dim() == 4 else (0, 0)
    if banks == 0 or heads % banks:
        shape = list(read.slots_k.shape)
        raise ValueError(f"memory_attention: slots_k is {shape}, expected [B, R, K, E] with R dividing {heads} heads")
    tokens = length if read.window_k is None or read.window_k.dim() != 4 else max(length, read.window_k.shape[2])
    expected = dict(
        slots_k=[batch, banks, slots, width * heads // banks],
        slots_v=[batch, banks, slots, width * heads // banks],
        slot_stamp=[batch, slots],
        slot_start=[batch, length],
        slot_stop=[batch, length],
        window_k=[batch, heads, tokens, width],
        window_v=[batch, heads, tokens, width],
        window_start=[batch, length],
        null_k=[heads, width],
        null_v=[heads, width],
        pages=[batch, heads, length, 0 if read.pages is None else read.pages.shape[-1]],
    )
    for name, shape in expected.items():
        x = getattr(read, name)
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"memory_attention: {name} is {list(x.shape)}, expected {shape}")
    for name in ("slot_stamp", "slot_start", "slot_stop", "window_start", "pages"):
        x = getattr(read, name)
        if x is not None and x.dtype != torch.int64:
            raise ValueError(f"memory_attention: {name} is {x.dtype}, expected torch.int64")


def _runs_as_kernel(read: Read) -> bool:
    return use_triton("memory_attention", read.q.device, attention_triton.unsupported(read))


_ARGUMENTS = """
    Tensor q, Tensor slots_k, Tensor slots_v, Tensor slot_stamp, Tensor slot_start, Tensor slot_stop,
    Tensor? window_k, Tensor? window_v, Tensor? window_start, Tensor? null_k, Tensor? null_v, Tensor? pages,
    int window, float rope_theta
"""
_SAVED = len(Read._fields) - 2  # the arguments that are tensors come first


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    read = Read(*arguments)
    return (attention_triton if _runs_as_kernel(read) else attention_torch).forward(read)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    q = Read(*arguments).q
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of `Gradients`, an empty tensor for each that is None."""
    read = Read(*arguments[:-4])
    implementation = attention_triton if _runs_as_kernel(read) else attention_torch
    return _without_none(read.q, *implementation.backward(read, *arguments[-4:]))


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    read = Read(*arguments[:-4])
    likes = (None if x is None else torch.empty_like(x) for x in (getattr(read, name) for name in Gradients._fields))
    return _without_none(read.q, *likes)


def _without_none(q: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


_forward_op = ops.register("memory_attention", _forward, _fake_forward, f"({_ARGUMENTS}) -> (Tensor, Tensor)")
_backward_op = ops.register(
    "memory_attention_backward",
    _backward,
    _fake_backward,
    f"({_ARGUMENTS}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with ops.below_autograd():
            output = _forward_op(*inputs)
        ctx.save_for_backward(*inputs[:_SAVED], *output)
        ctx.settings = inputs[_SAVED:]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors  # once: activation checkpointing allows no second look
        gradients = _backward_op(*tensors, *ctx.settings, out, lse, grad_out, grad_lse)
        by_name = dict(zip(Gradients._fields, gradients, strict=True))
        needed = dict(zip(Read._fields, ctx.needs_input_grad, strict=True))
        return tuple(by_name.get(name) if needed[name] else None for name in Read._fields)


ops.differentiate("memory_attention", _Function)
