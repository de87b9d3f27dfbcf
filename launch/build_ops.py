"""Compiles the C++ operators that DeepSpeed would otherwise compile as training starts. Takes minutes, once.

    python launch/build_ops.py [comm] [cpu_adam] [async_io]

Worth doing before the first run: ranks that compile at the same time wait for each other. A build that was killed
leaves a lock on which later ones would wait forever: it is removed. What cannot be built here is named, with what
needs it.
"""

import argparse
import os
import sys
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from mmrec_train.errors import EXIT_OK
from mmrec_train.ninja import prefer_own_ninja

# DeepSpeed's builder classes, and what they are for. An accelerator has no builder for what it does not need.
OPERATORS = {
    "comm": ("ShareMemCommBuilder", "fast communication between ranks on CPUs (without it, they use gloo)"),
    "cpu_adam": ("CPUAdamBuilder", "optimizer states in CPU memory (offload_optimizer)"),
    "async_io": ("AsyncIOBuilder", "parameters and optimizer states on NVMe (device: nvme), needs libaio's headers"),
}


def main() -> int:
    """Builds each operator named, or all, or says why not; the exit code is 0 either way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"of {', '.join(OPERATORS)}; all if none")
    names = parser.parse_args().operators or list(OPERATORS)
    if unknown := set(names) - set(OPERATORS):
        parser.error(f"unknown operator {', '.join(sorted(unknown))}; there are {', '.join(OPERATORS)}")
    prefer_own_ninja()
    remove_stale_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root())))
    for name in names:
        builder_class, purpose = OPERATORS[name]
        builder = get_accelerator().create_op_builder(builder_class)
        if builder is None:
            continue
        print(f"{builder.name}: for {purpose}", flush=True)
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            print(f"{builder.name} cannot be built here: {error}", file=sys.stderr, flush=True)
    return EXIT_OK


def remove_stale_locks(root: Path) -> None:
    """Removes the locks below `root` that killed builds have left; says which, and which are of builds that run."""
    for lock in root.glob("**/lock"):
        if _is_held(lock):
            print(f"Waiting for another build to release {lock}.", flush=True)
        else:
            print(f"Removing {lock}, which a build that was killed has left.", flush=True)
            lock.unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has torch's lock file open, as the one that builds does until it is done."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(lock.resolve()) for file in process.open_files()):
                return True
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile; another user's, with folders of its own
            continue
    return False


if __name__ == "__main__":
    sys.exit(main())
