"""The kernels of the recurrence whose gate mixes all channels; `dense_triton` says how they work together.

Both directions are one scan of the same form; "before" and "after" a token are in the order of the scan:

    forward:  h_t     = γ_t h_{t−1} + z_t σ(a_t),     a_t = W h_{t−1}
    adjoint:  λ_{t−1} = γ_t λ_t + (g_{t−1} + y_t),    y_t = Wᵀ(s_t λ_t),  s_t = z_t σ′(a_t)

The change of an iteration is scanned beside the state, from the difference of the two products, so that states need
not be kept from one iteration to the next.
"""

import triton
import triton.language as tl

from mmrec_kernels.handoff import take_ticket
from mmrec_kernels.operands_triton import HEADROOM, power_of_two, state_before
from mmrec_kernels.register_tiles import as_new, last_row, scan_tile, summarize_tile
from mmrec_kernels.sigmoid_triton import MINUS_LOG2_E, sigmoid, sigmoid_of_power
from mmrec_kernels.solver import MIN_IMPORTANCE
from mmrec_kernels.time_tiles import look_back, publish_tile, tile_of_ticket

INFINITY_BITS = tl.constexpr(0x7F800000)  # of fp32
LARGEST_OPERAND = tl.constexpr(32752.0)  # so that fp16 holds differences of two; conversions to 8 bits saturate
LEAST_WEIGHT = tl.constexpr(MIN_IMPORTANCE)


@triton.jit
def _load_once(pointer, inside, other: tl.constexpr = 0.0):
    """Loads what nobody reads again soon: it leaves the L2 cache before operands and products do."""
    return tl.load(pointer, inside, other=other, eviction_policy="evict_first")


@triton.jit
def _added(source, product, offset, step, inside, keep, has_earlier, ADJOINT: tl.constexpr):
    """What each token of a tile adds to the state, of the product [rows, channels]: z σ(a), or g of before plus y.

    The product is y, or the logit a times MINUS_LOG2_E.
    """
    if ADJOINT:
        return _load_once(source + offset - step, inside & has_earlier).to(tl.float32) + product * keep
    else:
        return _load_once(source + offset, inside).to(tl.float32) * sigmoid_of_power(product)


@triton.jit
def _largest(x, inside):
    """The largest number of a tile of numbers that are not negative."""
    return tl.max(tl.max(tl.where(inside, x, 0.0), 0))


