"""Loss of a model on a prepared data set, as a whole and by position in the document."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mmrec_train.data import Chunk, LaneLoader, TokenDataset
from mmrec_train.data.lanes import NO_LABEL, Span, StreamSettings
from mmrec_train.data.views import SourceHead, head
from mmrec_train.model import MMRecForCausalLM

POSITION_EDGES = (0, 1 << 10, 8 << 10, 32 << 10, 100 << 10)  # tokens; where each bucket begins, the last has no end


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [start, stop) of their documents (stop None: no end), and their mean loss in nats."""

    start: int
    stop: int | None
    tokens: int
    loss: float

    @property
    def name(self) -> str:
        """The positions in units of 1024 tokens, like the edges: 0-1K, 100K+."""
        if self.stop is None:
            return f"{self.start >> 10}K+"
        return f"{self.start >> 10}-{self.stop >> 10}K"


@dataclass(frozen=True)
class Evaluation:
    """Number of tokens, their mean loss in nats, and the same by position for the buckets that hold tokens."""

    tokens: int
    loss: float
    by_position: tuple[Bucket, ...]

    @classmethod
    def of(cls, totals: Tensor) -> Self:
        """From [2, buckets]: tokens and sums of their losses by position, in the order of POSITION_EDGES."""
        tokens, losses = totals.tolist()
        stops = (*POSITION_EDGES[1:], None)
        return cls(
            tokens=int(sum(tokens)),
            loss=sum(losses) / sum(tokens),
            by_position=tuple(
                Bucket(start, stop, int(count), total / count)
                for start, stop, count, total in zip(POSITION_EDGES, stops, tokens, losses, strict=True)
                if count
            ),
        )


def perplexity(loss: float) -> float:
    """exp(loss), which a loss beyond 700 nats would overflow."""
    return math.exp(min(loss, 700.0))


def evaluate(
    model: MMRecForCausalLM,
    dataset: TokenDataset,
    *,
    chunk_len: int,
    batch: int,
    tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda counted: None,
) -> dict[str, Evaluation]:
    """Mean next-token loss of each source of a split; each token once, memory carried from chunk to chunk.

    A token's loss is that of predicting what follows it: the next token of its document, eos after the last. Neither
    `chunk_len` nor `batch` changes the result, unless the model keeps memory across documents.

    Args:
        model: In evaluation mode.
        chunk_len: Tokens of a lane that are processed at a time.
        batch: Lanes, each a continuous stream of documents.
        tokens: Of each source the first so many, in stored order; None for all.
        on_progress: Called after each chunk with the number of tokens so far.
    """
    done = 0
    evaluations = {}
    for name in dataset.sources:
        lanes = FixedLanes(head(dataset, name, tokens), chunk_len=chunk_len, batch=batch)
        total = torch.zeros(2, len(POSITION_EDGES), dtype=torch.float64)
        for part in losses_by_position(model, lanes, model.device):
            total += part.cpu()
            on_progress(done + int(total[0].sum()))
        evaluations[name] = Evaluation.of(total)
        done += evaluations[name].tokens
    return evaluations


def combine(evaluations: Iterable[Evaluation]) -> Evaluation:
    """That of all the tokens together."""
    total = torch.zeros(2, len(POSITION_EDGES), dtype=torch.float64)
    for evaluation in evaluations:
        for bucket in evaluation.by_position:
            sums = torch.tensor([bucket.tokens, bucket.tokens * bucket.loss], dtype=total.dtype)
            total[:, POSITION_EDGES.index(bucket.start)] += sums
    return Evaluation.of(total)


class FixedLanes(LaneLoader):
    """One rank's lanes through one source from its first document to its last, once: always the same tokens.

    Args:
        dataset: What `head` made.
        batch: Lanes of each rank.
    """

    def __init__(
        self, dataset: TokenDataset, *, chunk_len: int, batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        [(name, source)] = dataset.sources.items()
        assert isinstance(source, SourceHead)
        super().__init__(
            dataset,
            StreamSettings(order="stored", epochs={name: 1}),
            num_lanes=batch * world_size,
            chunk_len=chunk_len,
            micro_batch_size=batch,
            rank=rank,
            world_size=world_size,
        )
        self._source = source
        self._own = slice(rank * batch, (rank + 1) * batch)
        self._spans: list[list[Span]] = []

    def advance(self) -> list[list[Span]]:
        self._spans = super().advance()
        return self._spans

    def __iter__(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks and the position of each of their tokens in its document [b, T], int64.

        Every rank has the same number of them; labels are `NO_LABEL` after the end.
        """
        while True:
            try:
                [chunk] = self.next_step()
            except StopIteration:
                self._source.prefetch(())  # others may have the room that it took
                return
            position = torch.zeros_like(chunk.input_ids)
            for row, spans in enumerate(self._spans[self._own]):
                end = 0
                for span in spans:
                    begin, end = end, end + span.stop - span.start
                    position[row, begin:end] = torch.arange(span.start, span.stop)
                    if span.stop == span.length and (label := self._source.label_at_end(span.document)) is not None:
                        chunk.labels[row, end - 1] = label
            yield chunk, position


@torch.no_grad()
def losses_by_position(model: Callable[..., Any], lanes: FixedLanes, device: torch.device) -> Iterator[Tensor]:
    """Of each chunk of the lanes: tokens and sums of their losses by position, [2, buckets] float64 on the device.

    The model is called once a chunk, on every rank. Lanes that have run out are left out, all but one.
    """
    rows: Tensor | None = None  # the lanes that go on
    memories = None
    edges = torch.tensor(POSITION_EDGES[1:])
    for chunk, position in lanes:
        rows = torch.arange(len(position)) if rows is None else rows
        going_on = (chunk.labels[rows] != NO_LABEL).any(1)
        if not going_on.all():
            going_on[0] |= not going_on.any()
            kept = going_on.nonzero().squeeze(1).to(device)
            memories = None if memories is None else tuple(state.rows(kept) for state in memories)
            rows = rows[going_on]
        input_ids, labels, reset = (t[rows].to(device) for t in chunk)
        output = model(
            input_ids=input_ids,
            shift_labels=labels,
            reset=reset,
            memory_states=memories,
            loss_reduction="none",
            logits_to_keep=1,  # logits are not needed; with the loss that is the fewest
        )
        memories = output.memory_states
        bucket = torch.bucketize(position[rows], edges, right=True).to(device)
        counted = labels != NO_LABEL
        inside = (bucket.unsqueeze(-1) == torch.arange(len(POSITION_EDGES), device=device)) & counted.unsqueeze(-1)
        losses = output.loss.double().unsqueeze(-1)
        yield torch.stack([inside.sum((0, 1)).double(), torch.where(inside, losses, 0.0).sum((0, 1))])
