"""The headwise recurrence and its adjoint, each in one launch.

A program owns a tile: `TILE` tokens of one head of one row. W and the tile's inputs stay on the chip while the tile
iterates; the tiles of a head form a pipeline over time. In iteration n a tile scans its tokens from the carry that the
tile before it had in iteration n, and hands its own carry on, so all tiles together perform the Picard iteration of
the whole sequence exactly, although each reads its inputs from memory once and several iterations are under way at the
same time:

    tile 0:  n=0  n=1  n=2  n=3 done
                \\    \\    \\    \\
    tile 1:      n=0  n=1  n=2  n=3 done
                    \\    \\    \\    \\
    tile 2:          n=0  n=1  n=2  n=3  n=4 done

A tile is done when the tile before it is and its own change is within its tolerance, which is half the one asked for:
tiles that stop one by one are further from the solution, on average, than a sequence that goes on until its last tile
may stop. The last tiles decide the final state, in fp32 and carried on; being few, they go on for longer. Past
`max_iterations` a tile waits until the one before it is done. From then on every iteration makes one more of its tokens
exact, so that after TILE + 1 of them the tile is exact: what does not contract is finished tile by tile.

Both directions are one scan of the same form; "before" and "after" a token are in the order of the scan:

    forward:  h_t     = γ_t h_{t−1} + z_t σ(a_t),     a_t = W h_{t−1}
    adjoint:  λ_{t−1} = γ_t λ_t + (g_{t−1} + y_t),    y_t = Wᵀ(s_t λ_t),  s_t = z_t σ′(a_t)

where g is the gradient that reaches a state from outside, and g_{−1} = 0: then λ_{−1} is the initial state's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.checks import cdiv
from mmrec_kernels.handoff import received, send, take_ticket
from mmrec_kernels.matmul import gate_weight_gradient
from mmrec_kernels.register_tiles import scan_tile
from mmrec_kernels.sigmoid_triton import sigmoid
from mmrec_kernels.solver import MIN_IMPORTANCE, SolverSettings
from mmrec_kernels.time_tiles import on_device

TILE = 64
LAST_TILES = tl.constexpr(2)  # that go on for longer
COARSE = tl.constexpr(2.0**-5)  # the change down to which a product's left operand has 16 bits
WARPS = tl.constexpr(4)  # of a program
PIPELINED = 32  # iterations at most before tiles wait for each other: every one has carries of its own

LEAST_WEIGHT = tl.constexpr(MIN_IMPORTANCE)
SIGN = tl.constexpr(-(2**31))  # the sign bit of an fp32 number


@triton.jit
def _larger(a_1, b_1, a_2, b_2):
    return tl.maximum(a_1, a_2), tl.maximum(b_1, b_2)


@triton.jit
def _multiply(left, right, precise):
    """left · right in fp32. Of 16-bit operands the left one is given as the sum of two, if `precise`.

    Rounded to one, it moves the states by 1e−3 of the largest one, and the iteration would not settle within less: its
    rounding error is multiplied as well. As long as they move by much more, one will do.
    """
    if right.dtype == tl.float32:
        product = tl.dot(left, right, input_precision="tf32x3")
    else:
        if right.dtype == tl.float16:  # the sum of two reaches 1.3e5; a gate saturates there
            left = tl.clamp(left, -131008.0, 131008.0, propagate_nan=tl.PropagateNan.ALL)
            rounded = tl.clamp(left, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(right.dtype)
        else:
            rounded = left.to(right.dtype)
        if precise:
            product = tl.dot(rounded, right)
            product = tl.dot((left - rounded.to(tl.float32)).to(right.dtype), right, product)
        else:
            product = tl.dot(rounded, right)
    return product


@triton.jit
def _before(h_ptr, initial, offset, inside, earliest, keep, H: tl.constexpr, d: tl.constexpr):
    """The state before each token [TILE, d] from stored states; zero where forgotten."""
    h = tl.load(h_ptr + offset - H * d, mask=inside & ~earliest, other=0.0).to(tl.float32)
    return tl.where(earliest, initial[None, :], h) * keep


@triton.jit
def _slot(n, max_iterations, tiles, tile):
    """Where a tile hands on what it has in iteration n."""
    return tl.minimum(n, max_iterations + 1).to(tl.int64) * tiles + tile


@triton.jit
def _words(carry_ptr, scale_ptr, slot, channel, wanted, d: tl.constexpr):
    """The words of a carry [d] and of its scale."""
    mask = wanted & (channel < d)
    carry = tl.load(carry_ptr + slot * d + channel, mask=mask, other=0, volatile=True)
    scale = tl.load(scale_ptr + slot, mask=wanted, other=0, volatile=True)
    return carry, scale


@triton.jit(do_not_specialize=["shift"])
def _solve_kernel(
    z_ptr, gamma_ptr, weight_ptr, initial_ptr, reset_ptr, h_ptr, grad_ptr, carry_in_ptr,
    final_ptr, slope_ptr, grad_z_ptr, grad_gamma_ptr, grad_gate_ptr,
    counter_ptr, carry_ptr, scale_ptr, iterations_ptr, residual_ptr,
    rows, length, tolerance, max_iterations, shift,
    H: tl.constexpr, d: tl.constexpr, TILE: tl.constexpr, RESETS: tl.constexpr, ADJOINT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile, from its inputs to its outputs; see the module.

    z, gamma, h, grad, grad_*: [rows, length, H, d]; weight [H, d, d]; initial, carry_in, final [rows, H, d] fp32;
    reset [rows, length]. Of the forward pass h and final are outputs, carry_in is the initial state. Of the adjoint h
    is an input, carry_in the adjoint of the last token, final the gradient of the initial state; slope is
    where it keeps s, like z but fp32: rounded to 16 bits its error would be in the adjoints of all tokens before.
    counter: int32, zero, for tickets. carry: [max_iterations + 2, tiles, d] and scale [max_iterations + 2, tiles],
    zero: words that tiles hand on in each iteration; the scale's sign says that the tile is done. shift: 0, which the
    compiler must not know: of aligned rows it would load several channels a thread at once, and then scan in that
    layout, across threads.
    """
    ticket = take_ticket(counter_ptr)
    tiles = tl.num_programs(0)
    step = ticket // (rows * H)
    chunk = tl.cdiv(length, TILE) - 1 - step if ADJOINT else step
    b = ticket % (rows * H) // H
    head = ticket % H
    channel = tl.arange(0, d)
    state_offset = (b * H + head) * d + channel
    tolerance *= tl.where(step < tl.cdiv(length, TILE) - LAST_TILES, 0.5, 0.0625)
    row = tl.arange(0, TILE)
    place = TILE - 1 - row if ADJOINT else row  # rows are in the order of the scan
    token = chunk * TILE + place
    inside = tl.full((TILE, 1), True, tl.int1) if WHOLE else (token < length)[:, None]
    earliest = ((row == (TILE - 1 if ADJOINT else 0)) & (chunk == 0))[:, None]
    # a start for each channel plus constants for the rows, which become part of the load instructions
    start = ((b.to(tl.int64) * length + chunk * TILE) * H + head) * d + channel + shift
    offset = start[None, :] + (place * (H * d)).to(tl.int64)[:, None]

    gamma = tl.load(gamma_ptr + offset, mask=inside, other=1.0).to(tl.float32)
    keep = tl.full((TILE, 1), 1.0, tl.float32)
    if RESETS:
        keep = 1.0 - tl.load(reset_ptr + b.to(tl.int64) * length + token, mask=token < length, other=0)[:, None].to(
            tl.float32
        )
        gamma *= keep
    weight_offset = head * d * d + channel[:, None] * d + channel[None, :]
    weight = tl.load(weight_ptr + weight_offset)
    if ADJOINT:
        initial = tl.load(initial_ptr + state_offset)
        h_before = _before(h_ptr, initial, offset, inside, earliest, keep, H, d)
        gate = sigmoid(_multiply(h_before, tl.trans(weight), True))
        slope = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)
        tl.store(slope_ptr + offset, slope, mask=inside)
        tl.debug_barrier()
        operand = weight
    else:
        operand = tl.trans(weight)

    product = tl.zeros((TILE, d), tl.float32)
    value = tl.zeros((TILE, d), tl.float32)
    before = tl.zeros((TILE, d), tl.float32)
    carry_out = tl.zeros((d,), tl.float32)
    scale = 0.0
    residual = 0.0
    exact = 0
    precise = True
    n = 0
    carry = tl.load(carry_in_ptr + state_offset)
    before_scale = 0.0
    final = step == 0  # whether the tile before is done: then its carry stays, and nobody is waited for any more
    done = False
    previous = ticket - rows * H
    slot = _slot(0, max_iterations, tiles, previous)
    carry_word, scale_word = _words(carry_ptr, scale_ptr, slot, channel, not final, d)
    while not done:
        if not final:
            slot = _slot(n, max_iterations, tiles, previous)
            # each thread loads for itself, and has to have seen what the others have
            while tl.min(((carry_word != 0) & (scale_word != 0)).to(tl.int32)) == 0:
                carry_word, scale_word = _words(carry_ptr, scale_ptr, slot, channel, True, d)
            if d < 32 * WARPS:  # several threads load the same word, and only one of them was asked
                carry_word, scale_word = _words(carry_ptr, scale_ptr, slot, channel, True, d)
            carry = received(carry_word)
            before_scale = tl.abs(received(scale_word))
            final = ~scale_word < 0
        if ADJOINT:
            grad_before = tl.load(grad_ptr + offset - H * d, mask=inside & ~earliest, other=0.0).to(tl.float32)
            before, after = scan_tile(gamma, product * keep + grad_before, carry)
            new = tl.maximum(1.0 - gamma, LEAST_WEIGHT) * before
        else:
            z = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            before, after = scan_tile(gamma, z * sigmoid(product), carry)
            new = after
        carry_out = tl.sum(tl.where((row == TILE - 1)[:, None], after, 0.0), 0)
        # columns first, within threads, then both at once across threads: the next tile is waiting
        change, largest = tl.reduce((tl.max(tl.abs(new - value), 0), tl.max(tl.abs(new), 0)), 0, _larger)
        scale = tl.maximum(before_scale, largest)
        value = new
        exact = tl.where(final & precise, exact + 1, exact)
        relative_change = change / tl.maximum(scale, 1e-37)
        if n <= max_iterations:
            residual = relative_change
        # NaN compares false: it ends the iteration, but not token by token (tolerance < 0). What was made with a coarse
        # product is not the solution, however little it moves
        done = final & (((tolerance >= 0.0) & precise & (not (relative_change > tolerance))) | (exact > TILE))
        if done | (n <= max_iterations):
            slot = _slot(n, max_iterations, tiles, ticket)
            send(carry_ptr + slot * d + channel, carry_out)
            sign = tl.where(done, SIGN, 0)
            send(scale_ptr + slot, (scale.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True))
        if not done:
            # asked for early: mostly it has been there for long
            slot = _slot(n + 1, max_iterations, tiles, previous)
            carry_word, scale_word = _words(carry_ptr, scale_ptr, slot, channel, not final, d)
            factor = tl.load(slope_ptr + offset, mask=inside, other=0.0) if ADJOINT else keep
            precise = (not (relative_change >= COARSE)) | (n >= max_iterations)
            product = _multiply(before * factor, operand, precise)
        n += 1

    if ADJOINT:
        # loaded and computed again, not kept in registers through the iteration
        h_before = _before(h_ptr, initial, offset, inside, earliest, keep, H, d)
        tl.store(grad_gamma_ptr + offset, (before * h_before).to(grad_gamma_ptr.dtype.element_ty), mask=inside)
        gate = sigmoid(_multiply(h_before, tl.trans(weight), True))
        tl.store(grad_z_ptr + offset, (before * gate).to(grad_z_ptr.dtype.element_ty), mask=inside)
        slope = tl.load(z_ptr + offset, mask=inside, other=0.0).to(tl.float32) * gate * (1.0 - gate)
        tl.store(grad_gate_ptr + offset, (before * slope * keep).to(weight.dtype), mask=inside)
    else:
        tl.store(h_ptr + offset, value.to(h_ptr.dtype.element_ty), mask=inside)
    if step == tl.cdiv(length, TILE) - 1:
        tl.store(final_ptr + state_offset, carry_out)
    tl.store(iterations_ptr + ticket, n - 1)  # the first had the gate at its neutral value
    tl.store(residual_ptr + ticket, residual)


