"""The lane law, against its definition written out in plain Python."""

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.dataset import TokenDataset
from mmrec_train.data.lanes import LaneLoader
from mmrec_train.data.permutation import Permutation
from mmrec_train.errors import UserError
from tests.data.documents import EOS, numbered_documents, write_documents

Step = tuple[list[list[int]], list[list[int]], list[list[bool]]]  # input_ids, labels, reset of all lanes


def plain_steps(
    documents: list[list[int]], num_lanes: int, chunk_len: int, seed: int, shuffle: bool = True
) -> Iterator[Step]:
    """The definition: lanes in turn, each filled from the queue of shuffled documents."""

    def queue() -> Iterator[list[int]]:
        epoch = 0
        while True:
            order = np.arange(len(documents))
            for index in Permutation(len(documents), seed=seed, epoch=epoch)(order) if shuffle else order:
                yield documents[index]
            epoch += 1

    source = queue()
    lanes: list[deque[tuple[int, int, bool]]] = [deque() for _ in range(num_lanes)]
    while True:
        rows = []
        for lane in lanes:
            while len(lane) < chunk_len:
                document = next(source)
                labels = [*document[1:], EOS]
                lane.extend(zip(document, labels, [True] + [False] * (len(document) - 1), strict=True))
            rows.append([lane.popleft() for _ in range(chunk_len)])
        yield tuple([[token[part] for token in row] for row in rows] for part in range(3))  # type: ignore[misc]


def make_loaders(
    dataset: TokenDataset,
    world_size: int,
    *,
    num_lanes: int,
    chunk_len: int,
    seed: int,
    accumulation: int = 1,
) -> list[LaneLoader]:
    return [
        LaneLoader(
            dataset,
            num_lanes=num_lanes,
            chunk_len=chunk_len,
            seed=seed,
            rank=rank,
            world_size=world_size,
            micro_batch_size=num_lanes // (world_size * accumulation),
        )
        for rank in range(world_size)
    ]


def global_step(loaders: Sequence[LaneLoader]) -> Step:
    """Put the ranks' chunks together in the order of lanes: micro-batch, rank, row."""
    chunks = [loader.next_step() for loader in loaders]
    ordered = [chunk for micro_batch in zip(*chunks, strict=True) for chunk in micro_batch]
    input_ids, labels, reset = (torch.cat(tensors).tolist() for tensors in zip(*ordered, strict=True))
    return input_ids, labels, reset


lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_strategy,
    world_size=st.sampled_from([1, 2, 4]),
    accumulation=st.integers(1, 2),
    rows=st.integers(1, 2),
    chunk_len=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    shard_tokens=st.integers(1, 100),
)
def test_global_batches_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    world_size: int,
    accumulation: int,
    rows: int,
    chunk_len: int,
    seed: int,
    shard_tokens: int,
) -> None:
    documents = numbered_documents(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=shard_tokens)
    num_lanes = world_size * accumulation * rows
    loaders = make_loaders(
        dataset, world_size, num_lanes=num_lanes, chunk_len=chunk_len, seed=seed, accumulation=accumulation
    )
    expected = plain_steps(documents, num_lanes, chunk_len, seed)
    for _ in range(3 * sum(lengths) // (num_lanes * chunk_len) + 2):  # three epochs
        assert global_step(loaders) == next(expected)
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_strategy,
    chunk_len=st.integers(1, 20),
    world_sizes=st.lists(st.sampled_from([1, 2, 4]), min_size=6, max_size=12),
)
def test_restart_at_every_step_with_other_rank_counts(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk_len: int, world_sizes: list[int]
) -> None:
    documents = numbered_documents(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents)
    expected = plain_steps(documents, 4, chunk_len, seed=3)
    state: dict[str, Any] | None = None
    for world_size in world_sizes:
        loaders = make_loaders(dataset, world_size, num_lanes=4, chunk_len=chunk_len, seed=3)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        assert global_step(loaders) == next(expected)
        state = json.loads(json.dumps(loaders[-1].state_dict()))


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_strategy, num_lanes=st.integers(1, 5), chunk_len=st.integers(1, 50))
def test_every_document_once_an_epoch_and_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], num_lanes: int, chunk_len: int
) -> None:
    """Straight from the law: cut the lanes at their resets and look at the pieces."""
    documents = numbered_documents(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents)
    [loader] = make_loaders(dataset, 1, num_lanes=num_lanes, chunk_len=chunk_len, seed=0)
    lanes: list[list[list[int]]] = [[] for _ in range(num_lanes)]
    for _ in range(3 * sum(lengths) // (num_lanes * chunk_len) + 2):
        input_ids, _, reset = global_step([loader])
        for lane, pieces in enumerate(lanes):
            for token, first in zip(input_ids[lane], reset[lane], strict=True):
                if first:
                    pieces.append([])
                pieces[-1].append(token)
    by_first_token = {document[0]: document for document in documents}
    for pieces in lanes:
        for piece in pieces[:-1]:
            assert piece == by_first_token[piece[0]]
        assert pieces[-1] == by_first_token[pieces[-1][0]][: len(pieces[-1])]
    read = Counter(piece[0] for pieces in lanes for piece in pieces)
    fewest, remainder = divmod(read.total(), len(documents))
    assert set(read.values()) <= {fewest, fewest + 1}
    assert sum(count == fewest + 1 for count in read.values()) == remainder


def test_going_back_in_the_same_loader(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([3, 1, 4, 1, 5, 9, 2, 6]))
    [loader] = make_loaders(dataset, 1, num_lanes=2, chunk_len=3, seed=0)
    states, steps = [], []
    for _ in range(12):
        states.append(loader.state_dict())
        steps.append(global_step([loader]))
    for state, step in zip(reversed(states), reversed(steps), strict=True):
        loader.load_state_dict(state)
        assert global_step([loader]) == step


def test_known_small_case(tmp_path: Path) -> None:
    """Numbers by hand: two lanes, chunks of three, three documents, not shuffled."""
    dataset = write_documents(tmp_path, [[11, 12, 13, 14], [21], [31, 32]])
    loader = LaneLoader(
        dataset, num_lanes=2, chunk_len=3, seed=0, rank=0, world_size=1, micro_batch_size=2, shuffle=False
    )
    [first], [second] = loader.next_step(), loader.next_step()
    assert first.input_ids.tolist() == [[11, 12, 13], [21, 31, 32]]
    assert first.labels.tolist() == [[12, 13, 14], [EOS, 32, EOS]]
    assert first.reset.tolist() == [[True, False, False], [True, True, False]]
    assert second.input_ids.tolist() == [[14, 11, 12], [21, 31, 32]]
    assert second.labels.tolist() == [[EOS, 12, 13], [EOS, 32, EOS]]
    assert second.reset.tolist() == [[False, True, False], [True, True, False]]
    assert loader.state_dict()["lanes"] == [[1, 0, 2], None]
    assert loader.state_dict()["queue"] == [1, 3]


def test_tensors_are_int64_and_bool(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([9, 9]), dtype="uint16")
    loader = LaneLoader(dataset, num_lanes=6, chunk_len=5, seed=0, rank=1, world_size=2, micro_batch_size=1)
    chunks = loader.next_step()
    assert len(chunks) == 3
    for chunk in chunks:
        assert [tensor.shape for tensor in chunk] == [torch.Size([1, 5])] * 3
        assert [tensor.dtype for tensor in chunk] == [torch.int64, torch.int64, torch.bool]


def test_epochs_are_shuffled_differently(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([1] * 30))
    [loader] = make_loaders(dataset, 1, num_lanes=1, chunk_len=30, seed=0)
    epochs = [loader.next_step()[0].input_ids[0].tolist() for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(1, 31)) for epoch in epochs)


