"""The recurrence whose gate mixes all channels: a matrix product and a scan per iteration, nothing decided by the host.

Per direction

1. a guess: the scan with the gate at its neutral value;
2. `planned` iterations, each a cuBLAS product and one launch of `_step_kernel`, which computes the gates, scans, and
   writes the operand of the next product. The first of them may have 8-bit operands: they only improve the guess.
   The last one measures the change, between its product and the one before;
3. `_refine_kernel`: more iterations until every row has converged. One launch whose programs meet at barriers; it
   returns at once if there is nothing left to do;
4. `_finish_kernel`: the rows that have not converged after `max_iterations`, token by token, in the same manner.

Both directions are one scan of the same form; "before" and "after" a token are in the order of the scan:

    forward:  h_t     = γ_t h_{t−1} + z_t σ(a_t),     a_t = W h_{t−1}
    adjoint:  λ_{t−1} = γ_t λ_t + (g_{t−1} + y_t),    y_t = Wᵀ(s_t λ_t),  s_t = z_t σ′(a_t)

With W in 16 bit, operands are fp16 (scaled by a power of two, see `_Operands`) and products fp32. Either of them in
bf16 would move the states by about 1e−3 of the largest one at every iteration, which then never settles within less.

The change of an iteration is scanned beside the state, from the difference of the two products, so that states need
not be kept from one iteration to the next.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.backend import interpreted
from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.matmul import gate_weight_gradient
from mmrec_kernels.register_tiles import last_row, scan_tile, summarize_tile
from mmrec_kernels.scan_torch import shift_right
from mmrec_kernels.solver import MIN_IMPORTANCE, SolverSettings
from mmrec_kernels.time_tiles import (
    GROUP,
    handoff_words,
    look_back,
    on_device,
    publish_tile,
    tile_of_ticket,
)

PLANNED = {torch.float32: 8}  # iterations before the change is looked at, by the dtype of W; else 5
PLANNED_8_BIT = 2  # how many of them have 8-bit operands
WIDTH_8_BIT = 2048  # from this width on: below, a product costs less than rounding its operands
HEADROOM = 16.0  # operands are scaled so that the largest input of the recurrence comes near this
CHANNELS = 32  # of a tile, per warp
INFINITY_BITS = tl.constexpr(0x7F800000)  # of fp32
LEAST_WEIGHT = tl.constexpr(MIN_IMPORTANCE)
STEPS = 64  # tokens of a tile


@triton.jit
def _added(source, product, unscale, b, offset, step, inside, keep, has_earlier, ADJOINT: tl.constexpr):
    """What each token of a tile adds to the state: z σ(a), or g of the token before plus y."""
    value = tl.zeros(offset.shape, tl.float32)
    if product is not None:
        value = tl.load(product + offset, inside, other=0.0).to(tl.float32)
        if unscale is not None:
            value *= tl.load(unscale + b)
    if ADJOINT:
        return tl.load(source + offset - step, inside & has_earlier, other=0.0).to(tl.float32) + value * keep
    else:
        return tl.load(source + offset, inside, other=0.0).to(tl.float32) * tl.sigmoid(value)


@triton.jit
def _step_tile(
    gamma, source, product, old_product, unscale, factor, reset, initial, scale, operand, value, final, change,
    size, words, change_words, ticket, batch, length, shift,
    D: tl.constexpr, ADJOINT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [STEPS, BLOCK_D] of one iteration; see `_step_kernel`. The rows are in the order of the scan."""
    chunk, b, channel, mask = tile_of_ticket(ticket, batch, D, BLOCK_D)
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * D
    index = b * D + channel
    row = tl.arange(0, STEPS)
    direction: tl.constexpr = -1 if ADJOINT else 1
    first = b * length + (length - 1 - chunk * STEPS if ADJOINT else chunk * STEPS)
    offset = (first * D + channel + shift)[None, :] + (row * (direction * D)).to(tl.int64)[:, None]
    inside = tl.full((STEPS, 1), True, tl.int1) if WHOLE else (chunk * STEPS + row < length)[:, None] & mask[None, :]
    has_earlier = (chunk * STEPS + row < length - 1)[:, None]
    keep = tl.full((STEPS, 1), 1.0, tl.float32)
    if reset is not None:
        there = chunk * STEPS + row < length
        keep -= tl.load(reset + first + row * direction, there, other=0)[:, None].to(tl.float32)

    decays = tl.load(gamma + offset, inside, other=1.0).to(tl.float32) * keep
    x = _added(source, product, unscale, b, offset, D, inside, keep, has_earlier, ADJOINT)
    decay, state = summarize_tile(decays, x)
    publish_tile(words, states, chunk, index, mask, decay, state)
    if old_product is not None:
        moved = x - _added(source, old_product, unscale, b, offset, D, inside, keep, has_earlier, ADJOINT)
        decay, delta = summarize_tile(decays, moved)
        publish_tile(change_words, states, chunk, index, mask, decay, delta)
    start = tl.load(initial + index, mask, other=0.0)
    start = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)
    before, after = scan_tile(decays, x, start)

    f = keep
    if factor is not None:
        f = tl.load(factor + offset, inside, other=0.0).to(tl.float32)
    u = before * f
    if scale is not None:
        u *= tl.load(scale + b)
        limit: tl.constexpr = 65504.0 if operand.dtype.element_ty == tl.float16 else 448.0
        # what fp16 cannot hold must not pass for converged
        if tl.max(tl.max(tl.where(inside, tl.abs(u), 0.0), 0)) > 65504.0:
            tl.atomic_max(change + b, INFINITY_BITS, sem="relaxed")
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(operand + offset, u.to(operand.dtype.element_ty), inside)
    if old_product is not None:
        tl.store(value + offset, (before if ADJOINT else after).to(value.dtype.element_ty), inside)
        if chunk == chunks - 1:
            tl.store(final + index, last_row(after), mask)
        nothing = tl.zeros((BLOCK_D,), tl.float32)
        start = look_back(change_words, states, chunk, chunks, index, mask, decay, delta, nothing, GROUP)
        moved_before, moved_after = scan_tile(decays, moved, start)
        if ADJOINT:  # measured in (1 − γ) λ
            weight = tl.maximum(1.0 - decays, LEAST_WEIGHT)
            largest_change, largest = tl.abs(moved_before) * weight, tl.abs(before) * weight
        else:
            largest_change, largest = tl.abs(moved_after), tl.abs(after)
        # numbers that are not negative are ordered like their bits
        most = tl.max(tl.max(tl.where(inside, largest_change, 0.0), 0))
        tl.atomic_max(change + b, most.to(tl.int32, bitcast=True), sem="relaxed")
        most = tl.max(tl.max(tl.where(inside, largest, 0.0), 0))
        tl.atomic_max(size + b, most.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["batch", "length", "shift"])