@triton.jit
def _raise(pointer, x):
    """Makes the fp32 number whose bits are at `pointer` at least x. Neither is negative: they are ordered like their
    bits."""
    tl.atomic_max(pointer, x.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _is_broken(largest, largest_factor, poisoned, b):
    """Whether row b has Inf or NaN among its inputs. It keeps them; its residual of NaN ends its iteration."""
    largest_input = tl.load(largest + b)
    if largest_factor is not None:
        largest_input = tl.maximum(largest_input, tl.load(largest_factor + b))
    broken = largest_input >= INFINITY_BITS
    if poisoned is not None:
        broken |= tl.load(poisoned + b) != 0
    return broken


@triton.jit
def _scaled(u, scale, broken, change, inside):
    """u times the scale, clamped to what an operand holds unless the row is broken; what was must not pass for
    converged."""
    if _largest(tl.abs(u), inside) * scale > LARGEST_OPERAND:
        tl.atomic_max(change, INFINITY_BITS, sem="relaxed")
        limit = tl.where(broken, float("inf"), LARGEST_OPERAND / scale)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return u * scale


@triton.jit
def _step_tile(
    gamma, source, product, old_product, largest, poisoned, factor, largest_factor, reset, initial, operand,
    subtracted, value, final, change, size, words, change_words, ticket, batch, length, shift,
    D: tl.constexpr, ADJOINT: tl.constexpr, INCREMENT: tl.constexpr, MEASURED: tl.constexpr, SUMMED: tl.constexpr,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile [STEPS, BLOCK_D] of one iteration; see `step_kernel`. The rows are in the order of the scan.

    SUMMED: the sum of an increment and the old product takes the old product's place.
    """
    chunk, b, channel, mask = tile_of_ticket(ticket, batch, D, BLOCK_D)
    chunks = tl.cdiv(length, STEPS)
    states = batch.to(tl.int64) * D
    index = b * D + channel
    row = tl.arange(0, STEPS)
    direction: tl.constexpr = -1 if ADJOINT else 1
    first = b * length + (length - 1 - chunk * STEPS if ADJOINT else chunk * STEPS)
    offset = (first * D + channel + shift * VECTOR)[None, :] + (row * (direction * D)).to(tl.int64)[:, None]
    # products and operands hold tokens against the order of the scan: the last rows of a product, which are in the L2
    # cache, are those that the scan reads first, and it writes last what the next product reads first
    last = first if ADJOINT else batch.to(tl.int64) * length - 1 - first
    place = (last * D + channel + shift * VECTOR)[None, :] - (row * D).to(tl.int64)[:, None]
    inside = tl.full((STEPS, 1), True, tl.int1) if WHOLE else (chunk * STEPS + row < length)[:, None] & mask[None, :]
    has_earlier = (chunk * STEPS + row < length - 1)[:, None]
    keep = tl.full((STEPS, 1), 1.0, tl.float32)
    if reset is not None:
        there = chunk * STEPS + row < length
        keep -= tl.load(reset + first + row * direction, there, other=0)[:, None].to(tl.float32)

    scale = 1.0
    if largest is not None:
        scale = power_of_two(tl.load(largest + b), HEADROOM)
    unscale = (1.0 if ADJOINT else MINUS_LOG2_E) / scale  # the gate wants its logit with this factor

    gammas = _load_once(gamma + offset, inside, 1.0)
    decays = gammas.to(tl.float32) * keep
    a = tl.zeros((STEPS, BLOCK_D), tl.float32)
    if product is not None:
        a = _load_once(product + place, inside).to(tl.float32) * unscale
    if old_product is not None:
        old_a = _load_once(old_product + place, inside).to(tl.float32) * unscale
        if INCREMENT:
            a += old_a
            if SUMMED:
                tl.store(old_product + place, a * (1.0 / unscale), inside)
    x = _added(source, a, offset, D, inside, keep, has_earlier, ADJOINT)
    decay, state = summarize_tile(decays, x)
    publish_tile(words, states, chunk, index, mask, decay, state)
    if product is None and largest is not None:
        # Inf and NaN never leave a state
        most = tl.max(tl.where(mask, state.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), 0)
        if most >= INFINITY_BITS:
            tl.atomic_max(poisoned + b, 1, sem="relaxed")
    if MEASURED:
        moved = x - _added(source, old_a, offset, D, inside, keep, has_earlier, ADJOINT)
        decay, delta = summarize_tile(decays, moved)
        publish_tile(change_words, states, chunk, index, mask, decay, delta)
    start = tl.load(initial + index, mask, other=0.0)
    start = look_back(words, states, chunk, chunks, index, mask, decay, state, start, GROUP)
    decays = as_new(gammas).to(tl.float32) * keep
    before, after = scan_tile(decays, x, start)

    broken = False
    if largest is not None:
        broken = _is_broken(largest, largest_factor, poisoned if product is not None else None, b)
        if broken:
            tl.atomic_max(change + b, INFINITY_BITS, sem="relaxed")
    if operand is not None:
        f = keep
        if factor is not None:
            f = _load_once(factor + offset, inside).to(tl.float32)
            if largest_factor is not None:
                scale *= 1.0 / power_of_two(tl.load(largest_factor + b), HEADROOM)
        u = before * f
        if largest is not None:
            u = _scaled(u, scale, broken, change + b, inside)
            if subtracted is not None:
                u -= _load_once(subtracted + place, inside).to(tl.float32)
        tl.store(operand + place, u.to(operand.dtype.element_ty), inside)
    if MEASURED:
        tl.store(value + offset, (before if ADJOINT else after).to(value.dtype.element_ty), inside)
        if chunk == chunks - 1:
            tl.store(final + index, last_row(after), mask)
        nothing = tl.zeros((BLOCK_D,), tl.float32)
        start = look_back(change_words, states, chunk, chunks, index, mask, decay, delta, nothing, GROUP)
        moved_before, moved_after = scan_tile(decays, moved, start)
        if ADJOINT:  # measured in (1 − γ) λ
            weight = tl.maximum(1.0 - decays, LEAST_WEIGHT)
            movement, state = tl.abs(moved_before) * weight, tl.abs(before) * weight
        else:
            movement, state = tl.abs(moved_after), tl.abs(after)
        _raise(change + b, _largest(movement, inside))
        most = _largest(state, inside)
        if largest is not None:
            most = tl.where(broken, float("inf"), most)
        _raise(size + b, most)


# change and size are rows of one tensor: whether they are aligned depends on the batch, and nothing depends on that
@triton.jit(do_not_specialize=["batch", "length", "shift"], do_not_specialize_on_alignment=["change", "size"])
def step_kernel(
    gamma, source, product, old_product, largest, poisoned, factor, largest_factor, reset, initial, operand,
    subtracted, value, final, change, size, words, change_words, batch, length, shift,
    D: tl.constexpr, ADJOINT: tl.constexpr, INCREMENT: tl.constexpr, MEASURED: tl.constexpr, WHOLE: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One iteration: scans with the gates of a product, and writes the operand of the next product.

    gamma, source (z, or the gradient of h), product, old_product, factor (s of the adjoint), operand and value are
    [batch, length, D]; reset [batch, length]; initial and final [batch, D] fp32; change and size [batch] int32, the
    bits of fp32 numbers. The tokens of products, operand and subtracted, all together, are in reverse order forward
    (`_step_tile`). Without a product the gate is neutral (y is zero). INCREMENT: the product is what has to be
    added to the old one. MEASURED: the change since the old product is measured, value and final are written.
    operand: None if none is to be written. subtracted: an operand relative to which this one is written. largest,
    largest_factor [batch]: what operands and the factor are scaled by (`operands_triton`); None for 1. poisoned
    [batch]: not zero for a row with Inf or NaN in its source; written by the iteration without a product. WHOLE: tiles
    fill length and D. shift (zero) and VECTOR, the channels of a thread that are next to each other: see
    `register_tiles`. A program takes one tile, which stays in its registers.
    """
    _step_tile(
        gamma, source, product, old_product, largest, poisoned, factor, largest_factor, reset, initial, operand,
        subtracted, value, final, change, size, words + 4, change_words + 4, take_ticket(words), batch, length, shift,
        D, ADJOINT, INCREMENT, MEASURED, False, WHOLE, VECTOR, BLOCK_D, STEPS, GROUP,
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
def _residual(change, size, b):
    moved = tl.load(change + b, cache_modifier=".cg").to(tl.float32, bitcast=True)
    largest = tl.load(size + b, cache_modifier=".cg").to(tl.float32, bitcast=True)
    return moved / tl.maximum(largest, 1e-37)


@triton.jit
def _converged(change, size, b, tolerance):
    return not (_residual(change, size, b) > tolerance)


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


@triton.jit
def _clear(words, count):
    """Sets words to zero, together with all other programs."""
    for start in range(tl.program_id(0) * 1024, count, tl.num_programs(0) * 1024):
        at = start + tl.arange(0, 1024)
        tl.store(words + at, 0, at < count)


# with both numbers of iterations constants of 1, the loop is dead code, which Triton 3.6 does not compile
@triton.jit(do_not_specialize=["batch", "length", "shift", "planned", "max_iterations"])
def refine_kernel(
    gamma, source, product, products, largest, poisoned, matrix, factor, largest_factor, reset, initial, operand,
    value, final, changes, sizes, iterations, words, change_words, word_count, meeting, batch, length, shift, tolerance,
    planned, max_iterations, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    ADJOINT: tl.constexpr, INCREMENT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Goes on iterating until every row has converged or the iterations are spent. All programs run at once.

    product, INCREMENT: of the last planned iteration, as in `step_kernel`. products: [2, batch, length,
    D]; the one of iteration n is at n mod 2, of the last planned one the sum, or what it is to be added to. changes,
    sizes: [max_iterations + 1, batch], of each iteration. iterations: [batch] int32, written: how many there have been.
    words, change_words: `word_count` each, zero.
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
    going_on = (iteration < max_iterations) & (
        not _all_converged(changes + iteration * batch, sizes + iteration * batch, batch, tolerance)
    )
    if going_on:  # what the last planned iteration did not write, since mostly nobody needs it: its operand and sum
        for tile in range(program, tiles, programs):
            _step_tile(
                gamma, source, product, products + (planned % 2) * elements if INCREMENT else None, largest,
                poisoned, factor, largest_factor, reset, initial, operand, None, value, final,
                changes + (planned + 1) * batch, sizes, words + 4, change_words + 4, tile, batch, length, shift,
                D, ADJOINT, INCREMENT, False, INCREMENT, WHOLE, 1, BLOCK_D, STEPS, GROUP,
            )  # fmt: skip
        meetings = _meet(meeting, meetings)
        _clear(words, word_count)
    while going_on:
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
                gamma, source, new, old, largest, poisoned, factor, largest_factor, reset, initial, operand, None,
                value, final, changes + iteration * batch, sizes + iteration * batch, words + 4, change_words + 4,
                tile, batch, length, shift, D, ADJOINT, False, True, False, WHOLE, 1, BLOCK_D, STEPS, GROUP,
            )  # fmt: skip
        meetings = _meet(meeting, meetings)
        _clear(words, word_count)
        _clear(change_words, word_count)
        going_on = (iteration < max_iterations) & (
            not _all_converged(changes + iteration * batch, sizes + iteration * batch, batch, tolerance)
        )
    for b in range(batch):
        tl.store(iterations + b, iteration, mask=program == 0)


@triton.jit
def _before_token(initial, states, at, inside, b, t, D: tl.constexpr):
    """The state before token t at some channels, fp32."""
    if t == 0:
        before = tl.load(initial + b * D + at, inside, other=0.0)
    else:
        before = tl.load(states + t % 2 * D + at, inside, other=0.0, cache_modifier=".cg")
    return before


@triton.jit(do_not_specialize=["batch", "length", "exact_after"])
def finish_kernel(
    gamma, source, weight, factor, largest_factor, reset, initial, value, final, changes, sizes, iterations, residuals,
    states, meeting, batch, length, exact_after, tolerance, N_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, ADJOINT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows that have not converged, token by token.

    From the first one: after n iterations the first n tokens are exact in principle, but operands and values were
    rounded to 16 bits, and where an iteration does not contract the recurrence need not either.

    residuals: [batch] fp32, written: the last change relative to the largest state, or zero if as many iterations as
    `exact_after` were made. states: [2, D] fp32, the state before an even and an odd token.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    done = tl.load(iterations, mask=batch > 0, other=0)
    per_head: tl.constexpr = (HEAD + BLOCK_N - 1) // BLOCK_N
    n_blocks: tl.constexpr = (D // HEAD) * per_head
    meetings = 1
    for b in range(batch):
        residual = _residual(changes + done * batch, sizes + done * batch, b)
        tl.store(residuals + b, tl.where(done == exact_after, 0.0, residual), mask=program == 0)
        if residual > tolerance:
            unscale_factor = 1.0
            if largest_factor is not None:
                unscale_factor /= power_of_two(tl.load(largest_factor + b), HEADROOM)
            t = tl.full((), 0, tl.int32)
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
                        before = _before_token(initial, states, at, there, b, t, D)
                        f = keep
                        if factor is not None:
                            f = tl.load(factor + row + at, there, other=0.0).to(tl.float32)
                        u = before * (f * unscale_factor)
                        place = head * HEAD * HEAD + inner[:, None] * N_STRIDE + k[None, :] * K_STRIDE
                        w = tl.load(weight + place, (inner < HEAD)[:, None] & there[None, :], other=0.0)
                        total += tl.sum(w.to(tl.float32) * u[None, :], 1)
                    mine = inner < HEAD
                    n = head * HEAD + inner
                    before_n = _before_token(initial, states, n, mine, b, t, D)
                    g = tl.load(gamma + row + n, mine, other=0.0).to(tl.float32) * keep
                    if ADJOINT:
                        x = tl.load(source + row - D + n, mine & (t < length - 1), other=0.0).to(tl.float32)
                        x += total * keep
                    else:
                        x = tl.load(source + row + n, mine, other=0.0).to(tl.float32) * sigmoid(total)
                    after = tl.fma(g, before_n, x)
                    tl.store(states + (t + 1) % 2 * D + n, after, mine)
                    tl.store(value + row + n, (before_n if ADJOINT else after).to(value.dtype.element_ty), mine)
                    tl.store(final + b * D + n, after, mine)
                meetings = _meet(meeting, meetings)
                t += 1


@triton.jit
def slope_kernel(z, logits, largest, slope, largest_z, count, row_size, BLOCK: tl.constexpr):
    """s = z σ′(a), elementwise over `count` elements, scaled like z by row if `largest_z` is given; a is the logits, of
    states scaled by `largest` if that is given."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a = tl.load(logits + at, inside, other=0.0)
    value = tl.load(z + at, inside, other=0.0).to(tl.float32)
    if largest is not None:
        a /= power_of_two(tl.load(largest + at // row_size, inside, other=0), HEADROOM)
    if largest_z is not None:
        value *= power_of_two(tl.load(largest_z + at // row_size, inside, other=0), HEADROOM)
    gate = sigmoid(a)
    tl.store(slope + at, (value * gate * (1.0 - gate)).to(slope.dtype.element_ty), inside)


@triton.jit
def gradient_kernel(
    adjoint,
    z,
    logits,
    largest,
    h,
    initial,
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
    b, t = row // length, row % length
    keep = 1.0
    if reset is not None:
        keep -= tl.load(reset + row).to(tl.float32)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < D
        at = row * D + channel
        value = tl.load(adjoint + at, inside, other=0.0)
        a = tl.load(logits + at, inside, other=0.0)
        if largest is not None:
            a *= 1.0 / power_of_two(tl.load(largest + b), HEADROOM)
        gate = sigmoid(a)
        slope = tl.load(z + at, inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)
        before = state_before(h + row * D, initial, b, t, channel, inside, D)
        tl.store(grad_z + at, (value * gate).to(grad_z.dtype.element_ty), inside)
        tl.store(grad_gamma + at, (value * before * keep).to(grad_gamma.dtype.element_ty), inside)
        tl.store(grad_gate + at, (value * slope * keep).to(grad_gate.dtype.element_ty), inside)
