"""The read of selected pages of slots as Triton kernels: each query gathers the slots of its own pages.

Queries share no keys, so there is nothing for the tensor cores in the forward and in ∂q: a program takes one query,
and its work is O(P). For ∂k and ∂v, (page, query) pairs are sorted by page; a program takes one page and adds up its
queries in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.attention_torch import PAGE, Read
from mmrec_kernels.checks import cdiv
from mmrec_kernels.triton_rows import LN_2, LOG2_E, NEVER, head_base, load_norm, precision, rows_of

_GATHERED = 16  # slots that a query gathers at one time
_COLLECTED = 32  # queries that a page adds at one time
_SIZES = ["length", "slots", "count", "pages_in_all"]
_PAGE = tl.constexpr(PAGE)


@triton.jit
def _gather(k_base, k_row, rule, at, b, t, first, length, slots, count, N: tl.constexpr, D: tl.constexpr):
    """The first-th and following slots of a query's pages: keys [N, D] in fp32, their slots and if they are seen."""
    stamp, start, stop, pages = rule
    listed = first + tl.arange(0, N)
    page = tl.load(pages + at * count + listed // _PAGE, mask=listed < count * _PAGE, other=-1)
    slot = page * _PAGE + listed % _PAGE
    stored = (page >= 0) & (slot < slots)
    number = tl.load(stamp + tl.cast(b, tl.int64) * slots + slot, mask=stored, other=NEVER)
    ruled = tl.cast(b, tl.int64) * length + t
    seen = stored & (number >= tl.load(start + ruled)) & (number < tl.load(stop + ruled))
    k = tl.load(k_base + slot[:, None] * k_row + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)
    return k.to(tl.float32), slot, seen


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q, slots_k, slots_v, rule, dense, dense_lse, out, lse, heads, group, length, slots, count, scale,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One query of one head. It goes on from the read of everything else, `dense` and `dense_lse`, if there is any."""
    at = tl.program_id(0).to(tl.int64)
    t = at % length
    b = at // length // heads
    h = at // length % heads
    column = tl.arange(0, D)
    q_row = tl.load(head_base(q, b, h, 1, D) + t * q.row + column).to(tl.float32)
    k_base = head_base(slots_k, b, h, group, D)
    v_base = head_base(slots_v, b, h, group, D)
    if dense is not None:
        top = tl.load(dense_lse + at) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        mean = tl.load(head_base(dense, b, h, 1, D) + t * dense.row + column)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        mean = tl.zeros([D], tl.float32)
    for first in range(0, count * _PAGE, N):
        k, slot, seen = _gather(k_base, slots_k.row, rule, at, b, t, first, length, slots, count, N, D)
        scores = tl.where(seen, tl.sum(k * q_row[None, :], 1) * scale, float("-inf"))
        v = tl.load(v_base + slot[:, None] * slots_v.row + column[None, :], mask=seen[:, None], other=0.0)
        highest = tl.maximum(top, tl.max(scores, 0))
        pivot = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - pivot)
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(weights, 0)
        mean = mean * shrink + tl.sum(weights[:, None] * v.to(tl.float32), 0)
        top = highest
    total = tl.where(total == 0.0, 1.0, total)  # nothing seen: out 0, lse −∞ (top is)
    mean = mean / total
    tl.store(head_base(out, b, h, 1, D) + t * out.row + column, mean.to(out.data.dtype.element_ty))
    tl.store(lse + at, top * LN_2 + tl.log(total))


@triton.jit(do_not_specialize=_SIZES)
def _query_kernel(
    q, slots_k, slots_v, rule, lse, delta, grad_out, dense, grad_q, heads, group, length, slots, count, scale,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """∂q of one query of one head: that of everything else, `dense` in fp32, and that of its pages."""
    at = tl.program_id(0).to(tl.int64)
    t = at % length
    b = at // length // heads
    h = at // length % heads
    column = tl.arange(0, D)
    q_row = tl.load(head_base(q, b, h, 1, D) + t * q.row + column).to(tl.float32)
    grad = tl.load(head_base(grad_out, b, h, 1, D) + t * grad_out.row + column).to(tl.float32)
    norm = load_norm(lse, at, at + 1)
    sums = tl.load(delta + at)
    k_base = head_base(slots_k, b, h, group, D)
    v_base = head_base(slots_v, b, h, group, D)
    grad_row = tl.zeros([D], tl.float32)
    for first in range(0, count * _PAGE, N):
        k, slot, seen = _gather(k_base, slots_k.row, rule, at, b, t, first, length, slots, count, N, D)
        v = tl.load(v_base + slot[:, None] * slots_v.row + column[None, :], mask=seen[:, None], other=0.0)
        scores = tl.where(seen, tl.sum(k * q_row[None, :], 1) * scale, float("-inf"))
        grad_scores = tl.exp2(scores - norm) * (tl.sum(v.to(tl.float32) * grad[None, :], 1) - sums)
        grad_row += tl.sum(grad_scores[:, None] * k, 0)
    grad_row = tl.load(head_base(dense, b, h, 1, D) + t * dense.row + column) + grad_row * (scale * LN_2)
    tl.store(head_base(grad_q, b, h, 1, D) + t * grad_q.row + column, grad_row.to(grad_q.data.dtype.element_ty))


@triton.jit(do_not_specialize=_SIZES)
def _key_kernel(
    q, slots_k, slots_v, rule, order, bounds, lse, delta, grad_out, grad_k, grad_v,
    heads, group, length, slots, count, pages_in_all, scale,
    D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of one page of one head, its slots padded to the K rows of a matrix instruction."""
    stamp, start, stop, _ = rule
    page = tl.program_id(0) % pages_in_all
    line = (tl.program_id(0) // pages_in_all).to(tl.int64)
    b = line // heads
    h = line % heads
    column = tl.arange(0, D)
    slot = page * _PAGE + tl.arange(0, K)
    stored = (tl.arange(0, K) < _PAGE) & (slot < slots)
    number = tl.load(stamp + b * slots + slot, mask=stored, other=NEVER)
    k_at = slot[:, None].to(tl.int64)
    k_base = head_base(slots_k, b, h, group, D) + column[None, :]
    v_base = head_base(slots_v, b, h, group, D) + column[None, :]
    k = tl.load(k_base + k_at * slots_k.row, mask=stored[:, None], other=0.0)
    v = tl.load(v_base + k_at * slots_v.row, mask=stored[:, None], other=0.0)
    q_base = head_base(q, b, h, 1, D) + column[None, :]
    grad_base = head_base(grad_out, b, h, 1, D) + column[None, :]
    sum_k = tl.zeros([K, D], tl.float32)
    sum_v = tl.zeros([K, D], tl.float32)
    end = tl.load(bounds + tl.program_id(0) + 1)
    for first in range(tl.load(bounds + tl.program_id(0)), end, N):
        listed = first + tl.arange(0, N)
        here = listed < end
        t = tl.load(order + listed, mask=here, other=0) // count % length
        q_tile = tl.load(q_base + t[:, None] * q.row, mask=here[:, None], other=0.0)
        grad = tl.load(grad_base + t[:, None] * grad_out.row, mask=here[:, None], other=0.0)
        norm = load_norm(lse + line * length, t, length)
        sums = tl.load(delta + line * length + t)
        starts = tl.load(start + b * length + t)
        stops = tl.load(stop + b * length + t)
        seen = here[None, :] & (number[:, None] >= starts[None, :]) & (number[:, None] < stops[None, :])
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale
        weights = tl.exp2(tl.where(seen, scores, float("-inf")) - norm[None, :])
        sum_v = tl.dot(weights.to(grad.dtype), grad, sum_v, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - sums[None, :])
        sum_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, sum_k, input_precision=PRECISION)
    grad_k_at = head_base(grad_k, b, h, group, D) + k_at * grad_k.row + column[None, :]
    grad_v_at = head_base(grad_v, b, h, group, D) + k_at * grad_v.row + column[None, :]
    tl.store(grad_k_at, (sum_k * (scale * LN_2)).to(grad_k.data.dtype.element_ty), mask=stored[:, None])
    tl.store(grad_v_at, sum_v.to(grad_v.data.dtype.element_ty), mask=stored[:, None])


def _rule(read: Read) -> tuple[Tensor, ...]:
    assert read.pages is not None
    return tuple(x.contiguous() for x in (read.slot_stamp, read.slot_start, read.slot_stop, read.pages))


def _sizes(read: Read) -> tuple[int, ...]:
    """heads, group, length, slots and count of the kernels."""
    assert read.pages is not None
    heads, length = read.q.shape[1:3]
    return heads, heads // read.slots_k.shape[1], length, read.slots_k.shape[2], read.pages.shape[-1]


def _scale(read: Read) -> float:
    return float(read.q.shape[-1] ** -0.5 * LOG2_E.value)


def forward(read: Read, dense: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The read of everything else, out in fp32 and lse, joined by that of the pages: out and lse."""
    out = torch.empty_like(read.q)
    lse = read.q.new_empty(read.q.shape[:3], dtype=torch.float32)
    dense_rows, dense_lse = (None, None) if dense is None else (rows_of(dense[0]), dense[1])
    _forward_kernel[(lse.numel(),)](
        rows_of(read.q), rows_of(read.slots_k), rows_of(read.slots_v), _rule(read), dense_rows, dense_lse,
        rows_of(out), lse, *_sizes(read), _scale(read), read.q.shape[-1], _GATHERED, num_warps=2,
    )  # fmt: skip
    return out, lse


def query_gradients(read: Read, lse: Tensor, delta: Tensor, grad_out: Tensor, dense: Tensor) -> Tensor:
    """∂q from that of everything else, in fp32."""
    grad_q = torch.empty_like(read.q)
    _query_kernel[(lse.numel(),)](
        rows_of(read.q), rows_of(read.slots_k), rows_of(read.slots_v), _rule(read), lse, delta, rows_of(grad_out),
        rows_of(dense), rows_of(grad_q), *_sizes(read), _scale(read), read.q.shape[-1], _GATHERED, num_warps=2,
    )  # fmt: skip
    return grad_q


def key_gradients(read: Read, lse: Tensor, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """∂slots_k and ∂slots_v."""
    assert read.pages is not None
    batch, heads, _, width = read.q.shape
    pages_in_all = cdiv(read.slots_k.shape[2], PAGE)
    lines = torch.arange(batch * heads, device=read.q.device).view(batch, heads, 1, 1)
    outside = (read.pages < 0) | (read.pages >= pages_in_all)
    page = torch.where(outside, batch * heads * pages_in_all, read.pages + lines * pages_in_all)
    page, order = page.flatten().sort(stable=True)
    bounds = torch.searchsorted(page, torch.arange(batch * heads * pages_in_all + 1, device=page.device))
    grad_k, grad_v = torch.empty_like(read.slots_k), torch.empty_like(read.slots_v)
    *sizes, count = _sizes(read)
    _key_kernel[(batch * heads * pages_in_all,)](
        rows_of(read.q), rows_of(read.slots_k), rows_of(read.slots_v), _rule(read), order, bounds, lse, delta,
        rows_of(grad_out), rows_of(grad_k), rows_of(grad_v), *sizes, count, pages_in_all, _scale(read),
        width, _COLLECTED, 16, precision(read.q.dtype), num_warps=4,
    )  # fmt: skip
    return grad_k, grad_v
