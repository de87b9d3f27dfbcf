"""The forward kernel of the read of the memories, and what the backward shares with it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmrec_kernels.triton_rows import LN_2, NEVER, head_base, load_rows, load_tile, store_rows

# Sizes vary from call to call: no kernel is compiled anew for them.
SIZES = ["length", "slots", "tokens", "window", "columns", "slot_programs", "splits", "grad_stride"]


class Rule(NamedTuple):
    """Which slots are seen: stamps [B, K], intervals [B, T], and lists of blocks (`attention_prepare_triton`)."""

    stamp: Any
    start: Any
    stop: Any
    lists: Any
    counts: Any


class Table(NamedTuple):
    """cos and sin of the rotary angles, [n, d/2] each, fp32."""

    cos: Any
    sin: Any


@triton.jit
def rotate(x, table, position, positions, sign, N: tl.constexpr, D: tl.constexpr):
    """Rows [N, D] turned to positions position, position + 1, … (back, with sign −1), up to the last one; fp32."""
    at = tl.minimum(position + tl.arange(0, N), positions - 1).to(tl.int64)
    angle = at[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(table.cos + angle)
    sin = tl.load(table.sin + angle) * sign
    first, second = tl.split(tl.permute(tl.reshape(x.to(tl.float32), [N, 2, D // 2]), [0, 2, 1]))
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(tl.permute(turned, [0, 2, 1]), [N, D])


@triton.jit
def window_blocks(first_seen, own, tokens, K: tl.constexpr):
    """Which blocks of keys a block of queries sees in the window, where query i sees keys first_seen_i … own_i.

    Returns:
        begin, whole_begin, whole_end, end: blocks begin … end − 1 may be seen, those from whole_begin to
        whole_end − 1 by every query, as a whole.
    """
    end = tl.max(own) // K + 1
    begin = tl.minimum(tl.min(first_seen) // K, end)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(tl.max(first_seen), K), begin), end)
    whole_end = tl.maximum((tl.min(own) + 1) // K, whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def window_rule(window_start, b, rows, length, tokens, window):
    """Index of the first key that queries see in the window, and of their own; rows from length on repeat the last."""
    rows = tl.minimum(rows, length - 1)
    own = tokens - length + rows
    start = tl.load(window_start + b.to(tl.int64) * length + rows)
    return tl.maximum(tl.minimum(start, tokens).to(tl.int32), tl.maximum(own - window + 1, 0)), own


@triton.jit
def load_intervals(rule, b, rows, length):
    """The stamps that queries see, from start to before stop; rows from length on repeat the last."""
    at = b.to(tl.int64) * length + tl.minimum(rows, length - 1)
    return tl.load(rule.start + at), tl.load(rule.stop + at)


@triton.jit
def _absorb(mean, top, total, scores, v, scale, PRECISION: tl.constexpr):
    """One step of the online softmax: keys with these scores (unscaled; −∞ if hidden) and values join."""
    highest = tl.maximum(top, tl.max(scores, 1) * scale)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores * scale - pivot[:, None])
    shrink = tl.exp2(top - pivot)
    total = total * shrink + tl.sum(weights, 1)
    mean = tl.dot(weights.to(v.dtype), v, mean * shrink[:, None], input_precision=PRECISION)
    return mean, highest, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, slots_k, slots_v, rule, window_k, window_v, window_start, table, null_k, null_v, out, lse,
    heads, group, length, slots, tokens, window, columns, scale,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The read of Q queries of one head. Slots and window are tiles of K keys; window_k is turned to its positions.

    scale is log₂e/√d.
    """
    blocks = tl.cdiv(length, Q)
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    row = block * Q
    rows = row + tl.arange(0, Q)
    q_tile = load_rows(head_base(q, b, h, 1, D), q.row, row, length, Q, D)

    if null_k is not None:
        columns_d = tl.arange(0, D)
        null = tl.load(null_k + h * D + columns_d).to(tl.float32)
        top = tl.sum(q_tile.to(tl.float32) * null[None, :], 1) * scale
        total = tl.full([Q], 1.0, tl.float32)
        mean = tl.zeros([Q, D], tl.float32) + tl.load(null_v + h * D + columns_d).to(tl.float32)[None, :]
    else:
        top = tl.full([Q], float("-inf"), tl.float32)
        total = tl.zeros([Q], tl.float32)
        mean = tl.zeros([Q, D], tl.float32)

    if rule is not None:
        line = b.to(tl.int64) * blocks + block
        lists = rule.lists + line * columns
        for i in range(tl.load(rule.counts + line * 2)):
            first = tl.load(lists + i) * K
            k = load_tile(slots_k, b, h, group, first, K, D)
            scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
            v = load_tile(slots_v, b, h, group, first, K, D)
            mean, top, total = _absorb(mean, top, total, scores, v, scale, PRECISION)
        start, stop = load_intervals(rule, b, rows, length)
        for i in range(tl.load(rule.counts + line * 2 + 1)):
            first = tl.load(lists + columns - 1 - i) * K
            k = load_tile(slots_k, b, h, group, first, K, D)
            scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
            keys = first + tl.arange(0, K)
            stamp = tl.load(rule.stamp + b.to(tl.int64) * slots + keys, mask=keys < slots, other=NEVER)
            seen = (stamp[None, :] >= start[:, None]) & (stamp[None, :] < stop[:, None])
            v = load_tile(slots_v, b, h, group, first, K, D)
            scores = tl.where(seen, scores, float("-inf"))
            mean, top, total = _absorb(mean, top, total, scores, v, scale, PRECISION)

    if window_k is not None:
        q_tile = rotate(q_tile, table, tokens - length + row, tokens, 1.0, Q, D).to(q_tile.dtype)
        first_seen, own = window_rule(window_start, b, rows, length, tokens, window)
        begin, whole_begin, whole_end, end = window_blocks(first_seen, own, tokens, K)
        for i in range(whole_begin, whole_end):
            k = load_tile(window_k, b, h, 1, i * K, K, D)
            scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
            v = load_tile(window_v, b, h, 1, i * K, K, D)
            mean, top, total = _absorb(mean, top, total, scores, v, scale, PRECISION)
        for i in range(begin, end - whole_end + whole_begin):
            first = tl.where(i < whole_begin, i, i + whole_end - whole_begin) * K
            k = load_tile(window_k, b, h, 1, first, K, D)
            scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
            keys = first + tl.arange(0, K)
            seen = (keys[None, :] >= first_seen[:, None]) & (keys[None, :] <= own[:, None])
            v = load_tile(window_v, b, h, 1, first, K, D)
            scores = tl.where(seen, scores, float("-inf"))
            mean, top, total = _absorb(mean, top, total, scores, v, scale, PRECISION)

    total = tl.where(total == 0.0, 1.0, total)  # nothing seen: out 0, lse −∞ (top is)
    mean = mean / total[:, None]
    store_rows(head_base(out, b, h, 1, D), out.row, row, length, mean, Q, D)
    lse += (b.to(tl.int64) * heads + h) * length
    tl.store(lse + rows, top * LN_2 + tl.log(total), mask=rows < length)
