"""`associative_scan_exponential` in Triton, forward and backward, in tiles of time (`mmrec_kernels.time_tiles`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.scan_torch import MIN_LOG, MIN_PRODUCT
from mmrec_kernels.time_tiles import launch, load_rows, look_back, publish_tile, readable, tile_of_ticket


@triton.jit
def _clamp(x, low, high):
    """Like torch.clamp: NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["batch", "length"])
def _exponential_kernel(
    gamma,
    initial,
    y,
    words,
    batch,
    length,
    gamma_batch: tl.int64,
    WIDTH: tl.constexpr,
    GAMMA_TIME: tl.constexpr,
    MIN_LOG: tl.constexpr,
    MIN_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Y_t = exp(max(MIN_LOG, initial + Σ_{i ≤ t} log γ_i)): a scan of logarithms whose decays are 1.

    Sums never rise, so clamping each of them is clamping what is written.
    """
    counter, words = words, words + 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    tiles = chunks * batch * ((WIDTH + BLOCK_D - 1) // BLOCK_D)
    ticket = take_ticket(counter)
    while ticket < tiles:
        chunk, row, channel, mask = tile_of_ticket(ticket, batch, WIDTH, BLOCK_D)
        first = chunk * STEPS
        gs = gamma + row * gamma_batch + first.to(tl.int64) * GAMMA_TIME + channel
        ys = y + (row * length + first) * WIDTH + channel
        left = length - first
        gammas = load_rows(gs, GAMMA_TIME, left, mask, 1.0, STEPS)
        ticket = take_ticket(counter)
        total = tl.zeros([BLOCK_D], tl.float32)
        for s in tl.static_range(STEPS):
            total += tl.log(_clamp(gammas[s].to(tl.float32), MIN_Y, 1.0))

        index = row * WIDTH + channel
        one = tl.full([BLOCK_D], 1.0, tl.float32)
        publish_tile(words, states, chunk, index, mask, one, total)
        start = tl.zeros([BLOCK_D], tl.float32)
        if initial is not None:
            start = tl.load(initial + index, mask, other=0.0).to(tl.float32)
            start = _clamp(start, MIN_LOG, 0.0)
        start = look_back(words, states, chunk, chunks, index, mask, one, total, start, GROUP)

        total = tl.zeros([BLOCK_D], tl.float32)
        for s in tl.static_range(STEPS):
            total += tl.log(_clamp(gammas[s].to(tl.float32), MIN_Y, 1.0))
            product = tl.exp(_clamp(start + total, MIN_LOG, 0.0))
            tl.store(ys + s * WIDTH, product, mask & (s < left))


@triton.jit
def _log_gradient(grad, y, MIN_Y: tl.constexpr):
    """Gradient of a sum of logarithms: zero where it is clamped."""
    return tl.where(y <= MIN_Y * (1 + 1e-5), 0.0, grad.to(tl.float32) * y)


@triton.jit(do_not_specialize=["batch", "length"])
def _exponential_backward_kernel(
    grad_y,
    gamma,
    y,
    initial,
    grad_gamma,
    grad_initial,
    words,
    batch,
    length,
    grad_batch: tl.int64,
    gamma_batch: tl.int64,
    WIDTH: tl.constexpr,
    GRAD_TIME: tl.constexpr,
    GAMMA_TIME: tl.constexpr,
    MIN_LOG: tl.constexpr,
    MIN_Y: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """∂ log γ_t = Σ_{i ≥ t} Y_i ∂L/∂Y_i, from the last token to the first, without the sums that were clamped."""
    counter, words = words, words + 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    tiles = chunks * batch * ((WIDTH + BLOCK_D - 1) // BLOCK_D)
    ticket = take_ticket(counter)
    while ticket < tiles:
        chunk, row, channel, mask = tile_of_ticket(ticket, batch, WIDTH, BLOCK_D)
        first = chunk * STEPS
        token = (length - 1 - first).to(tl.int64)
        gs = gamma + row * gamma_batch + token * GAMMA_TIME + channel
        ds = grad_y + row * grad_batch + token * GRAD_TIME + channel
        written = (row * length + token) * WIDTH + channel
        left = length - first
        grads = load_rows(ds, -GRAD_TIME, left, mask, 0.0, STEPS)
        products = load_rows(y + written, -WIDTH, left, mask, 0.0, STEPS)
        ticket = take_ticket(counter)
        total = tl.zeros([BLOCK_D], tl.float32)
        for s in tl.static_range(STEPS):
            total += _log_gradient(grads[s], products[s], MIN_Y)

        index = row * WIDTH + channel
        one = tl.full([BLOCK_D], 1.0, tl.float32)
        publish_tile(words, states, chunk, index, mask, one, total)
        zero = tl.zeros([BLOCK_D], tl.float32)
        start = look_back(words, states, chunk, chunks, index, mask, one, total, zero, GROUP)

        total = zero
        gammas = load_rows(gs, -GAMMA_TIME, left, mask, 1.0, STEPS)
        for s in tl.static_range(STEPS):
            total += _log_gradient(grads[s], products[s], MIN_Y)
            factor = gammas[s].to(tl.float32)
            clamped = (factor < MIN_Y) | (factor > 1.0)
            factor = tl.where(clamped, 1.0, factor)
            value = tl.where(clamped, 0.0, (start + total) / factor)
            tl.store(grad_gamma + written - s * WIDTH, value, mask & (s < left))
        if chunk == chunks - 1:
            end = start + total
            if initial is not None:
                before = tl.load(initial + index, mask, other=0.0).to(tl.float32)
                end = tl.where((before < MIN_LOG) | (before > 0.0), 0.0, end)
            tl.store(grad_initial + index, end, mask)


def exponential_scan_forward(gamma: Tensor, initial: Tensor | None) -> Tensor:
    """See `mmrec_kernels.scan_torch.exponential_scan_forward`; no fp64."""
    gamma = readable(gamma)
    batch, length, width = gamma.shape
    y = torch.empty(gamma.shape, dtype=torch.float32, device=gamma.device)
    launch(
        _exponential_kernel,
        batch,
        length,
        width,
        gamma.device,
        gamma=gamma,
        initial=None if initial is None else initial.contiguous(),
        y=y,
        gamma_batch=gamma.stride(0),
        GAMMA_TIME=gamma.stride(1),
        MIN_LOG=MIN_LOG,
        MIN_Y=MIN_PRODUCT,
    )
    return y


def exponential_scan_backward(
    grad_y: Tensor, gamma: Tensor, y: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `mmrec_kernels.scan_torch.exponential_scan_backward`; no fp64."""
    grad_y, gamma, y = readable(grad_y), readable(gamma), y.contiguous()
    batch, length, width = gamma.shape
    grad_gamma = torch.empty(gamma.shape, dtype=gamma.dtype, device=gamma.device)
    grad_initial = torch.empty(
        batch, width, dtype=torch.float32 if initial is None else initial.dtype, device=gamma.device
    )
    launch(
        _exponential_backward_kernel,
        batch,
        length,
        width,
        gamma.device,
        grad_y=grad_y,
        gamma=gamma,
        y=y,
        initial=None if initial is None else initial.contiguous(),
        grad_gamma=grad_gamma,
        grad_initial=grad_initial,
        grad_batch=grad_y.stride(0),
        gamma_batch=gamma.stride(0),
        GRAD_TIME=grad_y.stride(1),
        GAMMA_TIME=gamma.stride(1),
        MIN_LOG=MIN_LOG,
        MIN_Y=MIN_PRODUCT,
    )
    return grad_gamma, grad_initial
