"""The definition of the lanes, as plain as it can be written: lists of token ids, and everything counted anew."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mmrec_train.data.dataset import TokenDataset
from mmrec_train.data.lanes import NO_LABEL, StreamSettings
from mmrec_train.data.permutation import Permutation
from tests.data.documents import EOS

Documents = dict[str, list[list[int]]]
Step = tuple[list[list[int]], list[list[int]], list[list[bool]]]  # input_ids, labels, reset of all lanes


def shuffled(items: list, key: str, order: str) -> list:
    if order == "stored" or not items:
        return items
    return [items[place] for place in Permutation(len(items), key)(np.arange(len(items)))]


@dataclass
class Group:
    short: list[list[int]]
    long: list[list[int]]
    long_share: float


def groups(name: str, shards: list[list[list[int]]], stream: StreamSettings, chunk_len: int) -> Iterator[Group]:
    """A source's groups of documents in the order of their reading, epoch after epoch."""
    size = min(stream.shuffle_shards or len(shards), len(shards))
    epoch = 0
    while stream.epochs is None or epoch != stream.epochs.get(name):
        key = f"{stream.seed}/{name}/{epoch}"
        order = shards if size == len(shards) else shuffled(shards, f"{key}/shards", stream.order)
        for number in range(-(-len(shards) // size)):
            together = [document for shard in order[number * size :][:size] for document in shard]
            long = [d for d in together if stream.order == "by_length" and len(d) > chunk_len]
            short = [d for d in together if not (stream.order == "by_length" and len(d) > chunk_len)]
            yield Group(
                shuffled(short, f"{key}/{number}/0", stream.order),
                shuffled(long, f"{key}/{number}/1", stream.order),
                sum(map(len, long)) / sum(map(len, together)),
            )
        epoch += 1


class Source:
    def __init__(self, name: str, shards: list[list[list[int]]], stream: StreamSettings, chunk_len: int) -> None:
        self._groups = groups(name, shards, stream, chunk_len)
        self.group = next(self._groups, None)
        self.read = 0
        self.long_ahead = 0.0

    def take(self, long: bool) -> list[int]:
        assert self.group is not None
        document = (self.group.long if long else self.group.short).pop(0)
        if not self.group.long and not self.group.short:
            self.group = next(self._groups, None)
        return document


@dataclass
class Lane:
    source: Source | None = None
    document: list[int] = field(default_factory=list)
    offset: int = 0
    long_taken: int = 0

    def due(self, window: int) -> int:
        return 0 if self.source is None else min(len(self.document) - self.offset, window)


def plain_steps(
    documents: Documents, dataset: TokenDataset, stream: StreamSettings, num_lanes: int, chunk_len: int
) -> Iterator[Step]:
    window = stream.window_chunks * chunk_len
    by_length = stream.order == "by_length"
    sources: dict[str, Source] = {}
    tokens: dict[str, float] = {}
    for name, texts in documents.items():
        rest = iter(texts)
        counts = [shard.documents for shard in dataset.sources[name].shards]
        shards = [[next(rest) for _ in range(count)] for count in counts]
        sources[name] = Source(name, shards, stream, chunk_len)
        tokens[name] = sum(map(len, texts)) * (stream.epochs or {}).get(name, 1)
    weights = stream.weights or tokens
    parts = {name: weights[name] / sum(weights.values()) for name in sources}
    lanes = [Lane() for _ in range(num_lanes)]

    def next_document(lane: Lane) -> bool:
        """Gives a lane that is between documents a new one; False if there is none any more."""

        def progress(name: str) -> float:
            due = sum(other.due(window) for other in lanes if other.source is sources[name])
            return (sources[name].read + due) / parts[name]

        left = [name for name in sources if sources[name].group is not None]
        if not left:
            return False
        source = sources[min(left, key=progress)]
        assert source.group is not None
        fair = lane.long_taken * num_lanes <= sum(other.long_taken for other in lanes)
        long = bool(source.group.long) and ((source.long_ahead <= 0 and fair) or not source.group.short)
        lane.source, lane.document, lane.offset = source, source.take(long), 0
        if long:
            lane.long_taken += len(lane.document)
        count(lane, lane.due(window))
        return True

    def count(lane: Lane, tokens: int) -> None:
        """Tokens that a lane reads or is about to read from now on."""
        assert lane.source is not None
        if by_length:
            share = 0.0 if lane.source.group is None else lane.source.group.long_share
            lane.source.long_ahead += ((len(lane.document) > chunk_len) - share) * tokens

    step = 0
    while any(lane.source for lane in lanes) or any(source.group for source in sources.values()):
        rows = []
        for lane in lanes:
            row: list[tuple[int, int, bool]] = []
            while len(row) < window and (lane.source or next_document(lane)):
                assert lane.source is not None
                start, due = lane.offset, lane.due(window)
                lane.offset = min(len(lane.document), start + window - len(row))
                lane.source.read += lane.offset - start
                labels = [*lane.document[1:], EOS]
                row += [(lane.document[i], labels[i], i == 0) for i in range(start, lane.offset)]
                count(lane, lane.offset - start + lane.due(window) - due)
                if lane.offset == len(lane.document):
                    lane.source = None
            row += [(EOS, NO_LABEL, i == 0) for i in range(window - len(row))]
            first, length = [entry for entry in stream.sequence_len if entry[0] <= step][-1]
            rows.append(
                [
                    (token, label, start or (length is not None and ((step - first) * window + place) % length == 0))
                    for place, (token, label, start) in enumerate(row)
                ]
            )
        yield (
            [[token for token, _, _ in row] for row in rows],
            [[label for _, label, _ in row] for row in rows],
            [[reset for _, _, reset in row] for row in rows],
        )
        step += 1
