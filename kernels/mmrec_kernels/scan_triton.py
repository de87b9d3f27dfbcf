"""`linear_scan` in Triton, forward and backward: one launch each, in tiles of time (`mmrec_kernels.time_tiles`).

A tile's inputs stay in registers, 16-bit ones in pairs as they came, between the walk that summarizes it and the one
that writes its states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.time_tiles import as_new, launch, load_rows, look_back, publish_tile, readable, tile_of_ticket


@triton.jit
def _decay(gamma, forgets, s: tl.constexpr):
    """γ of row s in fp32, or zero where the row forgets what came before; `forgets` is empty if no row does."""
    if len(forgets) > 0:
        return tl.where(forgets[s] != 0, 0.0, gamma.to(tl.float32))
    else:
        return gamma.to(tl.float32)


@triton.jit
def _load_resets(reset, STEP: tl.constexpr, left, STEPS: tl.constexpr):
    """Tuple of a number per row, nonzero where the row forgets what came before; empty if `reset` is None."""
    if reset is None:
        return ()
    else:
        return load_rows(reset, STEP, left, left > 0, 0, STEPS)


@triton.jit(do_not_specialize=["batch", "length"])
def _forward_kernel(
    gamma,
    x,
    initial,
    reset,
    h,
    final,
    words,
    batch,
    length,
    gamma_batch: tl.int64,
    x_batch: tl.int64,
    WIDTH: tl.constexpr,
    GAMMA_TIME: tl.constexpr,
    X_TIME: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """h_t = γ_t h_{t−1} + x_t; STEP is −1 for the scan from the last token to the first. See the module."""
    counter, words = words, words + 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    tiles = chunks * batch * ((WIDTH + BLOCK_D - 1) // BLOCK_D)
    G: tl.constexpr = STEP * GAMMA_TIME
    X: tl.constexpr = STEP * X_TIME
    H: tl.constexpr = STEP * WIDTH
    ticket = take_ticket(counter)
    while ticket < tiles:
        chunk, row, channel, mask = tile_of_ticket(ticket, batch, WIDTH, BLOCK_D)
        first = chunk * STEPS
        token = (first if STEP > 0 else length - 1 - first).to(tl.int64)
        gs = gamma + row * gamma_batch + token * GAMMA_TIME + channel
        xs = x + row * x_batch + token * X_TIME + channel
        rs = None if reset is None else reset + row * length + token
        hs = h + (row * length + token) * WIDTH + channel
        left = length - first
        gammas = load_rows(gs, G, left, mask, 1.0, STEPS)
        xs = load_rows(xs, X, left, mask, 0.0, STEPS)
        forgets = _load_resets(rs, STEP, left, STEPS)
        ticket = take_ticket(counter)  # early, so that the next tile's number is here when this tile is done
        decay = tl.full([BLOCK_D], 1.0, tl.float32)
        state = tl.zeros([BLOCK_D], tl.float32)
        for s in tl.static_range(STEPS):
            factor = _decay(gammas[s], forgets, s)
            decay *= factor
            state = factor * state + xs[s].to(tl.float32)

        index = row * WIDTH + channel
        publish_tile(words, states, chunk, index, mask, decay, state)
        start = tl.zeros([BLOCK_D], tl.float32)
        if initial is not None:
            start = tl.load(initial + index, mask, other=0.0).to(tl.float32)
        state = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)

        left = as_new(left)
        for s in tl.static_range(STEPS):
            state = _decay(as_new(gammas[s]), forgets, s) * state + as_new(xs[s]).to(tl.float32)
            tl.store(hs + s * H, state, mask & (s < left))
        if chunk == chunks - 1:
            tl.store(final + index, state, mask)


@triton.jit(do_not_specialize=["batch", "length"])
def _backward_kernel(
    grad_h,
    grad_final,
    gamma,
    h,
    initial,
    reset,
    grad_x,
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
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """λ_t = ∂L/∂h_t + μ_{t+1} and μ_t = γ_t λ_t, against the direction of the forward scan.

    ∂x_t = λ_t, ∂γ_t = λ_t h_{t−1}; μ is what is scanned, starts as the gradient of the final state, and ends as the
    gradient of the initial one. STEP is the direction of this scan: −1 if the forward scan went to the last token.
    """
    counter, words = words, words + 4
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * WIDTH
    tiles = chunks * batch * ((WIDTH + BLOCK_D - 1) // BLOCK_D)
    G: tl.constexpr = STEP * GAMMA_TIME
    Y: tl.constexpr = STEP * GRAD_TIME
    H: tl.constexpr = STEP * WIDTH
    ticket = take_ticket(counter)
    while ticket < tiles:
        chunk, row, channel, mask = tile_of_ticket(ticket, batch, WIDTH, BLOCK_D)
        first = chunk * STEPS
        token = (first if STEP > 0 else length - 1 - first).to(tl.int64)
        gs = gamma + row * gamma_batch + token * GAMMA_TIME + channel
        ys = grad_h + row * grad_batch + token * GRAD_TIME + channel
        rs = None if reset is None else reset + row * length + token
        written = (row * length + token) * WIDTH + channel
        left = length - first
        gammas = load_rows(gs, G, left, mask, 1.0, STEPS)
        grads = load_rows(ys, Y, left, mask, 0.0, STEPS)
        forgets = _load_resets(rs, STEP, left, STEPS)
        ticket = take_ticket(counter)
        decay = tl.full([BLOCK_D], 1.0, tl.float32)
        state = tl.zeros([BLOCK_D], tl.float32)
        for s in tl.static_range(STEPS):
            factor = _decay(gammas[s], forgets, s)
            decay *= factor
            state = factor * (state + grads[s].to(tl.float32))

        index = row * WIDTH + channel
        publish_tile(words, states, chunk, index, mask, decay, state)
        start = tl.load(grad_final + index, mask, other=0.0).to(tl.float32)
        state = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)

        before = tl.zeros([BLOCK_D], tl.float32)
        if initial is not None:
            before = tl.load(initial + index, mask, other=0.0).to(tl.float32)
        left = as_new(left)
        # the state that entered a token, which for the last one is not among h
        entered = load_rows(h + written + H, H, left - 1, mask, 0.0, STEPS)
        for s in tl.static_range(STEPS):
            there = mask & (s < left)
            adjoint = state + as_new(grads[s]).to(tl.float32)
            state_before = tl.where(s + 1 == left, before, entered[s].to(tl.float32))
            tl.store(grad_x + written + s * H, adjoint, there)
            tl.store(grad_gamma + written + s * H, _decay(state_before * adjoint, forgets, s), there)
            state = _decay(as_new(gammas[s]), forgets, s) * adjoint
        if chunk == chunks - 1:
            tl.store(grad_initial + index, state, mask)


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
