"""The recurrence whose gate mixes all channels: a matrix product and a scan per iteration, nothing decided by the host.

The kernels are in `dense_kernels_triton`. Per direction

1. a guess: the scan with the gate at its neutral value;
2. `planned` iterations, each a cuBLAS product and one launch of `step_kernel`, which computes the gates, scans, and
   writes the operand of the next product. Every other may have 8-bit operands (`_Operands`). The last one measures the
   change, between its product and the one before;
3. `refine_kernel`: more iterations until every row has converged. One launch whose programs meet at barriers; it
   returns at once if there is nothing left to do;
4. `finish_kernel`: the rows that have not converged after `max_iterations`, token by token, in the same manner.

With W in 16 bit, operands are fp16 (scaled by a power of two, see `_Operands`) and products fp32. Either of them in
bf16 would move the states by about 1e−3 of the largest one at every iteration, which then never settles within less.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec_kernels.backend import interpreted
from mmrec_kernels.checks import cdiv
from mmrec_kernels.dense_kernels_triton import finish_kernel, gradient_kernel, refine_kernel, slope_kernel, step_kernel
from mmrec_kernels.matmul import gate_weight_gradient
from mmrec_kernels.operands_triton import converted_weight, find_largest, largest_of, states_before
from mmrec_kernels.solver import SolverSettings
from mmrec_kernels.time_tiles import GROUP, handoff_size, on_device

PLANNED = {torch.float32: 8}  # iterations before the change is looked at, by the dtype of W; else 5
WIDTH_8_BIT = 2048  # from this width on: below, a product costs less than rounding its operands
CHANNELS = 32  # of a tile, per warp; of 16-bit inputs twice as many
SAMPLED = 16  # one of so many tokens says how forward operands are scaled
SAMPLED_AT_LEAST = 64  # tokens, if there are so many
STEPS = 64  # tokens of a tile
STEPS_MEASURED = 32  # of the iteration that is measured, which holds twice as much
STEP_CHANNELS = 128
MEASURED_REGISTERS = 168  # of a thread: three programs a multiprocessor are worth 13 numbers spilled


class _Problem(NamedTuple):
    """What the iterations of one direction work on; see `step_kernel`. final and value are outputs."""

    gamma: Tensor
    source: Tensor
    weight: Tensor
    factor: Tensor | None
    largest_factor: Tensor | None
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


class _Operands:
    """Operands of the products, and the products.

    With W in 16 bit, operands are scaled, by row, by the power of two that brings the recurrence's largest input near
    2^HEADROOM, as far as some of its tokens tell; scales stay on the device. fp32 operands are taken as they are.

    The last planned product of such operands is an increment: that of what has changed since the product before, to
    which it is added, so that the rounding of whole operands does not reach the result. Wide layers have every other
    product in 8 bits, which takes half the time: increments (e5m2), of which 8 bits say enough, and the first product,
    which has none before it (e4m3).
    """

    def __init__(self, problem: _Problem, planned: int, limit: int, largest: Tensor):
        """`largest`: [B + 1] int32, zero."""
        source, matrix = problem.source, problem.matrix
        device = source.device
        self.matrix = matrix
        self.planned = planned
        self.largest: Tensor | None = None
        self.any_low = False  # whether every other planned product has 8-bit operands
        if matrix.dtype != torch.float32:
            self.largest = largest[:-1]
            # as many iterations as tokens make all of them exact, but not with 8 bits
            if planned > 2 and limit < source.shape[1] and _has_8_bit_products(problem):
                self.any_low = True
                find_largest(largest, _sample(problem), problem.initial, problem.weight)
                half, self.low_matrix, self.scale = converted_weight(problem.weight, largest[-1:], problem.adjoint)
                self.matrix = (half.mT if problem.adjoint else half).unsqueeze(0)
                self.low_operand = torch.empty(source.shape, dtype=torch.float8_e4m3fn, device=device)
            else:
                find_largest(self.largest, _sample(problem), problem.initial)
                self.matrix = matrix.to(torch.float16)
        self.operand = torch.empty(source.shape, dtype=self.matrix.dtype, device=device)
        self.products = torch.empty(2, *source.shape, dtype=torch.float32, device=device)
        if self.any_low:  # the whole products of planned iterations lie in the other one
            self.low_product = _in_half_of(self.products[(planned + 1) % 2], torch.bfloat16)

    def _low(self, n: int) -> bool:
        """Whether product n has 8-bit operands."""
        return self.any_low and n <= self.planned and (self.planned - n) % 2 == 0

    def increment(self, n: int) -> bool:
        """Whether the product of iteration n is what has to be added to the one before."""
        return n > 1 and self.largest is not None and (self._low(n) or n == self.planned)

    def after(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Where iteration n writes its operand, and what to subtract from it."""
        low, increment = self._low(n + 1), self.increment(n + 1)
        operand = self.low_operand if low else self.operand
        return operand.view(torch.float8_e5m2) if low and increment else operand, self.operand if increment else None

    def product(self, n: int) -> Tensor:
        """The product of iteration n ≥ 1."""
        if not self._low(n):
            # an increment is added to the one before it, there, and the iteration after that looks for it there
            place = n if self.largest is None else self.planned + self.increment(n)
            out = self.products[place % 2]
            if self.any_low and n < self.planned - 1:  # only the last whole product has to have more than 16 bits
                out = _in_half_of(out, torch.float16)
            return _multiply(self.operand, self.matrix, out)
        operand, result = self.low_operand, self.low_product
        if self.increment(n):
            operand = operand.view(torch.float8_e5m2)
        # sums of 14 bits are exact enough for operands of 3 and 4, and the product takes 179 instead of 188 us
        torch._scaled_mm(
            operand.flatten(0, 1), self.low_matrix.T, self.scale, self.scale,
            out_dtype=result.dtype, out=result.flatten(0, 1), use_fast_accum=True,
        )  # fmt: skip
        return result