def _step_kernel(
    gamma, source, product, old_product, unscale, factor, reset, initial, scale, operand, value, final, change,
    size, words, change_words, batch, length, shift,
    D: tl.constexpr, ADJOINT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One iteration: scans with the gates of a product, and writes the operand of the next product.

    gamma, source (z, or the gradient of h), product, old_product, factor (s of the adjoint), operand and value are
    [batch, length, D]; reset [batch, length]; initial and final [batch, D] fp32; change and size [batch] int32, the
    bits of fp32 numbers. Without a product the gate is neutral (y is zero). With an old one the iteration is measured,
    and value and final are written. scale, unscale: [batch] fp32, what operands
    and products are multiplied by. shift: zero, see
    `register_tiles`. WHOLE: tiles fill length and D. A program takes one tile, which stays in its registers.
    """
    _step_tile(
        gamma, source, product, old_product, unscale, factor, reset, initial, scale, operand, value, final, change,
        size, words + 4, change_words + 4, take_ticket(words), batch, length, shift,
        D, ADJOINT, WHOLE, BLOCK_D, STEPS, GROUP,
    )  # fmt: skip


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
    operand, matrix, product, m_block, n_block, tokens, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """product[m, n] = Σ_k matrix[n, k] operand[m, k], k over the head that n belongs to."""
    per_head: tl.constexpr = (HEAD + BLOCK_N - 1) // BLOCK_N
    head = n_block // per_head
    n = n_block % per_head * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    left = operand + m.to(tl.int64)[:, None] * D + head * HEAD + k[None, :]
    right = matrix + head * HEAD * HEAD + k[:, None] * K_STRIDE + n[None, :] * N_STRIDE
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HEAD, BLOCK_K):
        there = k < HEAD - start
        a = tl.load(left + start, mask=(m < tokens)[:, None] & there[None, :], other=0.0, cache_modifier=".cg")
        w = tl.load(right + start * K_STRIDE, mask=there[:, None] & (n < HEAD)[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision="tf32x3")
    at = product + m.to(tl.int64)[:, None] * D + head * HEAD + n[None, :]
    tl.store(at, total.to(product.dtype.element_ty), mask=(m < tokens)[:, None] & (n < HEAD)[None, :])


@triton.jit(do_not_specialize=["batch", "length", "shift"])
def _refine_kernel(
    gamma, source, products, unscale, matrix, factor, reset, initial, scale, operand, value, final, changes, sizes,
    iterations, words, change_words, word_count, meeting, batch, length, shift, tolerance, planned, max_iterations,
    N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, ADJOINT: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
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
    tiles = tl.cdiv(length, STEPS) * batch * ((D + BLOCK_D - 1) // BLOCK_D)
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
                operand, matrix, new, tile // n_blocks, tile % n_blocks, tokens, N_STRIDE, K_STRIDE,
                D, HEAD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        meetings = _meet(meeting, meetings)
        for tile in range(program, tiles, programs):
            _step_tile(
                gamma, source, new, old, unscale, factor, reset, initial, scale, operand, value, final,
                changes + iteration * batch, sizes + iteration * batch, words + 4, change_words + 4,
                tile, batch, length, shift, D, ADJOINT, WHOLE, BLOCK_D, STEPS, GROUP,
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
    batch, length, low, tolerance, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    ADJOINT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows that have not converged, token by token.

    After n iterations the first n tokens are exact, not counting the `low` iterations with 8-bit operands; none of them
    if an operand was too large (the change is infinite then).

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
            overflow = tl.load(changes + done * batch + b) == INFINITY_BITS
            begin = tl.where(overflow, 0, tl.maximum(done - low, 0))
            t = begin
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
                        elif t == begin:
                            # of the forward pass a token's value is the state after it, of the adjoint the one before
                            last = row + at if ADJOINT else row - D + at
                            before = tl.load(value + last, there, other=0.0, cache_modifier=".cg").to(tl.float32)
                        else:
                            before = tl.load(states + t % 2 * D + at, there, other=0.0, cache_modifier=".cg")
                        f = keep
                        if factor is not None:
                            f = tl.load(factor + row + at, there, other=0.0).to(tl.float32)
                        u = before * f
                        place = head * HEAD * HEAD + inner[:, None] * N_STRIDE + k[None, :] * K_STRIDE
                        w = tl.load(weight + place, (inner < HEAD)[:, None] & there[None, :], other=0.0)
                        total += tl.sum(w.to(tl.float32) * u[None, :], 1)
                    mine = inner < HEAD
                    n = head * HEAD + inner
                    if t == 0:
                        before_n = tl.load(initial + b * D + n, mine, other=0.0)
                    elif t == begin:
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
def _slope_kernel(z, logits, unscale, slope, count, row_size, BLOCK: tl.constexpr):
    """s = z σ′(a), elementwise over `count` elements; a is the logits times `unscale` of the row, if there is one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a = tl.load(logits + at, inside, other=0.0)
    if unscale is not None:
        a *= tl.load(unscale + at // row_size, inside, other=0.0)
    gate = tl.sigmoid(a)
    value = tl.load(z + at, inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)
    tl.store(slope + at, value.to(slope.dtype.element_ty), inside)


@triton.jit
def _gradient_kernel(
    adjoint,
    z,
    logits,
    unscale,
    before,
    grad_z,
    grad_gamma,
    grad_gate,
    reset,
    length,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one token [D]: z's λ σ(a), γ's λ h_{t−1}, the logits' λ s; the last two are zero at a reset."""
    row = tl.program_id(0).to(tl.int64)
    keep = 1.0
    if reset is not None:
        keep = 1.0 - tl.load(reset + row).to(tl.float32)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < D
        at = row * D + channel
        value = tl.load(adjoint + at, inside, other=0.0)
        a = tl.load(logits + at, inside, other=0.0)
        if unscale is not None:
            a *= tl.load(unscale + row // length)
        gate = tl.sigmoid(a)
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
    """out = matrix · operand for every token; operand [B, T, D], out likewise or fp32, matrix [H, d, d]."""
    left, right, result = _by_head(operand, matrix.shape[0]), matrix.mT, _by_head(out, matrix.shape[0])
    if out.dtype == operand.dtype:
        torch.bmm(left, right, out=result)
    elif operand.is_cuda:
        torch.bmm(left, right, out_dtype=out.dtype, out=result)
    else:
        torch.bmm(left.to(out.dtype), right.to(out.dtype), out=result)
    return out


def _largest(x: Tensor) -> Tensor:
    """Largest absolute value of each row of x [B, ...]: [B] fp32."""
    return torch.linalg.vector_norm(x.flatten(1), float("inf"), dim=1, dtype=torch.float32)


def _scale(*parts: Tensor) -> Tensor:
    """Powers of two [B], fp32, that bring each row's largest value near `HEADROOM`: fp16 holds 4000 times as much."""
    largest = torch.stack([_largest(x) for x in parts]).amax(0)
    exponent = torch.floor(math.log2(HEADROOM) - torch.log2(largest.nan_to_num(0.0, 0.0, 0.0)))
    return torch.exp2(exponent.clamp(-100.0, 100.0))


class _Operands:
    """Operands of the products, and the products.

    With W in 16 bit, operands are scaled, by row, by the power of two that brings the recurrence's largest input near
    `HEADROOM`, and are fp16, or e4m3 for the first `low` products. Scales stay on the device. fp32 operands are taken
    as they are.
    """

    def __init__(self, problem: _Problem, planned: int, limit: int):
        source, matrix = problem.source, problem.matrix
        device = source.device
        half = matrix.dtype != torch.float32
        self.matrix = matrix.to(torch.float16) if half else matrix
        self.scale = _scale(source, problem.initial) if half else None
        self.unscale = 1 / self.scale if self.scale is not None else None
        self.operand = torch.empty(source.shape, dtype=self.matrix.dtype, device=device)
        # as many iterations as tokens make all of them exact, but not with 8 bits
        enough = planned > 2 and limit < source.shape[1]
        self.low = min(PLANNED_8_BIT, planned - 2) if enough and _has_8_bit_products(problem) else 0
        if self.low:
            matrix_scale = torch.finfo(torch.float8_e4m3fn).max / _largest(matrix).clamp_min(1e-30)
            self.low_matrix = (matrix[0] * matrix_scale).to(torch.float8_e4m3fn).contiguous()
            self.low_scales = torch.ones_like(matrix_scale[0]), 1 / matrix_scale[0]
            self.low_operand = torch.empty(source.shape, dtype=torch.float8_e4m3fn, device=device)
            self.low_product = torch.empty(source.shape, dtype=torch.bfloat16, device=device)

    def after(self, n: int) -> Tensor:
        """Where iteration n writes its operand."""
        return self.low_operand if n < self.low else self.operand

    def product(self, n: int, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product of iteration n ≥ 1, in `out` (fp32) or elsewhere, and what to multiply it by."""
        if n > self.low:
            return _multiply(self.operand, self.matrix, out), self.unscale
        flat, result = self.low_operand.flatten(0, 1), self.low_product
        torch._scaled_mm(flat, self.low_matrix.T, *self.low_scales, out_dtype=result.dtype, out=result.flatten(0, 1))
        return result, self.unscale


def _has_8_bit_products(problem: _Problem) -> bool:
    heads, width, _ = problem.matrix.shape
    if interpreted() or heads > 1 or width < WIDTH_8_BIT or width % 16 or problem.matrix.dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(problem.source.device) >= (8, 9)


def _solve(problem: _Problem, settings: SolverSettings) -> tuple[Tensor, Tensor]:
    """Fills value and final; returns iterations [B] int32 and residual [B] fp32."""
    source = problem.source
    batch, length, width = source.shape
    device = source.device
    limit = 0 if settings.solver == "sequential" else min(settings.max_iterations, length)
    planned = min(PLANNED.get(problem.weight.dtype, 5), limit)
    operands = _Operands(problem, planned, limit)

    products = torch.empty(2, batch, length, width, dtype=torch.float32, device=device)
    # bits of fp32; a row that nothing is known about has not converged
    changes = torch.zeros(limit + 1, batch, dtype=torch.int32, device=device)
    sizes = torch.zeros_like(changes)
    if limit == 0:
        changes.view(torch.float32).fill_(float("inf"))
        sizes.view(torch.float32).fill_(1.0)
    words = handoff_words(planned + 2, length, batch * width, device, STEPS)
    common = dict(
        gamma=problem.gamma, source=source, factor=problem.factor, reset=problem.reset, initial=problem.initial,
        value=problem.value, final=problem.final, batch=batch, length=length, D=width, ADJOINT=problem.adjoint,
    )  # fmt: skip
    tiles = triton.cdiv(length, STEPS) * batch * triton.cdiv(width, 4 * CHANNELS)
    tiling = dict(STEPS=STEPS, GROUP=GROUP, WHOLE=length % STEPS == 0 and width % (8 * CHANNELS) == 0, shift=0)
    product: Tensor | None = None
    unscale: Tensor | None = None
    for n in range(planned + 1):
        old_product = product
        if n > 0:
            product, unscale = operands.product(n, products[n % 2])
        if n == planned == 1:
            old_product = products[0].zero_()  # the neutral gate of the guess
        _step_kernel[(tiles,)](
            **common, **tiling,
            product=product, old_product=old_product if n == planned else None, unscale=unscale,
            scale=operands.scale, operand=operands.after(n), change=changes[planned], size=sizes[planned],
            words=words[n], change_words=words[planned + 1], BLOCK_D=4 * CHANNELS, num_warps=4,
        )  # fmt: skip

    counters = torch.zeros(2, dtype=torch.int32, device=device)
    iterations = torch.empty(1, dtype=torch.int32, device=device)
    programs, blocks = 1, _BLOCKS_INTERPRETED
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = _BLOCKS.get(problem.weight.dtype, _BLOCKS_16_BIT)
    together = dict(
        changes=changes, sizes=sizes, iterations=iterations, tolerance=settings.tolerance,
        HEAD=problem.matrix.shape[1], num_warps=8, launch_cooperative_grid=device.type == "cuda",
    )  # fmt: skip
    words[:2].zero_()  # used by the guess and the first iteration
    n_stride, k_stride = operands.matrix.stride()[1:]
    _refine_kernel[(programs,)](
        **common, **tiling, **together,
        matrix=operands.matrix, N_STRIDE=n_stride, K_STRIDE=k_stride, products=products, unscale=operands.unscale,
        scale=operands.scale, operand=operands.operand, words=words[0], change_words=words[1],
        word_count=words.shape[1], meeting=counters[0], planned=planned, max_iterations=limit,
        BLOCK_D=8 * CHANNELS, BLOCK_M=blocks[0], BLOCK_N=blocks[1], BLOCK_K=blocks[2], num_stages=3,
    )  # fmt: skip
    n_stride, k_stride = problem.matrix.stride()[1:]
    _finish_kernel[(programs,)](
        **common, **together,
        weight=problem.weight, N_STRIDE=n_stride, K_STRIDE=k_stride, meeting=counters[1], low=operands.low,
        states=torch.empty(2, width, dtype=torch.float32, device=device), BLOCK_N=16, BLOCK_K=256,
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


def _logits(before: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """W times the states before each token [B, T, D] in fp32, and what to multiply it by."""
    matrix = weight if weight.dim() == 3 else weight.unsqueeze(0)
    out = torch.empty(before.shape, dtype=torch.float32, device=before.device)
    if weight.dtype == torch.float32:
        return _multiply(before.float(), matrix, out), None
    scale = _scale(before)
    return _multiply((before * scale.view(-1, 1, 1)).to(torch.float16), matrix.to(torch.float16), out), 1 / scale


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
        before = shift_right(h, initial.to(h.dtype))
        if reset is not None:
            before.masked_fill_(reset.unsqueeze(-1), 0.0)
        logits, unscale = _logits(before, weight)
        slope = torch.empty(z.shape, dtype=weight.dtype, device=z.device)
        _slope_kernel[(triton.cdiv(z.numel(), 2048),)](z, logits, unscale, slope, z.numel(), z[0].numel(), BLOCK=2048)
        adjoint = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        grad_initial = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
        last = (grad_h[:, -1].float() + grad_final).contiguous()
        problem = _Problem(gamma, grad_h.contiguous(), weight, slope, reset, last, adjoint, grad_initial, True)
        _solve(problem, settings)
        grad_z, grad_gamma = torch.empty_like(z), torch.empty_like(gamma)
        grad_gate = slope  # no longer needed
        _gradient_kernel[(z.shape[0] * z.shape[1],)](
            adjoint,
            z,
            logits,
            unscale,
            before,
            grad_z,
            grad_gamma,
            grad_gate,
            reset,
            z.shape[1],
            D=z.shape[2],
            BLOCK=1024,
        )
    return grad_z, grad_gamma, gate_weight_gradient(grad_gate, before, weight), grad_initial.to(initial.dtype)
