import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec_kernels import dense_triton, gated_recurrence, headwise_triton, reference, time_tiles
from mmrec_kernels.backend import interpreted

# tokens, channels, heads (None: a dense gate) by what computes it
KERNELS = {
    "headwise": (37, 16, 1),  # on the chip
    "dense": (11, 20, None),
    "odd heads": (9, 24, 2),  # not of a width that the kernel on the chip has: products in global memory
}
every_kernel = pytest.mark.parametrize("length, width, heads", KERNELS.values(), ids=KERNELS.keys())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter, tiles so small that short sequences have many of them, in groups and supergroups."""
    if interpreted():
        monkeypatch.setattr(headwise_triton, "TILE", 16)
        for name, value in {"STEPS": 8, "GROUP": 2}.items():
            monkeypatch.setattr(dense_triton, name, value)
            monkeypatch.setattr(time_tiles, name, value)


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


def cast(inputs, device, *dtypes):
    """Inputs on a device; in one dtype, or each in its own."""
    dtypes = dtypes * len(inputs) if len(dtypes) == 1 else dtypes
    return [t.to(device, dtype) for t, dtype in zip(inputs, dtypes, strict=True)]


def relative_error(actual, expected):
    assert actual.isfinite().all()
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run(function, inputs, reset, **options):
    """Outputs h and final state, then the gradients of a fixed functional of both with respect to all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = function(*leaves, reset=None if reset is None else reset.to(inputs[0].device), **options)
    h, final = result[0], result[1]
    generator = torch.Generator().manual_seed(99)
    probe = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
    probe_final = torch.randn(final.shape, generator=generator, dtype=torch.float64).to(final)
    loss = (h * probe).sum() + (final * probe_final).sum()
    return [h.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(actual, expected, tolerance):
    """Every one of the results of `run`, by its relative error."""
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    heads=st.sampled_from([None, 1, 2, 4]),
    seed=st.integers(0, 2**31),
    resets=st.sampled_from([0.0, 0.05, 1.0]),
    solver=st.sampled_from(["auto", "picard", "sequential"]),
)
def test_fp64_equals_the_loop_with_its_gradients(batch, length, heads, seed, resets, solver):
    *inputs, reset = problem(batch, length, 8, heads, seed=seed, resets=resets)
    actual = run(gated_recurrence, inputs, reset, solver=solver)
    assert_close(actual, run(reference.gated_recurrence, inputs, reset), 1e-10)


@pytest.mark.parametrize("solver", ["picard", "sequential"])
@pytest.mark.parametrize(
    "batch, length, width, heads, resets",
    [
        (1, 1, 16, 1, 0.0),
        (2, 33, 32, 2, 0.1),
        (3, 16, 16, 1, 1.0),
        (1, 1, 24, None, 1.0),
        (3, 7, 16, None, 0.2),
        (1, 10, 136, None, 0.0),
        (2, 9, 36, 3, 0.1),
    ],
)
def test_fp32_equals_the_loop_with_its_gradients(backend, device, batch, length, width, heads, resets, solver):
    *inputs, reset = problem(batch, length, width, heads, seed=length, resets=resets)
    expected = run(reference.gated_recurrence, inputs, reset)
    actual = run(gated_recurrence, cast(inputs, device, torch.float32), reset, solver=solver)
    assert all(a.dtype == torch.float32 for a in actual)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("heads", [None, 4])
def test_fp32_of_a_long_sequence(monkeypatch, heads):
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    *inputs, reset = problem(2, 1500, 64, heads, seed=5, resets=0.003)
    expected = run(reference.gated_recurrence, inputs, reset)
    assert_close(run(gated_recurrence, cast(inputs, "cpu", torch.float32), reset, tol=1e-6), expected, 1e-5)


def test_bf16_operands_are_within_twice_the_loop_s_own_error(monkeypatch):
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    *inputs, reset = problem(2, 400, 64, seed=6)
    expected = run(reference.gated_recurrence, inputs, reset)
    bf16 = cast(inputs, "cpu", torch.bfloat16)
    plain = run(reference.gated_recurrence, bf16, reset)
    for a, p, e in zip(run(gated_recurrence, bf16, reset), plain, expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)


@every_kernel
@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float16] * 4,
        [torch.float32, torch.float32, torch.float16, torch.float32],
        [torch.float16, torch.float32, torch.float32, torch.float16],
    ],
    ids=["fp16", "fp16 weight", "fp16 z and initial state"],
)
def test_16_bit_inputs_in_any_mix(monkeypatch, device, length, width, heads, dtypes):
    *inputs, reset = problem(2, length, width, heads, seed=6, resets=0.05)
    expected = run(reference.gated_recurrence, inputs, reset)
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    plain = run(gated_recurrence, cast(inputs, device, *dtypes), reset, tol=1e-5)
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    actual = run(gated_recurrence, cast(inputs, device, *dtypes), reset, tol=1e-5)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert a.dtype == p.dtype
        assert relative_error(a, e) <= max(2 * relative_error(p, e), 6e-5)


