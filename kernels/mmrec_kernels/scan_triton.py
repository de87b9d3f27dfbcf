"""`linear_scan` in Triton, forward and backward: one launch each, in tiles of time (`mmrec_kernels.time_tiles`).

A tile's inputs stay in registers, 16-bit ones in pairs as they came, between the walk that summarizes it and the one
that writes its states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.register_tiles import as_new, last_row, scan_rows, summarize_tile
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
def _remembered(value, forgets):
    """value [rows, channels] in fp32, but zero in rows that forget what came before them."""
    if len(forgets) > 0:
        return tl.where(forgets[0][:, None] != 0, 0.0, value.to(tl.float32))
    else:
        return value.to(tl.float32)


@triton.jit
def _load_resets(reset, first, there, STEP: tl.constexpr):
    """A number per row, nonzero where it forgets what came before it, as a tuple; empty if `reset` is None."""
    if reset is None:
        return ()
    else:
        return (tl.load(reset + first + tl.arange(0, there.shape[0]) * STEP, there, other=0),)


@triton.jit(do_not_specialize=["batch", "length", "shift"])
def _forward_kernel(
    gamma, x, initial, reset, h, final, words, batch, length, shift, gamma_batch: tl.int64, x_batch: tl.int64,
    WIDTH: tl.constexpr, GAMMA_TIME: tl.constexpr, X_TIME: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h_t = γ_t h_{t−1} + x_t; STEP is −1 for the scan from the last token to the first."""
    chunk, b, channel, mask = tile_of_ticket(take_ticket(words), batch, WIDTH, BLOCK_D)
    words += 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    index = b * WIDTH + channel
    place = channel + shift * VECTOR
    first = first_token(chunk, length, STEP, STEPS)
    there = chunk * STEPS + tl.arange(0, STEPS) < length
    inside = tile_mask(there, mask, WHOLE)
    gammas = load_tile(gamma + b * gamma_batch, first, place, GAMMA_TIME, STEP, inside, 1.0, STEPS)
    xs = load_tile(x + b * x_batch, first, place, X_TIME, STEP, inside, 0.0, STEPS)
    forgets = _load_resets(reset, b * length + first, there, STEP)
    decay, state = summarize_tile(_remembered(gammas, forgets), xs.to(tl.float32))
    publish_tile(words, states, chunk, index, mask, decay, state)
    start = tl.zeros([BLOCK_D], tl.float32)
    if initial is not None:
        start = tl.load(initial + index, mask, other=0.0).to(tl.float32)
    start = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)
    values = scan_rows(_remembered(as_new(gammas), forgets), as_new(xs).to(tl.float32), start)
    store_tile(h + b * length * WIDTH, first, place, WIDTH, STEP, inside, values)
    if chunk == chunks - 1:
        tl.store(final + index, last_row(values), mask)


