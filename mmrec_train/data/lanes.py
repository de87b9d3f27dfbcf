"""Lanes: continuous streams of documents, so that memory can be carried from one optimizer step to the next.

There are as many lanes as sequences in an optimizer step. A lane reads its document to the end, then takes the next one
of the source that is furthest behind its weight (`mixture`), in that source's order (`order`); lanes are served in the
order 0, 1, 2, ... within a step. So the position of the whole stream is a few integers for each source and each lane,
and the global batch of step k is a pure function of (data set, settings, num_lanes, chunk_len, k), whatever the number
of ranks: each rank follows all lanes with integers, and reads tokens for its own only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mmrec_train.data.dataset import SourceDocuments, TokenDataset
from mmrec_train.data.mixture import FairShare, resolve_weights
from mmrec_train.data.order import LONG, SHORT, Order, SourceQueue
from mmrec_train.errors import UserError

_STATE_FORMAT = 2
NO_LABEL = -100  # counts for nothing in PyTorch's cross-entropy


@dataclass(frozen=True)
class StreamSettings:
    """What the stream of documents depends on besides the data set and the lanes.

    Attributes:
        seed: Of the order.
        order: "shuffled": a new permutation each epoch. "by_length": the same, where documents longer than a chunk are
            spread evenly over the lanes and short ones fill up. "stored": as the documents lie in the shards.
        weights: Share of the tokens by source, in place of the data set's weights. None: those, or where there are none
            each source's number of tokens.
        epochs: Passes over a source after which it is exhausted; those not named (None: all) go on without end.
        shuffle_shards: Shards of a source whose documents are shuffled together; None: all of them.
        window_chunks: Chunks of a lane in one step.
        sequence_len: (step, tokens), ascending, the first for step 0: from that step on a lane forgets after so many of
            its tokens, where None is never. Several entries are a curriculum.
    """

    seed: int = 0
    order: Order = "shuffled"
    weights: Mapping[str, float] | None = None
    epochs: Mapping[str, int] | None = None
    shuffle_shards: int | None = None
    window_chunks: int = 1
    sequence_len: Sequence[tuple[int, int | None]] = ((0, None),)


class Chunk(NamedTuple):
    """Lanes' next tokens: those of one micro-batch of one rank. b = micro_batch_size."""

    input_ids: torch.Tensor  # [b, T] int64
    labels: torch.Tensor  # [b, T] int64: the document's next token, eos at its last; NO_LABEL after the stream's end
    reset: torch.Tensor  # [b, T] bool: nothing of what came before counts: a document's first token, or a sequence's

    def split(self, chunk_len: int) -> list["Chunk"]:
        """The pieces of `chunk_len` tokens, in order."""
        return [Chunk(*parts) for parts in zip(*(part.split(chunk_len, dim=1) for part in self), strict=True)]


class Span(NamedTuple):
    """A piece of a lane's window: tokens [start, stop) of a document that has `length` and begins at `begin`."""

    source: int
    document: int
    shard: int
    begin: int
    length: int
    start: int
    stop: int


@dataclass(slots=True)
class _Cursor:
    """A lane's place in its document: `offset` tokens are read, `due` is what `FairShare` counts as about to be."""

    source: int
    document: int
    shard: int
    begin: int
    length: int
    offset: int
    due: int


