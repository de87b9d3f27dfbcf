"""Scans of tiles [rows, channels] that lie in registers, a program's threads side by side along the channels.

Triton lays a tensor out like this by itself if it has (at least) as many channels as the program has threads and if
nothing suggests another layout. Loads do: of rows known to be aligned a thread would load several channels at once,
and the scan would inherit that layout and run across threads. So add to the offsets of such tiles an integer argument
that is zero but must not be specialized ("shift" in the kernels): the compiler then knows neither alignment nor width.
With twice that number a thread loads two channels, which is right for 16-bit ones that stay in registers as they came.
"""

import triton
import triton.language as tl

from mmrec_kernels.backend import interpreted

COMPILED = tl.constexpr(not interpreted())


@triton.jit
def _then(decay_1, input_1, factor_1, before_1, decay_2, input_2, factor_2, before_2):
    """Two spans of tokens as one. A span maps the state s that enters it to the state before its last token,
    factor·s + before; decay and input are those of its last token."""
    return (
        decay_2,
        input_2,
        factor_2 * decay_1 * factor_1,
        tl.fma(factor_2, tl.fma(decay_1, before_1, input_1), before_2),
    )


@triton.jit
def scan_tile(gamma, x, carry):
    """The states before and after each row [rows, channels] of s ← γ s + x, from the carry [channels] before them."""
    first = (tl.arange(0, gamma.shape[0]) == 0)[:, None]
    before = tl.where(first, carry[None, :], 0.0)
    one = tl.full(gamma.shape, 1.0, tl.float32)
    # γ and x come out as they went in, but in the layout of the scan: with `x` itself the code around the scan would be
    # laid out like the matrix product that x comes from, and γ would be kept twice
    gamma, x, _, before = tl.associative_scan((gamma, x, one, before), 0, _then)
    return before, tl.fma(gamma, before, x)


@triton.jit
def _append(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, tl.fma(decay_2, state_1, state_2)


@triton.jit
def scan_rows(gamma, x, carry):
    """The state after each row [rows, channels] of s ← γ s + x, from the carry [channels] before them."""
    first = (tl.arange(0, gamma.shape[0]) == 0)[:, None]
    x = tl.where(first, tl.fma(gamma, carry[None, :], x), x)
    return tl.associative_scan((gamma, x), 0, _append)[1]


@triton.jit
def last_row(x):
    """The last row [channels] of a tile."""
    is_last = tl.arange(0, x.shape[0]) == x.shape[0] - 1
    return tl.sum(tl.where(is_last[:, None], x, 0.0), 0)


@triton.jit
def summarize_tile(gamma, x):
    """What the rows of a tile do together to the state that enters, s ↦ decay·s + state: decay and state [channels]."""
    decay, state = tl.associative_scan((gamma, x), 0, _append)
    return last_row(decay), last_row(state)


@triton.jit
def as_new(x):
    """x, but the compiler does not know that it is.

    What it has computed from x before, such as numbers in fp32, it would keep in registers for a second use, and there
    are none left.
    """
    if COMPILED and x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", (x,), x.dtype, is_pure=False, pack=2)
    elif COMPILED:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", (x,), x.dtype, is_pure=False, pack=1)
    else:
        return x