def supports(weight: Tensor) -> bool:
    """Whether W's heads fit the chip, in both orientations; of fp32 a product takes four copies."""
    width = weight.shape[-1]
    return weight.dim() == 3 and width in (16, 32, 64, 128) and width * width * weight.element_size() <= 32 * 1024


def _solve(
    arguments: dict[str, Tensor | None], z: Tensor, weight: Tensor, adjoint: bool, settings: SolverSettings
) -> tuple[Tensor, Tensor]:
    """Launches the kernel over all tiles; returns iterations [B] int32 and residual [B] fp32."""
    batch, length, _ = z.shape
    heads, width, _ = weight.shape
    steps = cdiv(length, TILE)
    tiles = steps * batch * heads
    sequential = settings.solver == "sequential"
    max_iterations = -1 if sequential else min(settings.max_iterations, PIPELINED)
    empty = z.new_empty
    slots = max_iterations + 2
    words = torch.zeros(slots * tiles * (width + 1) + 1, dtype=torch.int32, device=z.device)
    carry, scale, counter = words.split([slots * tiles * width, slots * tiles, 1])
    iterations = empty((steps, batch, heads), dtype=torch.int32)
    residual = empty((steps, batch, heads), dtype=torch.float32)
    adjoint_only = ("grad_ptr", "initial_ptr", "slope_ptr", "grad_z_ptr", "grad_gamma_ptr", "grad_gate_ptr")
    _solve_kernel[(tiles,)](
        **(dict.fromkeys(adjoint_only) | arguments),
        z_ptr=z, weight_ptr=weight,
        counter_ptr=counter, carry_ptr=carry, scale_ptr=scale,
        iterations_ptr=iterations, residual_ptr=residual,
        rows=batch, length=length, max_iterations=max_iterations, shift=0,
        tolerance=-1.0 if sequential else settings.tolerance,
        H=heads, d=width, TILE=TILE, WHOLE=length % TILE == 0, RESETS=arguments["reset_ptr"] is not None,
        ADJOINT=adjoint, num_warps=WARPS.value,
    )  # fmt: skip
    if sequential:
        return torch.zeros_like(iterations[0, :, 0]), torch.zeros_like(residual[0, :, 0])
    return iterations.amax((0, 2)).clamp_max(max_iterations), residual.amax((0, 2))


