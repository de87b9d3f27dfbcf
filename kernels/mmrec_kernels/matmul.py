"""Matrix products with 16-bit operands and fp32 results."""

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
