"""Kernels under the compiler, which refuses what Triton's interpreter takes. It needs no GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mmrec_kernels

ONLY_16_BIT = {"operands_triton._largest_kernel", "operands_triton._weight_kernel"}  # with them it takes twice as long


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_hopper"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = {
        f"{path.stem}.{name}"
        for path in Path(mmrec_kernels.__file__).parent.glob("*_triton.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert kernels - ONLY_16_BIT == set(result.stdout.split())
    assert len(list(tmp_path.rglob("*.cubin"))) >= len(kernels - ONLY_16_BIT)
