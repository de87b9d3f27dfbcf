"""Kernels of MM-Rec: linear scans, the gated nonlinear recurrence, and the read of slot memories.

Triton kernels (`*_triton.py`) and PyTorch (`*_torch.py`); MMREC_KERNELS chooses (`mmrec_kernels.backend`).
Independent of `mmrec_train`; needs torch and triton only. `mmrec_kernels.reference` holds the plain loops that
define each operation and that everything else is tested against.
"""

from mmrec_kernels import reference
from mmrec_kernels.attention import memory_attention, merge_partial_reads
from mmrec_kernels.compile_cache import settle_keys
from mmrec_kernels.hierarchy import (
    Pyramid,
    RingWrites,
    build_pyramid,
    latest_pyramid,
    select_pages,
    slots_in_pages,
    update_pyramid,
)
from mmrec_kernels.recurrence import GatedRecurrence, gated_recurrence
from mmrec_kernels.scan import associative_scan_exponential, compute_dtype, linear_scan
from mmrec_kernels.solver import default_tolerance

__all__ = [
    "GatedRecurrence",
    "Pyramid",
    "RingWrites",
    "associative_scan_exponential",
    "build_pyramid",
    "compute_dtype",
    "default_tolerance",
    "gated_recurrence",
    "latest_pyramid",
    "linear_scan",
    "memory_attention",
    "merge_partial_reads",
    "reference",
    "select_pages",
    "slots_in_pages",
    "update_pyramid",
]

settle_keys(__name__)
