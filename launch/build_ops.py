"""Compiles the C++ operators that DeepSpeed would otherwise compile as training starts. Takes minutes, once.

    python launch/build_ops.py

Worth doing before the first run: ranks that compile at the same time wait for each other, and a build that is
killed leaves a lock on which later ones wait forever. What cannot be built here is named, with what needs it.
"""

import os
import sys
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from mmrec_train.errors import EXIT_OK

# DeepSpeed's builder classes, and what they are for. An accelerator has no builder for what it does not need.
OPERATORS = {
    "ShareMemCommBuilder": "fast communication between ranks on CPUs (without it, they use gloo)",
    "CPUAdamBuilder": "optimizer states in CPU memory (offload_optimizer)",
    "AsyncIOBuilder": "parameters and optimizer states on NVMe (device: nvme), which needs libaio's headers",
}


def main() -> int:
    """Builds each operator, or says why not; the exit code is 0 either way."""
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())).glob("**/lock"):
        print(f"Waiting for another build to release {lock}. If none is running, delete that file.", flush=True)
    for name, purpose in OPERATORS.items():
        builder = get_accelerator().create_op_builder(name)
        if builder is None:
            continue
        print(f"{builder.name}: for {purpose}", flush=True)
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            print(f"{builder.name} cannot be built here: {error}", file=sys.stderr, flush=True)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
