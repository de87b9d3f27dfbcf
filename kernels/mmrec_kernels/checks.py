"""What every operation over a sequence asks of its inputs, and the precision that it computes in."""

import torch
from torch import Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any of the dtypes is, else fp32: the arithmetic of scans, decays, gates and softmax."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. `triton.cdiv` takes the host 2 µs, several times before each launch."""
    return -(-a // b)


def check_sequence(name: str, gamma: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> None:
    """Raises ValueError unless gamma and x are floating [B, T ≥ 1, D], initial_state [B, D] and reset [B, T] bool."""
    if x.dim() != 3 or gamma.shape != x.shape:
        raise ValueError(f"{name}: gamma {list(gamma.shape)} and its input {list(x.shape)} must both be [B, T, D]")
    if not (x.is_floating_point() and gamma.is_floating_point()):
        raise ValueError(f"{name}: gamma is {gamma.dtype} and its input {x.dtype}; both must be floating-point")
    batch, length, width = x.shape
    if length == 0:
        raise ValueError(f"{name}: the sequence is empty (T = 0)")
    if initial_state is not None and initial_state.shape != (batch, width):
        raise ValueError(f"{name}: initial_state is {list(initial_state.shape)}, expected {[batch, width]}")
    if reset is not None and (reset.shape != (batch, length) or reset.dtype != torch.bool):
        raise ValueError(f"{name}: reset is {list(reset.shape)} {reset.dtype}, expected {[batch, length]} torch.bool")
