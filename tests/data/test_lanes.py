"""The lanes, against their definition written out in plain Python (`plain_lanes`), and the laws they must keep."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.dataset import TokenDataset
from mmrec_train.data.lanes import NO_LABEL, LaneLoader, StreamSettings
from mmrec_train.errors import UserError
from tests.data.documents import EOS, numbered_documents, write_documents
from tests.data.plain_lanes import Documents, Step, plain_steps

WORLDS = [1, 2, 3, 4, 8]
LANES = 24  # divisible by each of them


def make_loaders(
    dataset: TokenDataset,
    world_size: int,
    stream: StreamSettings,
    *,
    num_lanes: int,
    chunk_len: int,
    accumulation: int = 1,
) -> list[LaneLoader]:
    return [
        LaneLoader(
            dataset,
            stream,
            num_lanes=num_lanes,
            chunk_len=chunk_len,
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


def steps_of(loaders: Sequence[LaneLoader]) -> Iterator[Step]:
    """To the end of the stream; every rank must end at the same step."""
    while True:
        try:
            yield global_step(loaders)
        except StopIteration:
            for loader in loaders:
                with pytest.raises(StopIteration):
                    loader.next_step()
            return


def by_source(lengths: Mapping[str, Sequence[int]]) -> Documents:
    """Documents in which no token id occurs twice, not even in two sources."""
    numbered = iter(numbered_documents([length for source in lengths.values() for length in source]))
    return {name: list(islice(numbered, len(source))) for name, source in lengths.items()}


lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)
sources_strategy = st.one_of(
    st.fixed_dictionaries({"main": lengths_strategy}),
    st.fixed_dictionaries({"code": lengths_strategy, "web": lengths_strategy}),
    st.fixed_dictionaries({"a": lengths_strategy, "b": lengths_strategy, "c": lengths_strategy}),
)


@st.composite
def streams(draw: st.DrawFn, names: Sequence[str]) -> StreamSettings:
    weights = draw(st.none() | st.fixed_dictionaries({name: st.floats(0.01, 10.0) for name in names}))
    epochs = draw(st.none() | st.dictionaries(st.sampled_from(list(names)), st.integers(1, 3)))
    lengths = st.none() | st.integers(1, 30)
    return StreamSettings(
        seed=draw(st.integers(0, 2**40)),
        order=draw(st.sampled_from(["shuffled", "by_length", "stored"])),
        weights=weights,
        epochs=epochs,
        shuffle_shards=draw(st.none() | st.integers(1, 4)),
        window_chunks=draw(st.integers(1, 3)),
        sequence_len=draw(
            st.sampled_from([((0, None),)]) | st.tuples(st.tuples(st.just(0), lengths), st.tuples(st.just(2), lengths))
        ),
    )


@settings(max_examples=80, deadline=None)
@given(data=st.data(), lengths=sources_strategy, world_size=st.sampled_from(WORLDS), chunk_len=st.integers(1, 20))
def test_global_batches_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    lengths: dict[str, list[int]],
    world_size: int,
    chunk_len: int,
) -> None:
    """Token ids, labels and resets over three epochs and more, or to the end of a finite stream."""
    stream = data.draw(streams(list(lengths)))
    accumulation, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    shard_tokens = data.draw(st.integers(1, 100))
    documents = by_source(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=shard_tokens)
    num_lanes = world_size * accumulation * rows
    loaders = make_loaders(
        dataset, world_size, stream, num_lanes=num_lanes, chunk_len=chunk_len, accumulation=accumulation
    )
    total = sum(map(sum, lengths.values()))
    steps = 3 * total // (num_lanes * chunk_len * stream.window_chunks) + 3
    expected = list(islice(plain_steps(documents, dataset, stream, num_lanes, chunk_len), steps))
    assert list(islice(steps_of(loaders), steps)) == expected
    states = [json.dumps(loader.state_dict()) for loader in loaders]
    assert all(state == states[0] for state in states)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    lengths=sources_strategy,
    chunk_len=st.integers(1, 8),
    worlds=st.lists(st.sampled_from(WORLDS), min_size=6, max_size=12),
)
def test_restart_at_every_step_with_other_rank_counts(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    lengths: dict[str, list[int]],
    chunk_len: int,
    worlds: list[int],
) -> None:
    stream = data.draw(streams(list(lengths)))
    documents = by_source(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=30)
    expected = list(islice(plain_steps(documents, dataset, stream, LANES, chunk_len), len(worlds)))
    state: dict[str, Any] | None = None
    for world_size, step in zip(worlds, expected, strict=False):
        loaders = make_loaders(dataset, world_size, stream, num_lanes=LANES, chunk_len=chunk_len)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        assert global_step(loaders) == step
        state = json.loads(json.dumps(loaders[-1].state_dict()))


@pytest.mark.parametrize("order", ["shuffled", "by_length"])
def test_ranks_change_in_the_middle(tmp_path: Path, order: Any) -> None:
    """2 ranks, then 4, then 1: the token ids of three epochs are those of one undisturbed process."""
    lengths = np.random.default_rng(0).integers(1, 60, size=300).tolist()
    dataset = write_documents(tmp_path, numbered_documents(lengths), shard_tokens=700)
    stream = StreamSettings(seed=1, order=order)
    [alone] = make_loaders(dataset, 1, stream, num_lanes=8, chunk_len=16)
    steps = 3 * sum(lengths) // (8 * 16) + 1
    state = alone.state_dict()
    for world_size, count in ((2, steps // 3), (4, steps // 3), (1, steps - 2 * (steps // 3))):
        loaders = make_loaders(dataset, world_size, stream, num_lanes=8, chunk_len=16, accumulation=2)
        for loader in loaders:
            loader.load_state_dict(state)
        for _ in range(count):
            assert global_step(loaders) == global_step([alone])
        state = loaders[0].state_dict()


@settings(max_examples=60, deadline=None)
@given(
    lengths=sources_strategy,
    num_lanes=st.integers(1, 5),
    chunk_len=st.integers(1, 50),
    order=st.sampled_from(["shuffled", "by_length"]),
    shuffle_shards=st.none() | st.integers(1, 3),
)
def test_every_document_once_an_epoch_and_whole(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: dict[str, list[int]],
    num_lanes: int,
    chunk_len: int,
    order: Any,
    shuffle_shards: int | None,
) -> None:
    """Straight from the law: cut the lanes at their resets and look at the pieces."""
    documents = by_source(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=40)
    stream = StreamSettings(order=order, shuffle_shards=shuffle_shards)
    [loader] = make_loaders(dataset, 1, stream, num_lanes=num_lanes, chunk_len=chunk_len)
    lanes: list[list[list[int]]] = [[] for _ in range(num_lanes)]
    for _ in range(3 * sum(map(sum, lengths.values())) // (num_lanes * chunk_len) + 2):
        input_ids, _, reset = global_step([loader])
        for lane, pieces in enumerate(lanes):
            for token, first in zip(input_ids[lane], reset[lane], strict=True):
                if first:
                    pieces.append([])
                pieces[-1].append(token)
    by_first_token = {document[0]: (name, document) for name, all_ in documents.items() for document in all_}
    for pieces in lanes:
        for piece in pieces[:-1]:
            assert piece == by_first_token[piece[0]][1]
        assert pieces[-1] == by_first_token[pieces[-1][0]][1][: len(pieces[-1])]
    read = Counter(piece[0] for pieces in lanes for piece in pieces)
    for name, texts in documents.items():
        counts = [read[document[0]] for document in texts]
        assert max(counts) - min(counts) <= 1, name


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    weights=st.lists(st.floats(0.02, 5.0), min_size=2, max_size=4),
    num_lanes=st.integers(1, 6),
    chunk_len=st.integers(20, 40),
)
def test_the_mixture_holds_at_every_step(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    weights: list[float],
    num_lanes: int,
    chunk_len: int,
) -> None:
    """The bound that `FairShare` promises for documents no longer than a window, whatever the sources' sizes."""
    longest = 20
    names = [f"s{i}" for i in range(len(weights))]
    lengths = {name: data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=20)) for name in names}
    dataset = write_documents(tmp_path_factory.mktemp("data"), by_source(lengths))
    stream = StreamSettings(weights=dict(zip(names, weights, strict=True)))
    [loader] = make_loaders(dataset, 1, stream, num_lanes=num_lanes, chunk_len=chunk_len)
    for _ in range(40):
        loader.skip(1)
        read = loader.consumed
        assert sum(read.values()) == loader.step * num_lanes * chunk_len
        for name, weight in zip(names, weights, strict=True):
            ideal = weight / sum(weights) * sum(read.values())
            assert abs(read[name] - ideal) <= (len(names) - 1 + num_lanes) * longest


