"""Delivery on a GPU: pinned memory and a stream of its own change no token."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrec_train.data import LaneLoader, TokenDataset
from mmrec_train.data.delivery import Delivery
from mmrec_train.data.lanes import Chunk, StreamSettings
from tests.data.documents import numbered_documents, write_documents

DEVICE = torch.device("cuda")


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return write_documents(tmp_path, numbered_documents([3000] * 20), shard_tokens=10**6)


class DelayedCopies(LaneLoader):
    """Keeps the stream on which steps are copied busy before each of them."""

    def next_step(self) -> list[Chunk]:
        if threading.current_thread().name == "data":
            torch.cuda._sleep(20_000_000)  # cycles: 10 ms
        return super().next_step()


def make(dataset: TokenDataset, kind: type[LaneLoader] = LaneLoader) -> LaneLoader:
    return kind(dataset, StreamSettings(), num_lanes=8, chunk_len=4096, micro_batch_size=4)


def arriving(loader: LaneLoader, steps: int, products: int) -> Iterator[list[Chunk]]:
    """Copies of the steps, queued behind so many matrix products each, which are not waited for."""
    busy = torch.randn(4096, 4096, device=DEVICE)
    with Delivery(loader, DEVICE) as delivery:
        for _ in range(steps):
            for _ in range(products):
                busy = busy @ busy / 64
            yield [Chunk(*(tensor.clone() for tensor in window)) for window in delivery.next_step()]


def assert_the_same(arrived: list[list[Chunk]], plain: LaneLoader) -> None:
    for step in arrived:
        for window, expected in zip(step, plain.next_step(), strict=True):
            assert all(torch.equal(tensor.cpu(), right) for tensor, right in zip(window, expected, strict=True))


def test_the_same_steps_arrive_while_the_gpu_computes(dataset: TokenDataset) -> None:
    """The copies of later steps are done before an earlier one is read: its memory must not be theirs."""
    assert_the_same(list(arriving(make(dataset), steps=50, products=10)), make(dataset))


def test_no_step_is_read_before_it_is_copied(dataset: TokenDataset) -> None:
    assert_the_same(list(arriving(make(dataset, DelayedCopies), steps=20, products=0)), make(dataset))


def test_copies_are_asynchronous(dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pinned memory, on a stream that is not the one that trains."""
    copy = torch.Tensor.to
    copies: list[tuple[bool, bool, bool]] = []

    def watched(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if threading.current_thread().name == "data" and arguments[:1] == (DEVICE,):
            own_stream = torch.cuda.current_stream() != torch.cuda.default_stream()
            copies.append((tensor.is_pinned(), options.get("non_blocking", False), own_stream))
        return copy(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    assert len(list(arriving(make(dataset), steps=3, products=0))) == 3
    assert len(copies) >= 3 * 2 * len(Chunk._fields)
    assert set(copies) == {(True, True, True)}
