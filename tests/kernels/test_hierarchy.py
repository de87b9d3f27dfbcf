import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_kernels import (
    build_pyramid,
    memory_attention,
    reference,
    select_pages,
    update_pyramid,
)
from tests.kernels.test_attention import options_on, problem, relative_error, to


def rule(options):
    return {name: options[name] for name in ("slot_stamp", "slot_start", "slot_stop")}


def in_order(options, slots):
    """The ring in chronological order, begun at some index."""
    stamp = (torch.arange(slots) - 5) % slots
    return options | dict(slot_stamp=stamp.expand_as(options["slot_stamp"]).contiguous())


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    banks=st.integers(1, 3),
    slots=st.integers(1, 70),
    written=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_pyramid_after_writes_is_that_of_the_slots(batch, banks, slots, written, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    before, after = torch.randn(2, batch, banks, slots, 6, generator=g, dtype=torch.float64).to(dtype)
    index = torch.randint(-1, slots, (batch, written), generator=g)
    untouched = torch.ones(batch, slots + 1, dtype=torch.bool).scatter(1, index % (slots + 1), False)[:, :slots]
    after = torch.where(untouched[:, None, :, None], before, after)
    updated = update_pyramid(build_pyramid(before), after, index)
    whole = build_pyramid(after)
    assert torch.equal(updated.pages, whole.pages) and torch.equal(updated.coarse, whole.coarse)
    if dtype == torch.float64:
        torch.testing.assert_close(whole.pages, reference.build_pyramid(after, 4))
        torch.testing.assert_close(whole.coarse, reference.build_pyramid(after, 16))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    banks=st.sampled_from([1, 2]),
    length=st.integers(1, 12),
    slots=st.integers(1, 100),
    topk=st.integers(1, 5),
    ordered=st.booleans(),
    gathered=st.sampled_from([1, 2**24]),
    seed=st.integers(0, 2**31),
)
def test_selection_equals_the_loop(batch, banks, length, slots, topk, ordered, gathered, seed):
    tensors, options = problem(batch, 2, length, slots, 1, 0, seed, banks=banks, width=4)
    options = in_order(options, slots) if ordered else options
    q, k = tensors["q"], tensors["slots_k"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrec_kernels.hierarchy.GATHERED", gathered)
        pages = select_pages(q, k, build_pyramid(k), **rule(options), topk_blocks=topk)
    expected = reference.select_pages(q, k, **rule(options), topk_blocks=topk)
    assert pages.shape == (batch, 2, length, min(topk, (slots + 3) // 4))
    chosen = [[[{p for p in row if p >= 0} for row in head] for head in batch] for batch in pages.tolist()]
    assert chosen == expected
    assert all(len({*row} - {-1}) == len([p for p in row if p >= 0]) for b in pages.tolist() for h in b for row in h)


def test_of_equal_scores_the_smaller_index_wins():
    q = torch.ones(1, 1, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, 1, 64, 4, dtype=torch.float64)
    k[:, :, 32:] = 1.0
    everything = dict(
        slot_stamp=torch.arange(64)[None],
        slot_start=torch.zeros(1, 1, dtype=torch.int64),
        slot_stop=torch.full((1, 1), 64),
    )
    pages = select_pages(q, k, build_pyramid(k), **everything, topk_blocks=3)
    assert {*pages.flatten().tolist()} == {8, 9, 10}


def test_what_a_query_does_not_see_does_not_change_its_selection():
    tensors, options = problem(1, 2, 30, 80, 1, 0, seed=7)
    options = in_order(options, 80)
    q, k = tensors["q"], tensors["slots_k"]
    pages = select_pages(q, k, build_pyramid(k), **rule(options), topk_blocks=2)
    for t in (3, 17, 29):
        stamp = options["slot_stamp"][0]
        hidden = (stamp < options["slot_start"][0, t]) | (stamp >= options["slot_stop"][0, t])
        other = torch.where(hidden[:, None], 100.0, k)
        changed = select_pages(q, other, build_pyramid(other), **rule(options), topk_blocks=2)
        assert torch.equal(changed[:, :, t].sort(-1).values, pages[:, :, t].sort(-1).values)


def test_reading_the_selected_pages_is_reading_everything_when_they_cover_it(backend, device):
    tensors, options = problem(1, 2, 20, 37, 6, 4, seed=2, banks=1)
    tensors, options = to(device, tensors, torch.float32), options_on(device, options)
    k = tensors["slots_k"]
    pages = select_pages(tensors["q"], k, build_pyramid(k), **rule(options), topk_blocks=10)
    dense = memory_attention(**tensors, **options)
    paged = memory_attention(**tensors, **options, pages=pages)
    for d, p in zip(dense, paged, strict=True):
        assert relative_error(p, d.double().cpu()) < 1e-6
