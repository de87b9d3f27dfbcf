"""The recurrence whose gate mixes all channels: a matrix product and a scan per iteration, nothing decided by the host.

The kernels are in `dense_kernels_triton`. Per direction

1. a guess: the scan with the gate at its neutral value;
2. `planned` iterations, each a cuBLAS product and one launch of `step_kernel`, which computes the gates, scans, and
   writes the operand of the next product. The first of them may have 8-bit operands: they only improve the guess.
   The last one measures the change, between its product and the one before;
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
from mmrec_kernels.scan_torch import shift_right
from mmrec_kernels.solver import SolverSettings
from mmrec_kernels.time_tiles import GROUP, handoff_words, on_device

PLANNED = {torch.float32: 8}  # iterations before the change is looked at, by the dtype of W; else 5
PLANNED_8_BIT = 2  # how many of them have 8-bit operands
WIDTH_8_BIT = 2048  # from this width on: below, a product costs less than rounding its operands
HEADROOM = 16.0  # operands are scaled so that the largest input of the recurrence comes near this
CHANNELS = 32  # of a tile, per warp
STEPS = 64  # tokens of a tile


class _Problem(NamedTuple):
    """What the iterations of one direction work on; see `step_kernel`. final and value are outputs."""

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
    tiles = cdiv(length, STEPS) * batch * cdiv(width, 4 * CHANNELS)
    tiling = dict(STEPS=STEPS, GROUP=GROUP, WHOLE=length % STEPS == 0 and width % (8 * CHANNELS) == 0, shift=0)
    product: Tensor | None = None
    unscale: Tensor | None = None
    for n in range(planned + 1):
        old_product = product
        if n > 0:
            product, unscale = operands.product(n, products[n % 2])
        if n == planned == 1:
            old_product = products[0].zero_()  # the neutral gate of the guess
        step_kernel[(tiles,)](
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
    refine_kernel[(programs,)](
        **common, **tiling, **together,
        matrix=operands.matrix, N_STRIDE=n_stride, K_STRIDE=k_stride, products=products, unscale=operands.unscale,
        scale=operands.scale, operand=operands.operand, words=words[0], change_words=words[1],
        word_count=words.shape[1], meeting=counters[0], planned=planned, max_iterations=limit,
        BLOCK_D=8 * CHANNELS, BLOCK_M=blocks[0], BLOCK_N=blocks[1], BLOCK_K=blocks[2], num_stages=3,
    )  # fmt: skip
    n_stride, k_stride = problem.matrix.stride()[1:]
    finish_kernel[(programs,)](
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
        slope_kernel[(cdiv(z.numel(), 2048),)](z, logits, unscale, slope, z.numel(), z[0].numel(), BLOCK=2048)
        adjoint = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        grad_initial = torch.empty(initial.shape, dtype=torch.float32, device=z.device)
        last = (grad_h[:, -1].float() + grad_final).contiguous()
        problem = _Problem(gamma, grad_h.contiguous(), weight, slope, reset, last, adjoint, grad_initial, True)
        _solve(problem, settings)
        grad_z, grad_gamma = torch.empty_like(z), torch.empty_like(gamma)
        grad_gate = slope  # no longer needed
        gradient_kernel[(z.shape[0] * z.shape[1],)](
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
