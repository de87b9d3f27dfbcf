"""The read of the memories on a GPU: long chunks, tensors above 2³¹ elements, the same bits each time."""

import pytest
import torch

from mmrec_kernels import RingWrites, build_pyramid, memory_attention, select_pages, slots_in_pages, update_pyramid
from tests.kernels.test_attention import relative_error, run

SEGMENT = 64
HEAD = 37  # index that a chunk's first new slot is written to


def chunk(heads, length, slots, window, dtype, *, width=128, banks=1, documents=(), seed=0):
    """A chunk of a model: a ring begun at some index, the chunk's own slots behind it, documents that begin in it."""
    g = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=g)

    new = length // SEGMENT
    before = torch.arange(length, device="cuda") // SEGMENT
    start, window_start = before.clone(), torch.zeros_like(before)
    for first in documents:
        start[first:] = slots + before[first]
        window_start[first:] = window + first
    stamp = torch.cat([(torch.arange(slots) - HEAD) % slots, torch.arange(slots, slots + new)]).cuda()
    tensors = dict(
        q=randn(1, length, heads, width).transpose(1, 2),
        slots_k=randn(1, banks, slots + new, heads // banks * width),
        slots_v=randn(1, banks, slots + new, heads // banks * width),
        window_k=randn(1, window + length, heads, width).transpose(1, 2),
        window_v=randn(1, window + length, heads, width).transpose(1, 2),
        null_k=randn(heads, width),
        null_v=randn(heads, width),
    )
    options = dict(
        slot_stamp=stamp[None],
        slot_start=start[None],
        slot_stop=(slots + before)[None],
        window_start=window_start[None],
        window=window,
    )
    return tensors, options


def in_pages(tensors, options, slots, documents, topk):
    """`memory_attention` of a chunk's slots through the pages that its queries select."""
    stop, new = options["slot_stop"], tensors["slots_k"].shape[2] - slots
    before, write = stop - slots, torch.arange(new, device="cuda")[None]
    number, completed = slots + HEAD + write, slots + HEAD + before
    for first in documents:
        begun = before[0, first].clone()
        number = torch.where(write >= begun, write - begun, number)
        completed[:, first:] = before[:, first:] - begun
    in_all = torch.full((1,), slots + HEAD, device="cuda")
    writes = RingWrites.of(slots, in_all, number, torch.full_like(in_all, new))
    history = update_pyramid(build_pyramid(tensors["slots_k"][:, :, :slots]), tensors["slots_k"], writes)
    rule = dict(slot_stop=stop, completed=completed, topk_blocks=topk)
    pages = select_pages(tensors["q"], history, writes, **rule)

    def read(slots_k, slots_v, slot_stamp, **rest):
        paged = dict(slots_k=slots_in_pages(slots_k, writes), slots_v=slots_in_pages(slots_v, writes))
        return memory_attention(**paged, slot_stamp=writes.page_stamp, pages=pages, **rest)

    return read


def converted(tensors, dtype):
    return {name: t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_that_of_pytorch(dtype, width, monkeypatch):
    tensors, options = chunk(4, 1500, 256, 200, dtype, width=width, banks=2, documents=(100, 700, 703))
    results = []
    for mode, precision in [("torch", torch.float64), ("torch", dtype), ("triton", dtype)]:
        monkeypatch.setenv("MMREC_KERNELS", mode)
        results.append(run(memory_attention, converted(tensors, precision), options))
    for e, plain, kernel in zip(*results, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 2 * relative_error(plain, e.cpu())
        assert relative_error(kernel, e.cpu()) <= limit


@pytest.mark.parametrize("length", [65536, 127323])
def test_long_chunks(length, monkeypatch):
    tensors, options = chunk(1, length, 1024, 512, torch.float32, documents=(30000,))
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    actual = run(memory_attention, tensors, options)
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    expected = run(memory_attention, converted(tensors, torch.float64), options)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e.cpu()) < 1e-5


def test_more_than_two_to_the_31_elements(monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    length, last, window = 530_000, 256, 512
    tensors, options = chunk(32, length, 64, window, torch.bfloat16)
    options["slot_stop"] = options["slot_stop"].clamp_max(100)  # few slots: quick
    options["slot_start"] = torch.zeros_like(options["slot_start"])
    tensors |= {name: tensors[name][:, :, :128].contiguous() for name in ("slots_k", "slots_v")}
    options["slot_stamp"] = options["slot_stamp"][:, :128].contiguous()
    assert tensors["q"].numel() > 2**31
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    grad = torch.zeros_like(leaves["q"])
    grad[:, :, -last:] = torch.randn(1, 32, last, 128, device="cuda")
    out, lse = memory_attention(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)

    end = {name: t.detach()[:, :, -last:] if name == "q" else t.detach() for name, t in leaves.items()}
    end |= {name: end[name][:, :, -last - window :] for name in ("window_k", "window_v")}
    end = {name: t.requires_grad_() for name, t in end.items()}
    options = {
        name: x[:, -last:] if name.startswith("slot_st") and name != "slot_stamp" else x for name, x in options.items()
    }
    options["window_start"] = torch.zeros_like(options["slot_start"])
    end_out, end_lse = memory_attention(**end, **options)
    end_grads = torch.autograd.grad(end_out, list(end.values()), grad[:, :, -last:])
    assert relative_error(out[:, :, -last:], end_out.double().cpu()) < 1e-2
    assert relative_error(lse[:, :, -last:], end_lse.double().cpu()) < 1e-3
    for name, whole, part in zip(leaves, grads, end_grads, strict=True):
        tail = whole[:, :, -part.shape[2] :] if name in ("q", "window_k", "window_v") else whole
        assert relative_error(tail, part.double().cpu()) < 2e-2


@pytest.mark.parametrize("topk", [None, 8])
def test_same_inputs_same_bits(topk, monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    tensors, options = chunk(8, 3000, 512, 300, torch.bfloat16, documents=(1000,))
    read = in_pages(tensors, options, 512, (1000,), topk) if topk else memory_attention
    first = run(read, tensors, options)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(read, tensors, options), strict=True))


def test_selected_pages_that_cover_everything_are_everything(monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    tensors, options = chunk(4, 700, 64, 100, torch.float32, banks=2, documents=(300,))
    dense = run(memory_attention, tensors, options)
    paged = run(in_pages(tensors, options, 64, (300,), topk=16), tensors, options)
    for d, p in zip(dense, paged, strict=True):
        assert relative_error(p, d.double().cpu()) < 1e-5
