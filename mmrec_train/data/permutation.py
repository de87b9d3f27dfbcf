"""A shuffle that is computed, not stored: any part of any order at any time, in constant memory."""

import numpy as np
import xxhash

_ROUNDS = 8  # four make a good permutation of a large domain; the half-words of a small one need more mixing
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A permutation of 0 .. size - 1, a pure function of (size, key), the same on every machine.

    A balanced Feistel network permutes [0, 4^k), the smallest such range that holds `size`. Values that land
    beyond `size` are sent through again until they do not (cycle walking), which keeps it a bijection and takes
    fewer than four passes on average.
    """

    def __init__(self, size: int, key: str) -> None:
        assert size >= 1
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._keys = [np.uint64(xxhash.xxh3_64_intdigest(f"{key}/{number}".encode())) for number in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where each position goes: [n] integers in [0, size) -> [n] int64 in [0, size)."""
        values = self._network(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        left, right = values >> self._half_bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit reaches every output bit."""
    values = values + _MIX
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