@pytest.mark.parametrize("length, width, heads", [(160, 128, 8), (40, 24, None)], ids=["headwise", "dense"])
@pytest.mark.parametrize("input_dtype", [torch.float16, torch.float32])
def test_at_the_default_tolerance_a_16_bit_gate_is_as_exact_as_in_pytorch(
    monkeypatch, device, length, width, heads, input_dtype
):
    """Also in what is returned in fp32, though tiles stop one by one, and operands have 16 bits."""
    *inputs, reset = problem(1, length, width, heads, seed=10)
    dtypes = [input_dtype, input_dtype, torch.float16, torch.float32]
    rounded = cast(inputs, device, *dtypes)
    expected = run(reference.gated_recurrence, cast(rounded, device, torch.float64), reset)
    monkeypatch.setenv("MMREC_KERNELS", "torch")
    plain = run(gated_recurrence, rounded, reset)
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    for a, p, e in zip(run(gated_recurrence, rounded, reset), plain, expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("width, heads", [(16, 1), (32, 2)])
def test_a_short_sequence_is_exact_with_a_16_bit_gate(monkeypatch, device, length, width, heads):
    """Its last change is zero, whatever the products before had been rounded to."""
    *inputs, _ = problem(2, length, width, heads, seed=11)
    rounded = cast(inputs, device, torch.float32, torch.float32, torch.float16, torch.float32)
    expected = run(reference.gated_recurrence, cast(rounded, device, torch.float64), None)
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    h, final, *_ = run(gated_recurrence, rounded, None)
    assert relative_error(h, expected[0]) < 3e-6
    assert relative_error(final, expected[1]) < 3e-6


@every_kernel
def test_inputs_of_any_strides(backend, device, length, width, heads):
    """A slice of a wider tensor, a transposed one, every second element, the same numbers for every row."""
    z, gamma, weight, initial, reset = problem(2, length, width, heads, seed=13, resets=0.2)
    initial = initial[:1].expand(2, -1)
    plain = cast([z, gamma, weight, initial], device, torch.float32)
    strided = [
        torch.cat([plain[0], plain[0]], 2)[:, :, width:],
        plain[1].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        plain[2].repeat_interleave(2, -1)[..., ::2],
        plain[3][:1].expand(2, -1),
    ]
    resets = reset.repeat_interleave(2, 1)[:, ::2]
    assert not any(t.is_contiguous() for t in [*strided, resets])
    expected = run(gated_recurrence, [t.contiguous() for t in plain], reset)
    for a, e in zip(run(gated_recurrence, strided, resets), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    leaves = [t.detach().requires_grad_() for t in plain]
    gradients = torch.autograd.grad(gated_recurrence(*leaves).h.sum(), leaves)  # of the expanded number one
    doubles = [t.double().cpu().requires_grad_() for t in plain]
    assert_close(gradients, torch.autograd.grad(reference.gated_recurrence(*doubles)[0].sum(), doubles), 1e-5)


@every_kernel
def test_without_an_initial_state_it_is_zero(backend, device, length, width, heads):
    z, gamma, weight, initial, _ = cast(problem(1, length, width, heads, seed=14), device, torch.float32)
    result = gated_recurrence(z, gamma, weight)
    explicit = gated_recurrence(z, gamma, weight, torch.zeros_like(initial))
    assert same_bits(result, explicit)


@every_kernel
def test_gradients_through_one_output_only(backend, device, length, width, heads):
    *inputs, _ = problem(1, length, width, heads, seed=15)
    for output in (0, 1):
        leaves = [t.requires_grad_() for t in cast(inputs, device, torch.float32)]
        gradients = torch.autograd.grad(gated_recurrence(*leaves)[output].square().sum(), leaves)
        doubles = [t.clone().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(reference.gated_recurrence(*doubles)[output].square().sum(), doubles)
        assert_close(gradients, expected, 1e-5)


@every_kernel
def test_iterations_and_residual_tell_the_convergence(backend, device, length, width, heads):
    inputs = cast(problem(2, length, width, heads, seed=7)[:4], device, torch.float32)
    result = gated_recurrence(*inputs, tol=1e-5)
    assert result.iterations.shape == result.residual.shape == (2,)
    assert result.iterations.dtype == torch.int32 and result.residual.dtype == torch.float32
    assert (result.iterations > 2).all() and (result.iterations < 20).all()
    assert (result.residual <= 1e-5).all()
    sequential = gated_recurrence(*inputs, solver="sequential")
    assert (sequential.iterations == 0).all() and (sequential.residual == 0).all()


@every_kernel
def test_what_does_not_contract_is_finished_exactly(backend, device, length, width, heads):
    """Raw z, γ near 1 and a large gate: the iteration cannot converge in time, the answer is exact all the same."""
    *inputs, reset = problem(2, length, width, heads, seed=8, gate_scale=4.0, contracting=False, resets=0.02)
    inputs[1] = torch.full_like(inputs[1], 0.999)
    narrow = cast(inputs, device, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        actual = run(gated_recurrence, narrow, reset, max_iterations=3)
    assert_close(actual, run(reference.gated_recurrence, [t.double().cpu() for t in narrow], reset), 3e-5)
    result = gated_recurrence(*narrow, max_iterations=3)
    assert (result.residual > 1e-6).all() and (result.iterations >= 3).all()


@pytest.mark.parametrize("heads", [None, 1])
def test_the_exact_finish_is_as_exact_with_a_16_bit_gate(heads, backend, device):
    """Of nothing that iterations have left: their products are rounded more, and this recurrence lets it grow."""
    generator = torch.Generator().manual_seed(1)
    z, gamma = 2 * torch.randn(1, 64, 16, generator=generator), torch.full((1, 64, 16), 0.8)
    weight = 3 * torch.randn(16, 16, generator=generator)
    inputs = [z, gamma, (weight if heads is None else weight[None]).half()]
    expected = reference.gated_recurrence(*(t.double() for t in inputs))
    result = gated_recurrence(*(t.to(device) for t in inputs), tol=1e-6)
    assert relative_error(result.h, expected[0]) < 2e-6
    assert relative_error(result.final_state, expected[1]) < 2e-6


def test_an_adjoint_that_does_not_converge_warns():
    *inputs, _ = problem(2, 200, 16, seed=8, gate_scale=4.0, contracting=False)
    inputs[1] = torch.full_like(inputs[1], 0.999)
    with pytest.warns(RuntimeWarning, match="adjoint of gated_recurrence did not converge"):
        actual = run(gated_recurrence, inputs, None, max_iterations=6)
    assert_close(actual, run(reference.gated_recurrence, inputs, None), 1e-8)
    result = gated_recurrence(*inputs, max_iterations=6)
    assert (result.residual > 1e-12).all() and (result.iterations == 6).all()


@every_kernel
def test_only_the_unconverged_rows_are_finished(backend, device, length, width, heads):
    *inputs, _ = problem(2, max(length, 20), width, heads, seed=9)
    inputs[0][1] *= 40
    inputs[1][1] = 0.9999
    z, gamma, weight, initial = cast(inputs, device, torch.float32)
    options = dict(tol=1e-3, max_iterations=6)
    result = gated_recurrence(z, gamma, weight, initial, **options)
    assert result.residual[0] <= 1e-3 < result.residual[1]
    expected, _ = reference.gated_recurrence(*inputs)
    assert relative_error(result.h[1], expected[1]) < 1e-3  # the prefix is converged to the tolerance, the rest exact
    alone = gated_recurrence(z[:1], gamma[:1], weight, initial[:1], **options)
    torch.testing.assert_close(result.h[:1], alone.h, rtol=1e-5, atol=1e-5)


@every_kernel
def test_no_sequence_at_all(backend, device, length, width, heads):
    z, gamma, weight, initial, _ = problem(1, length, width, heads)
    inputs = cast(
        [z[:0], gamma[:0], weight, initial[:0]], device, torch.float32, torch.float32, torch.float16, torch.float32
    )
    h, final, *_ = run(gated_recurrence, inputs, None)
    assert h.shape == (0, length, width) and final.shape == (0, width)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row_and_end_the_iteration(backend, device, length, width, heads, poison, dtype):
    inputs = cast(problem(2, length, width, heads, seed=10)[:4], device, dtype)
    inputs[0][1] = 0.0  # so that this row is not what the number of iterations depends on
    clean = run(gated_recurrence, inputs, None)
    inputs[0][1, length // 2, 3] = poison
    result = run(gated_recurrence, inputs, None)
    for i in (0, 1, 2, 3, 5):  # all but the gradient of W, which is a sum over rows
        assert torch.equal(result[i][0], clean[i][0])
    h = result[0]
    assert not h[1, length // 2 :].isfinite().all() and h[1, : length // 2].isfinite().all()
    assert gated_recurrence(*inputs).iterations[1] <= 33


@every_kernel
def test_a_cut_anywhere_changes_nothing(backend, device, length, width, heads):
    z, gamma, weight, initial, reset = problem(2, length, width, heads, seed=11, resets=0.1)
    z, gamma, weight, initial = cast([z, gamma, weight, initial], device, torch.float32)
    reset = reset.to(device)
    whole = gated_recurrence(z, gamma, weight, initial, reset=reset)
    for cut in (1, length // 2, length - 1):
        left = gated_recurrence(z[:, :cut], gamma[:, :cut], weight, initial, reset=reset[:, :cut])
        right = gated_recurrence(z[:, cut:], gamma[:, cut:], weight, left.final_state, reset=reset[:, cut:])
        torch.testing.assert_close(torch.cat([left.h, right.h], 1), whole.h, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(right.final_state, whole.final_state, rtol=1e-5, atol=1e-5)


@every_kernel
def test_same_inputs_same_bits_whatever_memory_held_before(monkeypatch, backend, device, length, width, heads):
    inputs = cast(problem(2, length, width, heads, seed=12)[:4], device, torch.float32)
    first = run(gated_recurrence, inputs, None)

    def poisoned(allocate):
        def allocate_and_fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 2**30)

        return allocate_and_fill

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert same_bits(run(gated_recurrence, inputs, None), first)


def test_kernels_do_not_do_fp64(monkeypatch, device):
    monkeypatch.setenv("MMREC_KERNELS", "triton")
    *inputs, _ = problem(1, 4, 16)
    with pytest.raises(RuntimeError, match="fp64"):
        gated_recurrence(*cast(inputs, device, torch.float64))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gamma=torch.ones(1, 4, 3)), "gamma"),
        (dict(z=torch.ones(1, 0, 4), gamma=torch.ones(1, 0, 4)), "empty"),
        (dict(initial_state=torch.ones(4)), "initial_state"),
        (dict(weight=torch.ones(3, 2, 2)), "weight"),
        (dict(weight=torch.ones(2, 2, 1)), "weight"),
        (dict(solver="newton"), "solver"),
        (dict(tol=0.0), "tol"),
        (dict(tol=float("nan")), "tol"),
        (dict(z=torch.ones(1, 4, 4, dtype=torch.int64)), "floating"),
        (dict(max_iterations=0), "max_iterations"),
        (dict(reset=torch.zeros(1, 4)), "reset"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = dict(z=torch.ones(1, 4, 4), gamma=torch.ones(1, 4, 4), weight=torch.eye(4)) | change
    with pytest.raises(ValueError, match=message):
        gated_recurrence(**arguments)


@pytest.mark.parametrize("heads", [None, 2])
def test_16_bit_gates_of_nothing_and_of_large_states(heads, backend, device):
    """The scales of 16-bit operands: rows of zeros, a state far above the inputs, rows of very different size."""
    z, gamma, weight, initial, _ = problem(3, 20, 32, heads, seed=21)
    z[0], initial[0] = 0.0, 0.0
    z[1] *= 1e-3
    initial[1] *= 1e4
    z[2] *= 1e6 if heads is None else 1e3  # the kernel on the chip does not scale: fp16 ends at 1.3e5
    gamma = gamma.clamp(0.9, 0.999)
    weight = weight.half().double()
    inputs = cast([z, gamma, weight, initial], device, *[torch.float32] * 2, torch.float16, torch.float32)
    result = gated_recurrence(*inputs)
    expected, final = reference.gated_recurrence(z, gamma, weight, initial)
    assert torch.equal(result.h[0].cpu(), torch.zeros(20, 32))
    for b in (1, 2):
        assert relative_error(result.h[b], expected[b]) < 2e-3
        assert relative_error(result.final_state[b], final[b]) < 2e-3


@pytest.mark.parametrize("size, converges", [(30.0, True), (1e5, False)])
def test_a_token_far_above_those_that_operands_are_scaled_by(monkeypatch, backend, device, size, converges):
    monkeypatch.setattr(dense_triton, "SAMPLED_AT_LEAST", 1)
    z, gamma, weight, initial, _ = problem(1, 20, 16, seed=23)
    z[0, 9] *= size
    weight = weight.half().double()
    inputs = cast([z, gamma, weight, initial], device, *[torch.float32] * 2, torch.float16, torch.float32)
    result = gated_recurrence(*inputs, tol=1e-3)
    expected, final = reference.gated_recurrence(z, gamma, weight, initial)
    finished = backend == "triton" and not converges
    assert (result.iterations.item() == 20) == finished and result.residual.item() <= 1e-3
    limit = 1e-5 if finished else 1e-3
    assert relative_error(result.h, expected) < limit and relative_error(result.final_state, final) < limit


@pytest.mark.parametrize("heads", [None, 2])
def test_16_bit_gradients_through_the_final_state_only(heads, backend, device):
    *inputs, _ = problem(2, 20, 32, heads, seed=22)
    inputs[2] = inputs[2].half().double()
    leaves = cast(inputs, device, *[torch.float32] * 2, torch.float16, torch.float32)
    leaves = [t.requires_grad_() for t in leaves]
    actual = torch.autograd.grad(gated_recurrence(*leaves).final_state.sum(), leaves)
    plain = [t.detach().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(reference.gated_recurrence(*plain)[1].sum(), plain)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 5e-3
