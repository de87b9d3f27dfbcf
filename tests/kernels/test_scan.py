import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrec_kernels import associative_scan_exponential, linear_scan, reference, time_tiles


def relative_error(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_inputs(batch, length, width, seed, reset_probability=0.0):
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.rand(batch, length, width, generator=generator, dtype=torch.float64).pow(0.05)
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    initial = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    reset = torch.rand(batch, length, generator=generator) < reset_probability
    return gamma, x, initial, reset


def outputs_and_gradients(scan, inputs, reset=None, reverse=False):
    """h, the final state, and the gradients of a loss that both enter."""
    leaves = [None if i is None else i.detach().clone().requires_grad_() for i in inputs]
    h, final = scan(*leaves, reset=reset, reverse=reverse)
    weights = torch.arange(h.numel(), device=h.device).reshape(h.shape).cos()
    loss = (h * weights.to(h.dtype)).sum() + (final * weights[:, 0].to(final.dtype)).sum()
    return [h, final, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences have many groups and supergroups of them."""
    for name, value in {"CHANNELS": 1, "STEPS": 4, "GROUP": 2}.items():
        monkeypatch.setattr(time_tiles, name, value)


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
def test_fp64_equals_the_loop_with_its_gradients(batch, length, width, seed, reverse, with_initial, resets):
    gamma, x, initial, reset = random_inputs(batch, length, width, seed, resets)
    inputs = [gamma, x, initial if with_initial else None]
    actual, expected = (
        outputs_and_gradients(scan, inputs, reset, reverse) for scan in (linear_scan, reference.linear_scan)
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 40),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    reverse=st.booleans(),
    with_initial=st.booleans(),
    resets=st.sampled_from([None, 0.05, 1.0]),
)
def test_fp32_equals_the_loop_with_its_gradients(
    backend, device, small_tiles, batch, length, width, seed, reverse, with_initial, resets
):
    gamma, x, initial, reset = random_inputs(batch, length, width, seed, resets or 0.0)
    inputs = [i if i is None else i.float() for i in (gamma, x, initial if with_initial else None)]
    reset = None if resets is None else reset
    expected = outputs_and_gradients(
        reference.linear_scan, [i if i is None else i.double() for i in inputs], reset, reverse
    )
    actual = outputs_and_gradients(
        linear_scan,
        [i if i is None else i.to(device) for i in inputs],
        None if reset is None else reset.to(device),
        reverse,
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert relative_error(a, e) < 1e-6


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_fp32_is_accurate_in_tiles_of_full_size(length, backend, device):
    inputs = [t.float() for t in random_inputs(1, length, 70, seed=length)[:3]]
    actual = outputs_and_gradients(linear_scan, [t.to(device) for t in inputs])
    expected = outputs_and_gradients(reference.linear_scan, [t.double() for t in inputs])
    assert all(relative_error(a, e) < 1e-6 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("length", [1023, 1025, 32768, 65536])
def test_fp32_is_accurate_in_torch_at_any_length(length):
    inputs = [t.float() for t in random_inputs(1, length, 2, seed=length)[:3]]
    h, final = linear_scan(*inputs)
    expected, expected_final = reference.linear_scan(*(t.double() for t in inputs))
    assert relative_error(h, expected) < 1e-6
    assert relative_error(final, expected_final) < 1e-5


@pytest.mark.parametrize("dtypes", [[torch.bfloat16] * 2, [torch.float16] * 2, [torch.float32, torch.bfloat16]])
def test_16_bit_inputs_are_scanned_in_fp32(dtypes, backend, device):
    gamma, x, initial, _ = random_inputs(2, 150, 8, seed=0)
    inputs = [gamma.to(dtypes[0]), x.to(dtypes[1]), initial.float()]
    actual = outputs_and_gradients(linear_scan, [t.to(device) for t in inputs])
    expected = outputs_and_gradients(reference.linear_scan, [t.double() for t in inputs])
    assert [t.dtype for t in actual] == [dtypes[1], torch.float32, *dtypes, torch.float32]
    assert relative_error(actual[1], expected[1]) < 1e-6  # a 16-bit state would be off by 1e-3
    for a, e in zip(actual, expected, strict=True):
        # Triton's interpreter rounds to bf16 towards zero
        assert relative_error(a, e) < torch.finfo(min(dtypes, key=lambda d: d.itemsize)).eps


def test_inputs_may_be_views(backend, device, small_tiles):
    wide = torch.rand(2, 11, 12, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(device)
    gamma, x = wide[:, ::2, :6], wide.transpose(1, 2)[:, :6, :6]
    expected, expected_final = reference.linear_scan(gamma.double().cpu(), x.double().cpu())
    h, final = linear_scan(gamma, x)
    assert relative_error(h, expected) < 1e-6
    assert relative_error(final, expected_final) < 1e-6


def test_gradcheck_through_final_state():
    gamma, x, initial, reset = random_inputs(2, 37, 2, seed=3, reset_probability=0.1)
    leaves = [t.requires_grad_() for t in (gamma, x, initial)]
    assert torch.autograd.gradcheck(lambda g, v, i: linear_scan(g, v, i, reset=reset), leaves)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_row_and_channel(value, backend, device, small_tiles):
    gamma, x, initial, _ = (t.float().to(device) for t in random_inputs(3, 50, 5, seed=1))
    x[1, 20, 2] = value
    h, _ = linear_scan(gamma, x, initial)
    poisoned = torch.zeros_like(h, dtype=torch.bool)
    poisoned[1, 20:, 2] = True
    assert torch.equal(h.isfinite(), ~poisoned)


def test_a_nan_whose_bits_are_all_set_is_handed_on(backend, device, small_tiles):
    gamma, x, initial, _ = (t.float().to(device) for t in random_inputs(1, 50, 1, seed=1))
    x[0, 3, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    h, final = linear_scan(gamma, x, initial)
    assert h[0, 3:].isnan().all() and final.isnan().all()


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 2500), seed=st.integers(0, 2**31), exponent=st.sampled_from([0.001, 0.05, 3.0]))
def test_exponential_equals_the_loop(length, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.rand(2, length, 3, generator=generator, dtype=torch.float64).pow(exponent)
    gamma[0, length // 2, 0] = 0.0
    initial = -torch.rand(2, 3, generator=generator, dtype=torch.float64)
    expected = reference.associative_scan_exponential(gamma, initial)
    torch.testing.assert_close(associative_scan_exponential(gamma, initial), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("length", [1, 6, 37])
def test_exponential_in_fp32_with_its_gradients(length, with_initial, backend, device, small_tiles):
    generator = torch.Generator().manual_seed(length)
    gamma = torch.rand(2, length, 5, generator=generator).pow(0.3)
    gamma[0, length // 2, 0] = 1e-30  # below exp(-50)
    gamma[1, length // 2, 1] = 1e-20
    initial = -torch.rand(2, 5, generator=generator)
    initial[0, 1] = -60.0
    weights = torch.randn(2, length, 5, generator=generator)
    results = []
    for scan, where, dtype in (
        (associative_scan_exponential, device, torch.float32),
        (reference.associative_scan_exponential, "cpu", torch.float64),
    ):
        leaves = [t.to(where, dtype).requires_grad_() for t in (gamma, initial)[: 1 + with_initial]]
        y = scan(*leaves)
        results.append([y, *torch.autograd.grad((y * weights.to(where, dtype)).sum(), leaves)])
    for a, e in zip(*results, strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all()
        assert relative_error(a, e) < 2e-6
        assert torch.equal(a.cpu() == 0, e == 0)  # what is clamped passes nothing on


def test_exponential_has_finite_gradients_at_zero(backend, device):
    gamma = torch.tensor([[[0.5], [0.0], [0.9]]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(associative_scan_exponential(gamma)[:, 0].sum(), gamma)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[[1.0], [0.0], [0.0]]]))


def test_gradcheck_of_the_exponential_scan():
    gamma, _, initial, _ = random_inputs(2, 13, 2, seed=3)
    leaves = [gamma.requires_grad_(), (-initial.abs()).requires_grad_()]
    assert torch.autograd.gradcheck(associative_scan_exponential, leaves)


def test_operators_keep_their_contracts(backend, device, small_tiles):
    gamma, x, initial, reset = random_inputs(2, 5, 3, seed=4, reset_probability=0.2)
    leaves = [t.float().to(device).requires_grad_() for t in (gamma, x, initial)]
    torch.library.opcheck(torch.ops.mmrec.linear_scan.default, (*leaves, reset.to(device), True))
    torch.library.opcheck(torch.ops.mmrec.linear_scan.default, (*leaves[:2], None, None, False))
    torch.library.opcheck(torch.ops.mmrec.exponential_scan.default, (leaves[0], None))
    torch.library.opcheck(torch.ops.mmrec.exponential_scan.default, (leaves[0], leaves[2]))


def test_compiles_into_one_graph(backend, device, small_tiles):
    def loss(gamma, x, initial):
        h, final = linear_scan(gamma, x.sin(), initial, reverse=True)
        return h.square().sum() + final.sum() + associative_scan_exponential(gamma).sum()

    leaves = [t.float().to(device).requires_grad_() for t in random_inputs(1, 9, 5, seed=5)[:3]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


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


@pytest.mark.parametrize(
    "arguments, message", [((torch.ones(1, 0, 3),), "gamma"), ((torch.ones(1, 2, 3), torch.ones(3)), "initial_log")]
)
def test_wrong_shapes_are_refused_by_the_exponential_scan(arguments, message):
    with pytest.raises(ValueError, match=message):
        associative_scan_exponential(*arguments)
