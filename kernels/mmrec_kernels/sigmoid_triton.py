"""σ in a third of the instructions: neither exponentials below 2^−126 nor sums above 2^126 are kept from being zero.

Triton's own σ scales before and after to keep them, which a gate cannot tell apart. It rounds the exponent as this one
does; the rest of the error is that of `ex2.approx` and `rcp.approx`.
"""

import triton
import triton.language as tl

from mmrec_kernels.backend import interpreted

COMPILED = tl.constexpr(not interpreted())
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def sigmoid_of_power(x):
    """σ(a) of an fp32 tensor x = MINUS_LOG2_E · a, for factors that can be multiplied by that beforehand."""
    power = tl.exp2(x)
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", (1.0 + power,), tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + power)


@triton.jit
def sigmoid(x):
    """σ(x) of an fp32 tensor."""
    return sigmoid_of_power(x * MINUS_LOG2_E)