@triton.jit(do_not_specialize=["batch", "length", "shift"])
def _backward_kernel(
    grad_h, grad_final, gamma, h, initial, reset, grad_x, grad_gamma, grad_initial, words, batch, length, shift,
    grad_batch: tl.int64, gamma_batch: tl.int64, WIDTH: tl.constexpr, GRAD_TIME: tl.constexpr,
    GAMMA_TIME: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """λ_t = γ_{t+1} λ_{t+1} + ∂L/∂h_t, against the direction of the forward scan; ∂x_t = λ_t, ∂γ_t = λ_t h_{t−1}.

    The gradient of the final state enters the first λ without a decay; γ λ of the last one is the gradient of the
    initial state. STEP is the direction of this scan: −1 if the forward scan went to the last token.
    """
    chunk, b, channel, mask = tile_of_ticket(take_ticket(words), batch, WIDTH, BLOCK_D)
    words += 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    index = b * WIDTH + channel
    place = channel + shift * VECTOR
    own = b * length * WIDTH
    gammas = gamma + b * gamma_batch
    first = first_token(chunk, length, STEP, STEPS)
    order = chunk * STEPS + tl.arange(0, STEPS)
    there = order < length
    inside = tile_mask(there, mask, WHOLE)
    decays = load_tile(gammas, first - STEP, place, GAMMA_TIME, STEP, inside & (order > 0)[:, None], 1.0, STEPS)
    grads = load_tile(grad_h + b * grad_batch, first, place, GRAD_TIME, STEP, inside, 0.0, STEPS)
    forgets = _load_resets(reset, b * length + first - STEP, there & (order > 0), STEP)
    decay, state = summarize_tile(_remembered(decays, forgets), grads.to(tl.float32))
    publish_tile(words, states, chunk, index, mask, decay, state)
    start = tl.load(grad_final + index, mask, other=0.0).to(tl.float32)
    start = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)
    adjoints = scan_rows(_remembered(as_new(decays), forgets), as_new(grads).to(tl.float32), start)
    store_tile(grad_x + own, first, place, WIDTH, STEP, inside, adjoints)

    # the state that entered a token, which for the last one is not among h
    has_earlier = (order < length - 1)[:, None]
    entered = load_tile(h + own, first + STEP, place, WIDTH, STEP, inside & has_earlier, 0.0, STEPS).to(tl.float32)
    if initial is not None:
        before = tl.load(initial + index, mask, other=0.0).to(tl.float32)
        entered = tl.where(has_earlier, entered, before[None, :])
    slopes = _remembered(adjoints * entered, _load_resets(reset, b * length + first, there, STEP))
    store_tile(grad_gamma + own, first, place, WIDTH, STEP, inside, slopes)
    if chunk == chunks - 1:
        last = first + STEP * (length - 1 - chunk * STEPS)
        decay = tl.load(gammas + last * GAMMA_TIME + channel, mask, other=0.0).to(tl.float32)
        if reset is not None:
            decay = tl.where(tl.load(reset + b * length + last) != 0, 0.0, decay)
        tl.store(grad_initial + index, decay * last_row(adjoints), mask)


def linear_scan_forward(
    gamma: Tensor, x: Tensor, initial: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """See `mmrec_kernels.scan_torch.linear_scan_forward`; no fp64."""
    gamma, x = readable(gamma), readable(x)
    batch, length, width = x.shape
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(batch, width, dtype=torch.float32, device=x.device)
    launch(
        _forward_kernel,
        batch,
        length,
        width,
        x.device,
        gamma=gamma,
        x=x,
        initial=None if initial is None else initial.contiguous(),
        reset=None if reset is None else reset.contiguous().view(torch.uint8),
        h=h,
        final=final,
        gamma_batch=gamma.stride(0),
        x_batch=x.stride(0),
        GAMMA_TIME=gamma.stride(1),
        X_TIME=x.stride(1),
        STEP=-1 if reverse else 1,
    )
    return h, final


def linear_scan_backward(
    grad_h: Tensor,
    grad_final: Tensor,
    gamma: Tensor,
    h: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mmrec_kernels.scan_torch.linear_scan_backward`; no fp64."""
    grad_h, gamma, h = readable(grad_h), readable(gamma), h.contiguous()
    batch, length, width = h.shape
    grad_x = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_gamma = torch.empty(h.shape, dtype=gamma.dtype, device=h.device)
    grad_initial = torch.empty(batch, width, dtype=torch.float32 if initial is None else initial.dtype, device=h.device)
    launch(
        _backward_kernel,
        batch,
        length,
        width,
        h.device,
        grad_h=grad_h,
        grad_final=grad_final.contiguous(),
        gamma=gamma,
        h=h,
        initial=None if initial is None else initial.contiguous(),
        reset=None if reset is None else reset.contiguous().view(torch.uint8),
        grad_x=grad_x,
        grad_gamma=grad_gamma,
        grad_initial=grad_initial,
        grad_batch=grad_h.stride(0),
        gamma_batch=gamma.stride(0),
        GRAD_TIME=grad_h.stride(1),
        GAMMA_TIME=gamma.stride(1),
        STEP=1 if reverse else -1,
    )
    return grad_x, grad_gamma, grad_initial
