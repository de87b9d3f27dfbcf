import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_kernels import attention, interval_attention, memory_attention, merge_partial_reads, reference


def problem(batch, heads, length, slots, window, carried, seed):
    """Inputs of a read in fp64: a ring of slots in random order, visible intervals, `carried` earlier tokens."""
    g = torch.Generator().manual_seed(seed)
    d = 4

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = dict(
        q=randn(batch, heads, length, d),
        slots_k=randn(batch, heads, slots, d),
        slots_v=randn(batch, heads, slots, d),
        window_k=randn(batch, heads, carried + length, d),
        window_v=randn(batch, heads, carried + length, d),
        null_k=randn(heads, d),
        null_v=randn(heads, d),
    )
    stop = torch.randint(0, slots + 1, (batch, length), generator=g)
    start = (stop - torch.randint(0, slots + 1, (batch, length), generator=g)).clamp_min(0)
    own = torch.arange(carried, carried + length)
    options = dict(
        slot_stamp=torch.stack([torch.randperm(slots, generator=g) for _ in range(batch)]),
        slot_start=start,
        slot_stop=stop,
        window_start=(own - torch.randint(0, carried + length, (batch, length), generator=g)).clamp_min(0),
        window=window,
        rope_theta=100.0,
    )
    return tensors, options


def run(function, tensors, options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    out, lse = function(**leaves, **options)
    loss = (out * out.detach().cos()).sum() + (lse.sin()).sum()
    return [out, lse, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 20),
    slots=st.integers(1, 9),
    window=st.integers(1, 12),
    carried=st.integers(0, 12),
    block=st.sampled_from([3, 512]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loop_with_its_gradients(batch, length, slots, window, carried, block, seed):
    tensors, options = problem(batch, 2, length, slots, window, carried, seed)
    expected = run(reference.memory_attention, tensors, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        actual = run(memory_attention, tensors, options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_partial_reads_merge_to_the_whole():
    tensors, options = problem(2, 3, 10, 8, 1, 0, seed=0)
    q, k, v = tensors["q"], tensors["slots_k"], tensors["slots_v"]
    interval = dict(start=options["slot_start"], stop=options["slot_stop"])
    stamp = options["slot_stamp"]
    parts = [
        interval_attention(q, k[:, :, s], v[:, :, s], stamp=stamp[:, s], **interval) for s in (slice(0, 3), slice(3, 8))
    ]
    out, lse = merge_partial_reads([p[0] for p in parts], [p[1] for p in parts])
    whole_out, whole_lse = interval_attention(q, k, v, stamp=stamp, **interval)
    torch.testing.assert_close(out, whole_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_nothing_reads_zero():
    q = torch.randn(1, 1, 2, 4)
    k, v = torch.randn(2, 1, 1, 3, 4)
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    out, lse = interval_attention(q, k, v, start=zeros, stop=zeros)
    assert torch.equal(out, torch.zeros_like(out)) and (lse == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_within_twice_the_loop_s_own_error(dtype):
    tensors, options = problem(2, 2, 40, 16, 8, 8, seed=3)
    expected = run(reference.memory_attention, tensors, options)
    low = {name: t.to(dtype) for name, t in tensors.items()}
    plain = run(reference.memory_attention, low, options)
    actual = run(memory_attention, low, options)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert (a.double() - e).norm() <= 2 * (p.double() - e).norm()
