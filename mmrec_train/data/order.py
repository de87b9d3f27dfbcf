"""In which order a source's documents are read: epoch after epoch, each shuffled anew, computed and not stored.

An epoch goes through the source's shards in groups of `shuffle_shards`, themselves in shuffled order; the documents of
a group are shuffled together. So a source of any size needs only a group's shards at hand. Within a group there are
two queues, of documents longer than `long_from` tokens and of the others, where `order` is "by_length"; otherwise one.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from mmrec_train.data.dataset import SourceDocuments
from mmrec_train.data.permutation import Permutation

Order = Literal["shuffled", "by_length", "stored"]

SHORT, LONG = 0, 1  # the two queues of a group; without `by_length` all documents are in the first
_BLOCK = 4096  # documents whose order and places are looked up at once


class Entry(NamedTuple):
    """A document and where it lies."""

    document: int
    shard: int
    begin: int
    length: int


class _Group:
    """The documents of some shards, numbered through them in the order given, in two queues."""

    def __init__(self, source: SourceDocuments, shards: tuple[int, ...], long_from: int | None) -> None:
        self._source = source
        self._first = source.first_document[list(shards)]
        documents = [source.shards[shard].documents for shard in shards]
        self._offset = np.cumsum([0, *documents])
        total_tokens = sum(source.shards[shard].tokens for shard in shards)
        self._long = np.empty(0, dtype=np.int64)  # the long documents' numbers, ascending
        long_tokens = 0
        if long_from is not None:
            found = []
            for shard, offset in zip(shards, self._offset, strict=False):
                lengths = np.diff(source.starts(shard))
                long = np.flatnonzero(lengths > long_from)
                found.append(long + offset)
                long_tokens += int(lengths[long].sum())
            self._long = np.concatenate(found)
        self._long_before = self._long - np.arange(len(self._long))  # short documents before each long one
        self.counts = (int(self._offset[-1]) - len(self._long), len(self._long))
        self.long_share = long_tokens / total_tokens

    def entries(self, queue: int, ordinals: np.ndarray) -> list[Entry]:
        """The documents at some places, before any shuffle, of a queue: [n] integers in [0, counts[queue])."""
        if queue == LONG:
            number = self._long[ordinals]
        else:
            number = ordinals + np.searchsorted(self._long_before, ordinals, side="right")
        shard = np.searchsorted(self._offset, number, side="right") - 1
        documents = self._first[shard] + number - self._offset[shard]
        places = self._source.locate(documents)
        return list(map(Entry._make, zip(documents.tolist(), *(part.tolist() for part in places), strict=True)))


class SourceQueue:
    """The sequence of a source's documents. Its position is (epoch, group, documents taken from the two queues).

    Attributes:
        exhausted: Whether all epochs are over.

    Args:
        source: The documents.
        order: "shuffled", "by_length", or "stored" (as they lie in the shards).
        seed: Of the shuffle.
        long_from: Documents of more tokens than this are long; only `by_length` makes a difference of it.
        shuffle_shards: Shards of a group; None for all.
        epochs: Passes after which the source is exhausted; None for no end.
    """

    def __init__(
        self,
        source: SourceDocuments,
        *,
        order: Order,
        seed: int,
        long_from: int,
        shuffle_shards: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self.source = source
        self._key = f"{seed}/{source.name}"
        self._shuffle = order != "stored"
        self._group_size = min(shuffle_shards or len(source.shards), len(source.shards))
        self._epochs = epochs
        long = long_from if order == "by_length" else None
        # Two: that of an epoch of one group stays, and so does a group while the next one begins.
        self._group_of = lru_cache(maxsize=2)(lambda shards: _Group(source, shards, long))
        self.seek((0, 0, 0, 0))

    @property
    def position(self) -> tuple[int, int, int, int]:
        """(epoch, group, short documents taken, long documents taken)."""
        return (self._epoch, self._number, self._taken[SHORT], self._taken[LONG])

    def seek(self, position: Sequence[int]) -> None:
        self._epoch, self._number, *self._taken = position
        self._blocks: list[Iterator[Entry]] = [iter(()), iter(())]
        self._open: _Group | None = None
        # >= since a run may go on with fewer epochs than it has read
        self.exhausted = self._epochs is not None and self._epoch >= self._epochs

    @property
    def long_share(self) -> float:
        """The part of the current group's tokens that is in long documents; 0 when exhausted."""
        return 0.0 if self.exhausted else self._group().long_share

    def has(self, queue: int) -> bool:
        """Whether the current group has documents left in SHORT or LONG; not to be asked when exhausted."""
        return self._taken[queue] < self._group().counts[queue]

    def pop(self, queue: int) -> Entry:
        """The next document of SHORT or LONG, which must have one; moves on to the next group after the last."""
        entry = next(self._blocks[queue], None)
        if entry is None:
            self._blocks[queue] = iter(self._block(queue))
            entry = next(self._blocks[queue])
        self._taken[queue] += 1
        if tuple(self._taken) == self._group().counts:
            groups = -(-len(self.source.shards) // self._group_size)
            epoch, number = divmod(self._epoch * groups + self._number + 1, groups)
            self.seek((epoch, number, 0, 0))
        return entry

    def _block(self, queue: int) -> list[Entry]:
        count, taken = self._group().counts[queue], self._taken[queue]
        ordinals = np.arange(taken, min(taken + _BLOCK, count), dtype=np.int64)
        if self._shuffle:
            ordinals = Permutation(count, f"{self._key}/{self._epoch}/{self._number}/{queue}")(ordinals)
        return self._group().entries(queue, ordinals)

    def _group(self) -> _Group:
        if self._open is None:
            shards = self._shards(self._epoch, self._number)
            self.source.prefetch((*shards, *self._shards(self._epoch, self._number + 1)))
            self._open = self._group_of(shards)
        return self._open

    def _shards(self, epoch: int, group: int) -> tuple[int, ...]:
        """The shards of a group; that after an epoch's last is the next epoch's first."""
        count = len(self.source.shards)
        if self._group_size == count:
            return tuple(range(count))
        groups = -(-count // self._group_size)
        epoch, group = divmod(epoch * groups + group, groups)
        places = np.arange(group * self._group_size, min((group + 1) * self._group_size, count))
        if self._shuffle:
            places = Permutation(count, f"{self._key}/{epoch}/shards")(places)
        return tuple(places.tolist())
