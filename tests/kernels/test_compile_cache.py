"""What Triton has compiled is found again, whatever a program runs first."""

import os
import subprocess
import sys

PROGRAM = """
from triton import JITFunction
from mmrec_kernels import dense_kernels_triton, exponential_triton, headwise_triton, scan_triton
modules = [dense_kernels_triton, exponential_triton, headwise_triton, scan_triton]
kernels = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction) and f.__module__ == m.__name__]
keys = {f.__name__: f.cache_key for f in {ORDER}(kernels)}
print(len(keys), sorted(keys.items()))
"""


def keys_asked_for_in(order: str) -> str:
    """In a process of its own, since a key is computed once; kernels that are interpreted have none."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = PROGRAM.replace("{ORDER}", order)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_keys_do_not_depend_on_what_runs_first() -> None:
    first = keys_asked_for_in("list")
    assert int(first.split()[0]) > 20
    assert keys_asked_for_in("reversed") == first
