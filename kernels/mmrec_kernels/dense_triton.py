"""The recurrence whose gate mixes all channels: a matrix product and a scan per iteration, nothing decided by the host.

Per direction

1. a guess: the scan with the gate at its neutral value;
2. `planned` iterations, each a cuBLAS product and one launch of `_step_kernel`, which computes the gates, scans, and
   writes the operand of the next product. The first of them may have 8-bit operands: they only improve the guess.
   The last one measures the change, between its product and the one before, which are therefore fp32: rounding them
   to 16 bit changes the states by about 1e−3 of the largest one;
3. `_refine_kernel`: more iterations until every row has converged. One launch whose programs meet at barriers; it
   returns at once if there is nothing left to do;
4. `_finish_kernel`: the rows that have not converged after `max_iterations`, token by token, in the same manner.

Both directions are one scan of the same form; "before" and "after" a token are in the order of the scan:

    forward:  h_t     = γ_t h_{t−1} + z_t σ(a_t),     a_t = W h_{t−1}
    adjoint:  λ_{t−1} = γ_t λ_t + (g_{t−1} + y_t),    y_t = Wᵀ(s_t λ_t),  s_t = z_t σ′(a_t)

The change of an iteration is scanned beside the state, from the difference of the two products, so that states need
not be kept from one iteration to the next.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.backend import interpreted
from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.matmul import gate_weight_gradient
from mmrec_kernels.scan_torch import shift_right
from mmrec_kernels.solver import SolverSettings
from mmrec_kernels.time_tiles import (
    BLOCK_D,
    GROUP,
    STEPS,
    handoff_words,
    look_back,
    on_device,
    programs_in_cache,
    publish_tile,
)

PLANNED = {torch.float32: 8}  # iterations before the change is looked at, by the dtype of W; else 5
PLANNED_8_BIT = 3  # how many of them have 8-bit operands
WIDTH_8_BIT = 2048  # from this width on: below, a product costs less than rounding its operands
HEADROOM_8_BIT = 16.0  # 8-bit operands are scaled so that the largest input of the recurrence becomes this
ROWS = 8  # tokens whose loads are in flight together


@triton.jit
def _added(source, product, s: tl.constexpr, stride, at, inside, keep, earliest, ADJOINT: tl.constexpr):
    """What a token adds to the state: z σ(a), or g of the token before plus y."""
    if ADJOINT:
        value = tl.load(source + at - stride, inside & ~earliest, other=0.0).to(tl.float32)
        if product is not None:
            value += tl.load(product + at, inside, other=0.0).to(tl.float32) * keep
    else:
        value = tl.load(source + at, inside, other=0.0).to(tl.float32)
        if product is not None:
            value *= tl.sigmoid(tl.load(product + at, inside, other=0.0).to(tl.float32))
        else:
            value *= 0.5
    return value


@triton.jit
def _step_tile(
    gamma, source, product, old_product, factor, reset, initial, scale, operand, value, final, change, size,
    words, change_words, chunk, b, channel, mask, batch, length,
    D: tl.constexpr, ADJOINT: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile [STEPS, channels] of one iteration; see `_step_kernel`."""
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * D
    index = b.to(tl.int64) * D + channel
    first = chunk * STEPS
    count = tl.minimum(length - first, STEPS)
    token = length - 1 - first if ADJOINT else first
    step: tl.constexpr = -D if ADJOINT else D
    row_step: tl.constexpr = -1 if ADJOINT else 1
    place = (b.to(tl.int64) * length + token) * D + channel
    row = b.to(tl.int64) * length + token

    decay = tl.full(channel.shape, 1.0, tl.float32)
    state = tl.zeros(channel.shape, tl.float32)
    delta = tl.zeros(channel.shape, tl.float32)
    for i in range(0, count, ROWS):
        for s in tl.static_range(ROWS):
            inside = mask & (i + s < count)
            at = place + (i + s) * step
            keep = 1.0
            if reset is not None:
                keep = 1.0 - tl.load(reset + row + (i + s) * row_step, i + s < count, other=0).to(tl.float32)
            earliest = first + i + s == (length - 1 if ADJOINT else -1)
            g = tl.load(gamma + at, inside, other=1.0).to(tl.float32) * keep
            x = _added(source, product, s, D, at, inside, keep, earliest, ADJOINT)
            decay *= g
            state = tl.fma(g, state, x)
            if old_product is not None:
                old = _added(source, old_product, s, D, at, inside, keep, earliest, ADJOINT)
                delta = tl.fma(g, delta, x - old)
    start = tl.load(initial + index, mask, other=0.0)
    publish_tile(words, states, chunk, index, mask, decay, state)
    if old_product is not None:
        publish_tile(change_words, states, chunk, index, mask, decay, delta)
    state = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)
    if old_product is not None:
        nothing = tl.zeros(channel.shape, tl.float32)
        delta = look_back(change_words, states, chunk, chunks, index, mask, decay, delta, nothing, GROUP)

    factor_scale = 1.0
    if scale is not None:
        factor_scale = tl.load(scale)
    largest_change = tl.zeros(channel.shape, tl.float32)
    largest = tl.zeros(channel.shape, tl.float32)
    for i in range(0, count, ROWS):
        for s in tl.static_range(ROWS):
            inside = mask & (i + s < count)
            at = place + (i + s) * step
            keep = 1.0
            if reset is not None:
                keep = 1.0 - tl.load(reset + row + (i + s) * row_step, i + s < count, other=0).to(tl.float32)
            earliest = first + i + s == (length - 1 if ADJOINT else -1)
            g = tl.load(gamma + at, inside, other=1.0).to(tl.float32) * keep
            x = _added(source, product, s, D, at, inside, keep, earliest, ADJOINT)
            f = keep
            if factor is not None:
                f = tl.load(factor + at, inside, other=0.0).to(tl.float32)
            u = state * f * factor_scale
            if scale is not None:
                u = tl.clamp(u, -448.0, 448.0)
            tl.store(operand + at, u.to(operand.dtype.element_ty), inside)
            before = state
            state = tl.fma(g, state, x)
            if old_product is not None:
                old = _added(source, old_product, s, D, at, inside, keep, earliest, ADJOINT)
                delta_before = delta
                delta = tl.fma(g, delta, x - old)
                written = before if ADJOINT else state
                tl.store(value + at, written.to(value.dtype.element_ty), inside)
                weight = 1.0 - g if ADJOINT else 1.0
                moved = tl.abs(delta_before if ADJOINT else delta) * weight
                largest_change = tl.maximum(largest_change, tl.where(inside, moved, 0.0))
                largest = tl.maximum(largest, tl.where(inside, tl.abs(written) * weight, 0.0))
    if old_product is not None:
        # numbers that are not negative are ordered like their bits
        tl.atomic_max(change + b, tl.max(largest_change).to(tl.int32, bitcast=True), sem="relaxed")
        tl.atomic_max(size + b, tl.max(largest).to(tl.int32, bitcast=True), sem="relaxed")
        if chunk == chunks - 1:
            tl.store(final + index, state, mask)