def _in_half_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of x's shape and of a 16-bit dtype, in the first half of the memory of x (fp32)."""
    return x.flatten().view(dtype)[: x.numel()].view(x.shape)


def _sample(problem: _Problem) -> Tensor:
    """The tokens whose largest number says how to scale operands [B, n, D].

    Not all of them forward, which saves reading z once more: fp16 holds numbers 2000 times as large, and what it does
    not hold is finished exactly. Gradients may be of a few tokens only.
    """
    source = problem.source
    return source if problem.adjoint else source[:, :: max(1, min(SAMPLED, source.shape[1] // SAMPLED_AT_LEAST))]


def _zeros(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Zeroed int32 tensors of these shapes, by one launch; each begins at a multiple of 16 bytes."""
    sizes = [4 * cdiv(math.prod(shape), 4) for shape in shapes]
    parts = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _has_8_bit_products(problem: _Problem) -> bool:
    width = problem.weight.shape[-1]
    if interpreted() or problem.weight.dim() == 3 or width < WIDTH_8_BIT or width % 16:
        return False
    return torch.cuda.get_device_capability(problem.source.device) >= (8, 9)


def _solve(problem: _Problem, settings: SolverSettings) -> tuple[Tensor, Tensor]:
    """Fills value and final; returns iterations [B] int32 and residual [B] fp32."""
    source = problem.source
    batch, length, width = source.shape
    device = source.device
    limit = 0 if settings.solver == "sequential" else min(settings.max_iterations, length)
    planned = min(PLANNED.get(problem.weight.dtype, 5), limit)
    word_count, measured_count = (handoff_size(length, batch * width, steps) for steps in (STEPS, STEPS_MEASURED))
    # changes and sizes are bits of fp32; the last two of the words are refine_kernel's
    changes, sizes, largest, poisoned, counters, words, measured_words = _zeros(
        device, (limit + 1, batch), (limit + 1, batch), (batch + 1,), (batch,), (2,), (planned + 2, word_count),
        (2, measured_count),
    )  # fmt: skip
    operands = _Operands(problem, planned, limit, largest)
    if limit == 0:  # a row that nothing is known about has not converged
        changes.view(torch.float32).fill_(float("inf"))
        sizes.view(torch.float32).fill_(1.0)
    common = dict(
        gamma=problem.gamma, source=source, factor=problem.factor, largest_factor=problem.largest_factor,
        reset=problem.reset, initial=problem.initial, value=problem.value, final=problem.final, batch=batch,
        length=length, D=width, ADJOINT=problem.adjoint,
    )  # fmt: skip
    tiling = dict(GROUP=GROUP, WHOLE=length % STEPS == 0 and width % (8 * CHANNELS) == 0, shift=0)
    # a register holds two 16-bit channels
    vector = 2 if problem.gamma.element_size() == source.element_size() == 2 else 1
    product: Tensor | None = None
    for n in range(planned + 1):
        old_product = product
        if n > 0:
            product = operands.product(n)
        if n == planned == 1:
            old_product = operands.products[0].zero_()  # the neutral gate of the guess
        operand, subtracted = operands.after(n)
        measured = 0 < n == planned
        steps = STEPS_MEASURED if measured else STEPS
        step_kernel[(cdiv(length, steps) * batch * cdiv(width, STEP_CHANNELS),)](
            **common, **tiling,
            product=product, old_product=old_product if measured or operands.increment(n) else None,
            INCREMENT=operands.increment(n), MEASURED=measured,
            largest=operands.largest, poisoned=poisoned, operand=None if n == planned else operand,
            subtracted=None if n == planned else subtracted, change=changes[planned], size=sizes[planned],
            words=measured_words[0] if measured else words[n], change_words=measured_words[1],
            STEPS=steps, VECTOR=vector, BLOCK_D=STEP_CHANNELS, num_warps=STEP_CHANNELS // (CHANNELS * vector),
            maxnreg=MEASURED_REGISTERS if measured and vector == 1 else None,
        )  # fmt: skip

    iterations = torch.empty(batch, dtype=torch.int32, device=device)
    residuals = torch.empty(batch, dtype=torch.float32, device=device)
    programs, blocks = 1, _BLOCKS_INTERPRETED
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = _BLOCKS.get(problem.weight.dtype, _BLOCKS_16_BIT)
    together = dict(
        changes=changes, sizes=sizes, iterations=iterations, tolerance=settings.tolerance,
        HEAD=problem.matrix.shape[1], num_warps=8, launch_cooperative_grid=device.type == "cuda",
    )  # fmt: skip
    n_stride, k_stride = operands.matrix.stride()[1:]
    refine_kernel[(programs,)](
        **common, **tiling, **together,
        matrix=operands.matrix, N_STRIDE=n_stride, K_STRIDE=k_stride, product=product, products=operands.products,
        largest=operands.largest, poisoned=poisoned, operand=operands.operand,
        INCREMENT=operands.increment(planned), words=words[planned], change_words=words[planned + 1],
        word_count=word_count, meeting=counters[0], planned=planned, max_iterations=limit,
        STEPS=STEPS, BLOCK_D=8 * CHANNELS, BLOCK_M=blocks[0], BLOCK_N=blocks[1], BLOCK_K=blocks[2], num_stages=3,
    )  # fmt: skip
    n_stride, k_stride = problem.matrix.stride()[1:]
    finish_kernel[(programs,)](
        **common, **together,
        weight=problem.weight, N_STRIDE=n_stride, K_STRIDE=k_stride, meeting=counters[1],
        exact_after=limit if limit in (0, length) else -1, residuals=residuals,
        states=torch.empty(2, width, dtype=torch.float32, device=device), BLOCK_N=16, BLOCK_K=256,
    )  # fmt: skip
    return iterations, residuals


# tokens, channels and summands of a program's product, by the dtype of W
_BLOCKS_16_BIT = (128, 128, 64)
_BLOCKS = {torch.float32: (64, 64, 32)}
_BLOCKS_INTERPRETED = (16, 16, 16)


def _logits(h: Tensor, initial: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W times the states before each token [B, T, D] in fp32, and the bits of what they are scaled by (`operands`)."""
    matrix = weight if weight.dim() == 3 else weight.unsqueeze(0)
    largest, dtype = None, weight.dtype
    if dtype != torch.float32:
        largest, dtype = largest_of(h, initial), torch.float16
    operand = states_before(h, initial, reset, largest, dtype)
    out = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    return _multiply(operand, matrix.to(dtype), out), largest


def forward(
    z: Tensor, gamma: Tensor, weight: Tensor, initial: Tensor, reset: Tensor | None, settings: SolverSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, final state, iterations and residual; see `mmrec_kernels.gated_recurrence`."""
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    final = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
    start = initial.float().contiguous()
    problem = _Problem(
        gamma.contiguous(), z.contiguous(), weight.contiguous(), None, None, reset, start, h, final, False
    )  # fmt: skip
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
    z, gamma, weight, h, initial = (x.contiguous() for x in (z, gamma, weight, h, initial))
    with on_device(z.device):
        logits, largest = _logits(h, initial, weight, reset)
        # with more bits than W: each of its rounding errors is in the adjoints of all tokens before
        dtype = torch.float16 if weight.dtype == torch.bfloat16 else torch.float32
        slope = torch.empty(z.shape, dtype=dtype, device=z.device)
        largest_z = None if weight.dtype == torch.float32 else largest_of(z)
        slope_kernel[(cdiv(z.numel(), 2048),)](
            z, logits, largest, slope, largest_z, z.numel(), z.shape[1] * z.shape[2], BLOCK=2048
        )
        adjoint = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        grad_initial = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
        last = (grad_h[:, -1].float() + grad_final).contiguous()
        problem = _Problem(
            gamma, grad_h.contiguous(), weight, slope, largest_z, reset, last, adjoint, grad_initial, True
        )
        _solve(problem, settings)
        grad_z, grad_gamma = torch.empty_like(z), torch.empty_like(gamma)
        grad_gate = torch.empty_like(z, dtype=weight.dtype)
        gradient_kernel[(z.shape[0] * z.shape[1],)](
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
            z.shape[1],
            D=z.shape[2],
            BLOCK=1024,
        )
    return grad_z, grad_gamma, gate_weight_gradient(grad_gate, h, initial, weight), grad_initial.to(initial.dtype)
