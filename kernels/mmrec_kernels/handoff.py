"""Handing results from one program of a Triton kernel to another, while the kernel runs.

A scan that is split over time passes a state from each program to the next. A program may wait only for programs with
smaller tickets: those have started, so they will finish, whatever order the GPU starts programs in. What is passed
depends on the inputs alone, never on who was faster: same inputs, same bits.

What is passed are words in global memory, which are zero at first. A word is written once and says itself that it is
there: no flag, no fence, and it can be asked for long before it is needed. Read words with `volatile=True`.
"""

import triton
import triton.language as tl


@triton.jit
def take_ticket(counter):
    """The number of programs that came here before; `counter` is an int32 that starts at zero."""
    return tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def send(place, value, mask=None):
    """Writes fp32 values as words that are never zero.

    A word is the complement of the value's bits; only a NaN with every bit set would be zero, and it becomes another
    NaN.
    """
    word = ~value.to(tl.int32, bitcast=True)
    tl.atomic_xchg(place, tl.where(word == 0, 1, word), mask=mask, sem="relaxed")


@triton.jit
def received(word):
    """The value of a word."""
    return (~word).to(tl.float32, bitcast=True)
