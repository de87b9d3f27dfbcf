"""HDS: averages of slots over which a query finds the slots worth reading, from coarse to fine.

Nodes are over indices of the ring: node j of level 1 (a page) is slots 4j to 4j + 3, node j of level 2 is slots 16j to
16j + 15, its children are pages 4j to 4j + 3. The last node of a level may have fewer.

What a query does not see must not change what it selects: a node's score is the mean of the scores of those of its
slots that the query sees, and a node of which it sees none is no candidate. For a node seen whole that is the score of
the average of its keys, which the pyramid keeps. A node seen in part (in a ring in order: at the ends of the interval)
is scored from its slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec_kernels.attention_torch import GATHERED, PAGE, by_head
from mmrec_kernels.checks import compute_dtype
from mmrec_kernels.matmul import matmul_fp32

COARSE = 16  # slots of a node of level 2


class Pyramid(NamedTuple):
    """Averages of keys [B, R, M, E], in their dtype: level 1 [B, R, ⌈M/4⌉, E] and level 2 [B, R, ⌈M/16⌉, E]."""

    pages: Tensor
    coarse: Tensor


def build_pyramid(slots_k: Tensor) -> Pyramid:
    """The pyramid of slots [B, R, M, E]. Not differentiable."""
    return Pyramid(_averages(slots_k.detach(), PAGE), _averages(slots_k.detach(), COARSE))


def update_pyramid(pyramid: Pyramid, slots_k: Tensor, written: Tensor) -> Pyramid:
    """The pyramid after a write, of which only the nodes over the written slots are computed; the bits of a new one.

    Args:
        pyramid: Of the slots before the write.
        slots_k: The slots after it [B, R, M, E].
        written: Indices [B, N] of the written slots, int64; −1 for none.
    """
    slots_k = slots_k.detach()
    return Pyramid(_rewrite(pyramid.pages, slots_k, written, PAGE), _rewrite(pyramid.coarse, slots_k, written, COARSE))


def _mean(nodes: Tensor, count: Tensor) -> Tensor:
    """Means of nodes [B, R, n, size, E] over count [.., n, 1] slots, added one after another: always the same bits."""
    total = torch.zeros_like(nodes[..., 0, :], dtype=compute_dtype(nodes.dtype))
    for slot in nodes.unbind(-2):
        total += slot
    return (total / count).to(nodes.dtype)


def _averages(slots_k: Tensor, size: int) -> Tensor:
    slots = slots_k.shape[2]
    nodes = torch.nn.functional.pad(slots_k, (0, 0, 0, -slots % size)).unflatten(2, (-1, size))
    first = torch.arange(0, slots, size, device=slots_k.device)
    return _mean(nodes, (slots - first).clamp_max(size).unsqueeze(-1))


def _rewrite(level: Tensor, slots_k: Tensor, written: Tensor, size: int) -> Tensor:
    batch, banks, slots, width = slots_k.shape
    node = written.div(size, rounding_mode="floor")
    node = torch.where(node < 0, node.amax(1, keepdim=True).clamp_min(0), node)  # one more time what is written anyway
    slot = node.unsqueeze(-1) * size + torch.arange(size, device=node.device)  # [B, N, size]
    stored = (slot < slots).view(batch, 1, -1, size, 1)
    index = slot.clamp_max(slots - 1).view(batch, 1, -1, 1).expand(-1, banks, -1, width)
    nodes = slots_k.gather(2, index).unflatten(2, (-1, size)) * stored
    means = _mean(nodes, stored.sum(-2))
    return level.scatter(2, node.view(batch, 1, -1, 1).expand(-1, banks, -1, width), means)


def select_pages(
    q: Tensor,
    slots_k: Tensor,
    pyramid: Pyramid,
    *,
    slot_stamp: Tensor,
    slot_start: Tensor,
    slot_stop: Tensor,
    topk_blocks: int,
) -> Tensor:
    """The pages each query reads: those with the best scores below the best nodes of level 2.

    Level 2 is scored, the best `topk_blocks` candidates are taken, and of the pages below them again the best
    `topk_blocks`. Of equal scores the smaller index wins. Scores are fp32 (fp64 for fp64).

    Args:
        q: Queries [B, H, T, d].
        slots_k: Keys of the slots [B, R, M, E].
        pyramid: Theirs.
        slot_stamp, slot_start, slot_stop: As in `memory_attention`.
        topk_blocks: At least 1.

    Returns:
        [B, H, T, min(topk_blocks, ⌈M/4⌉)] int64, in no order, −1 where there are fewer candidates: what
        `memory_attention` takes as `pages`. Not differentiable.
    """
    if topk_blocks < 1:
        raise ValueError(f"select_pages: topk_blocks is {topk_blocks}, expected at least 1")
    q, slots_k = q.detach(), slots_k.detach()
    batch, heads, length, width = q.shape
    slots_by_head = by_head(slots_k, heads)
    pages, coarse = (by_head(level.to(q.dtype), heads) for level in pyramid)
    selected = []
    size = max(1, GATHERED // (batch * heads * topk_blocks * COARSE * width))
    for first in range(0, length, size):
        rows = slice(first, first + size)
        start, stop = slot_start[:, rows, None], slot_stop[:, rows, None]
        seen = (slot_stamp.unsqueeze(1) >= start) & (slot_stamp.unsqueeze(1) < stop)  # [B, t, M]
        selected.append(_descend(q[:, :, rows], slots_by_head, pages, coarse, seen, topk_blocks))
    return torch.cat(selected, dim=2)


def _descend(q: Tensor, slots_k: Tensor, pages: Tensor, coarse: Tensor, seen: Tensor, count: int) -> Tensor:
    """`select_pages` for some queries; keys by head, seen [B, t, M]."""
    heads, slots = slots_k.shape[1:3]
    by_node = torch.nn.functional.pad(seen, (0, -slots % COARSE)).unflatten(-1, (-1, COARSE)).sum(-1)  # [B, t, nodes]
    size = (slots - torch.arange(0, slots, COARSE, device=q.device)).clamp_max(COARSE)
    scores = _products(q, coarse)
    partial = ((by_node > 0) & (by_node < size)).flatten(0, 1).any(0).nonzero().flatten()  # seen in part by some query
    slot = partial.unsqueeze(-1) * COARSE + torch.arange(COARSE, device=q.device)
    inside = seen[..., slot.clamp_max(slots - 1)] & (slot < slots)  # [B, t, n, 16]
    products = _products(q, slots_k[:, :, slot.clamp_max(slots - 1).flatten()]).unflatten(-1, slot.shape)
    exact = _masked_mean(products, inside.unsqueeze(1))
    whole = (by_node == size)[..., partial].unsqueeze(1)
    scores[..., partial] = torch.where(whole, scores[..., partial], exact)
    node = _best(scores.masked_fill_(by_node.unsqueeze(1) == 0, float("-inf")), count)  # [B, H, t, k]

    child = torch.arange(COARSE // PAGE, device=q.device)
    page = torch.where(node.unsqueeze(-1) < 0, -1, node.unsqueeze(-1) * (COARSE // PAGE) + child).flatten(-2)
    page = (
        torch.where(page < pages.shape[2], page, -1).sort(-1).values
    )  # so that of equal scores the smaller index wins
    slot = page.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=q.device)  # [B, H, t, 4k, 4]
    stored = (slot >= 0) & (slot < slots)
    index = slot.clamp(0, slots - 1).flatten(-2)
    visible = seen.unsqueeze(1).expand(-1, heads, -1, -1).gather(-1, index).view_as(slot) & stored
    products = _gathered_products(q, slots_k, index).view_as(slot)
    average = _gathered_products(q, pages, page.clamp_min(0))
    whole = visible.sum(-1) == stored.sum(-1)
    scores = torch.where(whole, average, _masked_mean(products, visible))
    best = _best(scores.masked_fill_(~visible.any(-1), float("-inf")), min(count, pages.shape[2]))
    return torch.where(best < 0, -1, page.gather(-1, best.clamp_min(0)))


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q·k for q [B, H, t, d] and k [B, H, n, d] of one dtype: [B, H, t, n] in fp32 (fp64)."""
    return matmul_fp32(q.flatten(0, 1), k.flatten(0, 1).mT.to(q.dtype)).unflatten(0, q.shape[:2])


def _gathered_products(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    """q·k of each query with keys of its own: index [B, H, t, n] into k [B, H, K, d] -> [B, H, t, n]."""
    batch, heads, keys, _ = k.shape
    row = index + torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * keys
    rows = k.to(q.dtype).flatten(0, 2)[row]
    return matmul_fp32(rows.flatten(0, 2), q.flatten(0, 2).unsqueeze(-1)).view(index.shape)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores (all, if there are fewer); −1 for those at −∞."""
    values, index = scores.sort(dim=-1, descending=True, stable=True)
    count = min(count, scores.shape[-1])
    return index[..., :count].masked_fill(values[..., :count] == float("-inf"), -1)
