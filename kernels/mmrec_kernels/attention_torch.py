"""The read of the memories in plain PyTorch: queries in blocks, peak memory O(T).

Each part of the read (slots, window, null slot) is a softmax of its own in the forward; the parts are merged by their
log-sum-exp. The backward needs no parts: with the merged log-sum-exp, a key's weight is exp(score − lse) wherever it
comes from, and so are the gradients.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec_kernels.checks import compute_dtype
from mmrec_kernels.matmul import matmul_fp32

QUERY_BLOCK = 512  # queries whose scores exist at one time
GATHERED = 2**24  # elements of keys gathered for pages at one time
PAGE = 4  # slots of a page
TABLE_ROUNDING = 4096


class Read(NamedTuple):
    """Arguments of a read, as `mmrec_kernels.memory_attention` describes them; q, slots and window share one dtype."""

    q: Tensor
    slots_k: Tensor
    slots_v: Tensor
    slot_stamp: Tensor
    slot_start: Tensor
    slot_stop: Tensor
    window_k: Tensor | None
    window_v: Tensor | None
    window_start: Tensor | None
    null_k: Tensor | None
    null_v: Tensor | None
    pages: Tensor | None
    window: int
    rope_theta: float


class Gradients(NamedTuple):
    """Gradients of the arguments of a read that have one; None where the argument is."""

    q: Tensor
    slots_k: Tensor
    slots_v: Tensor
    window_k: Tensor | None
    window_v: Tensor | None
    null_k: Tensor | None
    null_v: Tensor | None


class _Part(NamedTuple):
    """Queries [B, H, T, d] over keys [B, H, K, d] of which each sees those with stamps [B, K] in [start, stop) [B, T].

    With a band, the queries belong to the last T keys, and none sees further back than the `band` keys that end with
    its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    stamp: Tensor
    start: Tensor
    stop: Tensor
    band: int | None = None

    def blocks(self) -> list[tuple[slice, slice]]:
        """Blocks of queries, each with the range of keys that any of its queries may see."""
        length, keys = self.q.shape[2], self.k.shape[2]
        blocks = []
        for first in range(0, length, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, length)
            own = keys - length + first
            seen = slice(0, keys) if self.band is None else slice(max(0, own - self.band + 1), own + last - first)
            blocks.append((slice(first, last), seen))
        return blocks

    def scores(self, rows: slice, seen: slice) -> Tensor:
        """Scaled scores [B, H, t, n] in fp32, −∞ where the key is hidden from the query."""
        scores = _bmm(self.q[:, :, rows], self.k[:, :, seen].mT) * self.q.shape[-1] ** -0.5
        stamp = self.stamp[:, None, None, seen]
        hidden = (stamp < self.start[:, None, rows, None]) | (stamp >= self.stop[:, None, rows, None])
        return scores.masked_fill_(hidden, float("-inf"))

    def forward(self) -> tuple[Tensor, Tensor]:
        """out [B, H, T, d] and lse [B, H, T], both fp32 (fp64)."""
        out = torch.empty(self.q.shape, dtype=compute_dtype(self.q.dtype), device=self.q.device)
        lse = torch.empty(self.q.shape[:3], dtype=out.dtype, device=out.device)
        for rows, seen in self.blocks():
            scores = self.scores(rows, seen)
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = (scores - finite(lse[:, :, rows]).unsqueeze(-1)).exp_()
            out[:, :, rows] = _bmm(weights.to(self.v.dtype), self.v[:, :, seen])
        return out, lse

    def backward(self, lse: Tensor, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in fp32 (fp64).

        Args:
            lse: Of the whole read, −∞ replaced [B, H, T].
            grad_out: [B, H, T, d], in the dtype of q.
            delta: Σ grad_out·out − grad_lse [B, H, T].
        """
        dtype = delta.dtype
        grad_q = torch.empty(self.q.shape, dtype=dtype, device=delta.device)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=delta.device) for x in (self.k, self.v))
        for rows, seen in self.blocks():
            weights = (self.scores(rows, seen) - lse[:, :, rows, None]).exp_()
            grad = grad_out[:, :, rows]
            grad_v[:, :, seen] += _bmm(weights.to(grad.dtype).mT, grad)
            grad_weights = _bmm(grad, self.v[:, :, seen].mT)
            grad_scores = weights * (grad_weights - delta[:, :, rows, None]) * self.q.shape[-1] ** -0.5
            grad_scores = grad_scores.to(self.q.dtype)
            grad_q[:, :, rows] = _bmm(grad_scores, self.k[:, :, seen])
            grad_k[:, :, seen] += _bmm(grad_scores.mT, self.q[:, :, rows])
        return grad_q, grad_k, grad_v


class _Pages(NamedTuple):
    """Queries [B, H, T, d] of which each sees the slots [B, H, K, d] of its own pages, if the interval rule allows."""

    q: Tensor
    k: Tensor
    v: Tensor
    stamp: Tensor
    start: Tensor
    stop: Tensor
    pages: Tensor

    def blocks(self) -> list[slice]:
        batch, heads, length, width = self.q.shape
        size = max(1, GATHERED // (batch * heads * max(1, self.pages.shape[-1]) * PAGE * width))
        return [slice(first, min(first + size, length)) for first in range(0, length, size)]

    def gather(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores [B, H, t, 1, 4P], keys and values [B, H, t, 4P, d], and their rows in [B·H·K, d] for some queries."""
        batch, heads, slots, _ = self.k.shape
        page = self.pages[:, :, rows]
        slot = (page.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=page.device)).flatten(-2)
        stored = (slot >= 0) & (slot < slots)
        slot = slot.clamp(0, slots - 1)
        stamp = self.stamp[:, None, None].expand(*slot.shape[:3], -1).gather(-1, slot)
        seen = (stamp >= self.start[:, None, rows, None]) & (stamp < self.stop[:, None, rows, None]) & stored
        row = slot + torch.arange(batch * heads, device=slot.device).view(batch, heads, 1, 1) * slots
        k, v = (x.flatten(0, 2)[row] for x in (self.k, self.v))
        scores = _bmm(self.q[:, :, rows].unsqueeze(-2), k.mT) * self.q.shape[-1] ** -0.5
        return scores.masked_fill_(~seen.unsqueeze(-2), float("-inf")), k, v, row

    def forward(self) -> tuple[Tensor, Tensor]:
        """As `_Part.forward`."""
        out = torch.empty(self.q.shape, dtype=compute_dtype(self.q.dtype), device=self.q.device)
        lse = torch.empty(self.q.shape[:3], dtype=out.dtype, device=out.device)
        for rows in self.blocks():
            scores, _, v, _ = self.gather(rows)
            norm = scores.logsumexp(-1, keepdim=True)
            out[:, :, rows] = _bmm((scores - finite(norm)).exp_().to(v.dtype), v).squeeze(-2)
            lse[:, :, rows] = norm.flatten(-3)
        return out, lse

    def backward(self, lse: Tensor, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_Part.backward`."""
        dtype = delta.dtype
        grad_q = torch.empty(self.q.shape, dtype=dtype, device=delta.device)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=delta.device) for x in (self.k, self.v))
        for rows in self.blocks():
            scores, k, v, row = self.gather(rows)
            weights = (scores - lse[:, :, rows, None, None]).exp_()
            grad = grad_out[:, :, rows].unsqueeze(-2)
            grad_scores = weights * (_bmm(grad, v.mT) - delta[:, :, rows, None, None]) * self.q.shape[-1] ** -0.5
            grad_q[:, :, rows] = _bmm(grad_scores.to(k.dtype), k).squeeze(-2)
            _add_rows(grad_k.flatten(0, 2), row, grad_scores.mT * self.q[:, :, rows].unsqueeze(-2).to(dtype))
            _add_rows(grad_v.flatten(0, 2), row, weights.mT * grad.to(dtype))
        return grad_q, grad_k, grad_v


def _add_rows(total: Tensor, row: Tensor, x: Tensor) -> None:
    """total[row] += x for rows [...] and x [..., d], in an order of additions that is always the same."""
    if total.is_cuda:  # sorts; index_add_ would add atomically there
        total.index_put_((row.flatten(),), x.flatten(0, -2), accumulate=True)
    else:
        total.index_add_(0, row.flatten(), x.flatten(0, -2))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """[..., m, k] @ [..., k, n] with an fp32 (fp64) result."""
    return matmul_fp32(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def finite(lse: Tensor) -> Tensor:
    """lse with 0 for queries that see nothing (−∞), whose weights then come out as exp(−∞) = 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def merge_partial_reads(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over disjoint sets of keys from the reads of each set: out [B, H, T, d] and lse [B, H, T]."""
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses)
    nothing = (stacked == float("-inf")).all(0)  # is seen in any part: the gradient of its logsumexp is NaN
    stacked = stacked.masked_fill(nothing, 0.0)
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().unsqueeze(-1)
    return sum(w * o for w, o in zip(weights, outs, strict=True)), lse.masked_fill(nothing, float("-inf"))


@lru_cache(maxsize=8)
def _rotary_table(
    length: int, width: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    inverse = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * inverse
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_table(read: Read) -> tuple[Tensor, Tensor]:
    """cos and sin [n, d/2] of the angles i·θ^(−2j/d), n at least the tokens of the window.

    Angles are taken in fp64: exact for long chunks too. Chunks of about one length share a table.
    """
    assert read.window_k is not None
    length = -(-read.window_k.shape[2] // TABLE_ROUNDING) * TABLE_ROUNDING
    return _rotary_table(length, read.q.shape[-1], read.rope_theta, compute_dtype(read.q.dtype), read.q.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [B, H, n, d]; component i is paired with component i + d/2 (Su et al. 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def by_head(banks: Tensor, heads: int) -> Tensor:
    """[B, R, n, E] -> [B, H, n, d]: head i reads bank ⌊i·R/H⌋, its own d-wide slice."""
    heads_per_bank = heads // banks.shape[1]
    return banks.unflatten(-1, (heads_per_bank, -1)).transpose(2, 3).flatten(1, 2)


def _by_bank(heads: Tensor, banks: int) -> Tensor:
    """The inverse of `_by_head`: [B, H, n, d] -> [B, R, n, E]."""
    return heads.unflatten(1, (banks, -1)).transpose(2, 3).flatten(-2)


def _slots(read: Read) -> _Part | _Pages:
    heads = read.q.shape[1]
    k, v = by_head(read.slots_k, heads), by_head(read.slots_v, heads)
    if read.pages is None:
        return _Part(read.q, k, v, read.slot_stamp, read.slot_start, read.slot_stop)
    return _Pages(read.q, k, v, read.slot_stamp, read.slot_start, read.slot_stop, read.pages)


def _window(read: Read) -> tuple[_Part, Tensor, Tensor] | None:
    """The window as a part whose stamps are token indices, and cos and sin of its tokens; None if there is none."""
    if read.window_k is None or read.window_v is None or read.window_start is None:
        return None
    batch, _, keys, _ = read.window_k.shape
    length, dtype = read.q.shape[2], read.q.dtype
    cos, sin = (x[:keys] for x in rotary_table(read))
    own = torch.arange(keys - length, keys, device=read.q.device)
    part = _Part(
        _rotate(read.q, cos[-length:], sin[-length:]).to(dtype),
        _rotate(read.window_k, cos, sin).to(dtype),
        read.window_v,
        stamp=torch.arange(keys, device=read.q.device).expand(batch, -1),
        start=torch.maximum(read.window_start, own - read.window + 1),
        stop=(own + 1).expand_as(read.window_start),
        band=read.window,
    )
    return part, cos, sin


def _null_scores(read: Read, null_k: Tensor, dtype: torch.dtype) -> Tensor:
    return (read.q.to(dtype) * null_k.to(dtype).unsqueeze(1)).sum(-1) * read.q.shape[-1] ** -0.5


def forward(read: Read) -> tuple[Tensor, Tensor]:
    """out, with the dtype and strides of `torch.empty_like(q)`, and lse [B, H, T]."""
    out, lse = _slots(read).forward()
    outs, lses = [out], [lse]
    window = _window(read)
    if window is not None:
        out, lse = window[0].forward()
        outs.append(out)
        lses.append(lse)
    if read.null_k is not None and read.null_v is not None:
        outs.append(read.null_v.to(lse.dtype)[None, :, None, :].expand_as(read.q))
        lses.append(_null_scores(read, read.null_k, lse.dtype))
    out, lse = merge_partial_reads(outs, lses)
    return torch.empty_like(read.q).copy_(out), lse


def backward(read: Read, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Gradients:
    """Gradients in the dtypes of the arguments, with the strides of `torch.empty_like` of each."""
    grad_q_window = grad_window_k = grad_window_v = grad_null_k = grad_null_v = None
    dtype = lse.dtype
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - grad_lse
    lse, grad_out = finite(lse), grad_out.to(read.q.dtype)

    grad_q, grad_k, grad_v = _slots(read).backward(lse, grad_out, delta)
    window = _window(read)
    if window is not None:
        part, cos, sin = window
        grad_q_window, grad_window_k, grad_window_v = part.backward(lse, grad_out, delta)
        length = read.q.shape[2]
        grad_q += _rotate(grad_q_window, cos[-length:], -sin[-length:])
        grad_window_k = _rotate(grad_window_k, cos, -sin)
    if read.null_k is not None and read.null_v is not None:
        weights = (_null_scores(read, read.null_k, dtype) - lse).exp_()
        grad_null_v = (weights.unsqueeze(-1) * grad_out.to(dtype)).sum((0, 2))
        grad_weights = (grad_out.to(dtype) * read.null_v.to(dtype).unsqueeze(1)).sum(-1)
        grad_scores = (weights * (grad_weights - delta) * read.q.shape[-1] ** -0.5).unsqueeze(-1)
        grad_q += grad_scores * read.null_k.to(dtype).unsqueeze(1)
        grad_null_k = (grad_scores * read.q.to(dtype)).sum((0, 2))

    banks = read.slots_k.shape[1]

    def like(x: Tensor | None, grad: Tensor | None) -> Tensor | None:
        return None if x is None or grad is None else torch.empty_like(x).copy_(grad)

    return Gradients(
        q=torch.empty_like(read.q).copy_(grad_q),
        slots_k=torch.empty_like(read.slots_k).copy_(_by_bank(grad_k, banks)),
        slots_v=torch.empty_like(read.slots_v).copy_(_by_bank(grad_v, banks)),
        window_k=like(read.window_k, grad_window_k),
        window_v=like(read.window_v, grad_window_v),
        null_k=like(read.null_k, grad_null_k),
        null_v=like(read.null_v, grad_null_v),
    )
