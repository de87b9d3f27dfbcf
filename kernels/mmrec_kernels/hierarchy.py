"""HDS: averages of slots over which a query finds the slots worth reading, from coarse to fine.

A ring of M slots belongs to one document at a time, whose slot number n goes to index n mod M. Nodes are over indices:
node j of level 1 (a page) is slots 4j to 4j + 3, node j of level 2 is slots 16j to 16j + 15, its children are pages 4j
to 4j + 3. The last node of a level may have fewer.

What a query does not see must not change what it selects: a node's score is the mean of the scores of those of its
slots that the query sees, the last M of its document; that is the score of their average key. Slots are written in the
order of the ring, so until a node is written again, those are the slots that could be seen when it was written last. So
a node keeps the average of these, and a query needs to know no more of a node than the number of its newest slot: no
slot is touched before it is selected.

While a chunk writes its slots, each query must find the ring as it is at its time, wherever the chunk was cut. So the
levels keep a history, the nodes before the chunk followed by one node for each new slot: the one it is written to, as
it is then. Pages of slots do the same, so that a selected page is 4 slots in a row.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from mmrec_kernels import ops
from mmrec_kernels.attention_torch import GATHERED, PAGE, by_head
from mmrec_kernels.checks import compute_dtype
from mmrec_kernels.matmul import matmul_fp32

COARSE = 16  # slots of a node of level 2
_LOW = 0xFFFFFFFF  # the lower half of an int64
_NEVER = torch.iinfo(torch.int64).min


class Pyramid(NamedTuple):
    """Averages of keys, in their dtype: level 1 [B, R, ⌈M/4⌉, E] and level 2 [B, R, ⌈M/16⌉, E].

    With a history of N written slots, each level has N more nodes: slot v's as it is after v is written.
    """

    pages: Tensor
    coarse: Tensor


class RingWrites(NamedTuple):
    """How N new slots enter a ring of M slots, one after another: integers that all layers of a model share.

    Stamps are those of `memory_attention`: the newest slot of the ring has M − 1, the ones before it in their order
    less, new slot v has M + v.

    Attributes:
        slots: M.
        number: Number of each new slot in its document [B, N], int64; 0 begins a document.
        written: How many of the N each row really writes, the others mean nothing [B], int64.
        page_slot: What the pages of the history hold [B, 4·N], as an index into ring + new slots.
        page_stamp: Stamps of the slots in pages, those of the ring and then of the history [B, 4·(⌈M/4⌉ + N)]; −1
            where there is no slot.
    """

    slots: int
    number: Tensor
    written: Tensor
    page_slot: Tensor
    page_stamp: Tensor

    @classmethod
    def of(cls, slots: int, before: Tensor, number: Tensor, written: Tensor) -> Self:
        """before: Slots of the ring's document before the chunk [B], int64."""
        slot, stamp = _written_nodes(slots, number, PAGE)
        index = torch.arange(-(-slots // PAGE) * PAGE, device=number.device)
        ring_stamp = torch.where(index < slots, (index - before.unsqueeze(1)) % slots, -1)
        return cls(slots, number, written, slot.flatten(1), torch.cat([ring_stamp, stamp.flatten(1)], dim=1))


def _written_nodes(slots: int, number: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The slots of the node each new slot is written to, as it is then, and their stamps: [B, N, size].

    Slots are indices into ring + new slots; the stamp is −1 where the document has written no slot.
    """
    number = number.unsqueeze(-1)
    own = number % slots
    index = own.div(size, rounding_mode="floor") * size + torch.arange(size, device=number.device)
    age = (own - index) % slots  # counted in slots back from the new one
    stamp = slots + torch.arange(number.shape[1], device=number.device).unsqueeze(-1) - age
    slot = torch.where(stamp < slots, index.clamp_max(slots - 1), stamp)
    return slot, torch.where((index < slots) & (age <= number), stamp, -1)


def latest_places(slots: int, number: Tensor, written: Tensor, size: int) -> Tensor:
    """Where a level of nodes of `size` slots with history keeps each node after the chunk: [B, ⌈M/size⌉].

    With a size of 1: what each index of the ring holds then, as an index into ring + new slots. The rest of the
    arguments as in `RingWrites`.
    """
    nodes = -(-slots // size)
    write = torch.arange(number.shape[1], device=number.device)
    place = torch.where(write < written.unsqueeze(1), nodes + write, -1)
    node = (number % slots).div(size, rounding_mode="floor")
    before = torch.arange(nodes, device=number.device).expand(len(number), -1)
    return before.scatter_reduce(1, node, place, "amax")


def slots_in_pages(slots: Tensor, writes: RingWrites) -> Tensor:
    """Ring and new slots [B, R, M + N, E] as pages [B, R, 4·(⌈M/4⌉ + N), E], which `select_pages` numbers.

    Differentiable, with the same bits every time; a new slot is there as often as the history has its page.
    """
    row = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1)
    written = slots[row, :, writes.page_slot].transpose(1, 2)  # its backward sorts; that of gather would add atomically
    padding = slots.new_zeros(*slots.shape[:2], -writes.slots % PAGE, slots.shape[3])
    return torch.cat([slots[:, :, : writes.slots], padding, written], dim=2)


def build_pyramid(slots_k: Tensor) -> Pyramid:
    """The pyramid of the slots [B, R, M, E] of a ring that may all be seen together. Not differentiable."""
    return Pyramid(_averages(slots_k.detach(), PAGE), _averages(slots_k.detach(), COARSE))


def _averages(slots_k: Tensor, size: int) -> Tensor:
    slots = slots_k.shape[2]
    nodes = torch.nn.functional.pad(slots_k, (0, 0, 0, -slots % size)).unflatten(2, (-1, size))
    first = torch.arange(0, slots, size, device=slots_k.device)
    return _mean(nodes, (slots - first).clamp_max(size).unsqueeze(-1))


def _mean(nodes: Tensor, count: Tensor) -> Tensor:
    """Means of nodes [B, R, n, size, E] over count [.., n, 1] slots, added one after another: always the same bits."""
    total = torch.zeros_like(nodes[..., 0, :], dtype=compute_dtype(nodes.dtype))
    for slot in nodes.unbind(-2):
        total += slot
    return (total / count).to(nodes.dtype)


def update_pyramid(pyramid: Pyramid, slots_k: Tensor, writes: RingWrites) -> Pyramid:
    """The pyramid with the history of a chunk's writes; only the nodes over new slots are computed.

    Args:
        pyramid: Of the ring before the chunk.
        slots_k: Ring and new slots [B, R, M + N, E].
    """
    slots_k = slots_k.detach()
    return Pyramid(
        torch.cat([pyramid.pages, _written_averages(slots_k, writes, PAGE)], dim=2),
        torch.cat([pyramid.coarse, _written_averages(slots_k, writes, COARSE)], dim=2),
    )


def _written_averages(slots_k: Tensor, writes: RingWrites, size: int) -> Tensor:
    batch, banks, _, width = slots_k.shape
    slot, stamp = _written_nodes(writes.slots, writes.number, size)
    seen = (stamp >= 0).view(batch, 1, -1, size, 1)
    index = slot.view(batch, 1, -1, 1).expand(-1, banks, -1, width)
    nodes = slots_k.gather(2, index).unflatten(2, (-1, size)).masked_fill(~seen, 0.0)
    return _mean(nodes, seen.sum(-2))


def latest_pyramid(history: Pyramid, writes: RingWrites) -> Pyramid:
    """The pyramid, without history, of the ring after the writes."""

    def latest(level: Tensor, size: int) -> Tensor:
        place = latest_places(writes.slots, writes.number, writes.written, size).unsqueeze(1).unsqueeze(-1)
        return level.gather(2, place.expand(-1, level.shape[1], -1, level.shape[3]))

    return Pyramid(latest(history.pages, PAGE), latest(history.coarse, COARSE))


def select_pages(
    q: Tensor,
    history: Pyramid,
    writes: RingWrites,
    *,
    slot_stop: Tensor,
    completed: Tensor,
    topk_blocks: int,
) -> Tensor:
    """The pages each query reads: those with the best scores below the best nodes of level 2.

    Level 2 is scored, the best `topk_blocks` nodes of which a slot is seen are taken, and of the pages below them again
    the best `topk_blocks`. Of equal scores the smaller index wins; scores are compared in fp32. The work is
    O(M/16 + N + topk_blocks) a query. Nothing waits for the device.

    Args:
        q: Queries [B, H, T, d].
        history: The pyramid with the history of the writes, of keys of banks that belong to heads as in
            `memory_attention`.
        slot_stop: [B, T] int64, past the stamp of the newest slot at the time of each query.
        completed: Slots that the query's document has by then [B, T], int64: it sees the last M of them.
        topk_blocks: At least 1.

    Returns:
        [B, H, T, min(topk_blocks, ⌈M/4⌉)] int64, in no order, −1 where there are fewer candidates: pages of
        `slots_in_pages`, which `memory_attention` takes as `pages`. Not differentiable.
    """
    if topk_blocks < 1:
        raise ValueError(f"select_pages: topk_blocks is {topk_blocks}, expected at least 1")
    return _select_op(q.detach(), history.pages, history.coarse, slot_stop, completed, writes.slots, topk_blocks)


def _select(
    q: Tensor, pages: Tensor, coarse: Tensor, stop: Tensor, completed: Tensor, slots: int, topk_blocks: int
) -> Tensor:
    batch, heads, length, width = q.shape
    dtype = torch.promote_types(q.dtype, pages.dtype)
    pages, coarse = (by_head(level.to(dtype), heads) for level in (pages, coarse))
    gathered = COARSE // PAGE * min(topk_blocks, -(-slots // COARSE)) * width
    size = max(1, GATHERED // (batch * heads * max(coarse.shape[2], gathered)))
    selected = []
    for first in range(0, length, size):
        rows = slice(first, first + size)
        when = _When(slots, stop[:, None, rows, None], completed[:, None, rows, None])
        selected.append(_descend(q[:, :, rows].to(dtype), pages, coarse, when, topk_blocks))
    return torch.cat(selected, dim=2)


def _fake_select(
    q: Tensor, pages: Tensor, coarse: Tensor, stop: Tensor, completed: Tensor, slots: int, topk_blocks: int
) -> Tensor:
    return q.new_empty(*q.shape[:3], min(topk_blocks, -(-slots // PAGE)), dtype=torch.int64)


_select_op = ops.register("select_pages", _select, _fake_select)


class _When(NamedTuple):
    """The ring at the time of some queries: M, and `stop` and `completed` of `select_pages` as [B, 1, t, 1]."""

    slots: int
    stop: Tensor
    completed: Tensor

    def find(self, node: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Where a level with history keeps nodes [.., n] as they are then, and whether the query sees any of them."""
        own = (self.completed - 1) % self.slots  # the index of the newest slot
        last = (node * size + size - 1).clamp_max(self.slots - 1)
        inside = own.div(size, rounding_mode="floor") == node
        age = torch.where(inside, 0, (own - last) % self.slots)  # of the node's newest slot
        stamp = self.stop - 1 - age
        place = torch.where(stamp < self.slots, node, -(-self.slots // size) + stamp - self.slots)
        return place, age < self.completed


def _descend(q: Tensor, pages: Tensor, coarse: Tensor, when: _When, count: int) -> Tensor:
    """`select_pages` for some queries, keys by head and all of one dtype."""
    in_all = -(-when.slots // PAGE)
    node = torch.arange(-(-when.slots // COARSE), device=q.device)
    place, seen = when.find(node, COARSE)
    scores = matmul_fp32(q.flatten(0, 1), coarse.flatten(0, 1).mT).unflatten(0, q.shape[:2])
    node = _best(scores.gather(-1, place.expand(*q.shape[:3], -1)), node, seen, count)  # [B, H, t, k]

    child = torch.arange(COARSE // PAGE, device=q.device)
    page = (node.unsqueeze(-1) * (COARSE // PAGE) + child).flatten(-2)  # negative without a node
    place, seen = when.find(page, PAGE)
    stored = (page >= 0) & (page < in_all)
    page = _best(_gathered_products(q, pages, torch.where(stored, place, 0)), page, seen & stored, min(count, in_all))
    return torch.where(page < 0, -1, when.find(page, PAGE)[0])


def _gathered_products(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    """q·k of each query with keys of its own: index [B, H, t, n] into k [B, H, K, d] -> [B, H, t, n]."""
    batch, heads, keys, _ = k.shape
    row = index + torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * keys
    rows = k.flatten(0, 2).index_select(0, row.flatten())
    return matmul_fp32(rows.view(-1, index.shape[-1], q.shape[-1]), q.flatten(0, 2).unsqueeze(-1)).view(index.shape)


def _best(scores: Tensor, index: Tensor, seen: Tensor, count: int) -> Tensor:
    """The indices [.., count] with the largest scores among those seen, −1 where there are fewer.

    topk leaves open which of equal scores it takes. So it is given integers that are never equal: above, a score's bits
    such that they order like the scores; below, how far the index is from the largest possible.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # −0 becomes 0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    key = bits.long().bitwise_left_shift_(32).bitwise_or_(_LOW - index).masked_fill_(~seen, _NEVER)
    best = key.topk(min(count, key.shape[-1]), dim=-1).values
    return torch.where(best == _NEVER, -1, _LOW - (best & _LOW))
