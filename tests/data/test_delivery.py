"""Delivery: the loader's steps unchanged, ahead of time, and a thread that always ends."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec_train.data import Chunk, LaneLoader, TokenDataset
from mmrec_train.data.delivery import DEPTH, Delivery
from mmrec_train.data.lanes import StreamSettings
from mmrec_train.errors import UserError
from tests.data.documents import numbered_documents, write_documents

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_documents(tmp_path, numbered_documents([7, 40, 1, 13, 90, 22, 5]))


def make_loader(dataset: TokenDataset, **settings: Any) -> LaneLoader:
    return LaneLoader(dataset, StreamSettings(**settings), num_lanes=4, chunk_len=6, micro_batch_size=2)


def values(step: list[Chunk]) -> list[list[Any]]:
    return [[tensor.tolist() for tensor in window] for window in step]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("window", [1, 3])
def test_steps_and_positions_are_those_of_the_loader(dataset: TokenDataset, window: int) -> None:
    plain = make_loader(dataset, window_chunks=window)
    with Delivery(make_loader(dataset, window_chunks=window), CPU) as delivery:
        assert delivery.state_dict() == plain.state_dict()
        for _ in range(12):
            assert values(delivery.next_step()) == values(plain.next_step())
            assert delivery.state_dict() == plain.state_dict()
            assert delivery.consumed == plain.consumed


def test_going_on_from_any_position(dataset: TokenDataset) -> None:
    with Delivery(make_loader(dataset), CPU) as delivery:
        states, steps = [], []
        for _ in range(6):
            states.append(delivery.state_dict())
            steps.append(values(delivery.next_step()))
    for first, state in enumerate(states):
        loader = make_loader(dataset)
        loader.load_state_dict(state)
        with Delivery(loader, CPU) as again:
            assert [values(again.next_step()) for _ in steps[first:]] == steps[first:]


def test_the_end_of_a_stream_comes_after_its_last_step_and_stays(dataset: TokenDataset) -> None:
    plain = make_loader(dataset, epochs={"main": 1})
    steps = [values(step) for step in iter(plain.next_step, None)]
    with Delivery(make_loader(dataset, epochs={"main": 1}), CPU) as delivery:
        assert [values(delivery.next_step()) for _ in steps] == steps
        for _ in range(2):
            with pytest.raises(StopIteration):
                delivery.next_step()
        assert delivery.state_dict() == plain.state_dict()


class Watched(LaneLoader):
    """Counts its steps, can be held up, and fails at one of them."""

    made = 0
    fails_at: int | None = None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def has_made(self, steps: int) -> bool:
        return self.made == steps

    def next_step(self) -> list[Chunk]:
        self.may_go_on.wait()
        if self.made == self.fails_at:
            raise UserError("shard lost")
        self.made += 1
        return super().next_step()


@pytest.fixture
def watched(dataset: TokenDataset) -> Watched:
    return Watched(dataset, StreamSettings(), num_lanes=4, chunk_len=6, micro_batch_size=2)


def test_so_many_steps_are_made_ahead_and_no_more(watched: Watched) -> None:
    with Delivery(watched, CPU) as delivery:
        for taken in range(3):
            ahead = taken + DEPTH
            until(partial(watched.has_made, ahead))
            time.sleep(0.02)  # nothing more may come
            assert watched.made == ahead
            delivery.next_step()


def test_an_error_arrives_where_the_step_is_taken_and_says_where_it_was_raised(watched: Watched) -> None:
    watched.fails_at = 3
    with Delivery(watched, CPU) as delivery:
        for _ in range(3):
            delivery.next_step()
        position = delivery.state_dict()
        for _ in range(2):
            with pytest.raises(UserError, match="shard lost") as caught:
                delivery.next_step()
            assert "test_delivery.py" in str(caught.traceback[-1].path)
            assert caught.traceback[-1].name == "next_step" and caught.traceback[-2].name == "_make_step"
        assert delivery.state_dict() == position


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_the_thread_ends_when_its_user_fails(watched: Watched, taken: int) -> None:
    def fail() -> Delivery:
        with Delivery(watched, CPU) as delivery:
            deliveries.append(delivery)
            for _ in range(taken):
                delivery.next_step()
            raise ZeroDivisionError

    deliveries: list[Delivery] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    [delivery] = deliveries
    made = watched.made
    assert made <= taken + DEPTH
    delivery.close()  # again: nothing happens
    assert watched.made == made


def test_waiting_is_measured_and_counted_once(watched: Watched) -> None:
    watched.may_go_on.clear()
    with Delivery(watched, CPU) as delivery:
        threading.Timer(0.2, watched.may_go_on.set).start()
        delivery.next_step()
        [waited] = delivery.waits()
        assert waited > 0.05
        assert delivery.waits() == []
        until(partial(watched.has_made, 1 + DEPTH))
        delivery.next_step()
        delivery.next_step()
        assert len(waits := delivery.waits()) == 2
        assert max(waits) < waited
