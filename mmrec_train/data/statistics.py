"""How long documents are, counted exactly in memory that depends on how many lengths there are, not documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmrec_train.data.dataset import SourceDocuments

_BLOCK = 1 << 20  # documents counted at once


class Range(NamedTuple):
    """Documents and tokens of a range [start, stop), in tokens; stop None: no end."""

    start: int
    stop: int | None
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """How many documents have which length: `values` [n] int64, ascending, and `counts` [n] int64, positive."""

    values: np.ndarray
    counts: np.ndarray

    @property
    def documents(self) -> int:
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        return int(self.values @ self.counts)

    @property
    def mean(self) -> float:
        return self.tokens / self.documents

    def quantile(self, part: float) -> int:
        """The least length that at least `part` (in [0, 1]) of the documents do not exceed."""
        up_to = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(up_to, part * self.documents)])

    def by_position(self, edges: Sequence[int]) -> list[Range]:
        """Of the positions between each two ascending `edges` and beyond the last: the tokens there, and the documents
        that have any."""
        return [
            Range(
                start,
                stop,
                int(self.counts[self.values > start].sum()),
                int((np.clip(self.values, start, stop) - start) @ self.counts),
            )
            for start, stop in zip(edges, (*edges[1:], None), strict=True)
        ]

    def by_doubling(self) -> list[Range]:
        """By length: [1, 2), [2, 4), [4, 8), ..., from the shortest document's to the longest's."""
        octave = np.floor(np.log2(self.values)).astype(np.int64)
        documents, tokens = np.zeros((2, int(octave[-1]) + 1), dtype=np.int64)
        np.add.at(documents, octave, self.counts)
        np.add.at(tokens, octave, self.counts * self.values)
        return [Range(1 << k, 2 << k, int(documents[k]), int(tokens[k])) for k in range(int(octave[0]), len(documents))]


def count_lengths(source: SourceDocuments, on_progress: Callable[[int], None] = lambda documents: None) -> Lengths:
    """The lengths of all documents of a source. `on_progress` is called with each number counted."""
    lengths = Lengths(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    for shard in range(len(source.shards)):
        documents = source.shards[shard].documents
        for first in range(0, documents, _BLOCK):
            block = source.lengths(shard, first, min(first + _BLOCK, documents))
            lengths = combined([lengths, Lengths(*np.unique(block, return_counts=True))])
            on_progress(len(block))
    return lengths


def combined(parts: Sequence[Lengths]) -> Lengths:
    """The lengths of all documents of the parts."""
    values, place = np.unique(np.concatenate([part.values for part in parts]), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
    return Lengths(values, counts)
