"""The recurrence's kernels at sizes that only a GPU can do in a test: precision, bits, graphs, whole blocks."""

import pytest
import torch

from mmrec_kernels import gated_recurrence, recurrence_torch
from mmrec_kernels.solver import SolverSettings
from mmrec_train.model import MMRecConfig, MMRecForCausalLM
from mmrec_train.model.memory import ChunkPlan

# channels and heads (None: a dense gate); from 2048 channels on every other product of a dense gate has 8 bits
WIDTHS = [(32, 2), (96, 3), (256, 4), (256, 2), (96, None), (2048, None)]
every_width = pytest.mark.parametrize("width, heads", WIDTHS)


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "triton")


def relative_error(actual, expected):
    assert actual.isfinite().all()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def problem(batch, length, width, heads, dtype, resets=0.0, gate_scale=1.0):
    """z̃ = 2 (1 − γ) z, γ, W, h₀; reset; gradients of h and the final state. Half-lives from 1 to 512 tokens."""
    generator = torch.Generator("cuda").manual_seed(length + width)
    options = dict(generator=generator, device="cuda", dtype=torch.float64)
    half_life = torch.logspace(0, 9, width, base=2, dtype=torch.float64, device="cuda")
    gamma = torch.sigmoid(torch.logit(0.5 ** (1 / half_life)) + torch.randn(batch, length, width, **options))
    z = 2 * (1 - gamma) * torch.randn(batch, length, width, **options)
    shape = (width, width) if heads is None else (heads, width // heads, width // heads)
    weight = gate_scale * torch.randn(shape, **options) / shape[-1] ** 0.5
    initial, grad_final = (torch.randn(batch, width, **options) for _ in range(2))
    grad = torch.randn(batch, length, width, **options)
    reset = torch.rand(batch, length, device="cuda", generator=generator) < resets
    inputs = [t.to(dtype) for t in (z, gamma, weight)]
    return [*inputs, initial.float()], reset, grad.to(dtype), grad_final.float()


def run(inputs, reset, grad, grad_final, **options):
    """h, the final state, and the gradients of z, gamma, W and the initial state."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = gated_recurrence(*leaves, reset=reset, **options)
    gradients = torch.autograd.grad(result[:2], leaves, (grad, grad_final))
    return [result.h.detach(), result.final_state.detach(), *gradients]


def exact(inputs, reset, grad, grad_final, solver="picard"):
    """In fp64, by the PyTorch path, which CPU tests compare with the loop."""
    settings = SolverSettings(solver, 1e-12, 200)
    z, gamma, weight, initial, grad, grad_final = (t.double() for t in (*inputs, grad, grad_final))
    h, final, *_ = recurrence_torch.forward(z, gamma, weight, initial, reset, settings)
    gradients = recurrence_torch.backward(grad, grad_final, z, gamma, weight, initial, reset, h, settings)
    return [h, final, *gradients]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_width
@pytest.mark.parametrize("batch, length", [(3, 777), (1, 4096)])
def test_fp32_with_gradients(width, heads, batch, length):
    arguments = problem(batch, length, width, heads, torch.float32, resets=0.002)
    for actual, expected in zip(run(*arguments, tol=1e-6), exact(*arguments), strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("width, heads", [*WIDTHS, (256, 16), (64, 4), (2048, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_within_twice_the_error_of_pytorch(monkeypatch, width, heads, dtype):
    arguments = problem(2, 4096, width, heads, dtype, resets=0.002)
    actual, expected = run(*arguments), exact(*arguments)
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    for a, plain, e in zip(actual, run(*arguments), expected, strict=True):
        assert a.dtype == plain.dtype
        assert relative_error(a, e) <= 2 * relative_error(plain, e)


@pytest.mark.parametrize("width, heads", [(256, 4), (96, None), (2048, None)])
def test_fp32_inputs_with_a_16_bit_gate_as_in_the_model(monkeypatch, width, heads):
    inputs, *others = problem(2, 2048, width, heads, torch.float32)
    arguments = [inputs[0], inputs[1], inputs[2].bfloat16(), inputs[3]], *others
    actual, expected = run(*arguments), exact(*arguments)
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    for a, plain, e in zip(actual, run(*arguments), expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(plain, e)


@pytest.mark.parametrize("heads", [8, 16, 64, None])
def test_same_inputs_same_bits(heads):
    arguments = problem(1, 4096, 1024, heads, torch.bfloat16)
    first = run(*arguments)
    for _ in range(100):
        assert same_bits(first, run(*arguments))


@every_width
def test_what_does_not_contract_is_finished_exactly(width, heads):
    """Raw inputs, γ near 1 and a large gate; both directions reach the last token."""
    inputs, reset, grad, grad_final = problem(2, 300, width, heads, torch.float32, gate_scale=4.0)
    inputs[0] = torch.randn(inputs[0].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    inputs[1] = torch.full_like(inputs[1], 0.999)
    arguments = inputs, reset, grad, grad_final
    for solver in ("picard", "sequential"):
        actual = run(*arguments, max_iterations=4, solver=solver)
        for a, e in zip(actual, exact(*arguments, solver="sequential"), strict=True):
            assert relative_error(a, e) < 1e-3  # it does not contract: rounding grows as it goes
    residual = gated_recurrence(*inputs, reset=reset, max_iterations=4).residual
    assert (residual > 1e-6).all()


@every_width
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_stay_in_their_row(width, heads, poison, dtype):
    inputs, reset, grad, grad_final = problem(3, 1000, width, heads, dtype)
    inputs[0][1, 500, 3] = poison
    poisoned = run(inputs, reset, grad, grad_final)
    assert not poisoned[0][1, 500:].isfinite().all()
    others = [0, 2]
    inputs, reset, grad, grad_final = problem(3, 1000, width, heads, dtype)
    inputs[0][1] = 0.0
    expected = run(inputs, reset, grad, grad_final)
    for i in (0, 1, 2, 3, 5):  # all but the gradient of W, which is a sum over rows
        assert poisoned[i][others].isfinite().all()
        torch.testing.assert_close(poisoned[i][others], expected[i][others], rtol=0, atol=0.05)
    h = poisoned[0][others], expected[0][others].double()
    assert relative_error(*h) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("width, heads", [(256, 4), (96, None), (2048, None)])
def test_forward_and_backward_in_a_cuda_graph(width, heads):
    """Nothing waits for the device, or the capture would fail; a replay computes from what is in the inputs then."""
    inputs, reset, grad, grad_final = problem(2, 512, width, heads, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(inputs, reset, grad, grad_final)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, reset, grad, grad_final)
    for scale in (1.0, 0.5, 0.0):
        inputs[0].mul_(scale)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert same_bits(replayed, run(inputs, reset, grad, grad_final))


@pytest.mark.parametrize("gate", ["dense", "headwise"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_block_compiles_as_one_graph_and_equals_eager(gate, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = MMRecConfig(
        vocab_size=64, hidden_dim=128, num_layers=1, num_heads=4, num_memories=2, memory_slots=16, segment_len=16,
        short_window=32, ffn_dim=256, gate=gate,
    )  # fmt: skip
    model = MMRecForCausalLM(config).cuda().model
    block = model.layers[0]
    x = torch.randn(2, 200, 128, device="cuda", requires_grad=True)
    reset = torch.rand(2, 200, device="cuda") < 0.02
    state = model.empty_memory(2)[0]
    plan = ChunkPlan.of(config, state, reset)

    def outputs_and_gradients(function):
        out, after, report = function(x, state, plan)
        parameters = [p for p in block.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(out.square().sum() + after.h.sum(), [x, *parameters], allow_unused=True)
        return [out, *after, *report, *(g for g in gradients if g is not None)]

    compiled = outputs_and_gradients(torch.compile(block, fullgraph=True, backend=backend))
    for c, e in zip(compiled, outputs_and_gradients(block), strict=True):
        if c.is_floating_point():
            torch.testing.assert_close(c, e, rtol=2e-3, atol=2e-3)
