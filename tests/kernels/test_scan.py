import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_kernels import associative_scan_exponential, linear_scan, reference


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(batch, length, width, seed, reset_probability=0.0):
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.rand(batch, length, width, generator=generator, dtype=torch.float64).pow(0.05)
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    reset = torch.rand(batch, length, generator=generator) < reset_probability
    return gamma, x, initial, reset


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 1200),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    reverse=st.booleans(),
    with_initial=st.booleans(),
    resets=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_equals_the_loop_with_its_gradients(batch, length, width, seed, reverse, with_initial, resets):
    gamma, x, initial, reset = random_inputs(batch, length, width, seed, resets)
    inputs = [gamma, x, initial if with_initial else None]
    outputs = []
    for scan in (linear_scan, reference.linear_scan):
        leaves = [None if i is None else i.clone().requires_grad_() for i in inputs]
        h, final = scan(*leaves, reset=reset, reverse=reverse)
        used = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad((h * x.cos()).sum() + (final * initial.sin()).sum(), used)
        outputs.append([h, final, *grads])
    for actual, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1023, 1024, 1025, 32768, 65536])
def test_fp32_is_accurate_at_any_length(length):
    gamma, x, initial, _ = random_inputs(1, length, 2, seed=length)
    h, final = linear_scan(gamma.float(), x.float(), initial.float())
    expected, expected_final = reference.linear_scan(
        gamma.float().double(), x.float().double(), initial.float().double()
    )
    assert relative_error(h, expected) < 1e-6
    assert relative_error(final, expected_final) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_scanned_in_fp32(dtype):
    gamma, x, initial, _ = (t.to(dtype) if t.is_floating_point() else t for t in random_inputs(2, 700, 8, seed=0))
    h, final = linear_scan(gamma, x, initial)
    expected, expected_final = reference.linear_scan(gamma.double(), x.double(), initial.double())
    assert h.dtype == dtype and final.dtype == torch.float32
    assert relative_error(final, expected_final) < 1e-6  # a 16-bit state would be off by 1e-3
    torch.testing.assert_close(h, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_gradcheck_through_final_state():
    gamma, x, initial, reset = random_inputs(2, 37, 2, seed=3, reset_probability=0.1)
    leaves = [t.requires_grad_() for t in (gamma, x, initial)]
    assert torch.autograd.gradcheck(lambda g, v, i: linear_scan(g, v, i, reset=reset), leaves)


def test_nan_stays_in_its_row_and_channel():
    gamma, x, initial, _ = random_inputs(3, 100, 4, seed=1)
    x[1, 50, 2] = float("nan")
    h, _ = linear_scan(gamma, x, initial)
    poisoned = torch.zeros_like(h, dtype=torch.bool)
    poisoned[1, 50:, 2] = True
    assert torch.equal(h.isnan(), poisoned)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 2500), seed=st.integers(0, 2**31), exponent=st.sampled_from([0.001, 0.05, 3.0]))
def test_exponential_equals_the_loop(length, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.rand(2, length, 3, generator=generator, dtype=torch.float64).pow(exponent)
    gamma[0, length // 2, 0] = 0.0
    initial = -torch.rand(2, 3, generator=generator, dtype=torch.float64)
    expected = reference.associative_scan_exponential(gamma, initial)
    torch.testing.assert_close(associative_scan_exponential(gamma, initial), expected, rtol=1e-9, atol=0)
    assert associative_scan_exponential(gamma.float()).dtype == torch.float32


def test_exponential_has_finite_gradients_at_zero():
    gamma = torch.tensor([[[0.5], [0.0], [0.9]]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(associative_scan_exponential(gamma)[:, 0].sum(), gamma)
    torch.testing.assert_close(grad, torch.tensor([[[1.0], [0.0], [0.0]]], dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 4)), "must both be"),
        ((torch.ones(1, 0, 3), torch.ones(1, 0, 3)), "empty"),
        ((torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2)), "initial_state"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_scan(*arguments)
