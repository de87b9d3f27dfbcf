"""How `gated_recurrence` is asked to solve."""

from typing import NamedTuple

import torch

MIN_IMPORTANCE = 2.0**-10  # of 1 − γ, in which the change of an adjoint is measured: γ may round to 1
SOLVERS = ("auto", "picard", "sequential")


class SolverSettings(NamedTuple):
    """Attributes:
    solver: "picard" (the parallel iteration and its exact finish), "sequential" or "auto".
    tolerance: Largest change of an iteration relative to the largest state at which it is over.
    max_iterations: Iterations before the exact finish.
    """

    solver: str
    tolerance: float
    max_iterations: int


def default_tolerance(dtype: torch.dtype) -> float:
    """The tolerance that matches the rounding of gate operands of this dtype."""
    return {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-3)
