from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec_train.data.statistics import Lengths, combined, count_lengths
from tests.data.documents import numbered_documents, write_documents

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def lengths_of(lengths: list[int]) -> Lengths:
    return Lengths(*np.unique(np.array(lengths), return_counts=True))


@given(lengths=lengths_lists)
def test_sums_and_quantiles(lengths: list[int]) -> None:
    counted = lengths_of(lengths)
    assert counted.documents == len(lengths)
    assert counted.tokens == sum(lengths)
    assert counted.mean == pytest.approx(np.mean(lengths))
    for part in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert counted.quantile(part) == np.quantile(lengths, part, method="inverted_cdf")


@given(lengths=lengths_lists, edges=st.sets(st.integers(1, 299), max_size=4))
def test_positions(lengths: list[int], edges: set[int]) -> None:
    starts = [0, *sorted(edges)]
    found = lengths_of(lengths).by_position(starts)
    positions = [range(length) for length in lengths]
    assert [part.start for part in found] == starts
    assert [part.stop for part in found] == [*starts[1:], None]
    for start, stop, documents, tokens in found:
        inside = [[p for p in document if p >= start and (stop is None or p < stop)] for document in positions]
        assert documents == sum(bool(document) for document in inside)
        assert tokens == sum(map(len, inside))


@given(lengths=lengths_lists)
def test_doublings(lengths: list[int]) -> None:
    found = lengths_of(lengths).by_doubling()
    assert found[0].start <= min(lengths) < 2 * found[0].start
    assert found[-1].start <= max(lengths) < 2 * found[-1].start
    for start, stop, documents, tokens in found:
        inside = [length for length in lengths if start <= length < 2 * start]
        assert (stop, documents, tokens) == (2 * start, len(inside), sum(inside))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_counting_sources_by_blocks(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec_train.data.statistics._BLOCK", block)
    lengths = {"a": [3, 1, 3, 70, 2, 2, 2], "b": [1, 500]}
    dataset = write_documents(tmp_path, {name: numbered_documents(of) for name, of in lengths.items()}, shard_tokens=5)
    heard: list[int] = []
    counted = [count_lengths(source, heard.append) for source in dataset.sources.values()]
    assert [(part.values.tolist(), part.counts.tolist()) for part in counted] == [
        ([1, 2, 3, 70], [1, 3, 2, 1]),
        ([1, 500], [1, 1]),
    ]
    assert sum(heard) == 9
    both = combined(counted)
    assert both.values.tolist() == [1, 2, 3, 70, 500]
    assert both.counts.tolist() == [2, 3, 2, 1, 1]
