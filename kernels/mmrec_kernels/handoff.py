"""Handing results from one program of a Triton kernel to another, while the kernel runs.

A scan that is split over time passes a state from each program to the next. A program may wait only for programs with
smaller tickets: those have started, so they will finish, whatever order the GPU starts programs in. What is passed
depends on the inputs alone, never on who was faster: same inputs, same bits.

Data go through global memory: write them with `tl.store`, `publish` a flag; the receiver does `wait_for` on the flag
and reads the data with `cache_modifier=".cg"`, past its own L1 cache, which may hold what was there before.
"""

import triton
import triton.language as tl


@triton.jit
def take_ticket(counter):
    """The number of programs that came here before; `counter` is an int32 that starts at zero."""
    return tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def publish(flag, value):
    """Sets a flag (int32) after everything that the threads of this program have stored."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, value, sem="release")


@triton.jit
def wait_for(flag, at_least):
    """Waits until a flag has reached a value; returns the flag."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen < at_least:
        seen = tl.atomic_add(flag, 0, sem="acquire")
    return seen
