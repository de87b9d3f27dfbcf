"""Which implementation of an operation runs: the Triton kernels or plain PyTorch.

The environment variable MMREC_KERNELS decides, read at every call:

- `auto` (the default): kernels for tensors on a GPU, PyTorch for tensors on a CPU. What no kernel can do on a GPU runs
  in PyTorch with one RuntimeWarning that names the reason.
- `triton`: kernels, or a RuntimeError that names the reason. On a CPU they run in Triton's interpreter, if
  TRITON_INTERPRET=1 was set before this package was imported.
- `torch`: PyTorch.
"""

import os
import warnings

import torch
from triton import knobs

VARIABLE = "MMREC_KERNELS"
MODES = ("auto", "triton", "torch")

_reported: set[tuple[str, str]] = set()


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)


def mode() -> str:
    """The value of MMREC_KERNELS.

    Raises:
        ValueError: If it is none of `MODES`.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in MODES:
        raise ValueError(f"{VARIABLE} is {value!r}, expected one of {', '.join(MODES)}")
    return value


def use_triton(operation: str, device: torch.device, unsupported: str | None = None) -> bool:
    """Whether the operation runs as a Triton kernel on this device.

    Args:
        operation: Its name, for messages.
        unsupported: Why no kernel can do it ("fp64 inputs", say); None if one can.

    Raises:
        RuntimeError: If MMREC_KERNELS=triton and the kernel cannot run.
    """
    chosen = mode()
    if chosen == "torch" or (chosen == "auto" and device.type == "cpu"):
        return False
    if device.type not in (("cpu",) if interpreted() else ("cuda",)):
        where = "on the CPU in Triton's interpreter" if interpreted() else "on CUDA devices"
        unsupported = f"tensors are on {device.type}, and kernels run {where}"
    if unsupported is None:
        return True
    if chosen == "triton":
        raise RuntimeError(f"{operation}: {VARIABLE}=triton, but no kernel can run: {unsupported}")
    if (operation, unsupported) not in _reported:
        _reported.add((operation, unsupported))
        warnings.warn(
            f"{operation} runs in PyTorch, slowly, because no kernel can run: {unsupported}",
            RuntimeWarning,
            stacklevel=3,
        )
    return False
