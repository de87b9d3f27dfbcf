import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_kernels import attention_torch, memory_attention, merge_partial_reads, reference

WIDTH = 16


def problem(batch, heads, length, slots, window, carried, seed, *, banks=None, pages=None, width=WIDTH):
    """Inputs of a read in fp64: a ring of slots in random order, visible intervals, `carried` earlier tokens."""
    g = torch.Generator().manual_seed(seed)
    banks = banks or heads

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = dict(
        q=randn(batch, length, heads, width).transpose(1, 2),
        slots_k=randn(batch, banks, slots, heads // banks * width),
        slots_v=randn(batch, banks, slots, heads // banks * width),
        window_k=randn(batch, carried + length, heads, width).transpose(1, 2),
        window_v=randn(batch, carried + length, heads, width).transpose(1, 2),
        null_k=randn(heads, width),
        null_v=randn(heads, width),
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
    if pages is not None:
        every = (slots + 3) // 4
        scattered = torch.rand(batch, heads, length, every, generator=g).argsort(-1)
        options["pages"] = torch.where(torch.rand(scattered.shape, generator=g) < 0.2, -1, scattered)[..., :pages]
    return tensors, options


def run(function, tensors, options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out, lse = function(**leaves, **options)
    loss = (out * out.detach().cos()).sum() + torch.where(lse.isinf(), 0.0, lse).sin().sum()
    return [out, lse, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]


def relative_error(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


def to(device, tensors, dtype):
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def options_on(device, options):
    return {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 20),
    slots=st.integers(1, 9),
    window=st.integers(1, 12),
    carried=st.integers(0, 12),
    banks=st.sampled_from([1, 2]),
    pages=st.sampled_from([None, 1, 3]),
    block=st.sampled_from([3, 512]),
    seed=st.integers(0, 2**31),
)
def test_pytorch_equals_the_loop_with_its_gradients(batch, length, slots, window, carried, banks, pages, block, seed):
    tensors, options = problem(batch, 2, length, slots, window, carried, seed, banks=banks, pages=pages, width=4)
    expected = run(reference.memory_attention, tensors, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMREC_KERNELS", "torch")
        patch.setattr(attention_torch, "QUERY_BLOCK", block)
        patch.setattr(attention_torch, "GATHERED", block * 100)
        actual = run(memory_attention, tensors, options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


SHAPES = {
    "several blocks": dict(batch=1, heads=2, length=150, slots=70, window=40, carried=30, banks=1),
    "one query": dict(batch=2, heads=1, length=1, slots=5, window=3, carried=9),
    "odd": dict(batch=2, heads=4, length=37, slots=33, window=64, carried=0, banks=2),
    "pages": dict(batch=1, heads=2, length=37, slots=33, window=5, carried=3, banks=1, pages=3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fp32_equals_the_loop_with_its_gradients(shape, backend, device):
    tensors, options = problem(**shape, seed=1)
    expected = run(reference.memory_attention, tensors, options)
    actual = run(memory_attention, to(device, tensors, torch.float32), options_on(device, options))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("shape", ["odd", "pages"])
def test_channels_that_are_not_next_to_each_other(shape, backend, device):
    tensors, options = problem(**SHAPES[shape], seed=2)
    expected = run(reference.memory_attention, tensors, options)
    turned = {name: t.mT.contiguous().mT for name, t in to(device, tensors, torch.float32).items()}
    actual = run(memory_attention, turned, options_on(device, options))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("shape", ["odd", "pages"])
def test_rows_that_begin_anywhere_in_memory(shape, backend, device):
    """Tiles of keys are asked for at multiples of 16 bytes."""
    tensors, options = problem(**SHAPES[shape], seed=3)
    expected = run(reference.memory_attention, tensors, options)
    shifted = {}
    for name, t in to(device, tensors, torch.float32).items():
        wider = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), device=t.device)
        shifted[name] = wider[..., 1:-2]
        shifted[name].copy_(t)
    actual = run(memory_attention, shifted, options_on(device, options))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("window", [2**31 - 1, 2**63 - 1])
def test_a_window_without_an_end(window, backend, device):
    tensors, options = problem(**SHAPES["odd"], seed=4)
    expected = run(reference.memory_attention, tensors, options | {"window": 37})
    actual = run(memory_attention, to(device, tensors, torch.float32), options_on(device, options) | {"window": window})
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("beyond", [9, 10**6, None])
def test_pages_that_there_are_not(beyond, backend, device):
    """Beyond the last slot, and none at all (None)."""
    tensors, options = problem(**SHAPES["pages"], seed=5)
    pages = options["pages"]
    if beyond is None:
        options["pages"] = absent = pages[..., :0]
        tensors = {name: t for name, t in tensors.items() if not name.startswith("slots")}
    else:
        pages[..., 0] = -1
        absent = pages.clone()
        absent[..., 0] = beyond
    slots = dict(slots_k=torch.randn(1, 1, 33, 32), slots_v=torch.randn(1, 1, 33, 32)) if beyond is None else {}

    def read(function, dtype, device, pages):
        fixed = to(device, slots, dtype) | options_on(device, options | {"pages": pages})
        return run(function, to(device, tensors, dtype), fixed)

    expected = read(reference.memory_attention, torch.float64, "cpu", options["pages"])
    for a, e in zip(read(memory_attention, torch.float32, device, absent), expected, strict=True):
        assert relative_error(a, e) < 1e-5


def test_merged_reads_of_which_none_sees_anything_have_gradients(backend, device):
    tensors, _ = problem(1, 2, 8, 8, 0, 0, seed=6)
    names = ("q", "slots_k", "slots_v")
    tensors = to(device, {name: tensors[name] for name in names}, torch.float32)
    stop = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]])
    rule = dict(slot_stamp=torch.arange(8)[None], slot_start=torch.zeros_like(stop), slot_stop=stop)
    rule = options_on(device, rule)

    def merged(q, slots_k, slots_v, slot_stamp, **rule):
        halves = (slice(0, 4), slice(4, 8))
        reads = [
            memory_attention(q, slots_k[:, :, h], slots_v[:, :, h], slot_stamp=slot_stamp[:, h], **rule) for h in halves
        ]
        return merge_partial_reads(*zip(*reads, strict=True))

    for a, e in zip(run(merged, tensors, rule), run(memory_attention, tensors, rule), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["several blocks", "odd", "pages"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_kernels_are_within_twice_the_error_of_pytorch(shape, dtype, device, monkeypatch):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bf16 matrices")
    tensors, options = problem(**SHAPES[shape], seed=3)
    tensors = to("cpu", tensors, dtype)
    low, options = to(device, tensors, dtype), options_on(device, options)
    results = []
    for mode, inputs in [("torch", to(device, tensors, torch.float64)), ("torch", low), ("triton", low)]:
        monkeypatch.setenv("MMREC_KERNELS", mode)
        results.append(run(memory_attention, inputs, options))
    for e, plain, kernel in zip(*results, strict=True):
        assert relative_error(kernel, e.cpu()) <= 2 * relative_error(plain, e.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_pytorch_is_within_twice_the_loop_s_own_error(dtype, monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    tensors, options = problem(2, 2, 40, 16, 8, 8, seed=3)
    expected = run(reference.memory_attention, tensors, options)
    low = to("cpu", tensors, dtype)
    plain = run(reference.memory_attention, low, options)
    actual = run(memory_attention, low, options)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)


@pytest.mark.parametrize("parts", itertools.product([False, True], repeat=2), ids=str)
@pytest.mark.parametrize("pages", [None, 2])
def test_window_and_null_slot_may_be_absent(parts, pages, backend, device):
    tensors, options = problem(1, 2, 20, 24, 6, 5, seed=4, pages=pages)
    with_window, with_null = parts
    absent = [] if with_window else ["window_k", "window_v", "window_start", "window"]
    absent += [] if with_null else ["null_k", "null_v"]
    tensors, options = ({n: x for n, x in group.items() if n not in absent} for group in (tensors, options))
    expected = run(reference.memory_attention, tensors, options)
    actual = run(memory_attention, to(device, tensors, torch.float32), options_on(device, options))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), e, rtol=1e-4, atol=1e-5)


def test_blocks_seen_whole_and_blocks_nobody_sees(backend, device, monkeypatch):
    # a ring in order that began at some index, one document that begins in the middle: like a model's
    tensors, options = problem(1, 1, 300, 150, 150, 20, seed=5)
    before = torch.arange(300) // 6
    stop = 100 + before
    begins = torch.where(torch.arange(300) < 170, 0, 170)
    options["slot_stamp"] = torch.cat([(torch.arange(100) - 30) % 100, torch.arange(100, 150)])[None]
    options["slot_start"] = torch.where(begins > 0, 100 + begins // 6, stop - 100)[None]
    options["slot_stop"] = stop[None]
    options["window_start"] = torch.where(begins > 0, begins + 20, 0)[None]
    tensors, options = to(device, tensors, torch.float32), options_on(device, options)
    actual = run(memory_attention, tensors, options)
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    expected = run(memory_attention, to(device, tensors, torch.float64), options)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e.cpu()) < 1e-5


def test_partial_reads_merge_to_the_whole(backend, device):
    tensors, options = problem(2, 3, 10, 8, 1, 0, seed=0)
    tensors, options = to(device, tensors, torch.float32), options_on(device, options)
    rule = {name: options[name] for name in ("slot_start", "slot_stop")}
    q, k, v, stamp = tensors["q"], tensors["slots_k"], tensors["slots_v"], options["slot_stamp"]
    parts = [
        memory_attention(q, k[:, :, s], v[:, :, s], slot_stamp=stamp[:, s], **rule) for s in (slice(0, 3), slice(3, 8))
    ]
    out, lse = merge_partial_reads([p[0] for p in parts], [p[1] for p in parts])
    whole_out, whole_lse = memory_attention(q, k, v, slot_stamp=stamp, **rule)
    torch.testing.assert_close(out, whole_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slots", [0, 3])
def test_a_query_that_sees_nothing_reads_zero(slots, backend, device):
    q = torch.randn(1, 1, 2, WIDTH, device=device, requires_grad=True)
    k, v = torch.randn(2, 1, 1, slots, WIDTH, device=device)
    zeros = torch.zeros(1, 2, dtype=torch.int64, device=device)
    out, lse = memory_attention(
        q, k, v, slot_stamp=torch.arange(slots, device=device)[None], slot_start=zeros, slot_stop=zeros
    )
    assert torch.equal(out, torch.zeros_like(out)) and (lse == float("-inf")).all()
    (grad,) = torch.autograd.grad(out.sum(), [q])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("pages", [None, 2])
def test_nan_stays_in_its_row_and_every_element_is_written(pages, backend, device, monkeypatch):
    tensors, options = problem(2, 2, 20, 9, 4, 3, seed=6, pages=pages)
    tensors, options = to(device, tensors, torch.float32), options_on(device, options)
    clean = run(memory_attention, tensors, options)

    def poisoned(function):
        return lambda *args, **kwargs: (
            x.fill_(float("nan")) if (x := function(*args, **kwargs)).is_floating_point() else x
        )

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    again = run(memory_attention, tensors, options)
    for name in ("q", "slots_k", "window_v"):
        tensors[name][1, 0, 0] = float("nan")
    dirty = run(memory_attention, tensors, options)
    for c, a, d in zip(clean, again, dirty, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=0)
        if c.shape[0] == 2 and c.dim() > 2:
            torch.testing.assert_close(d[0], c[0], rtol=0, atol=0)
    assert dirty[0][1].isnan().any()


def test_dtypes_mix(backend, device):
    tensors, options = problem(1, 2, 10, 6, 4, 3, seed=8)
    tensors = to(device, tensors, torch.float32)
    tensors["q"] = tensors["q"].bfloat16()
    tensors["null_k"] = tensors["null_k"].half()
    results = run(memory_attention, tensors, options_on(device, options))
    wide = {name: t.float() for name, t in tensors.items()}
    expected = memory_attention(**wide, **options_on(device, options))
    assert [r.dtype for r in results] == [torch.bfloat16, torch.float32] + [t.dtype for t in tensors.values()]
    torch.testing.assert_close(results[1], expected[1], rtol=1e-5, atol=1e-5)


def test_operator_and_compilation(backend, device):
    tensors, options = problem(1, 2, 12, 6, 4, 3, seed=9, pages=1)
    tensors, options = to(device, tensors, torch.float32), options_on(device, options)
    expected = run(memory_attention, tensors, options)
    compiled = torch.compile(memory_attention, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, tensors, options), expected, strict=True):
        assert torch.equal(a, e)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    everything = leaves | options
    names = ["q", "slots_k", "slots_v", "slot_stamp", "slot_start", "slot_stop", "window_k", "window_v", "window_start"]
    names += ["null_k", "null_v", "pages", "window", "rope_theta"]
    torch.library.opcheck(torch.ops.mmrec.memory_attention.default, tuple(everything[name] for name in names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(null_v=None), "null_v is missing"),
        (dict(slot_start=torch.zeros(1, 5, dtype=torch.int64)), r"slot_start is \[1, 5\], expected \[1, 4\]"),
        (dict(slot_stamp=torch.zeros(1, 6, dtype=torch.int32)), "slot_stamp is torch.int32"),
        (dict(slots_v=torch.zeros(1, 3, 6, WIDTH)), r"slots_v is \[1, 3, 6, 16\], expected \[1, 2, 6, 16\]"),
        (dict(q=torch.zeros(1, 2, 0, WIDTH)), r"q is \[1, 2, 0, 16\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    tensors, options = problem(1, 2, 4, 6, 4, 3, seed=10)
    with pytest.raises(ValueError, match=message):
        memory_attention(**(tensors | options | change))


def test_what_no_kernel_can_do_is_said(device, monkeypatch):
    tensors, options = problem(1, 2, 4, 6, 4, 3, seed=10, width=6)
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="heads of width 6"):
        memory_attention(**to(device, tensors, torch.float32), **options_on(device, options))
    with pytest.raises(RuntimeError, match="float64 inputs"):
        memory_attention(**to(device, tensors, torch.float64), **options_on(device, options))
