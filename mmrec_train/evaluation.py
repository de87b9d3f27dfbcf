"""Loss of a model on a prepared data set, as a whole and by position in the document."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_train.data import LaneLoader, TokenDataset
from mmrec_train.model import MMRecForCausalLM
from mmrec_train.model.accounting import LOSS_SLICE_TOKENS

POSITION_EDGES = (0, 1 << 10, 8 << 10, 32 << 10, 100 << 10)  # tokens; where each bucket begins, the last has no end


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [start, stop) of their documents (stop None: no end), and their mean loss in nats."""

    start: int
    stop: int | None
    tokens: int
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """Number of tokens, their mean loss in nats, and the same by position for the buckets that hold tokens."""

    tokens: int
    loss: float
    by_position: tuple[Bucket, ...]


def perplexity(loss: float) -> float:
    """exp(loss), which a loss beyond 700 nats would overflow."""
    return math.exp(min(loss, 700.0))


@torch.inference_mode()
def evaluate(
    model: MMRecForCausalLM,
    dataset: TokenDataset,
    *,
    chunk_len: int,
    batch: int,
    tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda counted: None,
) -> Evaluation:
    """Mean next-token loss over a split, in its own order; each token once, memory carried from chunk to chunk.

    A token's loss is that of predicting what follows it: the next token of its document, eos after the last. Neither
    `chunk_len` nor `batch` changes the result, unless the model keeps memory across documents.

    Args:
        chunk_len: Tokens of a lane that are processed at a time.
        batch: Lanes, each a continuous stream of documents.
        tokens: Stop with the chunks that reach this many; None for the whole split.
        on_progress: Called after each chunk with the number of tokens so far.
    """
    loader = LaneLoader(
        dataset,
        num_lanes=batch,
        chunk_len=chunk_len,
        seed=0,
        rank=0,
        world_size=1,
        micro_batch_size=batch,
        shuffle=False,
    )
    wanted = dataset.num_tokens if tokens is None else min(tokens, dataset.num_tokens)
    places = _Places(batch)
    lanes = torch.arange(batch)  # those that still read tokens of the first epoch
    memories = model.model.empty_memory(batch)
    counts = torch.zeros(len(POSITION_EDGES), dtype=torch.int64)
    sums = torch.zeros(len(POSITION_EDGES), dtype=torch.float64)
    while (counted := int(counts.sum())) < wanted:
        [chunk] = loader.next_step()
        position, document = places.advance(chunk.reset)
        first_epoch = document < dataset.num_documents
        going_on = first_epoch[lanes].any(1)
        if not going_on.all():
            memories = tuple(state.rows(going_on.nonzero().squeeze(1).to(model.device)) for state in memories)
            lanes = lanes[going_on]
        input_ids, labels, reset = (t[lanes].to(model.device) for t in chunk)
        output = model.model(input_ids=input_ids, memory_states=memories, reset=reset)
        memories = output.memory_states
        losses = token_losses(output.last_hidden_state, labels, model.lm_head).cpu().double()
        counts_here = first_epoch[lanes]
        bucket = torch.bucketize(position[lanes][counts_here], torch.tensor(POSITION_EDGES[1:]), right=True)
        counts += torch.bincount(bucket, minlength=len(POSITION_EDGES))
        sums += torch.bincount(bucket, weights=losses[counts_here], minlength=len(POSITION_EDGES))
        on_progress(int(counts.sum()))
    stops = (*POSITION_EDGES[1:], None)
    return Evaluation(
        tokens=counted,
        loss=sums.sum().item() / counted,
        by_position=tuple(
            Bucket(start, stop, int(count), total.item() / int(count))
            for start, stop, count, total in zip(POSITION_EDGES, stops, counts, sums, strict=True)
            if count
        ),
    )


def token_losses(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """The cross-entropy of each token in nats, fp32: hidden [B, T, D] and labels [B, T] -> [B, T].

    The logits of a slice of tokens exist at a time.
    """
    slices = zip(hidden.flatten(0, 1).split(LOSS_SLICE_TOKENS), labels.flatten().split(LOSS_SLICE_TOKENS), strict=True)
    losses = [F.cross_entropy(head(x).float(), y, reduction="none") for x, y in slices]
    return torch.cat(losses).view_as(labels)


class _Places:
    """Follows lanes of documents by their resets."""

    def __init__(self, lanes: int) -> None:
        self._position = torch.zeros(lanes, dtype=torch.int64)
        self._document = torch.zeros(lanes, dtype=torch.int64)
        self._started = 0

    def advance(self, reset: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token of the lanes' next chunk [lanes, T]: position in its document, and how many-th that one is.

        Documents are numbered as they are taken from the queue, through all epochs: the loader serves the lanes in
        order, so within a chunk they start in the order in which the flattened `reset` is read.
        """
        token = torch.arange(reset.shape[1])
        newest = torch.where(reset, token, -1).cummax(1).values  # the start of the token's document, −1: an earlier one
        carried = newest < 0
        position = torch.where(carried, self._position.unsqueeze(1) + token, token - newest)
        number = self._started - 1 + reset.flatten().cumsum(0).view_as(reset)
        document = torch.where(carried, self._document.unsqueeze(1), number)
        self._position, self._document = position[:, -1] + 1, document[:, -1]
        self._started += int(reset.sum())
        return position, document