def test_more_documents_than_are_looked_up_at_once(tmp_path: Path) -> None:
    documents = numbered_documents([1, 2] * 5000)
    dataset = write_documents(tmp_path, documents, shard_tokens=4000)
    [loader] = make_loaders(dataset, 1, num_lanes=2, chunk_len=1000, seed=5)
    expected = plain_steps(documents, 2, 1000, seed=5)
    for _ in range(16):
        assert global_step([loader]) == next(expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 2}, "seed is 2 here and 1 there"), ({"chunk_len": 6}, "chunk_len is 6 here and 5 there")],
)
def test_refuses_another_stream_and_says_what_differs(tmp_path: Path, change: dict[str, int], named: str) -> None:
    dataset = write_documents(tmp_path, numbered_documents([9, 9]))
    usual = {"num_lanes": 2, "chunk_len": 5, "seed": 1}
    [loader], [other] = make_loaders(dataset, 1, **usual), make_loaders(dataset, 1, **{**usual, **change})
    with pytest.raises(UserError, match=named):
        other.load_state_dict(loader.state_dict())


def test_refuses_other_lanes_and_another_data_set(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "a", numbered_documents([9, 9]))
    changed = write_documents(tmp_path / "b", [[1, 2], [3, 4]])
    copied = write_documents(tmp_path / "c", numbered_documents([9, 9]))
    [loader] = make_loaders(dataset, 1, num_lanes=2, chunk_len=5, seed=1)
    loader.next_step()
    with pytest.raises(UserError, match="num_lanes is 4 here and 2 there"):
        make_loaders(dataset, 1, num_lanes=4, chunk_len=5, seed=1)[0].load_state_dict(loader.state_dict())
    with pytest.raises(UserError, match=f"data set is {changed.fingerprint} here and {dataset.fingerprint} there"):
        make_loaders(changed, 1, num_lanes=2, chunk_len=5, seed=1)[0].load_state_dict(loader.state_dict())
    [moved] = make_loaders(copied, 1, num_lanes=2, chunk_len=5, seed=1)
    moved.load_state_dict(loader.state_dict())
    assert global_step([moved]) == global_step([loader])


def test_impossible_deals_are_refused(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[1, 2]])
    with pytest.raises(ValueError, match="6 lanes cannot be dealt to 2 ranks x 2 rows"):
        LaneLoader(dataset, num_lanes=6, chunk_len=1, seed=0, rank=0, world_size=2, micro_batch_size=2)


def test_epoch_tells_when_a_lane_begins_the_data_set_anew(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[1] * 4, [2] * 2, [3] * 4])
    loader = LaneLoader(
        dataset, num_lanes=2, chunk_len=2, seed=0, rank=0, world_size=1, micro_batch_size=2, shuffle=False
    )
    epochs = []
    for _ in range(4):
        loader.next_step()
        epochs.append(loader.epoch)
    # lanes: 1111 then 1…, 2233 and on: the third step needs a fourth document
    assert epochs == [0, 0, 1, 1]
