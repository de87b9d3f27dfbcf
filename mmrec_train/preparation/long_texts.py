"""Encoding a text of any length in bounded memory.

A tokenizer takes about 470 bytes for each token that it is working on. So a long text is encoded in pieces that
overlap. What a token is depends on the text close to it, so two pieces agree about their overlap but for its ends;
there the tokens of the second follow those of the first. Whether they agree is looked at, token by token, and a text in
which two pieces do not is encoded as a whole.

The second takes over where a word begins, so that every word is of one piece. Where there is no word, as with
tokenizers that divide nothing before they merge, any place will do for BPE, whose merges are decided close by, but not
for a unigram model: it takes the division of a word with the largest sum over all of it, and of equal ones rounding
chooses.
"""

from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models

PIECE = 2**20  # characters
OVERLAP = 2**16  # characters; of these the first and the last quarter are not compared


class _Tokens(NamedTuple):
    """Attributes, each [n]:
    ids: Their ids, int64.
    begin, end: Where they are in the text, int64.
    begins_word: Whether another word begins than that of the token before, bool.
    """

    ids: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    begins_word: np.ndarray

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
        seam = _seam(tokens, ours, following, theirs, needs_word=not isinstance(backend.model, models.BPE))
        if seam is None:
            return [np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)]
        parts.append(tokens.ids[done : ours.start + seam])
        tokens, done = following, theirs.start + seam
    return [*parts, tokens.ids[done:]]


def _encode(backend: Tokenizer, text: str, first: int, last: int) -> _Tokens:
    encoding = backend.encode(text[first:last], add_special_tokens=False)
    ids = np.array(encoding.ids, dtype=np.int64)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + first
    words = np.array(encoding.word_ids, dtype=np.int64)
    return _Tokens(ids, offsets[:, 0], offsets[:, 1], np.diff(words, prepend=-1) != 0)


def _seam(tokens: _Tokens, ours: slice, following: _Tokens, theirs: slice, needs_word: bool) -> int | None:
    """After how many tokens of a stretch of both the second may take over; None where it may not.

    It may where the two stretches are the same tokens at the same places, one at least, and in order.
    """
    in_order = all((np.diff(t.begin) >= 0).all() for t in (tokens, following))
    same = all(np.array_equal(a[ours], b[theirs]) for a, b in zip(tokens, following, strict=True))
    words = np.flatnonzero(tokens.begins_word[ours])
    if not in_order or not same or ours.start == ours.stop or (needs_word and words.size == 0):
        return None
    return int(words[0]) if words.size else 0
