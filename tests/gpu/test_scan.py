"""Scans at sizes that only a GPU can do in a test: long, larger than 2³¹ elements, and the same bits each time."""

import pytest
import torch

from mmrec_kernels import associative_scan_exponential, linear_scan, scan_torch


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "triton")


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(batch, length, width, dtype, resets=0.0, exponent=0.05):
    generator = torch.Generator("cuda").manual_seed(length)
    options = dict(generator=generator, device="cuda")
    gamma = torch.rand(batch, length, width, **options).pow(exponent).to(dtype)
    x, grad = (torch.randn(batch, length, width, **options).to(dtype) for _ in range(2))
    initial, grad_final = (torch.randn(batch, width, **options) for _ in range(2))
    reset = torch.rand(batch, length, **options) < resets if resets else None
    return gamma, x, initial, reset, grad, grad_final


def run(gamma, x, initial, reset, grad, grad_final, reverse=False):
    leaves = [t.detach().clone().requires_grad_() for t in (gamma, x, initial)]
    outputs = linear_scan(*leaves, reset=reset, reverse=reverse)
    return [*outputs, *torch.autograd.grad(outputs, leaves, (grad, grad_final.to(outputs[1].dtype)))]


def exact(gamma, x, initial, reset, grad, grad_final, reverse=False):
    """In fp64, by the PyTorch path, which CPU tests compare with the loop."""
    gamma, x, initial, grad, grad_final = (t.double() for t in (gamma, x, initial, grad, grad_final))
    h, final = scan_torch.linear_scan_forward(gamma, x, initial, reset, reverse)
    grads = scan_torch.linear_scan_backward(grad, grad_final, gamma, h, initial, reset, reverse)
    return [h, final, grads[1], grads[0], grads[2]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 65536, 48), (1, 127323, 33), (3, 5001, 130), (2, 77, 1000), (1, 1, 1)])
def test_fp32_with_gradients(shape, reverse):
    problem = random_inputs(*shape, torch.float32, resets=0.001)
    for actual, expected in zip(run(*problem, reverse), exact(*problem, reverse), strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("exponent", [0.05, 0.001])
def test_fp32_with_decays_near_one(exponent):
    problem = random_inputs(1, 65536, 64, torch.float32, exponent=exponent)
    for actual, expected in zip(run(*problem), exact(*problem), strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_accurate_as_its_rounding(dtype):
    gamma, x, initial, reset, grad, grad_final = random_inputs(2, 8192, 512, dtype, resets=0.001)
    expected = exact(gamma, x, initial, reset, grad, grad_final)
    for actual, e in zip(run(gamma, x, initial, reset, grad, grad_final), expected, strict=True):
        assert relative_error(actual, e) <= max(2 * relative_error(e.to(actual.dtype), e), 1e-6)


@pytest.mark.parametrize("length", [65536, 127323])
def test_exponential(length):
    gamma, _, _, _, grad, _ = random_inputs(1, length, 64, torch.float32, exponent=0.001)
    initial = -torch.rand(1, 64, device="cuda")
    leaves = [t.requires_grad_() for t in (gamma, initial)]
    y = associative_scan_exponential(*leaves)
    actual = [y, *torch.autograd.grad(y, leaves, grad)]
    doubles = [t.detach().double() for t in leaves]
    expected_y = scan_torch.exponential_scan_forward(*doubles)
    expected = [expected_y, *scan_torch.exponential_scan_backward(grad.double(), doubles[0], expected_y, doubles[1])]
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-6


@pytest.mark.parametrize("shape", [(1, 8192, 4096), (4, 2000, 256), (1, 100000, 32)])
def test_same_inputs_same_bits(shape):
    problem = random_inputs(*shape, torch.bfloat16, resets=0.001)
    first = run(*problem)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*problem), strict=True))


def test_more_than_two_to_the_31_elements():
    length, width = 2**19 + 5, 4096
    gamma = torch.full((1, 1, 1), 0.5, device="cuda", dtype=torch.bfloat16).expand(1, length, width).contiguous()
    x = torch.arange(length, device="cuda").remainder(7).to(torch.bfloat16).view(1, -1, 1).expand(1, -1, width)
    h, final = linear_scan(gamma, x.contiguous())
    state = torch.zeros((), device="cuda")
    for t in range(length - 100, length):
        state = 0.5 * state + t % 7
    torch.testing.assert_close(final, state.expand(1, width))
    # the sequence repeats itself, once its beginning is forgotten
    assert h[:, 1000:].unfold(1, 7, 7)[:, 1:].eq(h[:, 1000:1007].mT.unsqueeze(1)).all()


def test_gradient_of_more_than_two_to_the_31_elements():
    length, width = 2**19 + 5, 4096
    ones = torch.ones(1, length, width, device="cuda", dtype=torch.bfloat16)
    grad_x, grad_gamma, grad_initial = torch.ops.mmrec.linear_scan_backward(
        ones, torch.ones(1, width, device="cuda"), ones.mul(0.5), ones, None, None, False
    )
    assert (grad_x == 2).all() and (grad_initial == 1).all()
    assert (grad_gamma[:, 1:] == 2).all() and (grad_gamma[:, 0] == 0).all()