def test_the_mixture_holds_with_documents_of_many_chunks(tmp_path: Path) -> None:
    """Books of 60 chunks and messages of a tenth of one, half and half: at once, not after the first books."""
    lengths = {"books": [600] * 20, "messages": [1] * 3000}
    dataset = write_documents(tmp_path, by_source(lengths), shard_tokens=10**6, weights={"books": 1.0, "messages": 1.0})
    [loader] = make_loaders(dataset, 1, StreamSettings(), num_lanes=8, chunk_len=10)
    for step in range(1, 200):
        loader.skip(1)
        assert abs(loader.consumed["books"] - 40 * step) <= 40


def test_long_documents_are_spread_over_the_lanes_and_the_epoch(tmp_path: Path) -> None:
    """40 documents of 30 to 50 chunks among 8000 short ones, over 8 lanes."""
    rng = np.random.default_rng(0)
    long, short = rng.integers(300, 500, size=40), rng.integers(1, 5, size=8000)
    lengths = rng.permutation(np.concatenate([long, short])).tolist()
    dataset = write_documents(tmp_path, numbered_documents(lengths), shard_tokens=4000)
    longest, share = int(long.max()), long.sum() / (long.sum() + short.sum())
    [loader] = make_loaders(dataset, 1, StreamSettings(order="by_length"), num_lanes=8, chunk_len=10)
    of_lane, in_all = np.zeros(8), []
    for _ in range(sum(lengths) // 80):
        for lane, spans in enumerate(loader.advance()):
            of_lane[lane] += sum(span.stop - span.start for span in spans if span.length > 10)
        in_all.append(of_lane.sum() / (loader.step * 80))
        assert of_lane.max() - of_lane.min() <= 2 * longest
    assert np.abs(np.array(in_all[20:]) - share).max() < 0.08
    # without it, a lane gets as many of them as chance will have
    [shuffled] = make_loaders(dataset, 1, StreamSettings(), num_lanes=8, chunk_len=10)
    by_chance = np.zeros(8)
    for _ in range(sum(lengths) // 80):
        for lane, spans in enumerate(shuffled.advance()):
            by_chance[lane] += sum(span.stop - span.start for span in spans if span.length > 10)
    assert np.ptp(by_chance) > np.ptp(of_lane)


def test_going_back_in_the_same_loader(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, {"a": numbered_documents([3, 1, 4, 1]), "b": numbered_documents([5, 9, 2, 6])})
    [loader] = make_loaders(dataset, 1, StreamSettings(order="by_length"), num_lanes=2, chunk_len=3)
    states, steps = [], []
    for _ in range(12):
        states.append(loader.state_dict())
        steps.append(global_step([loader]))
    for state, step in zip(reversed(states), reversed(steps), strict=True):
        loader.load_state_dict(state)
        assert global_step([loader]) == step


def test_skipping_leads_where_reading_does(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([3, 1, 4, 1, 5, 9, 2, 6]))
    [reading], [skipping] = (make_loaders(dataset, 1, StreamSettings(), num_lanes=2, chunk_len=3) for _ in range(2))
    for _ in range(7):
        reading.next_step()
    skipping.skip(7)
    assert skipping.state_dict() == reading.state_dict()
    assert global_step([skipping]) == global_step([reading])


def test_known_small_case(tmp_path: Path) -> None:
    """Numbers by hand: two lanes, chunks of three, three documents, not shuffled."""
    dataset = write_documents(tmp_path, [[11, 12, 13, 14], [21], [31, 32]])
    [loader] = make_loaders(dataset, 1, StreamSettings(order="stored"), num_lanes=2, chunk_len=3)
    [first], [second] = loader.next_step(), loader.next_step()
    assert first.input_ids.tolist() == [[11, 12, 13], [21, 31, 32]]
    assert first.labels.tolist() == [[12, 13, 14], [EOS, 32, EOS]]
    assert first.reset.tolist() == [[True, False, False], [True, True, False]]
    assert second.input_ids.tolist() == [[14, 11, 12], [21, 31, 32]]
    assert second.labels.tolist() == [[EOS, 12, 13], [EOS, 32, EOS]]
    assert second.reset.tolist() == [[False, True, False], [True, True, False]]
    assert loader.lane_documents() == [("main", 0, 2), None]
    assert loader.consumed == {"main": 12}


def test_a_finite_stream_ends_with_padding(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[11, 12, 13, 14], [21], [31, 32]])
    stream = StreamSettings(order="stored", epochs={"main": 1})
    [loader] = make_loaders(dataset, 1, stream, num_lanes=2, chunk_len=3)
    loader.skip(1)
    [last] = loader.next_step()
    assert last.input_ids.tolist() == [[14, EOS, EOS], [EOS, EOS, EOS]]
    assert last.labels.tolist() == [[EOS, NO_LABEL, NO_LABEL], [NO_LABEL] * 3]
    assert last.reset.tolist() == [[False, True, False], [True, False, False]]
    for _ in range(2):
        with pytest.raises(StopIteration):
            loader.next_step()
    assert loader.consumed == {"main": 7}
    assert loader.step == 2


def test_windows_are_chunks_in_a_row(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([9, 7, 5, 3]))
    for accumulation in (1, 2):
        [loader] = make_loaders(
            dataset, 1, StreamSettings(window_chunks=3), num_lanes=2, chunk_len=4, accumulation=accumulation
        )
        windows = loader.next_step()
        assert [window.input_ids.shape for window in windows] == [(2 // accumulation, 12)] * accumulation
        for window in windows:
            chunks = window.split(4)
            assert [chunk.input_ids.shape for chunk in chunks] == [(2 // accumulation, 4)] * 3
            for whole, *parts in zip(window, *chunks, strict=True):
                assert torch.equal(whole, torch.cat(parts, dim=1))


def test_a_curriculum_cuts_the_lanes_into_longer_and_longer_sequences(tmp_path: Path) -> None:
    """From step 0 every 4 tokens, from step 3 every 5, from step 5 never: in chunks of 6 tokens, one long document."""
    dataset = write_documents(tmp_path, [list(range(1, 200))])
    stream = StreamSettings(sequence_len=((0, 4), (3, 5), (5, None)))
    [loader] = make_loaders(dataset, 1, stream, num_lanes=1, chunk_len=6)
    tokens: list[int] = []
    starts = []
    for _ in range(8):
        [chunk] = loader.next_step()
        starts += [len(tokens) + place for place in chunk.reset[0].nonzero().flatten().tolist()]
        tokens += chunk.input_ids[0].tolist()
    assert starts == [0, 4, 8, 12, 16, 18, 23, 28]
    assert tokens == list(range(1, 49))  # no token is lost at a cut


def test_tensors_are_int64_and_bool(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([9, 9]), dtype="uint16")
    loader = LaneLoader(dataset, StreamSettings(), num_lanes=6, chunk_len=5, rank=1, world_size=2, micro_batch_size=1)
    chunks = loader.next_step()
    assert len(chunks) == 3
    for chunk in chunks:
        assert [tensor.shape for tensor in chunk] == [torch.Size([1, 5])] * 3
        assert [tensor.dtype for tensor in chunk] == [torch.int64, torch.int64, torch.bool]


def test_the_largest_ids_of_16_bits(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[65535, 65534, 65535]], dtype="uint16")
    [loader] = make_loaders(dataset, 1, StreamSettings(), num_lanes=1, chunk_len=3)
    assert loader.next_step()[0].input_ids.tolist() == [[65535, 65534, 65535]]


def test_epochs_are_shuffled_differently(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([1] * 30))
    [loader] = make_loaders(dataset, 1, StreamSettings(), num_lanes=1, chunk_len=30)
    epochs = [loader.next_step()[0].input_ids[0].tolist() for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == list(range(1, 31)) for epoch in epochs)


def test_more_documents_than_are_looked_up_at_once(tmp_path: Path) -> None:
    documents = {"main": numbered_documents([1, 2] * 5000)}
    dataset = write_documents(tmp_path, documents, shard_tokens=4000)
    stream = StreamSettings(seed=5, order="by_length")
    [loader] = make_loaders(dataset, 1, stream, num_lanes=2, chunk_len=1)
    [wide] = make_loaders(dataset, 1, StreamSettings(seed=5), num_lanes=2, chunk_len=1000)
    assert list(islice(steps_of([wide]), 16)) == list(
        islice(plain_steps(documents, dataset, StreamSettings(seed=5), 2, 1000), 16)
    )
    assert list(islice(steps_of([loader]), 50)) == list(islice(plain_steps(documents, dataset, stream, 2, 1), 50))


USUAL = StreamSettings(seed=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "data.seed is 2 here and 1 there"),
        ({"order": "by_length"}, "data.order is by_length here and shuffled there"),
        ({"window_chunks": 2}, "data.window_chunks is 2 here and 1 there"),
        ({"shuffle_shards": 1}, "data.shuffle_shards is 1 here and None there"),
        ({"weights": {"a": 3.0, "b": 1.0}}, r"weight of a is 0\.75 here and 0\.5 there"),
        ({"epochs": {"a": 2}}, "epochs of a is 2 here and None there"),
        ({"sequence_len": ((0, 4),)}, r"data.sequence_len is \[\[0, 4\]\] here and \[\[0, None\]\] there"),
    ],
)
def test_refuses_another_stream_and_says_what_differs(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    dataset = write_documents(tmp_path, {"a": numbered_documents([9, 9]), "b": numbered_documents([9, 9])})
    [loader] = make_loaders(dataset, 1, USUAL, num_lanes=2, chunk_len=5)
    [other] = make_loaders(dataset, 1, StreamSettings(**{"seed": 1, **change}), num_lanes=2, chunk_len=5)
    loader.skip(3)
    state = json.loads(json.dumps(loader.state_dict()))
    with pytest.raises(UserError, match=named + ".*--set data.allow_change=true"):
        other.load_state_dict(state)
    other.load_state_dict(state, allow_change=True)
    assert other.step == 3
    assert other.lane_documents() == loader.lane_documents()


def test_refuses_other_lanes_even_if_told_to_insist(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([9, 9]))
    [loader] = make_loaders(dataset, 1, USUAL, num_lanes=2, chunk_len=5)
    [other] = make_loaders(dataset, 1, USUAL, num_lanes=4, chunk_len=5)
    with pytest.raises(UserError, match=r"lanes is 4 here and 2 there\. Restore these settings, or start a new run\.$"):
        other.load_state_dict(loader.state_dict(), allow_change=True)


def test_other_documents_are_refused_a_copy_is_not(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "a", numbered_documents([9, 9]))
    changed = write_documents(tmp_path / "b", [[1, 2], [3, 4]])
    copied = write_documents(tmp_path / "c", numbered_documents([9, 9]))
    [loader] = make_loaders(dataset, 1, USUAL, num_lanes=2, chunk_len=5)
    loader.next_step()
    here, there = changed.sources["main"].fingerprint, dataset.sources["main"].fingerprint
    with pytest.raises(UserError, match=f"documents of main is {here} here and {there} there"):
        make_loaders(changed, 1, USUAL, num_lanes=2, chunk_len=5)[0].load_state_dict(loader.state_dict())
    [moved] = make_loaders(copied, 1, USUAL, num_lanes=2, chunk_len=5)
    moved.load_state_dict(loader.state_dict())
    assert global_step([moved]) == global_step([loader])


def test_insisting_on_a_change_keeps_what_is_the_same(tmp_path: Path) -> None:
    """c replaces b: lanes in documents of a read them to the end, a's order goes on, b's lanes take new ones."""
    a, b, c = (list(range(start, start + 30)) for start in (100, 200, 300))
    before = write_documents(tmp_path / "x", {"a": [a, a[:7]], "b": [b, b[:7]]}, weights={"a": 1.0, "b": 1.0})
    after = write_documents(tmp_path / "y", {"a": [a, a[:7]], "c": [c, c[:7]]}, weights={"a": 1.0, "c": 1.0})
    stream = StreamSettings(order="stored")
    [loader] = make_loaders(before, 1, stream, num_lanes=2, chunk_len=10)
    input_ids, _, _ = global_step([loader])
    assert input_ids == [a[:10], b[:10]]
    [changed] = make_loaders(after, 1, stream, num_lanes=2, chunk_len=10)
    changed.load_state_dict(loader.state_dict(), allow_change=True)
    input_ids, _, reset = global_step([changed])
    assert input_ids == [a[10:20], c[:10]]
    assert reset == [[False] * 10, [True] + [False] * 9]
    assert changed.consumed == {"a": 20, "c": 10}


def test_half_of_the_sources_with_weights_is_refused(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, {"a": [[1, 2]], "b": [[3]]})
    with pytest.raises(UserError, match="the source b has no weight, but a has one"):
        make_loaders(dataset, 1, StreamSettings(weights={"a": 1.0}), num_lanes=1, chunk_len=1)


def test_sources_without_weights_end_together(tmp_path: Path) -> None:
    """Their tokens times their epochs are their weights."""
    dataset = write_documents(tmp_path, by_source({"a": [5] * 40, "b": [5] * 20}))
    [loader] = make_loaders(dataset, 1, StreamSettings(epochs={"a": 1, "b": 3}), num_lanes=2, chunk_len=5)
    for step in range(1, 51):
        loader.skip(1)
        assert abs(loader.consumed["a"] - 4 * step) <= 15
    with pytest.raises(StopIteration):
        loader.advance()
    assert loader.consumed == {"a": 200, "b": 300}


def test_impossible_deals_are_refused(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, [[1, 2]])
    with pytest.raises(ValueError, match="6 lanes cannot be dealt to 2 ranks x 2 rows"):
        LaneLoader(dataset, USUAL, num_lanes=6, chunk_len=1, rank=0, world_size=2, micro_batch_size=2)


def test_a_source_read_more_often_than_it_now_may_be_is_exhausted(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, numbered_documents([9, 9]))
    [loader] = make_loaders(dataset, 1, USUAL, num_lanes=2, chunk_len=5)
    [fewer] = make_loaders(dataset, 1, StreamSettings(seed=1, epochs={"main": 2}), num_lanes=2, chunk_len=5)
    loader.skip(20)  # 200 tokens, 11 epochs
    fewer.load_state_dict(loader.state_dict(), allow_change=True)
    with pytest.raises(StopIteration):  # after the documents that lanes are in
        fewer.skip(3)
