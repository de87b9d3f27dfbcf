import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_kernels import gated_recurrence, reference


def problem(batch, length, width, heads=None, *, seed=0, resets=0.0, gate_scale=1.0, contracting=True):
    """z, γ, W, h₀, reset in fp64; z̃ = 2 (1 − γ) z when contracting, half-lives from 1 to 512 tokens."""
    generator = torch.Generator().manual_seed(seed)
    half_life = torch.logspace(0, 9, width, base=2, dtype=torch.float64)
    logit = torch.logit(0.5 ** (1 / half_life)) + torch.randn(batch, length, width, generator=generator).double()
    gamma = torch.sigmoid(logit)
    z = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    z = 2 * (1 - gamma) * z if contracting else z
    shape = (width, width) if heads is None else (heads, width // heads, width // heads)
    weight = gate_scale * torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
    initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    reset = torch.rand(batch, length, generator=generator) < resets
    return z, gamma, weight, initial, reset


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def run(function, inputs, reset, **options):
    """Outputs h and final state, then the gradients of a fixed functional of both with respect to all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    result = function(*leaves, reset=reset, **options)
    h, final = result[0], result[1]
    generator = torch.Generator().manual_seed(99)
    probe = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
    probe_final = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final)
    loss = (h * probe).sum() + (final * probe_final).sum()
    return [h, final, *torch.autograd.grad(loss, leaves)]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    heads=st.sampled_from([None, 1, 2, 4]),
    seed=st.integers(0, 2**31),
    resets=st.sampled_from([0.0, 0.05, 1.0]),
    solver=st.sampled_from(["auto", "picard", "sequential"]),
)
def test_equals_the_loop_with_its_gradients(batch, length, heads, seed, resets, solver):
    *inputs, reset = problem(batch, length, 8, heads, seed=seed, resets=resets)
    actual = run(gated_recurrence, inputs, reset, solver=solver)
    expected = run(reference.gated_recurrence, inputs, reset)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-10 or e.norm() == 0


@pytest.mark.parametrize("heads", [None, 4])
def test_fp32_at_1e6_tolerance(heads):
    *inputs, reset = problem(2, 1500, 64, heads, seed=5, resets=0.003)
    expected = run(reference.gated_recurrence, inputs, reset)
    actual = run(gated_recurrence, [t.float() for t in inputs], reset, tol=1e-6)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and relative_error(a, e) < 1e-5


def test_bf16_operands_are_within_twice_the_loop_s_own_error():
    *inputs, reset = problem(2, 400, 64, seed=6)
    expected = run(reference.gated_recurrence, inputs, reset)
    bf16 = [t.bfloat16() for t in inputs]
    plain = run(reference.gated_recurrence, bf16, reset)
    actual = run(gated_recurrence, bf16, reset)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)


def test_iterations_and_residual_tell_the_convergence():
    *inputs, reset = problem(3, 600, 32, seed=7)
    result = gated_recurrence(*[t.float() for t in inputs], reset=reset, tol=1e-5)
    assert result.iterations.shape == result.residual.shape == (3,)
    assert (result.iterations > 2).all() and (result.iterations < 20).all()
    assert (result.residual <= 1e-5).all()


def test_what_does_not_contract_is_finished_exactly():
    """Raw z, γ near 1 and a large gate: the iteration cannot converge in time, the answer is exact all the same."""
    *inputs, _ = problem(2, 200, 16, seed=8, gate_scale=4.0, contracting=False)
    inputs[1] = torch.full_like(inputs[1], 0.999)
    reset = torch.zeros(2, 200, dtype=torch.bool)
    with pytest.warns(RuntimeWarning, match="adjoint of gated_recurrence did not converge"):
        actual = run(gated_recurrence, inputs, reset, max_iterations=6)
    for a, e in zip(actual, run(reference.gated_recurrence, inputs, reset), strict=True):
        assert relative_error(a, e) < 1e-8
    result = gated_recurrence(*inputs, max_iterations=6)
    assert (result.residual > 1e-12).all() and (result.iterations == 6).all()


def test_only_the_unconverged_rows_are_finished():
    *inputs, _ = problem(2, 120, 16, seed=9)
    z, gamma, weight, initial = inputs
    z[1] *= 40
    gamma[1] = 0.9999
    result = gated_recurrence(z, gamma, weight, initial, tol=1e-4, max_iterations=10)
    assert result.residual[0] <= 1e-4 < result.residual[1]
    expected, _ = reference.gated_recurrence(z, gamma, weight, initial)
    assert relative_error(result.h[1], expected[1]) < 1e-4  # the prefix is converged to the tolerance, the rest exact
    alone = gated_recurrence(z[:1], gamma[:1], weight, initial[:1], tol=1e-4, max_iterations=10)
    torch.testing.assert_close(result.h[:1], alone.h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row_and_end_the_iteration(poison):
    *inputs, _ = problem(3, 80, 16, seed=10)
    clean = gated_recurrence(*inputs)
    inputs[0][1, 40, 3] = poison
    result = gated_recurrence(*inputs)
    torch.testing.assert_close(result.h[[0, 2]], clean.h[[0, 2]], rtol=1e-12, atol=1e-12)
    assert not result.h[1, 40:].isfinite().all() and result.h[1, :40].isfinite().all()
    assert result.iterations[1] <= 33


def test_a_cut_anywhere_changes_nothing():
    *inputs, reset = problem(2, 90, 8, seed=11, resets=0.05)
    z, gamma, weight, initial = inputs
    whole = gated_recurrence(*inputs, reset=reset)
    for cut in (1, 13, 89):
        left = gated_recurrence(z[:, :cut], gamma[:, :cut], weight, initial, reset=reset[:, :cut])
        right = gated_recurrence(z[:, cut:], gamma[:, cut:], weight, left.final_state, reset=reset[:, cut:])
        torch.testing.assert_close(torch.cat([left.h, right.h], 1), whole.h, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(right.final_state, whole.final_state, rtol=1e-10, atol=1e-10)


def test_same_inputs_same_bits():
    *inputs, reset = problem(2, 300, 32, seed=12, resets=0.01)
    first = run(gated_recurrence, [t.float() for t in inputs], reset)
    second = run(gated_recurrence, [t.float() for t in inputs], reset)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.ones(3, 2, 2)), "weight"),
        (dict(solver="newton"), "solver"),
        (dict(tol=0.0), "tol"),
        (dict(max_iterations=0), "max_iterations"),
        (dict(reset=torch.zeros(1, 4)), "reset"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = dict(z=torch.ones(1, 4, 4), gamma=torch.ones(1, 4, 4), weight=torch.eye(4)) | change
    with pytest.raises(ValueError, match=message):
        gated_recurrence(**arguments)
