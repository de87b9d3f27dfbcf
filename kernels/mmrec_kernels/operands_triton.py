"""Operands of the dense gate's products: scaled by powers of two, so that 16 or 8 bits hold them, and converted.

The largest absolute value is kept as the bits of an fp32 number (int32): those are ordered like the numbers, and NaN
comes after all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.checks import cdiv

HEADROOM = tl.constexpr(4)  # states are scaled to at most 2⁴: operands may be 2000 times as large
HEADROOM_8_BIT = tl.constexpr(8)  # weights to at most 2⁸, of the 448 that e4m3 holds


@triton.jit
def power_of_two(largest, headroom: tl.constexpr):
    """The power of two that brings the number with these bits to at most 2^headroom; 1 if it is 0, Inf or NaN."""
    exponent = (largest >> 23) - 127
    power = tl.minimum(tl.maximum(-1 - exponent + headroom, -100), 100)
    power = tl.where((exponent == 128) | (largest == 0), 0, power)
    return ((power + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest_in(x, rows, stride, program, programs, D: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the largest absolute value of every programs-th of `rows` rows from `program` on."""
    most = tl.zeros((BLOCK,), tl.int32)
    for row in range(program, rows, programs):
        for start in tl.static_range(0, D, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            value = tl.load(x + tl.cast(row, tl.int64) * stride + channel, channel < D, other=0.0).to(tl.float32)
            most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(most, 0)


@triton.jit(do_not_specialize=["tokens", "programs"])
def _largest_kernel(
    x, initial, matrix, largest, tokens, stride, programs, x_batch: tl.int64, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if program < programs:
        most = _largest_in(x + b * x_batch, tokens, stride, program, programs, D, BLOCK)
        if initial is not None and program == 0:
            most = tl.maximum(most, _largest_in(initial + b * D, 1, stride, program, programs, D, BLOCK))
        tl.atomic_max(largest + b, most, sem="relaxed")
    if matrix is not None and (program >= programs) & (b == 0):
        others = tl.num_programs(0) - programs
        most = _largest_in(matrix, D, D, program - programs, others, D, BLOCK)
        tl.atomic_max(largest + tl.num_programs(1), most, sem="relaxed")


def find_largest(largest: Tensor, x: Tensor, initial: Tensor | None = None, matrix: Tensor | None = None) -> None:
    """Writes the bits of the largest absolute value of x [B, T, D] and the initial states [B, D], for each row of the
    batch, and then that of a matrix [D, D].

    `largest` is [B] int32, [B + 1] with a matrix, and zero. Only the tokens of x may lie apart.
    """
    batch, tokens, width = x.shape
    programs, others = min(tokens, 2048), 0 if matrix is None else min(width, 2048)
    _largest_kernel[(programs + others, batch)](
        x, initial, matrix, largest, tokens, x.stride(1), programs, x.stride(0), D=width, BLOCK=1024
    )  # fmt: skip


def largest_of(x: Tensor, initial: Tensor | None = None) -> Tensor:
    """[B] int32: what `find_largest` writes."""
    largest = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    find_largest(largest, x, initial)
    return largest


@triton.jit(do_not_specialize_on_alignment=["largest"])
def _weight_kernel(
    weight, half, low, scale, largest, SIZE: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A square block of a matrix [SIZE, SIZE] in fp16 and, scaled and perhaps transposed, in 8 bits."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * SIZE + column[None, :]
    inside = (row < SIZE)[:, None] & (column < SIZE)[None, :]
    value = tl.load(weight + at, inside, other=0.0).to(tl.float32)
    tl.store(half + at, value.to(half.dtype.element_ty), inside)
    root = _even_root(power_of_two(tl.load(largest), HEADROOM_8_BIT))
    tl.store(scale, 1.0 / root, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    value *= root * root
    if TRANSPOSED:
        at = column[:, None] * SIZE + row[None, :]
        value, inside = tl.trans(value), tl.trans(inside)
    tl.store(low + at, value.to(low.dtype.element_ty), inside)


@triton.jit
def _even_root(power):
    """The root of a power of two, or of half of it if that has one."""
    exponent = (power.to(tl.int32, bitcast=True) >> 23) - 127
    return (((exponent >> 1) + 127) << 23).to(tl.float32, bitcast=True)


def converted_weight(weight: Tensor, largest: Tensor, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A 16-bit matrix [D, D] in fp16, and scaled (see `largest`, [1]) and perhaps transposed in e4m3.

    Returns:
        half, low, scale: The square of scale (fp32) undoes the scaling of low.
    """
    half = torch.empty_like(weight, dtype=torch.float16)
    low = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty((), dtype=torch.float32, device=weight.device)
    blocks = cdiv(len(weight), 64)
    _weight_kernel[(blocks, blocks)](
        weight, half, low, scale, largest, SIZE=len(weight), TRANSPOSED=transposed, BLOCK=64
    )  # fmt: skip
    return half, low, scale


@triton.jit
def state_before(h, initial, b, t, channel, inside, D: tl.constexpr):
    """The state before token t of row b at some channels, fp32: from h [B, T, D], or the initial one [B, D]."""
    if t == 0:
        before = tl.load(initial + b * D + channel, inside, other=0.0).to(tl.float32)
    else:
        before = tl.load(h - D + channel, inside, other=0.0).to(tl.float32)
    return before


@triton.jit
def _states_kernel(h, initial, reset, operand, largest, length, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, t = row // length, row % length
    factor = 1.0
    if reset is not None:
        factor -= tl.load(reset + row).to(tl.float32)
    if largest is not None:
        factor *= power_of_two(tl.load(largest + b), HEADROOM)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        before = state_before(h + row * D, initial, b, t, channel, channel < D, D)
        tl.store(operand + row * D + channel, (before * factor).to(operand.dtype.element_ty), channel < D)


def states_before(
    h: Tensor, initial: Tensor, reset: Tensor | None, largest: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The state before each token [B, T, D], zero where it is forgotten; scaled by row if `largest` is given."""
    batch, length, width = h.shape
    operand = torch.empty(h.shape, dtype=dtype, device=h.device)
    _states_kernel[(batch * length,)](h, initial, reset, operand, largest, length, D=width, BLOCK=1024)
    return operand
