"""Matrix products with 16-bit operands and fp32 results, and those of the gate."""

import torch
from torch import Tensor


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [N, m, k] and [N, k, n], accumulated and returned in fp32 (fp64 for fp64 operands).

    16-bit operands stay 16 bit on CUDA, where the tensor cores accumulate in fp32; elsewhere they are widened first.
    """
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def gate_product(h: Tensor, weight: Tensor) -> Tensor:
    """W h for h [B, T, D] and a dense [D, D] or headwise [H, d, d] weight, in h's dtype (fp32 or fp64).

    h is not rounded to a 16-bit weight's dtype: rounded to bf16, it moves the states of the recurrence by about 1e−3
    of the largest one, and the iteration never settles within less.
    """
    batch, length, width = h.shape
    matrix = weight.to(h.dtype)
    if weight.dim() == 2:
        return h @ matrix.mT
    heads = weight.shape[0]
    by_head = h.reshape(batch * length, heads, weight.shape[1]).transpose(0, 1)
    return torch.bmm(by_head, matrix.mT).transpose(0, 1).reshape(batch, length, width)


def gate_weight_gradient(grad: Tensor, h: Tensor, initial: Tensor, weight: Tensor) -> Tensor:
    """Σ_t grad_t h_{t−1}ᵀ over batch and time, in the shape and dtype of the weight.

    Args:
        grad: Gradient of the gate's logits [B, T, D], contiguous, zero where the state before is forgotten. The first
            token's are overwritten: rows of a batch follow each other, and the state before them is not in h.
        h: States [B, T, D], contiguous.
        initial: The state before the first token [B, D].
    """
    heads = weight.shape[0] if weight.dim() == 3 else 1

    def product(left: Tensor, right: Tensor) -> Tensor:  # [n, D] each
        left, right = (x.to(weight.dtype).unflatten(-1, (heads, -1)).transpose(0, 1) for x in (left, right))
        return matmul_fp32(left.mT, right)

    total = product(grad[:, 0], initial)
    grad[:, 0] = 0.0
    total += product(grad.flatten(0, 1)[1:], h.flatten(0, 1)[:-1])
    return total.view(weight.shape).to(weight.dtype)
