"""The beginning of a source, against the list of its tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_train.data.views import SourceHead, head, select_sources
from mmrec_train.evaluation import FixedLanes
from tests.data.documents import EOS, numbered_documents, write_documents


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    limit=st.integers(1, 200),
    shard_tokens=st.integers(1, 60),
)
def test_a_head_holds_the_first_tokens(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, shard_tokens: int
) -> None:
    documents = numbered_documents(lengths)
    dataset = write_documents(tmp_path_factory.mktemp("data"), documents, shard_tokens=shard_tokens)
    view = head(dataset, "main", limit)
    source = view.sources["main"]
    assert isinstance(source, SourceHead)
    read = [source.read(number).tolist() for number in range(source.num_documents)]
    whole = [token for document in documents for token in document]
    assert [token for document in read for token in document] == whole[:limit]
    assert view.num_tokens == source.num_tokens == sum(shard.tokens for shard in source.shards) == len(whole[:limit])
    assert view.num_documents == source.num_documents == sum(shard.documents for shard in source.shards)
    assert source.first_document[-1] == source.num_documents
    for number, document in enumerate(read):
        rest = documents[number][len(document) :]
        assert source.label_at_end(number) == (rest[0] if rest else None)
    # the data set itself stays as it is
    assert dataset.num_tokens == len(whole) and dataset.sources["main"].num_documents == len(lengths)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    limit=st.none() | st.integers(1, 200),
    chunk_len=st.integers(1, 40),
    world_size=st.integers(1, 3),
    batch=st.integers(1, 3),
)
def test_fixed_lanes_give_every_token_once_with_its_label_and_position(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    limit: int | None,
    chunk_len: int,
    world_size: int,
    batch: int,
) -> None:
    documents = numbered_documents(lengths)
    view = head(write_documents(tmp_path_factory.mktemp("data"), documents), "main", limit)
    expected = [
        (token, label, position)
        for document in documents
        for position, (token, label) in enumerate(zip(document, [*document[1:], EOS], strict=True))
    ][:limit]
    found, chunks = [], []
    for rank in range(world_size):
        lanes = FixedLanes(view, chunk_len=chunk_len, batch=batch, rank=rank, world_size=world_size)
        chunks.append(0)
        for chunk, position in lanes:
            counted = chunk.labels != -100
            found += list(zip(*(t[counted].tolist() for t in (chunk.input_ids, chunk.labels, position)), strict=True))
            assert (position[counted & chunk.reset] == 0).all()
            chunks[-1] += 1
    assert sorted(found) == sorted(expected)
    assert len(set(chunks)) == 1  # every rank calls the model as often as the others


def test_selected_sources(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path, {"a": [[1, 2]], "b": [[3]], "c": [[4, 5], [6]]})
    view = select_sources(dataset, ["c", "a"])
    assert list(view.sources) == ["a", "c"] and (view.num_documents, view.num_tokens) == (3, 5)
    assert np.array_equal(view.sources["c"].read(1), [6])
    assert list(dataset.sources) == ["a", "b", "c"] and dataset.num_tokens == 6