def forward(
    z: Tensor, gamma: Tensor, weight: Tensor, initial: Tensor, reset: Tensor | None, settings: SolverSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, final state, iterations and residual; see `mmrec_kernels.gated_recurrence`."""
    z, gamma = z.contiguous(), gamma.contiguous()
    h = torch.empty_like(z)
    final = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
    arguments = dict(
        gamma_ptr=gamma, reset_ptr=reset, carry_in_ptr=initial.float().contiguous(), h_ptr=h, final_ptr=final
    )
    with on_device(z.device):
        report = _solve(arguments, z, weight.contiguous(), False, settings)
    return h, final, *report


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
    """Gradients of z, gamma, weight and the initial state (fp32)."""
    z, gamma, weight = z.contiguous(), gamma.contiguous(), weight.contiguous()
    initial = initial.float().contiguous()
    grad_z, grad_gamma = torch.empty_like(z), torch.empty_like(gamma)
    grad_gate = torch.empty_like(z, dtype=weight.dtype)
    slope = torch.empty_like(z, dtype=torch.float32)
    grad_initial = torch.empty_like(initial)
    arguments = dict(
        gamma_ptr=gamma, reset_ptr=reset, carry_in_ptr=(grad_h[:, -1].float() + grad_final).contiguous(), h_ptr=h,
        grad_ptr=grad_h.contiguous(), initial_ptr=initial, final_ptr=grad_initial,
        slope_ptr=slope, grad_z_ptr=grad_z, grad_gamma_ptr=grad_gamma, grad_gate_ptr=grad_gate,
    )  # fmt: skip
    with on_device(z.device):
        _solve(arguments, z, weight, True, settings)
    return grad_z, grad_gamma, gate_weight_gradient(grad_gate, h, initial, weight), grad_initial
