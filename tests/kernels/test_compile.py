"""The operations under torch.compile: no graph break, the same numbers, and what they tell it about themselves."""

import pytest
import torch

from mmrec_kernels import linear_scan
from mmrec_train.model.memory import ChunkPlan
from tests.model.conftest import SMALL, small_model

GATES = ["dense", "headwise", "none"]


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch):
    """What runs inside an operation is hidden from the compiler, so the kernels need not be interpreted for this."""
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    torch._dynamo.reset()


def block_and_inputs(gate, length=10):
    model = small_model(gate=gate).model
    block = model.layers[0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, SMALL["hidden_dim"], generator=generator, dtype=torch.float64)
    reset = torch.rand(2, length, generator=generator) < 0.2
    state = model.empty_memory(2)[0]
    return block, x, state, ChunkPlan.of(model.config, state, reset)


def outputs_and_gradients(function, block, x, state, plan):
    block.zero_grad()
    x = x.detach().requires_grad_()
    out, state, report = function(x, state, plan)
    floating = [out, *(t for t in state if t.requires_grad)]
    weights = [torch.arange(t.numel(), dtype=t.dtype).cos().view(t.shape) for t in floating]
    torch.autograd.backward(floating, weights)
    return [out, *state, *report, x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("gate", GATES)
def test_a_block_compiles_as_one_graph_and_equals_eager(gate):
    block, *inputs = block_and_inputs(gate)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(block, block, *inputs)
    for a, e in zip(outputs_and_gradients(compiled, block, *inputs), eager, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_any_length_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    block, *_ = block_and_inputs("headwise")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (13, 7, 10):  # the first is the size of nothing else: the compiler would take it for a rule
        _, *inputs = block_and_inputs("headwise", length)
        again = outputs_and_gradients(compiled, block, *inputs)
        for a, e in zip(again, outputs_and_gradients(block, block, *inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_a_second_derivative_is_refused():
    gamma, x = (torch.rand(1, 5, 4, requires_grad=True) for _ in range(2))
    (gradient,) = torch.autograd.grad(linear_scan(gamma, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("weight_shape", [(16, 16), (2, 8, 8)])
@pytest.mark.parametrize(
    "dtype, initial_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)],
)
@pytest.mark.parametrize("permuted", [False, True])
def test_recurrence_op(weight_shape, dtype, initial_dtype, permuted):
    z, gamma = 0.2 * randn(2, 5, 16, dtype=dtype), randn(2, 5, 16).sigmoid()
    if permuted:
        z, gamma = (t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in (z, gamma))
    weight, initial = randn(*weight_shape, dtype=dtype), randn(2, 16, dtype=initial_dtype)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[1, 2] = True
    settings = ("auto", 1e-3, 32)
    differentiable = [t.requires_grad_() for t in (z, gamma, weight, initial)]
    torch.library.opcheck(torch.ops.mmrec.gated_recurrence, (*differentiable, reset, *settings))
    plain = [t.detach() for t in differentiable]
    h, final, *_ = torch.ops.mmrec.gated_recurrence(*plain, None, *settings)
    arguments = (torch.ones_like(h), torch.ones_like(final), *plain, None, h, *settings)
    torch.library.opcheck(torch.ops.mmrec.gated_recurrence_backward, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", ["all", "slots", "pages"])
def test_memory_attention_op(dtype, parts):
    q, slots_k, slots_v = (randn(2, 4, n, 8, dtype=dtype).requires_grad_() for n in (5, 8, 8))
    stamp = torch.arange(8).repeat(2, 1)
    start, stop = torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), 8)
    window = [None, None, None]
    null = [None, None]
    pages = torch.tensor([0, 1]).expand(2, 4, 5, 2) if parts == "pages" else None
    if parts == "all":
        window = [*(randn(2, 4, 7, 8, dtype=dtype).requires_grad_() for _ in range(2)), torch.zeros_like(start)]
        null = [randn(4, 8, dtype=torch.float32).requires_grad_() for _ in range(2)]
    arguments = (q, slots_k, slots_v, stamp, start, stop, *window, *null, pages, 3, 10000.0)
    torch.library.opcheck(torch.ops.mmrec.memory_attention, arguments)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    out, lse = torch.ops.mmrec.memory_attention(*plain)
    arguments = (*plain, out, lse, torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(torch.ops.mmrec.memory_attention_backward, arguments)