@triton.jit(do_not_specialize=["batch", "length"])
def _step_kernel(
    gamma, source, product, old_product, factor, reset, initial, scale, operand, value, final, change, size,
    words, change_words, batch, length,
    D: tl.constexpr, ADJOINT: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One iteration: scans with the gates of a product, and writes the operand of the next product.

    gamma, source (z, or the gradient of h), product, old_product, factor (s of the adjoint), operand and value are
    [batch, length, D]; reset [batch, length]; initial and final [batch, D] fp32; change and size [batch] int32, the
    bits of fp32 numbers. Without a product the gate is neutral (y is zero). With an old one the iteration is measured,
    and value and final are written. scale: 8-bit operands are multiplied by it.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(length, STEPS) * batch * blocks
    ticket = take_ticket(words)
    while ticket < tiles:
        column = ticket % (batch * blocks)
        channel = column % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        _step_tile(
            gamma, source, product, old_product, factor, reset, initial, scale, operand, value, final, change, size,
            words + 4, change_words + 4, ticket // (batch * blocks), column // blocks, channel, channel < D,
            batch, length, D, ADJOINT, STEPS, GROUP, ROWS,
        )  # fmt: skip
        ticket = take_ticket(words)


@triton.jit
def _meet(counter, meetings):
    """All programs wait here for each other, for the time number `meetings`; returns the next number."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel")
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < meetings * tl.num_programs(0):
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()
    return meetings + 1


@triton.jit
def _converged(change, size, b, tolerance):
    moved = tl.load(change + b, cache_modifier=".cg").to(tl.float32, bitcast=True)
    largest = tl.load(size + b, cache_modifier=".cg").to(tl.float32, bitcast=True)
    return not (moved / tl.maximum(largest, 1e-37) > tolerance)


@triton.jit
def _all_converged(change, size, batch, tolerance):
    converged = True
    for b in range(batch):
        converged = converged & _converged(change, size, b, tolerance)
    return converged


@triton.jit
def _product_tile(
    operand, weight, product, m_block, n_block, tokens, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """product[m, n] = Σ_k weight[n, k] operand[m, k], k over the head that n belongs to."""
    per_head: tl.constexpr = (HEAD + BLOCK_N - 1) // BLOCK_N
    head = n_block // per_head
    n = n_block % per_head * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    left = operand + m.to(tl.int64)[:, None] * D + head * HEAD + k[None, :]
    right = weight + head * HEAD * HEAD + k[:, None] * K_STRIDE + n[None, :] * N_STRIDE
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HEAD, BLOCK_K):
        there = k < HEAD - start
        a = tl.load(left + start, mask=(m < tokens)[:, None] & there[None, :], other=0.0, cache_modifier=".cg")
        w = tl.load(right + start * K_STRIDE, mask=there[:, None] & (n < HEAD)[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision="tf32x3")
    at = product + m.to(tl.int64)[:, None] * D + head * HEAD + n[None, :]
    tl.store(at, total.to(product.dtype.element_ty), mask=(m < tokens)[:, None] & (n < HEAD)[None, :])


@triton.jit(do_not_specialize=["batch", "length"])
def _refine_kernel(
    gamma, source, products, weight, factor, reset, initial, operand, value, final, changes, sizes, iterations,
    words, change_words, word_count, meeting, batch, length, tolerance, planned, max_iterations,
    N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, ADJOINT: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Goes on iterating until every row has converged or the iterations are spent. All programs run at once.

    products: [2, batch, length, D]; the one of iteration n is at n mod 2. changes, sizes: [max_iterations + 1, batch],
    of each iteration. words: zero when an iteration begins.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tokens = batch * length
    elements = tokens.to(tl.int64) * D
    m_blocks = tl.cdiv(tokens, BLOCK_M)
    n_blocks: tl.constexpr = (D // HEAD) * ((HEAD + BLOCK_N - 1) // BLOCK_N)
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(length, STEPS) * batch * blocks
    iteration = planned
    meetings = 1
    while (iteration < max_iterations) & (
        not _all_converged(changes + iteration * batch, sizes + iteration * batch, batch, tolerance)
    ):
        iteration += 1
        new = products + (iteration % 2) * elements
        old = products + ((iteration + 1) % 2) * elements
        for tile in range(program, m_blocks * n_blocks, programs):
            _product_tile(
                operand, weight, new, tile // n_blocks, tile % n_blocks, tokens, N_STRIDE, K_STRIDE,
                D, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        meetings = _meet(meeting, meetings)
        for tile in range(program, tiles, programs):
            column = tile % (batch * blocks)
            channel = column % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
            _step_tile(
                gamma, source, new, old, factor, reset, initial, None, operand, value, final,
                changes + iteration * batch, sizes + iteration * batch, words, change_words,
                tile // (batch * blocks), column // blocks, channel, channel < D,
                batch, length, D, ADJOINT, STEPS, GROUP, ROWS,
            )  # fmt: skip
        meetings = _meet(meeting, meetings)
        for start in range(program * 1024, word_count, programs * 1024):
            at = start + tl.arange(0, 1024)
            tl.store(words + at, 0, at < word_count)
            tl.store(change_words + at, 0, at < word_count)
    tl.store(iterations, iteration, mask=program == 0)


@triton.jit(do_not_specialize=["batch", "length"])
def _finish_kernel(
    gamma, source, weight, factor, reset, initial, value, final, changes, sizes, iterations, states, meeting,
    batch, length, tolerance, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    ADJOINT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows that have not converged, token by token; after n iterations the first n tokens are exact.

    states: [2, D] fp32, the state before an even and an odd token.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    done = tl.load(iterations)
    per_head: tl.constexpr = (HEAD + BLOCK_N - 1) // BLOCK_N
    n_blocks: tl.constexpr = (D // HEAD) * per_head
    meetings = 1
    for b in range(batch):
        if not _converged(changes + done * batch, sizes + done * batch, b, tolerance):
            t = done
            while t < length:
                token = length - 1 - t if ADJOINT else t
                keep = 1.0
                if reset is not None:
                    keep = 1.0 - tl.load(reset + length.to(tl.int64) * b + token).to(tl.float32)
                row = (length.to(tl.int64) * b + token) * D
                for block in range(program, n_blocks, programs):
                    head = block // per_head
                    inner = block % per_head * BLOCK_N + tl.arange(0, BLOCK_N)
                    total = tl.zeros((BLOCK_N,), tl.float32)
                    for start in range(0, HEAD, BLOCK_K):
                        k = start + tl.arange(0, BLOCK_K)
                        there = k < HEAD
                        at = head * HEAD + k
                        if t == 0:
                            before = tl.load(initial + b * D + at, there, other=0.0)
                        elif t == done:
                            # of the forward pass a token's value is the state after it, of the adjoint the one before
                            last = row + at if ADJOINT else row - D + at
                            before = tl.load(value + last, there, other=0.0, cache_modifier=".cg").to(tl.float32)
                        else:
                            before = tl.load(states + t % 2 * D + at, there, other=0.0, cache_modifier=".cg")
                        f = keep
                        if factor is not None:
                            f = tl.load(factor + row + at, there, other=0.0).to(tl.float32)
                        u = (before * f).to(weight.dtype.element_ty).to(tl.float32)
                        place = head * HEAD * HEAD + inner[:, None] * N_STRIDE + k[None, :] * K_STRIDE
                        w = tl.load(weight + place, (inner < HEAD)[:, None] & there[None, :], other=0.0)
                        total += tl.sum(w.to(tl.float32) * u[None, :], 1)
                    mine = inner < HEAD
                    n = head * HEAD + inner
                    if t == 0:
                        before_n = tl.load(initial + b * D + n, mine, other=0.0)
                    elif t == done:
                        last_n = row + n if ADJOINT else row - D + n
                        before_n = tl.load(value + last_n, mine, other=0.0, cache_modifier=".cg").to(tl.float32)
                    else:
                        before_n = tl.load(states + t % 2 * D + n, mine, other=0.0, cache_modifier=".cg")
                    g = tl.load(gamma + row + n, mine, other=0.0).to(tl.float32) * keep
                    if ADJOINT:
                        x = tl.load(source + row - D + n, mine & (t < length - 1), other=0.0).to(tl.float32)
                        x += total * keep
                    else:
                        x = tl.load(source + row + n, mine, other=0.0).to(tl.float32) * tl.sigmoid(total)
                    after = tl.fma(g, before_n, x)
                    tl.store(states + (t + 1) % 2 * D + n, after, mine)
                    tl.store(value + row + n, (before_n if ADJOINT else after).to(value.dtype.element_ty), mine)
                    tl.store(final + b * D + n, after, mine)
                meetings = _meet(meeting, meetings)
                t += 1


@triton.jit
def _slope_kernel(z, product, slope, count, BLOCK: tl.constexpr):
    """s = z σ′(a), elementwise over `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.sigmoid(tl.load(product + at, inside, other=0.0).to(tl.float32))
    value = tl.load(z + at, inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)
    tl.store(slope + at, value.to(slope.dtype.element_ty), inside)


@triton.jit
def _gradient_kernel(
    adjoint, z, product, before, grad_z, grad_gamma, grad_gate, reset, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of one token [D]: z's λ σ(a), γ's λ h_{t−1}, the logits' λ s; both of them zero at a reset."""
    row = tl.program_id(0).to(tl.int64)
    keep = 1.0
    if reset is not None:
        keep = 1.0 - tl.load(reset + row).to(tl.float32)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < D
        at = row * D + channel
        value = tl.load(adjoint + at, inside, other=0.0)
        gate = tl.sigmoid(tl.load(product + at, inside, other=0.0).to(tl.float32))
        slope = tl.load(z + at, inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)
        h = tl.load(before + at, inside, other=0.0).to(tl.float32)
        tl.store(grad_z + at, (value * gate).to(grad_z.dtype.element_ty), inside)
        tl.store(grad_gamma + at, (value * h).to(grad_gamma.dtype.element_ty), inside)
        tl.store(grad_gate + at, (value * slope * keep).to(grad_gate.dtype.element_ty), inside)


class _Problem(NamedTuple):
    """What the iterations of one direction work on; see `_step_kernel`. final and value are outputs."""

    gamma: Tensor
    source: Tensor
    weight: Tensor
    factor: Tensor | None
    reset: Tensor | None
    initial: Tensor
    value: Tensor
    final: Tensor
    adjoint: bool

    @property
    def matrix(self) -> Tensor:
        """[H, d, d] (of a dense gate [1, D, D]) that maps an operand to its product: W, or Wᵀ for the adjoint."""
        weight = self.weight if self.weight.dim() == 3 else self.weight.unsqueeze(0)
        return weight.mT if self.adjoint else weight


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] as [H, B·T, d]."""
    return x.view(-1, heads, x.shape[-1] // heads).transpose(0, 1)


def _multiply(operand: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """out = matrix · operand for every token; operand and out [B, T, D], matrix [H, d, d]; out is fp32 or 16 bit."""
    left, right, result = _by_head(operand, matrix.shape[0]), matrix.mT, _by_head(out, matrix.shape[0])
    if out.dtype == operand.dtype:
        torch.bmm(left, right, out=result)
    elif operand.is_cuda:
        torch.bmm(left, right, out_dtype=out.dtype, out=result)
    else:
        torch.bmm(left.to(out.dtype), right.to(out.dtype), out=result)
    return out


class _EightBit:
    """Products with operands in e4m3, for the first iterations.

    Operands are scaled by what makes the largest input of the recurrence `HEADROOM_8_BIT`, the matrix by what makes
    its largest element fill the format; both factors stay on the device.
    """

    def __init__(self, problem: _Problem):
        matrix = problem.matrix[0]
        largest = torch.finfo(torch.float8_e4m3fn).max
        tiny = torch.finfo(torch.float32).tiny
        self.scale = HEADROOM_8_BIT / problem.source.abs().amax().float().clamp_min(tiny)
        matrix_scale = largest / matrix.abs().amax().float().clamp_min(tiny)
        self.matrix = (matrix * matrix_scale).to(torch.float8_e4m3fn).contiguous()
        self.inverse_scales = 1 / self.scale, 1 / matrix_scale
        self.operand = torch.empty(problem.source.shape, dtype=torch.float8_e4m3fn, device=matrix.device)

    @staticmethod
    def available(problem: _Problem) -> bool:
        device, matrix = problem.source.device, problem.matrix
        wide = matrix.shape[0] == 1 and matrix.shape[1] >= WIDTH_8_BIT and matrix.shape[1] % 16 == 0
        if interpreted() or not wide or matrix.dtype == torch.float32:
            return False
        return torch.cuda.get_device_capability(device) >= (8, 9)

    def product(self, out: Tensor) -> None:
        flat = self.operand.flatten(0, 1)
        torch._scaled_mm(flat, self.matrix.T, *self.inverse_scales, out_dtype=out.dtype, out=out.flatten(0, 1))


def _solve(problem: _Problem, settings: SolverSettings) -> tuple[Tensor, Tensor]:
    """Fills value and final; returns iterations [B] int32 and residual [B] fp32."""
    source, weight, matrix = problem.source, problem.weight, problem.matrix
    batch, length, width = source.shape
    device = source.device
    limit = 0 if settings.solver == "sequential" else min(settings.max_iterations, length)
    planned = min(PLANNED.get(weight.dtype, 5), limit)
    low = min(PLANNED_8_BIT, planned - 2) if planned > 2 and _EightBit.available(problem) else 0
    eight_bit = _EightBit(problem) if low else None

    products = torch.empty(2, batch, length, width, dtype=torch.float32, device=device)
    early_product = torch.empty(source.shape, dtype=weight.dtype, device=device)
    operand = torch.empty(source.shape, dtype=weight.dtype, device=device)
    # bits of fp32; a row that nothing is known about has not converged
    changes = torch.zeros(limit + 1, batch, dtype=torch.int32, device=device)
    sizes = torch.zeros_like(changes)
    if limit == 0:
        changes.view(torch.float32).fill_(float("inf"))
        sizes.view(torch.float32).fill_(1.0)
    words = handoff_words(planned + 2, length, batch * width, device)
    state = dict(
        gamma=problem.gamma, source=source, factor=problem.factor, reset=problem.reset, initial=problem.initial,
        value=problem.value, final=problem.final, batch=batch, length=length,
        D=width, ADJOINT=problem.adjoint, STEPS=STEPS, GROUP=GROUP, ROWS=ROWS,
    )  # fmt: skip
    item_bytes = problem.gamma.element_size() + source.element_size() + 4
    product: Tensor | None = None
    for n in range(planned + 1):
        old_product = product
        if n > 0:
            product = products[n % 2] if n >= planned - 1 else early_product
            if eight_bit is not None and n <= low:
                eight_bit.product(product)
            else:
                _multiply(operand, matrix, product)
        if n == planned == 1:
            old_product = products[0].zero_()  # the neutral gate of the guess
        into = eight_bit if eight_bit is not None and n < low else None
        _step_kernel[(programs_in_cache(batch, length, width, item_bytes, device),)](
            **state,
            product=product, old_product=old_product if n == planned else None,
            scale=into.scale if into else None, operand=into.operand if into else operand,
            change=changes[planned], size=sizes[planned], words=words[n], change_words=words[planned + 1],
            BLOCK_D=BLOCK_D, num_warps=1, num_stages=1,
        )  # fmt: skip

    counters = torch.zeros(2, dtype=torch.int32, device=device)
    iterations = torch.empty(1, dtype=torch.int32, device=device)
    programs, blocks = 1, _BLOCKS_INTERPRETED
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = _BLOCKS.get(weight.dtype, _BLOCKS_16_BIT)
    n_stride, k_stride = matrix.stride()[1:]
    shared = state | dict(
        weight=weight, changes=changes, sizes=sizes, iterations=iterations, tolerance=settings.tolerance,
        N_STRIDE=n_stride, K_STRIDE=k_stride, HEAD=matrix.shape[1], num_warps=8,
        launch_cooperative_grid=device.type == "cuda",
    )  # fmt: skip
    words[:2].zero_()  # used by the guess and the first iteration
    _refine_kernel[(programs,)](
        **shared,
        products=products, operand=operand, words=words[0], change_words=words[1], word_count=words.shape[1],
        meeting=counters[0], planned=planned, max_iterations=limit,
        BLOCK_D=8 * BLOCK_D, BLOCK_M=blocks[0], BLOCK_N=blocks[1], BLOCK_K=blocks[2], num_stages=3,
    )  # fmt: skip
    for name in ("STEPS", "GROUP", "ROWS"):
        del shared[name]
    _finish_kernel[(programs,)](
        **shared,
        states=torch.empty(2, width, dtype=torch.float32, device=device), meeting=counters[1],
        BLOCK_N=16, BLOCK_K=256,
    )  # fmt: skip
    last = iterations.long()
    change, size = (x.index_select(0, last)[0].view(torch.float32) for x in (changes, sizes))
    residual = change / size.clamp_min(torch.finfo(torch.float32).tiny)
    if limit == length or limit == 0:  # exact whatever the last change was
        residual = torch.where(iterations == limit, 0.0, residual)
    return iterations.expand(batch).clone(), residual


# tokens, channels and summands of a program's product, by the dtype of W
_BLOCKS_16_BIT = (128, 128, 64)
_BLOCKS = {torch.float32: (64, 64, 32)}
_BLOCKS_INTERPRETED = (16, 16, 16)


def _logits(h: Tensor, initial: Tensor, reset: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each token in the weight's dtype, zero where forgotten, and W times them [B, T, D]."""
    before = shift_right(h, initial.to(h.dtype)).to(weight.dtype)
    if reset is not None:
        before.masked_fill_(reset.unsqueeze(-1), 0.0)
    matrix = weight if weight.dim() == 3 else weight.unsqueeze(0)
    return before, _multiply(before, matrix, torch.empty_like(before))


def forward(
    z: Tensor, gamma: Tensor, weight: Tensor, initial: Tensor, reset: Tensor | None, settings: SolverSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, final state, iterations and residual; see `mmrec_kernels.gated_recurrence`."""
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    final = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
    start = initial.float().contiguous()
    problem = _Problem(gamma.contiguous(), z.contiguous(), weight.contiguous(), None, reset, start, h, final, False)
    with on_device(z.device):
        iterations, residual = _solve(problem, settings)
    return h, final, iterations, residual


def backward(
    grad_h: Tensor,
    grad_final: Tensor,
    z: Tensor,
    gamma: Tensor,
    weight: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    h: Tensor,
    settings: SolverSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, gamma, weight and the initial state."""
    z, gamma, weight = z.contiguous(), gamma.contiguous(), weight.contiguous()
    with on_device(z.device):
        before, logits = _logits(h, initial, reset, weight)
        slope = torch.empty_like(logits)
        _slope_kernel[(triton.cdiv(z.numel(), 2048),)](z, logits, slope, z.numel(), BLOCK=2048)
        adjoint = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        grad_initial = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
        last = grad_h[:, -1].float() + grad_final
        problem = _Problem(gamma, grad_h.contiguous(), weight, slope, reset, last, adjoint, grad_initial, True)
        _solve(problem, settings)
        grad_z, grad_gamma = torch.empty_like(z), torch.empty_like(gamma)
        grad_gate = slope  # no longer needed
        _gradient_kernel[(z.shape[0] * z.shape[1],)](
            adjoint, z, logits, before, grad_z, grad_gamma, grad_gate, reset, D=z.shape[2], BLOCK=1024
        )
    return grad_z, grad_gamma, gate_weight_gradient(grad_gate, before, weight), grad_initial.to(initial.dtype)
