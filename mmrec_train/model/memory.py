"""Long-term and short-term memory of one layer: the state carried between chunks, how it is written and read.

What every layer shares about a chunk (positions in documents, segment ends, which slots a token may see) is integer
arithmetic on `reset` and a few counters; it is worked out once per chunk in `ChunkPlan`.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import Pyramid, compute_dtype, memory_attention, select_pages, update_pyramid
from mmrec_kernels.attention import PAGE
from mmrec_kernels.hierarchy import COARSE, RingWrites, latest_places, latest_pyramid, slots_in_pages
from mmrec_train.model.configuration import MMRecConfig


class MemoryState(NamedTuple):
    """What one layer remembers of the tokens before a chunk. B rows, of which each may be in another document.

    Attributes:
        h: Short-term memory, the state after the last token [B, D], fp32.
        slots_k, slots_v: Long-term memory [B, R, M, E], a ring: slot number n of the document (of the lane, with
            `memory_across_documents`) lies at index n mod M. Keys are stored normalised, ready to be read.
        pages_k, coarse_k: Averages of the slots' keys by 4 [B, R, ⌈M/4⌉, E] and by 16 [B, R, ⌈M/16⌉, E] (HDS), by which
            a `topk` read selects; of no width with a `dense` one.
        window_k, window_v: Short-term bank [B, W, D]: keys (normalised) and values of the last W tokens.
        segment_max: Largest pooling score of the unfinished segment of each bank [B, R], fp32.
        segment_weight: Sum of exp(score − segment_max) over it [B, R], fp32.
        segment_k, segment_v: Sums of its keys and values under these weights [B, D], fp32.
        position: Tokens of the current document so far [B], int64; the last position mod S are in no slot yet.
        document: Number of the current document in its lane [B], int64.
        slots_written: Slots of the document (of the lane) so far [B], int64; the number of the next one.
    """

    h: Tensor
    slots_k: Tensor
    slots_v: Tensor
    pages_k: Tensor
    coarse_k: Tensor
    window_k: Tensor
    window_v: Tensor
    segment_max: Tensor
    segment_weight: Tensor
    segment_k: Tensor
    segment_v: Tensor
    position: Tensor
    document: Tensor
    slots_written: Tensor

    @classmethod
    def empty(cls, config: MMRecConfig, batch: int, dtype: torch.dtype, device: torch.device | str) -> Self:
        """The state before any token. dtype is that of slots and window."""
        d, r, m = config.hidden_dim, config.num_memories, config.memory_slots
        banks = torch.zeros(batch, r, m, config.mem_dim, dtype=dtype, device=device)
        nodes = [-(-m // size) if config.read == "topk" else 0 for size in (PAGE, COARSE)]
        pages, coarse = (torch.zeros(batch, r, n, config.mem_dim, dtype=dtype, device=device) for n in nodes)
        window = torch.zeros(batch, config.short_window, d, dtype=dtype, device=device)
        wide = torch.zeros(batch, d, dtype=compute_dtype(dtype), device=device)
        narrow = torch.zeros(batch, r, dtype=wide.dtype, device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        no_score = torch.full_like(narrow, float("-inf"))
        return cls(wide, banks, banks, pages, coarse, window, window, no_score, narrow, wide, wide, count, count, count)

    def detach(self) -> Self:
        """The same values, cut from the graph that computed them."""
        return type(self)(*(t.detach() for t in self))

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(t.to(device) for t in self))

    def rows(self, index: Tensor) -> Self:
        """The states of some rows, in the order of the index [n], int64."""
        return type(self)(*(t.index_select(0, index) for t in self))


class ChunkPlan(NamedTuple):
    """Where the tokens of a chunk stand in their documents, and what they may see. N segments may end in T tokens.

    Attributes:
        reset: A document's first token [B, T], bool.
        slot_stamp: Chronological numbers [B, M + N] of the ring's slots and of the chunk's new ones; the ring's newest
            has M − 1, the first new one M.
        slot_start, slot_stop: [B, T]; a token sees the slots whose stamps lie in [start, stop).
        completed: Slots of the token's document (of the lane) before it [B, T]; it sees the last M of them.
        window_start: Index of the first token a token may see, counted from the start of the carried window [B, T].
        segment_start, segment_stop: Chunk positions [B, N + 1] of the segments that end in the chunk, in order, and
            last of the one left unfinished. A negative start reaches back into the carried sums. Entries after a row's
            last ended segment, the last column aside, mean nothing.
        ring_source: [B, M]; what each index of the ring holds after the chunk, as an index into ring + new slots.
        writes: How the new slots enter the pages of the ring, for a `topk` read; None for a `dense` one.
        position, document, slots_written: The counters of `MemoryState` after the chunk [B].
    """

    reset: Tensor
    slot_stamp: Tensor
    slot_start: Tensor
    slot_stop: Tensor
    completed: Tensor
    window_start: Tensor
    segment_start: Tensor
    segment_stop: Tensor
    ring_source: Tensor
    writes: RingWrites | None
    position: Tensor
    document: Tensor
    slots_written: Tensor

    @classmethod
    def of(cls, config: MMRecConfig, state: MemoryState, reset: Tensor) -> Self:
        """The plan of the chunk that follows a state; reset is [B, T], bool."""
        segment_len, slots = config.segment_len, config.memory_slots
        length = reset.shape[1]
        token = torch.arange(length, device=reset.device)
        # a token's position: since the last reset in the chunk, else counted on from the carried document
        document_start = torch.where(reset, token, -1).cummax(1).values
        position = token - torch.where(document_start < 0, -state.position.unsqueeze(1), document_start)

        ended = ((position + 1) % segment_len == 0).cumsum(1)
        before = ended - ((position + 1) % segment_len == 0).long()  # segments that ended before the token
        count = ended[:, -1]
        possible = (length + segment_len - 1) // segment_len
        new = torch.arange(possible, device=reset.device)
        last_token = torch.searchsorted(ended, (new + 1).repeat(len(reset), 1))
        tail = (position[:, -1:] + 1) % segment_len
        segment_stop = torch.cat([last_token + 1, torch.full_like(tail, length)], dim=1)
        segment_start = torch.cat([last_token + 1 - segment_len, length - tail], dim=1)

        # of its own document a token sees what that has completed, ⌊p/S⌋ segments; stamps make them the latest ones
        completed = position // segment_len
        number = position.gather(1, last_token.clamp_max(length - 1)) // segment_len
        slots_written = (position[:, -1] + 1) // segment_len
        if config.memory_across_documents:
            completed = state.slots_written.unsqueeze(1) + before
            number = state.slots_written.unsqueeze(1) + new
            slots_written = state.slots_written + count
        slot_stop = slots + before
        age = (torch.arange(slots, device=reset.device) - state.slots_written.unsqueeze(1)) % slots
        writes = None
        if config.read == "topk":
            writes = RingWrites.of(slots, state.slots_written, number, count)
        return cls(
            reset=reset,
            slot_stamp=torch.cat([age, (slots + new).expand(len(age), -1)], 1),
            slot_start=slot_stop - completed.clamp_max(slots),
            slot_stop=slot_stop,
            completed=completed,
            window_start=(config.short_window + token - position).clamp_min(0),
            segment_start=segment_start,
            segment_stop=segment_stop,
            ring_source=latest_places(slots, number, count, size=1),
            writes=writes,
            position=position[:, -1] + 1,
            document=state.document + reset.sum(1),
            slots_written=slots_written,
        )


class SlotMemory(nn.Module):
    """Banks of slots and the short window of one layer: writes segments, answers queries.

    Parameters: gains of the per-head RMSNorm of queries and keys, the pooling scorer (zero at the start, so that a
    segment's pool begins as its mean), key and value of the null slot, and the output gain β, zero at the start.
    """

    def __init__(self, config: MMRecConfig):
        super().__init__()
        self.config = config
        self.query_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.key_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.pool_score = nn.Parameter(torch.zeros(config.num_memories, config.hidden_dim))
        self.null_k = nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
        self.null_v = nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
        self.output_gain = nn.Parameter(torch.zeros(config.hidden_dim))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, normed_h: Tensor, state: MemoryState, plan: ChunkPlan
    ) -> tuple[Tensor, MemoryState]:
        """Reads for every token of a chunk, and writes the chunk.

        Args:
            q: Queries [B, T, D].
            k, v: What each token puts into the memories [B, T, D].
            normed_h: RMSNorm(h) [B, T, D], which the pooling scores are computed from.

        Returns:
            m [B, T, D]; the state after the chunk, its h as it was given.
        """
        config = self.config
        new_k, new_v, segment = self._pool(k, v, F.linear(normed_h, self.pool_score), state, plan)
        new_k = self._normalise_keys(new_k.to(k.dtype))
        ring_k = torch.cat([state.slots_k, self._by_bank(new_k)], dim=2)
        ring_v = torch.cat([state.slots_v, self._by_bank(new_v.to(v.dtype))], dim=2)
        window_k = torch.cat([state.window_k, self._normalise_keys(k)], dim=1)
        window_v = torch.cat([state.window_v, v], dim=1)

        q = self.query_norm(q.unflatten(-1, (config.num_heads, -1))).transpose(1, 2)
        slots, levels = self._slots_to_read(q, ring_k, ring_v, state, plan)
        short = config.short_window > 0
        read, _ = memory_attention(
            q,
            **slots,
            slot_start=plan.slot_start,
            slot_stop=plan.slot_stop,
            window_k=window_k.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) if short else None,
            window_v=window_v.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) if short else None,
            window_start=plan.window_start if short else None,
            window=config.short_window,
            null_k=self.null_k,
            null_v=self.null_v,
            rope_theta=config.rope_theta,
        )
        source = plan.ring_source[:, None, :, None].expand(-1, config.num_memories, -1, config.mem_dim)
        carried = window_k.shape[1] - config.short_window
        state = MemoryState(
            h=state.h,
            slots_k=ring_k.gather(2, source),
            slots_v=ring_v.gather(2, source),
            pages_k=levels.pages,
            coarse_k=levels.coarse,
            window_k=window_k[:, carried:],
            window_v=window_v[:, carried:],
            position=plan.position,
            document=plan.document,
            slots_written=plan.slots_written,
            **segment,
        )
        return read.transpose(1, 2).flatten(-2) * self.output_gain, state

    def _slots_to_read(
        self, q: Tensor, ring_k: Tensor, ring_v: Tensor, state: MemoryState, plan: ChunkPlan
    ) -> tuple[dict[str, Tensor], Pyramid]:
        """What `memory_attention` is told about the slots, and the coarse levels after the chunk.

        Args:
            q: Queries [B, H, T, d], normalised.
            ring_k, ring_v: Ring and new slots [B, R, M + N, E].
        """
        levels, writes = Pyramid(state.pages_k, state.coarse_k), plan.writes
        if writes is None:
            return dict(slots_k=ring_k, slots_v=ring_v, slot_stamp=plan.slot_stamp), levels
        history = update_pyramid(levels, ring_k, writes)
        pages = select_pages(
            q,
            history,
            writes,
            slot_stop=plan.slot_stop,
            completed=plan.completed,
            topk_blocks=self.config.topk_blocks,
        )
        k, v = (slots_in_pages(slots, writes) for slots in (ring_k, ring_v))
        slots = dict(slots_k=k, slots_v=v, slot_stamp=writes.page_stamp, pages=pages)
        return slots, latest_pyramid(history, writes)

    def _pool(
        self, k: Tensor, v: Tensor, score: Tensor, state: MemoryState, plan: ChunkPlan
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Softmax-weighted pools [B, N, D] of the keys and values of each segment, and the sums of the unfinished one.

        The carried sums of a segment begun in an earlier chunk enter as one more summand, so that a chunk may end
        anywhere. Segments are gathered as [B, N + 1, S] tokens; each token is in one of them at most.
        """
        segment_len, banks = self.config.segment_len, self.config.num_memories
        dtype = state.segment_k.dtype
        offset = torch.arange(segment_len, device=k.device)
        token = plan.segment_start.unsqueeze(-1) + offset  # [B, N + 1, S]
        inside = (token >= 0) & (token < plan.segment_stop.unsqueeze(-1)) & (token < k.shape[1])
        index = token.clamp(0, k.shape[1] - 1)

        def gather(x: Tensor) -> Tensor:  # [B, T, C] -> [B, N + 1, S, R, C / R]
            flat = x.gather(1, index.flatten(1).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            return flat.view(*index.shape, banks, -1).to(dtype)

        scores = gather(score).squeeze(-1).masked_fill(~inside.unsqueeze(-1), float("-inf"))  # [B, N + 1, S, R]
        continued = (plan.segment_start < 0).unsqueeze(-1)  # [B, N + 1, 1]
        carried_max = state.segment_max.unsqueeze(1).masked_fill(~continued, float("-inf"))
        highest = torch.maximum(scores.amax(2), carried_max)
        pivot = highest.masked_fill(highest == float("-inf"), 0.0).detach()  # of a segment without tokens
        weights = (scores - pivot.unsqueeze(2)).exp()
        carried = (carried_max - pivot).exp()
        total = weights.sum(2) + carried * state.segment_weight.unsqueeze(1)

        def weighted_sum(x: Tensor, carried_sum: Tensor) -> Tensor:  # -> [B, N + 1, R, E]
            # an einsum over the tokens of a segment, as a batched product: [1, S] @ [S, E]
            here = torch.einsum("bnsr,bnsre->bnre", weights, gather(x))
            return here + carried.unsqueeze(-1) * carried_sum.unflatten(-1, (banks, -1)).unsqueeze(1)

        sum_k, sum_v = weighted_sum(k, state.segment_k), weighted_sum(v, state.segment_v)
        done = total[:, :-1].clamp_min(torch.finfo(dtype).tiny).unsqueeze(-1)
        unfinished = dict(
            segment_max=highest[:, -1].detach(),
            segment_weight=total[:, -1],
            segment_k=sum_k[:, -1].flatten(-2),
            segment_v=sum_v[:, -1].flatten(-2),
        )
        return (sum_k[:, :-1] / done).flatten(-2), (sum_v[:, :-1] / done).flatten(-2), unfinished

    def _normalise_keys(self, k: Tensor) -> Tensor:
        """RMSNorm per head of keys [..., D]."""
        return self.key_norm(k.unflatten(-1, (self.config.num_heads, -1))).flatten(-2)

    def _by_bank(self, slots: Tensor) -> Tensor:
        """[B, N, D] -> [B, R, N, E]."""
        return slots.unflatten(-1, (self.config.num_memories, -1)).transpose(1, 2)
