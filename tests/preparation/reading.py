"""Reads sources piece by piece, or whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec_train.preparation.records import Document, Extraction, JsonLines, Rows, Template
from mmrec_train.preparation.sources import Piece, Position, open_source


def pieces(
    source: Path | str,
    extraction: Extraction,
    position: Position | None = None,
    batch_bytes: int = 1 << 20,
    **choice: str,
) -> list[Piece]:
    opened = open_source(str(source), fields=extraction.fields, **choice)
    opened.take_stock(None)
    return list(opened.read(position, batch_bytes))


def batch_size(piece: Piece) -> int:
    """Bytes of a batch of lines or rows."""
    assert isinstance(piece.batch, JsonLines | Rows)
    return len(piece.batch.data)


def documents(found: Sequence[Piece], extraction: Extraction) -> list[Document]:
    return [document for piece in found for document in piece.batch.documents(extraction)]


def read(source: Path | str, text_field: str = "text", **choice: Any) -> list[Document]:
    extraction = Extraction(Template.of_field(text_field))
    return documents(pieces(source, extraction, **choice), extraction)


def texts(source: Path | str, **choice: Any) -> list[str]:
    return [document.text for document in read(source, **choice)]
