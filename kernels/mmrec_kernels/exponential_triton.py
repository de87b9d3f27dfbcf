"""`associative_scan_exponential` in Triton, forward and backward, in tiles of time (`mmrec_kernels.time_tiles`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.register_tiles import last_row
from mmrec_kernels.scan_torch import MIN_LOG, MIN_PRODUCT
from mmrec_kernels.time_tiles import (
    first_token,
    launch,
    load_tile,
    look_back,
    publish_tile,
    readable,
    store_tile,
    tile_mask,
    tile_of_ticket,
)


@triton.jit
def _clamp(x, low, high):
    """Like torch.clamp: NaN stays NaN."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["batch", "length", "shift"])
def _exponential_kernel(
    gamma, initial, y, words, batch, length, shift, gamma_batch: tl.int64, WIDTH: tl.constexpr,
    GAMMA_TIME: tl.constexpr, MIN_LOG: tl.constexpr, MIN_Y: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y_t = exp(max(MIN_LOG, initial + Σ_{i ≤ t} log γ_i)): a scan of logarithms whose decays are 1.

    Sums never rise, so clamping each of them is clamping what is written.
    """
    chunk, b, channel, mask = tile_of_ticket(take_ticket(words), batch, WIDTH, BLOCK_D)
    words += 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    index = b * WIDTH + channel
    place = channel + shift * VECTOR
    first = first_token(chunk, length, 1, STEPS)
    inside = tile_mask(chunk * STEPS + tl.arange(0, STEPS) < length, mask, WHOLE)
    factors = load_tile(gamma + b * gamma_batch, first, place, GAMMA_TIME, 1, inside, 1.0, STEPS).to(tl.float32)
    totals = tl.cumsum(tl.log(_clamp(factors, MIN_Y, 1.0)), 0)
    one = tl.full([BLOCK_D], 1.0, tl.float32)
    total = last_row(totals)
    publish_tile(words, states, chunk, index, mask, one, total)
    start = tl.zeros([BLOCK_D], tl.float32)
    if initial is not None:
        start = tl.load(initial + index, mask, other=0.0).to(tl.float32)
        start = _clamp(start, MIN_LOG, 0.0)
    start = look_back(words, states, chunk, chunks, index, mask, one, total, start, GROUP)
    products = tl.exp(_clamp(start[None, :] + totals, MIN_LOG, 0.0))
    store_tile(y + b * length * WIDTH, first, place, WIDTH, 1, inside, products)


@triton.jit(do_not_specialize=["batch", "length", "shift"])
def _exponential_backward_kernel(
    grad_y, gamma, y, initial, grad_gamma, grad_initial, words, batch, length, shift, grad_batch: tl.int64,
    gamma_batch: tl.int64, WIDTH: tl.constexpr, GRAD_TIME: tl.constexpr, GAMMA_TIME: tl.constexpr,
    MIN_LOG: tl.constexpr, MIN_Y: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """∂ log γ_t = Σ_{i ≥ t} Y_i ∂L/∂Y_i, from the last token to the first, without the sums that were clamped."""
    chunk, b, channel, mask = tile_of_ticket(take_ticket(words), batch, WIDTH, BLOCK_D)
    words += 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    index = b * WIDTH + channel
    place = channel + shift * VECTOR
    own = b * length * WIDTH
    first = first_token(chunk, length, -1, STEPS)
    inside = tile_mask(chunk * STEPS + tl.arange(0, STEPS) < length, mask, WHOLE)
    grads = load_tile(grad_y + b * grad_batch, first, place, GRAD_TIME, -1, inside, 0.0, STEPS).to(tl.float32)
    products = load_tile(y + own, first, place, WIDTH, -1, inside, 0.0, STEPS)
    # zero where the sum of logarithms was clamped
    totals = tl.cumsum(tl.where(products <= MIN_Y * (1 + 1e-5), 0.0, grads * products), 0)
    one = tl.full([BLOCK_D], 1.0, tl.float32)
    zero = tl.zeros([BLOCK_D], tl.float32)
    total = last_row(totals)
    publish_tile(words, states, chunk, index, mask, one, total)
    start = look_back(words, states, chunk, chunks, index, mask, one, total, zero, GROUP)
    factors = load_tile(gamma + b * gamma_batch, first, place, GAMMA_TIME, -1, inside, 1.0, STEPS).to(tl.float32)
    clamped = (factors < MIN_Y) | (factors > 1.0)
    slopes = tl.where(clamped, 0.0, (start[None, :] + totals) / tl.where(clamped, 1.0, factors))
    store_tile(grad_gamma + own, first, place, WIDTH, -1, inside, slopes)
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
