"""The read of the memories as Triton kernels.

Forward: a program takes a block of queries of one head and walks over the keys that any of them may see, block by
block, with an online softmax: the null slot first, then the slots, then the window, all in one running maximum, sum
and weighted mean of values. Only blocks that some query does not see whole are masked; which those are is worked out
beforehand from the smallest and largest stamps of each block, because the ring is in no order.

Backward: scores are computed again. One kernel walks over keys for each block of queries and writes ∂q; another walks
over queries for each block of keys and writes ∂k and ∂v. Every sum has one program and a fixed order.

Rotary positions: the keys of the window are turned once, into a copy; queries are turned where they are read.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrec_kernels import attention_pages_triton
from mmrec_kernels.attention_backward_triton import key_kernel, query_kernel
from mmrec_kernels.attention_forward_triton import Rule, Table, forward_kernel
from mmrec_kernels.attention_prepare_triton import TURNED, TURNED_HEADS, prepare_kernel
from mmrec_kernels.attention_torch import Gradients, Read, rotary_table
from mmrec_kernels.backend import interpreted
from mmrec_kernels.checks import cdiv
from mmrec_kernels.triton_rows import LOG2_E, precision, rows_of, tiles_of

_SCANNED = 1024  # queries whose window is looked at at one time
_SPLIT_ROWS = 1024  # queries that make splitting the sums over queries worth while
_PROGRAMS = 512  # enough to fill any GPU


class Blocks(NamedTuple):
    """Sizes of the blocks of queries and keys of a kernel and its launch; fixed by width and dtype."""

    queries: int
    keys: int
    warps: int
    stages: int


def _blocks(width: int, dtype: torch.dtype) -> tuple[Blocks, Blocks, Blocks]:
    """Blocks of the forward, of ∂q, and of ∂k and ∂v."""
    if dtype == torch.float32:  # without tensor cores, products are unrolled: larger blocks do not fit into registers
        block = Blocks(32, 32, 8, 2) if width <= 64 else Blocks(32, 16, 8, 2)
        return block, block, block
    if width <= 128:
        return Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)
    return Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)


def unsupported(read: Read) -> str | None:
    """Why no kernel can do the read; None if one can."""
    width = read.q.shape[-1]
    if read.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(read.q.dtype).removeprefix('torch.')} inputs"
    if width not in (16, 32, 64, 128, 256):
        return f"heads of width {width}, not a power of two from 16 to 256"
    if interpreted() and read.q.dtype == torch.bfloat16:
        return "Triton's interpreter takes bf16 matrices for integers"
    return None


class _Window(NamedTuple):
    """The window, its keys turned to their positions."""

    keys: Tensor
    values: Tensor
    start: Tensor
    table: Table


class _Prepared(NamedTuple):
    """What a read needs beforehand: lists for blocks of queries and of keys, and the window; None without."""

    by_queries: Rule | None
    by_keys: Rule | None
    window: _Window | None


def _rule(read: Read, lists: int, columns: int) -> Rule:
    """The rule of the slots, with room for lists of blocks."""
    stamp, start, stop = (x.contiguous() for x in (read.slot_stamp, read.slot_start, read.slot_stop))
    shape = len(stamp), lists
    room, counts = (stamp.new_empty(*shape, n, dtype=torch.int32) for n in (columns, 2))
    return Rule(stamp, start, stop, room, counts)


def _prepare(read: Read, queries: Blocks, keys: Blocks | None) -> _Prepared:
    """Lists the blocks of slots that blocks of queries see (keys: and the reverse), turns the keys of the window."""
    batch, heads, length, width = read.q.shape
    slots = read.slot_stamp.shape[1]
    by_queries = by_keys = None
    if slots > 0 and read.pages is None:
        by_queries = _rule(read, cdiv(length, queries.queries), cdiv(slots, queries.keys))
        if keys is not None:
            by_keys = _rule(read, cdiv(slots, keys.keys), cdiv(length, keys.queries))
    window = keys_from = keys_to = table = None
    tokens = turning = 0
    if read.window_k is not None and read.window_v is not None and read.window_start is not None:
        tokens = read.window_k.shape[2]
        table = Table(*rotary_table(read))
        window = _Window(torch.empty_like(read.window_k), read.window_v, read.window_start.contiguous(), table)
        keys_from, keys_to = rows_of(read.window_k), rows_of(window.keys)
        turning = cdiv(tokens, TURNED.value) * cdiv(heads, TURNED_HEADS.value) * batch
    query_lists, key_lists = (0 if rule is None else batch * rule.counts.shape[1] for rule in (by_queries, by_keys))
    if query_lists + key_lists + turning > 0:
        other = queries if keys is None else keys
        prepare_kernel[(query_lists + key_lists + turning,)](
            by_queries, by_keys, keys_from, keys_to, table, query_lists, key_lists, batch, heads, length, slots, tokens,
            queries.queries, queries.keys, other.queries, other.keys, width // 2, num_warps=4,
        )  # fmt: skip
    return _Prepared(by_queries, by_keys, window)


def _sizes(read: Read, rule: Rule | None) -> tuple[int | float, ...]:
    """heads, group, length, slots, tokens, window, columns and scale of the kernels."""
    _, heads, length, width = read.q.shape
    tokens = length if read.window_k is None else read.window_k.shape[2]
    group = heads // read.slots_k.shape[1]
    columns = 0 if rule is None else rule.lists.shape[2]
    return heads, group, length, read.slots_k.shape[2], tokens, read.window, columns, width**-0.5 * LOG2_E.value


def _keys(read: Read, rule: Rule | None, window: _Window | None, rows: int) -> tuple[Any, ...]:
    """slots_k, slots_v, rule, window_k, window_v, window_start and table of the kernels, keys in tiles of `rows`."""
    width = read.q.shape[-1]
    slots = window_tiles = (None, None)
    if rule is not None:
        slots = tiles_of(read.slots_k, rows, width), tiles_of(read.slots_v, rows, width)
    if window is None:
        return *slots, rule, *window_tiles, None, None
    window_tiles = tiles_of(window.keys, rows, width), tiles_of(window.values, rows, width)
    return *slots, rule, *window_tiles, window.start, window.table


def _null(read: Read) -> tuple[Tensor | None, Tensor | None]:
    if read.null_k is None or read.null_v is None:
        return None, None
    return read.null_k.contiguous(), read.null_v.contiguous()


def forward(read: Read) -> tuple[Tensor, Tensor]:
    """out, with the dtype and strides of `torch.empty_like(q)`, and lse [B, H, T]."""
    with torch.cuda.device_of(read.q):
        if read.pages is None:
            return _read_blocks(read, read.q.dtype)
        others = None
        if read.window_k is not None or read.null_k is not None:
            others = _read_blocks(read, torch.float32)
        return attention_pages_triton.forward(read, others)


def _read_blocks(read: Read, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out in a dtype and lse of everything but pages."""
    batch, heads, length, width = read.q.shape
    blocks, _, _ = _blocks(width, read.q.dtype)
    out = torch.empty_like(read.q, dtype=dtype)
    lse = read.q.new_empty(batch, heads, length, dtype=torch.float32)
    rule, _, window = _prepare(read, blocks, None)
    forward_kernel[(cdiv(length, blocks.queries) * batch * heads,)](
        rows_of(read.q), *_keys(read, rule, window, blocks.keys), *_null(read), rows_of(out), lse,
        *_sizes(read, rule), width, blocks.queries, blocks.keys, precision(read.q.dtype),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse


def backward(read: Read, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Gradients:
    """Gradients in the dtypes of the arguments, with the strides of `torch.empty_like` of each."""
    grad_out, grad_lse = grad_out.to(read.q.dtype), grad_lse.contiguous()
    with torch.cuda.device_of(read.q):
        prepared = _prepare(read, *_blocks(read.q.shape[-1], read.q.dtype)[1:])
        delta = torch.empty_like(lse)
        turned_q = None if prepared.window is None else torch.empty_like(read.q)
        grad_q, grad_null_k, grad_null_v = _query_gradients(
            read, prepared, out, lse, grad_out, grad_lse, turned_q, delta
        )
        slots_k, slots_v, window_k, window_v = _key_gradients(read, prepared, lse, grad_out, turned_q, delta)
        if read.pages is not None:
            grad_q = attention_pages_triton.query_gradients(read, lse, delta, grad_out, grad_q)
            slots_k, slots_v = attention_pages_triton.key_gradients(read, lse, delta, grad_out)
    return Gradients(grad_q, slots_k, slots_v, window_k, window_v, grad_null_k, grad_null_v)


def _query_gradients(
    read: Read,
    prepared: _Prepared,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    turned_q: Tensor | None,
    delta: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, in fp32 if that of pages will join it, and of the null slot; fills turned_q and delta."""
    batch, heads, length, width = read.q.shape
    _, blocks, _ = _blocks(width, read.q.dtype)
    rule, _, window = prepared
    query_blocks = cdiv(length, blocks.queries)
    null = _null(read)
    null_sums = None if null[0] is None else lse.new_empty(2, batch, heads, query_blocks, width)
    grad_q = torch.empty_like(read.q, dtype=read.q.dtype if read.pages is None else torch.float32)
    query_kernel[(query_blocks * batch * heads,)](
        rows_of(read.q), *_keys(read, rule, window, blocks.keys), *null, rows_of(out), lse, rows_of(grad_out), grad_lse,
        rows_of(grad_q), None if turned_q is None else rows_of(turned_q), delta, null_sums,
        *_sizes(read, rule), width, blocks.queries, blocks.keys, precision(read.q.dtype),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if read.null_k is None or read.null_v is None or null_sums is None:
        return grad_q, None, None
    grad_null_k, grad_null_v = null_sums.sum((1, 3))
    return grad_q, torch.empty_like(read.null_k).copy_(grad_null_k), torch.empty_like(read.null_v).copy_(grad_null_v)


def _key_gradients(
    read: Read, prepared: _Prepared, lse: Tensor, grad_out: Tensor, turned_q: Tensor | None, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of slots_k and slots_v, left empty if they come from pages, and of window_k and window_v."""
    batch, heads, length, width = read.q.shape
    _, _, blocks = _blocks(width, read.q.dtype)
    _, rule, window = prepared
    slot_programs = 0 if rule is None else cdiv(read.slots_k.shape[2], blocks.keys) * batch * heads
    window_programs = 0 if window is None else cdiv(window.keys.shape[2], blocks.keys) * batch * heads
    splits = max(1, min(_PROGRAMS // max(1, slot_programs + window_programs), length // _SPLIT_ROWS))
    grads = torch.empty_like(read.slots_k), torch.empty_like(read.slots_v)
    sums = grads
    if splits > 1:
        shape = (splits, *read.slots_k.shape)
        sums = lse.new_empty(shape), lse.new_empty(shape)
    window_k, window_v = (None if x is None else torch.empty_like(x) for x in (read.window_k, read.window_v))
    if slot_programs + window_programs > 0:
        key_kernel[(slot_programs * splits + window_programs,)](
            *(None if x is None else tiles_of(x, blocks.queries, width) for x in (read.q, turned_q)),
            *_keys(read, rule, window, blocks.keys), lse, delta, tiles_of(grad_out, blocks.queries, width),
            *(rows_of(x if splits == 1 else x[0]) for x in sums),
            *(None if x is None else rows_of(x) for x in (window_k, window_v)),
            slot_programs * splits, splits, read.slots_k.numel(), *_sizes(read, rule),
            width, blocks.queries, blocks.keys, _SCANNED, precision(read.q.dtype),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    if splits > 1:
        for grad, x in zip(grads, sums, strict=True):
            grad.copy_(x.sum(0))
    return *grads, window_k, window_v
