"""Operands of the dense gate's products: scaled by powers of two, so that 16 or 8 bits hold them, and converted.

The largest absolute value is kept as the bits of an fp32 number (int32): those are ordered like the numbers, and NaN
comes after all of them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec_kernels.checks import cdiv

HEADROOM = tl.constexpr(4)  # states are scaled to at most 2⁴: fp16 holds 4000 times as much
HEADROOM_8_BIT = tl.constexpr(8)  # weights to at most 2⁸, of the 448 that e4m3 holds


@triton.jit
def power_of_two(largest, headroom: tl.constexpr):
    """The power of two that brings the number with these bits to at most 2^headroom; 1 if it is Inf or NaN."""
    exponent = (largest >> 23) - 127
    power = tl.minimum(tl.maximum(-1 - exponent + headroom, -100), 100)
    power = tl.where(exponent == 128, 0, power)
    return ((power + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest_in(x, row, size, program, programs, BLOCK: tl.constexpr):
    """The bits of the largest absolute value of a row of x, in every programs-th block from `program` on."""
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(program * BLOCK, size, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row.to(tl.int64) * size + at, at < size, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(most, 0)


@triton.jit
def _largest_kernel(x, y, matrix, largest, x_size, y_size, matrix_size, x_programs, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    program = tl.program_id(0)
    if program < x_programs:
        most = _largest_in(x, row, x_size, program, x_programs, BLOCK)
        if y is not None:
            most = tl.maximum(most, _largest_in(y, row, y_size, program, x_programs, BLOCK))
        tl.atomic_max(largest + row, most, sem="relaxed")
    if matrix is not None and (program >= x_programs) & (row == 0):
        most = _largest_in(matrix, row, matrix_size, program - x_programs, tl.num_programs(0) - x_programs, BLOCK)
        tl.atomic_max(largest + tl.num_programs(1), most, sem="relaxed")


def find_largest(largest: Tensor, x: Tensor, y: Tensor | None = None, matrix: Tensor | None = None) -> None:
    """Writes the bits of the largest absolute value in each row of x and y, [B, ...], and then of a matrix.

    All are contiguous; `largest` is [B] int32, [B + 1] with a matrix, and zero.
    """
    x_size, y_size = (0 if t is None else math.prod(t.shape[1:]) for t in (x, y))
    matrix_size = 0 if matrix is None else matrix.numel()
    x_programs, matrix_programs = (min(cdiv(size, 4096), 2048) for size in (x_size, matrix_size))
    _largest_kernel[(x_programs + matrix_programs, len(x))](
        x, y, matrix, largest, x_size, y_size, matrix_size, x_programs, BLOCK=4096
    )  # fmt: skip


def largest_of(x: Tensor, y: Tensor | None = None) -> Tensor:
    """[B] int32: the bits of the largest absolute value in each row of x and y, [B, ...], contiguous."""
    largest = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    find_largest(largest, x, y)
    return largest


@triton.jit
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
    tl.store(scale, 1.0 / root)  # all programs write the same
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
