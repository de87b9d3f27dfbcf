"""How the operations are made known to PyTorch: to the dispatcher, to autograd and to torch.compile.

`torch.library.custom_op` with `register_autograd` would do, but a call, forward and backward, then takes the host about
35 µs longer (of 80), as long as a small kernel runs.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mmrec", "DEF")

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context in which an operation is called without autograd: in the forward pass of its own `autograd.Function`."""


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any], schema: str | None = None) -> Any:
    """Makes `torch.ops.mmrec.<name>`, and returns it.

    Args:
        implementation: Computes the outputs, none of which may be an input or share its memory.
        fake: The same for tensors without data: shapes, dtypes and strides of the outputs.
        schema: "(Tensor x, …) -> Tensor"; taken from the implementation's annotations if None.
    """
    schema = torch.library.infer_schema(implementation, mutates_args=()) if schema is None else schema
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmrec::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mmrec, name).default


def differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Gives an operation its gradient; `function.forward` calls it, within `below_autograd()`."""
    _LIBRARY.impl(name, function.apply, "Autograd")
