"""What is made once before the read of the memories, in one launch: lists of blocks, and the window's keys turned.

Each of these alone would leave most of the GPU idle: lists wait for their loads, keys are copied at the memory's rate.
"""

import triton
import triton.language as tl

from mmrec_kernels.triton_rows import head_base, row_pointers

LISTED = tl.constexpr(32)  # blocks of keys sorted at one time when lists are made
LISTED_QUERIES = tl.constexpr(128)  # blocks of queries, of which there are more
TURNED = tl.constexpr(64)  # tokens turned by one program
TURNED_HEADS = tl.constexpr(8)  # at most, by one program


@triton.jit
def _list_blocks(
    rule, program, rows, columns, length, slots, Q: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BY_KEYS: tl.constexpr,
):  # fmt: skip
    """For a block of queries, lists the blocks of keys; BY_KEYS: for a block of keys, the blocks of queries.

    A list begins with the blocks in which every query sees every key, and ends, backwards, with those in which some
    query may see some key. Blocks that nobody sees are in neither. `counts` has the two lengths.
    """
    row = program % rows
    b = (program // rows).to(tl.int64)
    lists = rule.lists + program.to(tl.int64) * columns
    whole_count = 0
    partial_count = 0
    for first in range(0, columns, N):
        column = first + tl.arange(0, N)
        own = tl.full([1], row, tl.int32)
        key = (own if BY_KEYS else column) * K
        query = (column if BY_KEYS else own) * Q
        stamp_at = tl.minimum(key[:, None] + tl.arange(0, K)[None, :], slots - 1)
        query_at = tl.minimum(query[:, None] + tl.arange(0, Q)[None, :], length - 1)
        stamp = tl.load(rule.stamp + b * slots + stamp_at)
        start = tl.load(rule.start + b * length + query_at)
        stop = tl.load(rule.stop + b * length + query_at)
        oldest = tl.min(stamp, 1)
        newest = tl.max(stamp, 1)
        seen = (newest >= tl.min(start, 1)) & (oldest < tl.max(stop, 1)) & (column < columns)
        whole = seen & (oldest >= tl.max(start, 1)) & (newest < tl.min(stop, 1))
        whole = (whole & (key + K <= slots) & (query + Q <= length)).to(tl.int32)
        partial = seen.to(tl.int32) - whole
        tl.store(lists + whole_count + tl.cumsum(whole) - 1, column, mask=whole != 0)
        tl.store(lists + columns - partial_count - tl.cumsum(partial), column, mask=partial != 0)
        whole_count += tl.sum(whole)
        partial_count += tl.sum(partial)
    tl.store(rule.counts + program.to(tl.int64) * 2, whole_count)
    tl.store(rule.counts + program.to(tl.int64) * 2 + 1, partial_count)


@triton.jit
def _turn_keys(x, turned, table, program, blocks, heads, tokens, N: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr):
    """Turns N tokens of x [B, H, n, d] to their positions, for G heads, which share their angles."""
    first = program % blocks * N
    groups = tl.cdiv(heads, G)
    begin = program // blocks % groups * G
    b = program // blocks // groups
    inside = (first + tl.arange(0, N) < tokens)[:, None]
    angle = row_pointers(0, HALF, first, N, HALF)
    cos = tl.load(table.cos + angle, mask=inside)
    sin = tl.load(table.sin + angle, mask=inside)
    for h in range(begin, tl.minimum(begin + G, heads)):
        source = row_pointers(head_base(x, b, h, 1, HALF), x.row, first, N, HALF)
        target = row_pointers(head_base(turned, b, h, 1, HALF), turned.row, first, N, HALF)
        low = tl.load(source, mask=inside).to(tl.float32)
        high = tl.load(source + HALF, mask=inside).to(tl.float32)
        tl.store(target, (low * cos - high * sin).to(turned.data.dtype.element_ty), mask=inside)
        tl.store(target + HALF, (high * cos + low * sin).to(turned.data.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "slots", "tokens", "query_lists", "key_lists"])
def prepare_kernel(
    by_queries, by_keys, window_k, turned, table, query_lists, key_lists, batch, heads, length, slots, tokens,
    Q: tl.constexpr, K: tl.constexpr, KEYS_Q: tl.constexpr, KEYS_K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Fills the lists of two rules and the turned keys; each of them may be None.

    by_queries: for blocks of Q queries, the blocks of K keys. by_keys: for blocks of KEYS_K keys, the blocks of KEYS_Q
    queries. query_lists, key_lists: how many lists there are of each. What takes longest begins first.
    """
    program = tl.program_id(0)
    if by_queries is not None and program < query_lists:
        _list_blocks(
            by_queries, program, query_lists // batch, tl.cdiv(slots, K), length, slots, Q, K, LISTED, False
        )  # fmt: skip
    program -= query_lists
    if by_keys is not None and (program >= 0) & (program < key_lists):
        _list_blocks(
            by_keys, program, key_lists // batch, tl.cdiv(length, KEYS_Q), length, slots, KEYS_Q, KEYS_K,
            LISTED_QUERIES, True,
        )  # fmt: skip
    program -= key_lists
    if window_k is not None and program >= 0:
        _turn_keys(window_k, turned, table, program, tl.cdiv(tokens, TURNED), heads, tokens, TURNED, TURNED_HEADS, HALF)
