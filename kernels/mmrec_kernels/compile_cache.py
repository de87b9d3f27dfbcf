"""Keeps the keys under which Triton caches this package's compiled kernels the same from program to program.

The key of a kernel covers the constants of the functions it calls, but only of those that have a key already
(Triton 3.6 and 3.7: `DependenciesFinder._update_hash` collects a function's constants before it asks for its key). So
it would depend on what a program runs first, and one program would compile again what another one has left on disk.
"""

import sys

from triton.runtime.jit import JITCallable


def settle_keys(package: str) -> None:
    """Asks for the key of every Triton function in a package's modules, always in the same order."""
    for name in sorted(name for name in sys.modules if name.startswith(package + ".")):
        for value in vars(sys.modules[name]).values():
            if isinstance(value, JITCallable):
                _ = value.cache_key
