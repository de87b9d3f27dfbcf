"""Which documents are left out, and which are held out for validation."""

from dataclasses import dataclass

from mmrec_train.preparation.records import Document

EMPTY, TOO_SHORT, TOO_LONG, LANGUAGE, DUPLICATE = "empty", "too_short", "too_long", "language", "duplicate"
# What becomes of a document, as the number in `workers.DOCUMENT`: a split, or a reason to leave it out.
OUTCOMES = ("train", "validation", EMPTY, TOO_SHORT, TOO_LONG, LANGUAGE, DUPLICATE)


@dataclass(frozen=True)
class Filters:
    """Lengths are in characters, both ends included; `languages` None keeps all."""

    min_characters: int = 0
    max_characters: int | None = None
    languages: frozenset[str] | None = None

    def reason(self, document: Document) -> str | None:
        """Why a document is left out; None keeps it."""
        length = len(document.text)
        if not length:
            return EMPTY
        if self.languages is not None and document.language not in self.languages:
            return LANGUAGE
        if length < self.min_characters:
            return TOO_SHORT
        if self.max_characters is not None and length > self.max_characters:
            return TOO_LONG
        return None


def is_held_out(text_hash: int, validation_fraction: float) -> bool:
    """Whether a text belongs to validation, by its xxh3_64 alone: in every data set the same."""
    return text_hash / 2**64 < validation_fraction
