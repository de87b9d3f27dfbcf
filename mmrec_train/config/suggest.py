"""The nearest valid name to a misspelt one."""

import difflib
from collections.abc import Iterable


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid name most like `word`, or None where none is like it."""
    return next(iter(difflib.get_close_matches(word, list(valid), n=1)), None)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """A clause to end a message with: the nearest valid name, or all of them where none is near."""
    names = sorted(valid)
    match = nearest(word, names)
    return f"did you mean '{match}'?" if match else f"valid: {', '.join(names)}"
