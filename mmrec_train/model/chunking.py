"""How a long sequence is cut into chunks."""

import math

import psutil
import torch

from mmrec_train.model.accounting import activation_bytes
from mmrec_train.model.configuration import MMRecConfig

LONGEST_CHUNK = 32768  # longer sequences are cut by themselves …
DEFAULT_CHUNK = 8192  # … into chunks of this length


def chunk_bounds(
    length: int,
    chunk_size: int | str | None,
    config: MMRecConfig,
    *,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[slice]:
    """Slices of at most `chunk_size` tokens that cover [0, length) in order.

    Args:
        chunk_size: Tokens; None cuts only sequences longer than `LONGEST_CHUNK`, into `DEFAULT_CHUNK`; "auto" takes
            the largest power of two (256 to `LONGEST_CHUNK`) whose activations fit in half of the free memory.
        batch, device, dtype: Rows, where the memory is asked for, and of the activations; for "auto".
    """
    if chunk_size == "auto":
        size = _largest_fitting_chunk(config, batch, device, dtype)
    elif chunk_size is None:
        size = length if length <= LONGEST_CHUNK else DEFAULT_CHUNK
    elif isinstance(chunk_size, int) and chunk_size >= 1:
        size = chunk_size
    else:
        raise ValueError(f'chunk_size is {chunk_size!r}; it must be a positive number of tokens, None or "auto"')
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _largest_fitting_chunk(config: MMRecConfig, batch: int, device: torch.device, dtype: torch.dtype) -> int:
    if device.type == "cuda":
        device_free, _ = torch.cuda.mem_get_info(device)
        # what the caching allocator holds but does not use is free to us as well
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = device_free + cached
    else:
        free = psutil.virtual_memory().available
    checkpointing = (
        "none" if torch.is_grad_enabled() else "full"
    )  # without a graph one block's activations live at a time
    for exponent in range(int(math.log2(LONGEST_CHUNK)), 8, -1):
        needed = activation_bytes(config, batch, 2**exponent, checkpointing, dtype.itemsize)
        if needed <= free / 2:
            return 2**exponent
    return 256
