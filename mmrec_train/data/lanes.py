"""Lanes: continuous streams of documents, so that memory can be carried from one optimizer step to the next.

The documents of an epoch are shuffled into a queue, and epochs follow each other without end. Each of the
`num_lanes` lanes reads its document to the end, then takes the next one from the queue; lanes are served in the
order 0, 1, 2, ... within a step. So the position of the whole stream is one (epoch, ordinal) for the queue's head
and one (epoch, ordinal, offset) per lane, and the global batch of step k is a pure function of (data set, seed,
num_lanes, chunk_len, k), whatever the number of ranks: each rank follows all lanes with integers, and reads tokens
for its own only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mmrec_train.data.dataset import TokenDataset
from mmrec_train.data.permutation import Permutation
from mmrec_train.errors import UserError

_STATE_FORMAT = 1
_QUEUE_BLOCK = 4096  # documents whose order and length are looked up at once


class Chunk(NamedTuple):
    """One micro-batch of one rank; b = micro_batch_size, T = chunk_len."""

    input_ids: torch.Tensor  # [b, T] int64
    labels: torch.Tensor  # [b, T] int64: the document's next token; eos at its last one, so never another document's
    reset: torch.Tensor  # [b, T] bool: the token is its document's first


@dataclass(slots=True)
class _Cursor:
    """A lane's place: it has read `offset` tokens of the document at (epoch, ordinal) of the queue."""

    epoch: int
    ordinal: int
    offset: int
    document: int
    length: int


class _Span(NamedTuple):
    document: int
    start: int
    stop: int
    length: int


class _Queue:
    """The endless sequence of documents, epoch after epoch; (epoch, ordinal) is the one that comes next."""

    def __init__(self, dataset: TokenDataset, seed: int, shuffle: bool) -> None:
        self._dataset = dataset
        self._seed = seed
        self._shuffle = shuffle
        self.seek(0, 0)

    def seek(self, epoch: int, ordinal: int) -> None:
        self.epoch, self.ordinal = epoch, ordinal
        self._block: Iterator[tuple[int, int]] = iter(())

    def pop(self) -> _Cursor:
        entry = next(self._block, None)
        if entry is None:
            if self.ordinal == self._dataset.num_documents:
                self.seek(self.epoch + 1, 0)
            self._block = iter(self._look_up(self.epoch, self.ordinal, _QUEUE_BLOCK))
            entry = next(self._block)
        cursor = _Cursor(self.epoch, self.ordinal, 0, *entry)
        self.ordinal += 1
        return cursor

    def cursor(self, epoch: int, ordinal: int, offset: int) -> _Cursor:
        [entry] = self._look_up(epoch, ordinal, 1)
        return _Cursor(epoch, ordinal, offset, *entry)

    def _look_up(self, epoch: int, ordinal: int, count: int) -> list[tuple[int, int]]:
        """(document, length) of up to `count` places of one epoch."""
        documents = np.arange(ordinal, min(ordinal + count, self._dataset.num_documents), dtype=np.int64)
        if self._shuffle:
            documents = Permutation(self._dataset.num_documents, seed=self._seed, epoch=epoch)(documents)
        lengths = self._dataset.document_lengths(documents)
        return list(zip(documents.tolist(), lengths.tolist(), strict=True))


class LaneLoader:
    """One rank's share of an endless stream of global batches; every token of an epoch is read exactly once.

    `num_lanes` is the global batch. Lane l belongs to micro-batch a, rank r and row b of the step, where
    l = (a * world_size + r) * micro_batch_size + b: a lane stays at its place for the whole run.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        num_lanes: int,
        chunk_len: int,
        seed: int,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        shuffle: bool = True,
    ) -> None:
        if num_lanes % (world_size * micro_batch_size) != 0 or num_lanes < 1:
            raise ValueError(f"{num_lanes} lanes cannot be dealt to {world_size} ranks x {micro_batch_size} rows")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if chunk_len < 1:
            raise ValueError(f"chunk_len {chunk_len}")
        self.dataset = dataset
        self.num_lanes = num_lanes
        self.chunk_len = chunk_len
        self.micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._identity = {
            "format": _STATE_FORMAT,
            "data set": dataset.fingerprint,
            "seed": seed,
            "shuffle": shuffle,
            "num_lanes": num_lanes,
            "chunk_len": chunk_len,
        }
        self._queue = _Queue(dataset, seed, shuffle)
        self._lanes: list[_Cursor | None] = [None] * num_lanes  # None: between two documents

    @property
    def epoch(self) -> int:
        """The epoch of the newest document that a lane has begun; 0 until one begins the data set anew."""
        return self._queue.epoch

    def next_step(self) -> list[Chunk]:
        """This rank's chunks of the next step, one per accumulation micro-batch, on the CPU."""
        accumulation = self.num_lanes // (self._world_size * self.micro_batch_size)
        shape = (accumulation, self.micro_batch_size, self.chunk_len)
        input_ids, labels = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        reset = np.zeros(shape, dtype=np.bool_)
        for lane in range(self.num_lanes):
            spans = self._advance(lane)
            group, row = divmod(lane, self.micro_batch_size)
            micro_batch, rank = divmod(group, self._world_size)
            if rank == self._rank:
                place = (micro_batch, row)
                self._read(spans, input_ids[place], labels[place], reset[place])
        return [
            Chunk(torch.from_numpy(input_ids[a]), torch.from_numpy(labels[a]), torch.from_numpy(reset[a]))
            for a in range(accumulation)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The position after the steps so far: JSON-able, a few integers per lane, the same on every rank."""
        lanes = [None if c is None else [c.epoch, c.ordinal, c.offset] for c in self._lanes]
        return {**self._identity, "queue": [self._queue.epoch, self._queue.ordinal], "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with any number of ranks; UserError if the stream is another one."""
        differences = [
            f"{key} is {value} here and {state.get(key)} there"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        if differences:
            raise UserError(
                "the checkpoint's position belongs to another data stream: "
                + "; ".join(differences)
                + ". Restore these settings, or start a new run."
            )
        self._queue.seek(*state["queue"])
        self._lanes = [None if lane is None else self._queue.cursor(*lane) for lane in state["lanes"]]

    def _advance(self, lane: int) -> list[_Span]:
        """Move a lane on by chunk_len tokens; returns the pieces of documents they come from."""
        spans = []
        missing = self.chunk_len
        cursor = self._lanes[lane]
        while missing:
            cursor = cursor or self._queue.pop()
            stop = min(cursor.offset + missing, cursor.length)
            spans.append(_Span(cursor.document, cursor.offset, stop, cursor.length))
            missing -= stop - cursor.offset
            cursor.offset = stop
            if stop == cursor.length:
                cursor = None
        self._lanes[lane] = cursor
        return spans

    def _read(self, spans: list[_Span], input_ids: np.ndarray, labels: np.ndarray, reset: np.ndarray) -> None:
        """Fill one row, each [T], with the tokens of `spans`."""
        begin = 0
        for span in spans:
            tokens = self.dataset.read(span.document, span.start, min(span.stop + 1, span.length))
            end = begin + span.stop - span.start
            input_ids[begin:end] = tokens[: end - begin]
            labels[begin : begin + len(tokens) - 1] = tokens[1:]
            if span.stop == span.length:
                labels[end - 1] = self.dataset.manifest.eos_id
            reset[begin] = span.start == 0
            begin = end
