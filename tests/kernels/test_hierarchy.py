from dataclasses import dataclass, replace

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
from mmrec_kernels.hierarchy import Pyramid, RingWrites, latest_pyramid, slots_in_pages

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@dataclass
class Lane:
    """Rows whose slots are written one by one into a ring of `slots`, of which a chunk writes `new` after `before`.

    keys and values [B, R, n, E] are those of all slots in their order, number [B, n] those in their documents, of which
    a query sees the last `slots`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    number: torch.Tensor
    slots: int
    before: int
    new: int

    def ring(self, time):
        """Keys and values [B, R, M, E] of the ring after so many writes, and which slots they are [B, M]."""
        held = [{n % self.slots: i for i, n in enumerate(row)} for row in self.number[:, :time].tolist()]
        which = torch.tensor([[row.get(index, -1) for index in range(self.slots)] for row in held])
        index = which[:, None, :, None]
        keys, values = (
            torch.where(index < 0, 0, x.take_along_dim(index.clamp_min(0), 2)) for x in (self.keys, self.values)
        )
        return keys, values, which

    def completed(self, time):
        """Slots of each row's document after so many writes [B]."""
        return self.number[:, time - 1] + 1 if time else torch.zeros(len(self.keys), dtype=torch.int64)

    def writes(self, unused=0):
        """The new slots as one chunk writes them, with some more that it could have written."""
        number = self.number[:, self.before : self.before + self.new]
        number = torch.nn.functional.pad(number, (0, unused), value=3)
        count = torch.full((len(number),), self.new)
        return RingWrites.of(self.slots, self.completed(self.before), number, count)

    def pyramid(self):
        """The pyramid of the ring before the chunk: averages of what could be seen when a node was written last."""
        keys, _, which = self.ring(self.before)
        levels = [torch.zeros_like(keys[:, :, : -(-self.slots // size)]) for size in (4, 16)]
        for level, size in zip(levels, (4, 16), strict=True):
            for b, row in enumerate(which):
                for node, inside in enumerate(row.split(size)):
                    newest = int(inside.max())
                    own = inside[inside > newest - 1 - self.number[b, newest]] if newest >= 0 else inside[:0]
                    if len(own):
                        level[b, :, node] = self.keys[b, :, own].double().mean(1)
        return Pyramid(*levels)

    def chunk(self, unused=0):
        """Keys and values of ring + new slots, those not written NaN."""
        new = slice(self.before, self.before + self.new)
        nothing = self.keys.new_full((*self.keys.shape[:2], unused, self.keys.shape[3]), float("nan"))
        ring_k, ring_v, _ = self.ring(self.before)
        return tuple(torch.cat([r, x[:, :, new], nothing], 2) for r, x in ((ring_k, self.keys), (ring_v, self.values)))

    def rule(self, length, g):
        """slot_stop and completed [B, T] of queries at random times, one in five in a document without slots."""
        times = torch.randint(0, self.new + 1, (len(self.keys), length), generator=g).sort(1).values
        fresh = torch.rand(times.shape, generator=g) < 0.2
        completed = [[self.completed(self.before + int(n))[b] for n in row] for b, row in enumerate(times)]
        return dict(slot_stop=self.slots + times, completed=torch.where(fresh, 0, torch.tensor(completed)))

    def as_seen(self, b, stop):
        """The ring of row b as a query with this slot_stop finds it: keys, values [1, R, M, E], stamps [1, M]."""
        keys, values, which = self.ring(self.before + stop - self.slots)
        return keys[b : b + 1], values[b : b + 1], which[b : b + 1] + self.slots - self.before


def interval(rule, slots):
    """slot_start and slot_stop of `memory_attention`."""
    return dict(
        slot_start=rule["slot_stop"] - rule["completed"].clamp_max(slots),
        slot_stop=rule["slot_stop"],
    )


def random_lane(g, batch, banks, slots, before, new, *, width=6, dtype=torch.float64, change=0.1):
    """Documents begin at random slots; there is a slot that nobody writes."""
    shape = (2, batch, banks, before + new + 1, width)
    every = torch.arange(before + new + 1)
    begins = torch.where(torch.rand(batch, before + new + 1, generator=g) < change, every, 0).cummax(1).values
    return Lane(*torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), every - begins, slots, before, new)


def generator(seed):
    return torch.Generator().manual_seed(seed)


lanes = dict(
    batch=st.integers(1, 2),
    banks=st.sampled_from([1, 2]),
    slots=st.integers(1, 70),
    before=st.integers(0, 200),
    new=st.integers(0, 90),
    g=st.integers(0, 2**31).map(generator),
    change=st.sampled_from([0.0, 0.05, 0.3]),
)


@settings(max_examples=30, deadline=None)
@given(**lanes, dtype=st.sampled_from(DTYPES), cut=st.floats(0, 1))
def test_pyramid_after_writes_is_that_of_the_ring_wherever_they_are_cut(dtype, cut, **shape):
    lane = random_lane(**shape, dtype=dtype)
    middle = int(cut * lane.new)
    ends = []
    for parts in ([(0, lane.new)], [(0, middle), (middle, lane.new)]):
        pyramid = lane.pyramid()
        for first, last in parts:
            part = replace(lane, before=lane.before + first, new=last - first)
            keys, _ = part.chunk(unused=1)
            writes = part.writes(unused=1)
            pyramid = latest_pyramid(update_pyramid(pyramid, keys, writes), writes)
        ends.append(pyramid)
    expected = replace(lane, before=lane.before + lane.new, new=0).pyramid()
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    for whole, in_parts, e in zip(*ends, expected, strict=True):
        assert torch.equal(in_parts, whole)
        torch.testing.assert_close(whole, e, **tolerance)


@pytest.mark.parametrize("slots", [1, 5, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pyramid_built_at_once_is_the_one_written_slot_by_slot(slots, dtype):
    lane = random_lane(generator(1), 2, 2, slots, 0, slots + 3, dtype=dtype, change=0.0)
    keys, _ = lane.chunk()
    history = update_pyramid(lane.pyramid(), keys, lane.writes())
    written = latest_pyramid(history, lane.writes())
    ring, _, _ = lane.ring(lane.new)
    built = build_pyramid(ring)
    for w, b, size in zip(written, built, (4, 16), strict=True):
        torch.testing.assert_close(w, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        if dtype == torch.float64:
            torch.testing.assert_close(b, reference.build_pyramid(ring, size))


@settings(max_examples=40, deadline=None)
@given(**lanes, length=st.integers(1, 12), topk=st.integers(1, 5), gathered=st.sampled_from([1, 2**24]))
def test_selection_and_read_equal_the_loop_over_the_ring_as_each_query_finds_it(length, topk, gathered, g, **shape):
    lane = random_lane(g, **shape, width=8)
    keys, values = lane.chunk(unused=2)
    writes, rule = lane.writes(unused=2), lane.rule(length, g)
    q = torch.randn(shape["batch"], 2, length, 4 * shape["banks"], generator=g, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrec_kernels.hierarchy.GATHERED", gathered)
        history = update_pyramid(lane.pyramid(), keys, writes)
        pages = select_pages(q, history, writes, **rule, topk_blocks=topk)
    assert pages.shape == (shape["batch"], 2, length, min(topk, (lane.slots + 3) // 4))
    paged = [slots_in_pages(x, writes) for x in (keys, values)]
    out, lse = memory_attention(q, *paged, slot_stamp=writes.page_stamp, **interval(rule, lane.slots), pages=pages)
    for b in range(shape["batch"]):
        for t in range(length):
            ring_k, ring_v, stamp = lane.as_seen(b, int(rule["slot_stop"][b, t]))
            one_rule = {name: x[b : b + 1, t : t + 1] for name, x in rule.items()}
            own = interval(one_rule, lane.slots) | dict(slot_stamp=stamp)
            one = q[b : b + 1, :, t : t + 1]
            by_head = [heads[0] for heads in reference.select_pages(one, ring_k, **own, topk_blocks=topk)[0]]
            for h, chosen in enumerate(by_head):
                real = [p for p in pages[b, h, t].tolist() if p >= 0]
                assert len({*real}) == len(real) == len(chosen)
            listed = torch.full((1, 2, 1, max(map(len, by_head), default=0) or 1), -1)
            for h, chosen in enumerate(by_head):
                listed[0, h, 0, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int64)
            expected = reference.memory_attention(one, ring_k, ring_v, **own, pages=listed)
            torch.testing.assert_close(out[b, :, t], expected[0][0, :, 0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(lse[b, :, t], expected[1][0, :, 0], rtol=1e-9, atol=1e-9)


def full_ring(slots, keys):
    """Pyramid, writes (none) and rule of a ring of which one query sees all."""
    nothing = torch.zeros(1, dtype=torch.int64)
    writes = RingWrites.of(slots, nothing + slots, nothing.view(1, 1)[:, :0], nothing)
    rule = dict(slot_stop=torch.full((1, 1), slots), completed=torch.full((1, 1), slots))
    return build_pyramid(keys), writes, rule


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, -0.0), (-1.0, 0.0), (-2.0, -1.0), (1.0, 1 + 2**-23)])
def test_of_equal_scores_the_smaller_index_wins(low, high):
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    keys = torch.full((1, 1, 64, 2), low)
    keys[:, :, 32:] = high
    pyramid, writes, rule = full_ring(64, keys)
    pages = select_pages(q, pyramid, writes, **rule, topk_blocks=3)
    assert {*pages.flatten().tolist()} == {8, 9, 10}


def test_infinite_scores_have_their_place_and_nan_stays_in_its_row():
    keys = torch.zeros(1, 1, 64, 2)
    keys[:, :, 16:32, 0], keys[:, :, 32:48, 0] = float("inf"), float("-inf")
    pyramid, writes, rule = full_ring(64, keys)
    rule = {name: x.expand(1, 3) for name, x in rule.items()}
    q = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0]]).view(1, 1, 3, 2)
    pages = select_pages(q, pyramid, writes, **rule, topk_blocks=1)
    assert pages.flatten().tolist()[:2] == [4, 8]
    assert 0 <= pages.flatten()[2] < 16


def test_what_a_query_does_not_see_does_not_change_its_selection():
    g = generator(7)
    lane = random_lane(g, 1, 1, 80, 100, 40, width=8, change=0.05)
    writes, rule = lane.writes(), lane.rule(30, g)
    q = torch.randn(1, 2, 30, 4, generator=g, dtype=torch.float64)

    def select():
        keys, _ = lane.chunk()
        return select_pages(q, update_pyramid(lane.pyramid(), keys, writes), writes, **rule, topk_blocks=2)

    pages, keys = select(), lane.keys
    for t in (3, 17, 29):
        seen, stamp = interval(rule, 80), torch.arange(141) + 80 - 100
        hidden = (stamp < seen["slot_start"][0, t]) | (stamp >= seen["slot_stop"][0, t])
        lane.keys = torch.where(hidden[:, None], 100.0, keys)
        assert torch.equal(select()[:, :, t], pages[:, :, t])


@pytest.mark.parametrize("slots", [37, 64])
def test_pages_that_cover_everything_are_everything(slots, backend, device):
    g = generator(2)
    lane = random_lane(g, 1, 2, slots, 50, 30, width=16, dtype=torch.float32)
    writes, rule = lane.writes(), {name: x.to(device) for name, x in lane.rule(20, g).items()}
    writes = writes._replace(**{name: x.to(device) for name, x in writes._asdict().items() if name != "slots"})
    keys, values = (x.to(device) for x in lane.chunk())
    q = torch.randn(1, 2, 20, 16, generator=g).to(device)
    pyramid = Pyramid(*(level.to(device) for level in lane.pyramid()))
    pages = select_pages(q, update_pyramid(pyramid, keys, writes), writes, **rule, topk_blocks=(slots + 3) // 4)
    written = int(lane.completed(50)[0])
    stamp = torch.cat([(torch.arange(slots) - written) % slots, torch.arange(slots, slots + 30)])[None].to(device)
    seen = interval(rule, slots)

    def run(read):
        leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
        out, lse = read(*leaves)
        gradients = torch.autograd.grad(out.square().sum() + lse.exp().sum(), leaves)
        return out, lse, *gradients

    dense = run(lambda q, k, v: memory_attention(q, k, v, slot_stamp=stamp, **seen))
    paged = run(
        lambda q, k, v: memory_attention(
            q,
            slots_in_pages(k, writes),
            slots_in_pages(v, writes),
            slot_stamp=writes.page_stamp,
            **seen,
            pages=pages,
        )
    )
    for d, p in zip(dense, paged, strict=True):
        torch.testing.assert_close(p, d, rtol=1e-5, atol=1e-5)


def test_operator_and_compilation():
    g = generator(3)
    lane = random_lane(g, 2, 1, 20, 30, 9, width=8, dtype=torch.float32)
    keys, _ = lane.chunk()
    writes, rule = lane.writes(), lane.rule(12, g)
    q = torch.randn(2, 2, 12, 4, generator=g)
    history = update_pyramid(lane.pyramid(), keys, writes)
    arguments = (q, *history, *rule.values(), 20, 2)
    torch.library.opcheck(torch.ops.mmrec.select_pages.default, arguments)

    def everything(pyramid, keys, q):
        history = update_pyramid(pyramid, keys, writes)
        return select_pages(q, history, writes, **rule, topk_blocks=2)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(lane.pyramid(), keys, q), everything(lane.pyramid(), keys, q))


def test_no_pages_at_all_are_refused():
    pyramid, writes, rule = full_ring(8, torch.zeros(1, 1, 8, 2))
    with pytest.raises(ValueError, match="topk_blocks is 0, expected at least 1"):
        select_pages(torch.zeros(1, 1, 1, 2), pyramid, writes, **rule, topk_blocks=0)
