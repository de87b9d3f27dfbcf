"""Encoding a text of any length in bounded memory.

A tokenizer takes about 470 bytes for each token that it is working on. So a long text is encoded in pieces that
overlap. What a token is depends on the text close to it, so two pieces agree about their overlap but for its ends;
there the tokens of the second follow those of the first. Whether they agree is looked at, token by token, and a text in
which two pieces do not is encoded as a whole.
"""

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

PIECE = 2**20  # characters
OVERLAP = 2**16  # characters; of these the first and the last quarter are not compared


class _Tokens(NamedTuple):
    """Attributes, each [n] int64:
    ids: Their ids.
    begin, end: Where they are in the text.
    """

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def between(self, first: int, last: int) -> slice:
        """Those that begin in [first, last)."""
        return slice(*np.searchsorted(self.begin, [first, last]).tolist())


def encode(backend: Tokenizer, text: str, piece: int = PIECE, overlap: int = OVERLAP) -> list[np.ndarray]:
    """The ids of a text, in parts [n] int64 that follow each other."""
    parts = []
    tokens, done = _encode(backend, text, 0, piece + overlap), 0
    for start in range(piece, len(text) - overlap, piece):
        following = _encode(backend, text, start, start + piece + overlap)
        middle = start + overlap // 4, start + overlap - overlap // 4
        ours, theirs = tokens.between(*middle), following.between(*middle)
        if not _agree(tokens, ours, following, theirs):
            return [np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)]
        parts.append(tokens.ids[done : ours.start])
        tokens, done = following, theirs.start
    return [*parts, tokens.ids[done:]]


def _encode(backend: Tokenizer, text: str, first: int, last: int) -> _Tokens:
    encoding = backend.encode(text[first:last], add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + first
    return _Tokens(np.array(encoding.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1])


def _agree(tokens: _Tokens, ours: slice, following: _Tokens, theirs: slice) -> bool:
    """Whether two stretches are the same tokens at the same places, one at least, and in order."""
    pairs = ((a[ours], b[theirs]) for a, b in zip(tokens, following, strict=True))
    in_order = all((np.diff(t.begin) >= 0).all() for t in (tokens, following))
    return in_order and ours.start < ours.stop and all(np.array_equal(a, b) for a, b in pairs)
