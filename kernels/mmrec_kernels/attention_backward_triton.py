"""The backward kernels of the read of the memories."""

import triton
import triton.language as tl

from mmrec_kernels.attention_forward_triton import SIZES, load_intervals, rotate, window_blocks, window_rule
from mmrec_kernels.triton_rows import LN_2, NEVER, head_base, load_norm, load_rows, load_tile, store_rows


@triton.jit
def _score_gradients(scores, norm, delta, grad, v, scale, PRECISION: tl.constexpr):
    """Gradients [Q, K] of scaled scores, from scores before scaling."""
    weights = tl.exp2(scores * scale - norm[:, None])
    return weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    q, slots_k, slots_v, rule, window_k, window_v, window_start, table, null_k, null_v,
    out, lse, grad_out, grad_lse, grad_q, turned_q, delta, null_sums,
    heads, group, length, slots, tokens, window, columns, scale,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂q of Q queries of one head, their sums for the null slot, and what `key_kernel` needs of them.

    Slots and window are tiles of K keys; window_k is turned to its positions.
    Writes grad_q; delta [B, H, T], Σ grad_out·out − grad_lse; turned_q, the queries at their positions;
    null_sums [2, B, H, blocks, d], the blocks' shares of ∂null_k and ∂null_v.
    """
    blocks = tl.cdiv(length, Q)
    block = tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    row = block * Q
    rows = row + tl.arange(0, Q)
    at = (b.to(tl.int64) * heads + h) * length
    grad = load_rows(head_base(grad_out, b, h, 1, D), grad_out.row, row, length, Q, D)
    sums = tl.sum(
        grad.to(tl.float32) * load_rows(head_base(out, b, h, 1, D), out.row, row, length, Q, D).to(tl.float32), 1
    )
    sums -= tl.load(grad_lse + at + rows, mask=rows < length, other=0.0)
    tl.store(delta + at + rows, sums, mask=rows < length)
    norm = load_norm(lse + at, rows, length)
    q_base = head_base(q, b, h, 1, D)
    q_tile = load_rows(q_base, q.row, row, length, Q, D)
    grad_tile = tl.zeros([Q, D], tl.float32)

    if window_k is not None:
        turned = rotate(q_tile, table, tokens - length + row, tokens, 1.0, Q, D).to(q_tile.dtype)
        store_rows(head_base(turned_q, b, h, 1, D), turned_q.row, row, length, turned, Q, D)
        first_seen, own = window_rule(window_start, b, rows, length, tokens, window)
        begin, whole_begin, whole_end, end = window_blocks(first_seen, own, tokens, K)
        for i in range(whole_begin, whole_end):
            k = load_tile(window_k, b, h, 1, i * K, K, D)
            v = load_tile(window_v, b, h, 1, i * K, K, D)
            scores = tl.dot(turned, tl.trans(k), input_precision=PRECISION)
            grad_scores = _score_gradients(scores, norm, sums, grad, v, scale, PRECISION).to(k.dtype)
            grad_tile = tl.dot(grad_scores, k, grad_tile, input_precision=PRECISION)
        for i in range(begin, end - whole_end + whole_begin):
            first = tl.where(i < whole_begin, i, i + whole_end - whole_begin) * K
            k = load_tile(window_k, b, h, 1, first, K, D)
            v = load_tile(window_v, b, h, 1, first, K, D)
            keys = first + tl.arange(0, K)
            seen = (keys[None, :] >= first_seen[:, None]) & (keys[None, :] <= own[:, None])
            scores = tl.where(seen, tl.dot(turned, tl.trans(k), input_precision=PRECISION), float("-inf"))
            grad_scores = _score_gradients(scores, norm, sums, grad, v, scale, PRECISION).to(k.dtype)
            grad_tile = tl.dot(grad_scores, k, grad_tile, input_precision=PRECISION)
        grad_tile = rotate(grad_tile, table, tokens - length + row, tokens, -1.0, Q, D)

    if rule is not None:
        line = b.to(tl.int64) * blocks + block
        lists = rule.lists + line * columns
        for i in range(tl.load(rule.counts + line * 2)):
            first = tl.load(lists + i) * K
            k = load_tile(slots_k, b, h, group, first, K, D)
            v = load_tile(slots_v, b, h, group, first, K, D)
            scores = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)
            grad_scores = _score_gradients(scores, norm, sums, grad, v, scale, PRECISION).to(k.dtype)
            grad_tile = tl.dot(grad_scores, k, grad_tile, input_precision=PRECISION)
        start, stop = load_intervals(rule, b, rows, length)
        for i in range(tl.load(rule.counts + line * 2 + 1)):
            first = tl.load(lists + columns - 1 - i) * K
            k = load_tile(slots_k, b, h, group, first, K, D)
            v = load_tile(slots_v, b, h, group, first, K, D)
            keys = first + tl.arange(0, K)
            stamp = tl.load(rule.stamp + b.to(tl.int64) * slots + keys, mask=keys < slots, other=NEVER)
            seen = (stamp[None, :] >= start[:, None]) & (stamp[None, :] < stop[:, None])
            scores = tl.where(seen, tl.dot(q_tile, tl.trans(k), input_precision=PRECISION), float("-inf"))
            grad_scores = _score_gradients(scores, norm, sums, grad, v, scale, PRECISION).to(k.dtype)
            grad_tile = tl.dot(grad_scores, k, grad_tile, input_precision=PRECISION)

    if null_k is not None:
        columns_d = tl.arange(0, D)
        k = tl.load(null_k + h * D + columns_d).to(tl.float32)
        v = tl.load(null_v + h * D + columns_d).to(tl.float32)
        weights = tl.exp2(tl.sum(q_tile.to(tl.float32) * k[None, :], 1) * scale - norm)
        grad_scores = weights * (tl.sum(grad.to(tl.float32) * v[None, :], 1) - sums)
        grad_tile += grad_scores[:, None] * k[None, :]
        shares = null_sums + tl.program_id(0).to(tl.int64) * D + columns_d
        grad_k = tl.sum(grad_scores[:, None] * q_tile.to(tl.float32), 0)
        tl.store(shares, grad_k * (scale * LN_2))
        tl.store(shares + tl.num_programs(0).to(tl.int64) * D, tl.sum(weights[:, None] * grad.to(tl.float32), 0))
    store_rows(head_base(grad_q, b, h, 1, D), grad_q.row, row, length, grad_tile * (scale * LN_2), Q, D)


@triton.jit
def _collect(grad_k, grad_v, scores, q, grad, v, norm, delta, scale, PRECISION: tl.constexpr):
    """A block of queries joins the sums ∂k and ∂v of a block of keys; scores [K, Q] are unscaled, −∞ if hidden."""
    weights = tl.exp2(scores * scale - norm[None, :])
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_scores = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _slot_gradients(
    q, slots_k, slots_v, rule, lse, delta, grad_out, grad_k, grad_v,
    program, splits, grad_stride, heads, group, length, slots, columns, scale,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of K slots of one head over one of `splits` parts of the queries."""
    key_blocks = tl.cdiv(slots, K)
    split = program % splits
    block = program // splits % key_blocks
    h = program // splits // key_blocks % heads
    b = program // splits // key_blocks // heads
    first = block * K
    k = load_tile(slots_k, b, h, group, first, K, D)
    v = load_tile(slots_v, b, h, group, first, K, D)
    sum_k = tl.zeros([K, D], tl.float32)
    sum_v = tl.zeros([K, D], tl.float32)
    at = (b.to(tl.int64) * heads + h) * length
    line = b.to(tl.int64) * key_blocks + block
    lists = rule.lists + line * columns
    whole = tl.load(rule.counts + line * 2)
    for i in range(whole * split // splits, whole * (split + 1) // splits):
        row = tl.load(lists + i) * Q
        rows = row + tl.arange(0, Q)
        q_tile = load_tile(q, b, h, 1, row, Q, D)
        norm = load_norm(lse + at, rows, length)
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        grad = load_tile(grad_out, b, h, 1, row, Q, D)
        sums = tl.load(delta + at + rows)
        sum_k, sum_v = _collect(sum_k, sum_v, scores, q_tile, grad, v, norm, sums, scale, PRECISION)
    keys = first + tl.arange(0, K)
    stamp = tl.load(rule.stamp + b.to(tl.int64) * slots + keys, mask=keys < slots, other=NEVER)
    partial = tl.load(rule.counts + line * 2 + 1)
    for i in range(partial * split // splits, partial * (split + 1) // splits):
        row = tl.load(lists + columns - 1 - i) * Q
        rows = row + tl.arange(0, Q)
        q_tile = load_tile(q, b, h, 1, row, Q, D)
        norm = load_norm(lse + at, rows, length)
        start, stop = load_intervals(rule, b, rows, length)
        seen = (stamp[:, None] >= start[None, :]) & (stamp[:, None] < stop[None, :])
        scores = tl.where(seen, tl.dot(k, tl.trans(q_tile), input_precision=PRECISION), float("-inf"))
        grad = load_tile(grad_out, b, h, 1, row, Q, D)
        sums = tl.load(delta + at + rows, mask=rows < length, other=0.0)
        sum_k, sum_v = _collect(sum_k, sum_v, scores, q_tile, grad, v, norm, sums, scale, PRECISION)
    k_base = head_base(grad_k, b, h, group, D) + split.to(tl.int64) * grad_stride
    v_base = head_base(grad_v, b, h, group, D) + split.to(tl.int64) * grad_stride
    store_rows(k_base, grad_k.row, first, slots, sum_k * (scale * LN_2), K, D)
    store_rows(v_base, grad_v.row, first, slots, sum_v, K, D)


@triton.jit
def _window_queries(window_start, b, first, last, length, tokens, window, Q: tl.constexpr, N: tl.constexpr):
    """Which blocks of queries see the keys first … last of the window.

    Returns:
        begin, whole_begin, whole_end, end: blocks begin … end − 1 may see some, those from whole_begin to
        whole_end − 1 see all.
    """
    carried = tokens - length  # query t is token carried + t
    begin = tl.maximum(first - carried, 0) // Q
    stop = tl.minimum(last + window - carried, length)
    whole_begin = tl.cdiv(tl.maximum(last - carried, 0), Q)
    whole_end = tl.maximum(tl.minimum(first + window - carried, length), 0) // Q
    seen_until = begin * Q  # by documents
    latest = 0  # start of a document among the queries that would see all without documents
    for t in range(begin * Q, stop, N):
        rows = t + tl.arange(0, N)
        start = tl.load(window_start + b.to(tl.int64) * length + rows, mask=rows < stop, other=2**31 - 1)
        start = tl.minimum(start, 2**31 - 1).to(tl.int32)
        seen_until = tl.maximum(seen_until, tl.max(tl.where(start <= last, rows + 1, 0)))
        within = (rows >= whole_begin * Q) & (rows < whole_end * Q)
        latest = tl.maximum(latest, tl.max(tl.where(within, start, 0)))
    end = tl.cdiv(seen_until, Q)
    whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
    whole_end = tl.where(latest > first, whole_begin, tl.maximum(tl.minimum(whole_end, end), whole_begin))
    return begin, whole_begin, whole_end, end


@triton.jit
def _window_gradients(
    q, window_k, window_v, window_start, table, lse, delta, grad_out, grad_k, grad_v,
    program, heads, length, tokens, window, scale,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of K tokens of the window of one head; q and window_k are turned to their positions, ∂k is not."""
    key_blocks = tl.cdiv(tokens, K)
    block = program % key_blocks
    h = program // key_blocks % heads
    b = program // key_blocks // heads
    first = block * K
    last = tl.minimum(first + K, tokens) - 1
    k = load_tile(window_k, b, h, 1, first, K, D)
    v = load_tile(window_v, b, h, 1, first, K, D)
    sum_k = tl.zeros([K, D], tl.float32)
    sum_v = tl.zeros([K, D], tl.float32)
    at = (b.to(tl.int64) * heads + h) * length
    begin, whole_begin, whole_end, end = _window_queries(window_start, b, first, last, length, tokens, window, Q, N)
    for i in range(whole_begin, whole_end):
        rows = i * Q + tl.arange(0, Q)
        q_tile = load_tile(q, b, h, 1, i * Q, Q, D)
        norm = load_norm(lse + at, rows, length)
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        grad = load_tile(grad_out, b, h, 1, i * Q, Q, D)
        sums = tl.load(delta + at + rows)
        sum_k, sum_v = _collect(sum_k, sum_v, scores, q_tile, grad, v, norm, sums, scale, PRECISION)
    keys = first + tl.arange(0, K)
    for i in range(begin, end - whole_end + whole_begin):
        row = tl.where(i < whole_begin, i, i + whole_end - whole_begin) * Q
        rows = row + tl.arange(0, Q)
        q_tile = load_tile(q, b, h, 1, row, Q, D)
        norm = load_norm(lse + at, rows, length)
        first_seen, own = window_rule(window_start, b, rows, length, tokens, window)
        seen = (keys[:, None] >= first_seen[None, :]) & (keys[:, None] <= own[None, :])
        scores = tl.where(seen, tl.dot(k, tl.trans(q_tile), input_precision=PRECISION), float("-inf"))
        grad = load_tile(grad_out, b, h, 1, row, Q, D)
        sums = tl.load(delta + at + rows, mask=rows < length, other=0.0)
        sum_k, sum_v = _collect(sum_k, sum_v, scores, q_tile, grad, v, norm, sums, scale, PRECISION)
    sum_k = rotate(sum_k, table, first, tokens, -1.0, K, D)
    store_rows(head_base(grad_k, b, h, 1, D), grad_k.row, first, tokens, sum_k * (scale * LN_2), K, D)
    store_rows(head_base(grad_v, b, h, 1, D), grad_v.row, first, tokens, sum_v, K, D)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    q, turned_q, slots_k, slots_v, rule, window_k, window_v, window_start, table, lse, delta, grad_out,
    grad_slots_k, grad_slots_v, grad_window_k, grad_window_v,
    slot_programs, splits, grad_stride, heads, group, length, slots, tokens, window, columns, scale,
    D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v. Slots take longer than the window, so their programs come first and the others fill the gaps.

    q, turned_q and grad_out are tiles of Q queries; slots and window, which is turned, of K keys.
    """
    program = tl.program_id(0)
    if rule is not None and program < slot_programs:
        _slot_gradients(
            q, slots_k, slots_v, rule, lse, delta, grad_out, grad_slots_k, grad_slots_v,
            program, splits, grad_stride, heads, group, length, slots, columns, scale, D, Q, K, PRECISION,
        )  # fmt: skip
    if window_k is not None and program >= slot_programs:
        _window_gradients(
            turned_q, window_k, window_v, window_start, table, lse, delta, grad_out, grad_window_k, grad_window_v,
            program - slot_programs, heads, length, tokens, window, scale, D, Q, K, N, PRECISION,
        )  # fmt: skip
