"""Parts of Triton's interpreter that take most of these tests' time, doing the same in less."""

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime import interpreter

_prepared: set[Callable[..., Any]] = set()
_numpy_dtypes: dict[str, np.dtype[Any]] = {}
_numpy_dtype = interpreter._get_np_dtype


def install(monkeypatch):
    """For the time of a test."""
    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", scan_by_doubling)


def call(self, *args, **kwargs):
    """A function that a kernel calls. The interpreter puts its own functions in the place of Triton's here, each time.

    Where they are put when a kernel is launched they are there already. They stay in triton.language.core, which only
    Triton's own library uses, from the first time on.
    """
    if self.fn not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def numpy_dtype(dtype):
    """Looked up once for each dtype of elements: the interpreter makes its table at every call."""
    name = dtype.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _numpy_dtype(dtype)
    return _numpy_dtypes[name]


def scan_by_doubling(self, inputs):
    """The associative scan, which goes element by element, over the whole tensor in ⌈log₂ n⌉ steps."""
    totals, distance = [self.to_tensor(x.handle.data, x.dtype) for x in inputs], 1
    length = inputs[0].handle.data.shape[self.axis]
    while distance < length:
        earlier = [self.to_tensor(np.roll(t.handle.data, distance, self.axis), t.dtype) for t in totals]
        combined = self.combine_fn.fn(*earlier, *totals)
        for total, new in zip(totals, combined, strict=True):
            first, _ = np.split(total.handle.data, [distance], self.axis)
            _, rest = np.split(new.handle.data, [distance], self.axis)
            total.handle.data = np.concatenate([first, rest], self.axis)
        distance *= 2
    return totals