class LaneLoader:
    """One rank's share of a stream of global batches; every token of an epoch is read exactly once.

    `num_lanes` is the global batch. Lane l belongs to micro-batch a, rank r and row b of the step, where
    l = (a * world_size + r) * micro_batch_size + b: a lane stays at its place for the whole run.

    Attributes: `step`, the steps given so far; `consumed`, the tokens given so far by source.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        settings: StreamSettings,
        *,
        num_lanes: int,
        chunk_len: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_lanes % (world_size * micro_batch_size) != 0 or num_lanes < 1:
            raise ValueError(f"{num_lanes} lanes cannot be dealt to {world_size} ranks x {micro_batch_size} rows")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if chunk_len < 1 or settings.window_chunks < 1:
            raise ValueError(f"windows of {settings.window_chunks} chunks of {chunk_len} tokens")
        self.settings = settings
        self.num_lanes = num_lanes
        self.window = settings.window_chunks * chunk_len
        self.step = 0
        self._chunk_len = chunk_len
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._eos = dataset.manifest.eos_id
        self._sources: list[SourceDocuments] = list(dataset.sources.values())
        self._names = list(dataset.sources)
        epochs = settings.epochs or {}
        self._weights = resolve_weights(
            {name: source.num_tokens for name, source in dataset.sources.items()},
            {name: source.weight for name, source in dataset.sources.items()},
            settings.weights,
            epochs,
        )
        self._queues = [
            SourceQueue(
                source,
                order=settings.order,
                seed=settings.seed,
                long_from=chunk_len,
                shuffle_shards=settings.shuffle_shards,
                epochs=epochs.get(name),
            )
            for name, source in dataset.sources.items()
        ]
        self._start()

    def _start(self) -> None:
        self._share = FairShare(list(self._weights.values()))
        self._consumed = [0] * len(self._sources)
        self._long_ahead = [0.0] * len(self._sources)  # tokens of long documents more than the groups' shares of them
        self._lanes: list[_Cursor | None] = [None] * self.num_lanes  # None: between two documents
        self._lane_long = [0] * self.num_lanes  # tokens of the long documents a lane has taken
        self._all_long = 0  # their sum

    @property
    def consumed(self) -> dict[str, int]:
        return dict(zip(self._names, self._consumed, strict=True))

    def next_step(self) -> list[Chunk]:
        """This rank's windows of the next step, one per accumulation micro-batch, on the CPU.

        Raises StopIteration when all sources are exhausted. A lane that has run out before is padded: eos tokens that
        begin with a reset, without labels.
        """
        sequence_starts = self._sequence_starts()
        spans = self.advance()
        accumulation = self.num_lanes // (self._world_size * self._micro_batch_size)
        shape = (accumulation, self._micro_batch_size, self.window)
        input_ids, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        reset = np.zeros(shape, dtype=np.bool_)
        reset[..., sequence_starts] = True
        for micro_batch in range(accumulation):
            first = (micro_batch * self._world_size + self._rank) * self._micro_batch_size
            for row in range(self._micro_batch_size):
                place = (micro_batch, row)
                self._read(spans[first + row], input_ids[place], labels[place], reset[place])
        return [
            Chunk(torch.from_numpy(input_ids[a]), torch.from_numpy(labels[a]), torch.from_numpy(reset[a]))
            for a in range(accumulation)
        ]

    def advance(self) -> list[list[Span]]:
        """Move all lanes one step on without reading: the pieces of documents that each one's window is made of."""
        if all(lane is None for lane in self._lanes) and all(queue.exhausted for queue in self._queues):
            raise StopIteration
        self.step += 1
        return [self._fill(lane) for lane in range(self.num_lanes)]

    def skip(self, steps: int) -> None:
        """Go on as `steps` calls of `next_step` would, without reading a token."""
        for _ in range(steps):
            self.advance()

    def lane_documents(self) -> list[tuple[str, int, int] | None]:
        """Where each lane stands: (source, document, tokens of it read); None between two documents."""
        return [None if c is None else (self._names[c.source], c.document, c.offset) for c in self._lanes]

    def state_dict(self) -> dict[str, Any]:
        """The position after the steps so far: JSON-able, a few integers per source and lane, the same on all ranks."""
        sources = {
            name: {
                "order": self._order_identity(index),
                "position": list(self._queues[index].position),
                "consumed": self._consumed[index],
                "given": self._share.given[index],
                "long_ahead": self._long_ahead[index],
            }
            for index, name in enumerate(self._names)
        }
        return {
            "identity": self._identity(),
            "step": self.step,
            "sources": sources,
            "lanes": [None if place is None else list(place) for place in self.lane_documents()],
            "lane_long": list(self._lane_long),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_change: bool = False) -> None:
        """Continue where `state` was taken, with any number of ranks; UserError that says what differs, if anything.

        With `allow_change` a different stream goes on as far as it is the same: sources with the same documents in the
        same order from where they were, others from their beginning; lanes in documents that are still there to these
        documents' ends; changed weights from now on. The number of lanes must stay: each has a memory.
        """
        identity = self._identity()
        stored = state["identity"]
        differences = [
            f"{key} is {identity.get(key)} here and {stored.get(key)} there"
            for key in dict.fromkeys((*identity, *stored))
            if identity.get(key) != stored.get(key)
        ]
        fixed = [key for key in ("format", "lanes") if identity[key] != stored.get(key)]
        if differences and (fixed or not allow_change):
            raise UserError(
                "the checkpoint's position belongs to another data stream: "
                + "; ".join(differences)
                + ". Restore these settings, or start a new run"
                + ("." if fixed else ", or go on with the change by --set data.allow_change=true.")
            )
        self._start()
        self.step = state["step"]
        for index, name in enumerate(self._names):
            source = state["sources"].get(name)
            if source is None:
                continue
            self._consumed[index] = source["consumed"]
            if source["order"] == self._order_identity(index):
                self._queues[index].seek(source["position"])
                self._long_ahead[index] = source["long_ahead"]
            if not differences:
                self._share.given[index] = source["given"]
        self._lanes = [None if place is None else self._cursor(stored, *place) for place in state["lanes"]]
        for cursor in filter(None, self._lanes):
            self._share.due[cursor.source] += cursor.due
        self._lane_long = list(state["lane_long"])
        self._all_long = sum(self._lane_long)

    def _cursor(self, stored: dict[str, Any], name: str, document: int, offset: int) -> _Cursor | None:
        """A lane's place, unless its document is not in the data set any more."""
        key = f"documents of {name}"
        if name not in self._names or stored[key] != self._identity()[key]:
            return None
        source = self._names.index(name)
        shard, begin, length = (int(part[0]) for part in self._sources[source].locate(np.array([document])))
        return _Cursor(source, document, shard, begin, length, offset, min(length - offset, self.window))

    def _identity(self) -> dict[str, Any]:
        """What the stream depends on, JSON-able, by the names that a user knows it by."""
        settings = self.settings
        return {
            "format": _STATE_FORMAT,
            "lanes": self.num_lanes,
            "data.chunk_len": self._chunk_len,
            "data.window_chunks": settings.window_chunks,
            "data.seed": settings.seed,
            "data.order": settings.order,
            "data.shuffle_shards": settings.shuffle_shards,
            "data.sequence_len": [list(entry) for entry in settings.sequence_len],
            **{f"weight of {name}": weight for name, weight in self._weights.items()},
            **{f"epochs of {name}": (settings.epochs or {}).get(name) for name in self._names},
            **{f"documents of {source.name}": source.fingerprint for source in self._sources},
        }

    def _order_identity(self, index: int) -> list[Any]:
        """What a position in a source's queue depends on."""
        settings = self.settings
        long_from = self._chunk_len if settings.order == "by_length" else None
        return [self._sources[index].fingerprint, settings.seed, settings.order, settings.shuffle_shards, long_from]

    def _fill(self, lane: int) -> list[Span]:
        """Move a lane on by a window; less only when all sources are exhausted."""
        spans = []
        missing = self.window
        cursor = self._lanes[lane]
        while missing:
            if cursor is None:
                cursor = self._take(lane)
                if cursor is None:
                    break
            start = cursor.offset
            stop = min(start + missing, cursor.length)
            spans.append(Span(cursor.source, cursor.document, cursor.shard, cursor.begin, cursor.length, start, stop))
            missing -= stop - start
            self._count(cursor, stop)
            if stop == cursor.length:
                cursor = None
        self._lanes[lane] = cursor
        return spans

    def _take(self, lane: int) -> _Cursor | None:
        """The document that a lane reads next; None when all sources are exhausted."""
        candidates = [index for index, queue in enumerate(self._queues) if not queue.exhausted]
        if not candidates:
            return None
        index = candidates[0] if len(candidates) == 1 else self._share.next(candidates)
        queue = self._queues[index]
        long = queue.has(LONG) and (not queue.has(SHORT) or self._long_is_due(index, lane))
        entry = queue.pop(LONG if long else SHORT)
        if long:
            self._lane_long[lane] += entry.length
            self._all_long += entry.length
        cursor = _Cursor(index, *entry, offset=0, due=0)
        self._count(cursor, 0)
        return cursor

    def _long_is_due(self, source: int, lane: int) -> bool:
        """Whether long documents are behind their share, and this lane has not had more of them than the others."""
        return self._long_ahead[source] <= 0 and self._lane_long[lane] * self.num_lanes <= self._all_long

    def _count(self, cursor: _Cursor, offset: int) -> None:
        """Move a cursor to `offset` and keep the books of its source."""
        read = offset - cursor.offset
        due = cursor.length - offset
        if due > self.window:
            due = self.window
        added_due = due - cursor.due
        cursor.offset, cursor.due = offset, due
        index = cursor.source
        self._consumed[index] += read
        self._share.given[index] += read
        self._share.due[index] += added_due
        if self.settings.order == "by_length":
            is_long = cursor.length > self._chunk_len
            self._long_ahead[index] += (is_long - self._queues[index].long_share) * (read + added_due)

    def _sequence_starts(self) -> np.ndarray:
        """The window's positions at which every lane begins a new sequence: [n] integers."""
        step, tokens = [entry for entry in self.settings.sequence_len if entry[0] <= self.step][-1]
        if tokens is None:
            return np.empty(0, dtype=np.int64)
        before = (self.step - step) * self.window
        return np.arange(-before % tokens, self.window, tokens)

    def _read(self, spans: list[Span], input_ids: np.ndarray, labels: np.ndarray, reset: np.ndarray) -> None:
        """Fill one row, each [window], with the tokens of `spans`."""
        begin = 0
        begins, ends = [], []  # of documents
        for span in spans:
            tokens = self._sources[span.source].tokens(span.shard)
            end = begin + span.stop - span.start
            input_ids[begin:end] = tokens[span.begin + span.start : span.begin + span.stop]
            if span.start == 0:
                begins.append(begin)
            if span.stop == span.length:
                ends.append(end - 1)
            begin = end
        labels[:-1] = input_ids[1:]
        if spans and spans[-1].stop < spans[-1].length:
            labels[begin - 1] = tokens[spans[-1].begin + spans[-1].stop]
        labels[ends] = self._eos
        reset[begins] = True
        if begin < self.window:
            input_ids[begin:] = self._eos
            labels[begin:] = NO_LABEL
            reset[begin] = True
