"""From raw records to documents: what a worker process does before it tokenizes.

A reader (`sources`) passes records on as they lie: a block of JSON lines, rows of a table, the bytes of text files.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from mmrec_train.errors import UserError

MOST_DOCUMENTS = 1000  # of a batch: short ones, too, take some kilobytes each while they are treated

_LOOKED_AT = 8192  # bytes: further on a zero byte is damage to a text
_SURROGATE = re.compile("[\ud800-\udfff]")
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_ONE_A_LINE = "one object a line is expected. Mend or remove it; in a folder, --pattern chooses the files to read."


@dataclass(frozen=True)
class Document:
    text: str  # valid Unicode: can be encoded as UTF-8
    replaced: int  # how many U+FFFD stand for text that was not valid
    language: str | None = None  # the field of the language filter, if there is one


@dataclass(frozen=True)
class Template:
    """Literal text and fields in turn, such as "{title}\\n\\n{body}": `literals` has one more than `fields`."""

    literals: tuple[str, ...]
    fields: tuple[str, ...]
    takes_numbers: bool  # else every field must be text

    @classmethod
    def parse(cls, template: str) -> "Template":
        """Raises ValueError for a template that is not literal text with plain {field} or {field.inner} in it."""
        literals, fields = [""], []
        for literal, field, specification, conversion in Formatter().parse(template):
            literals[-1] += literal
            if field is None:
                continue
            if not field or specification or conversion or "[" in field:
                raise ValueError(f"a field of the template must be a plain name in braces, not {{{field}}}")
            fields.append(field)
            literals.append("")
        if not fields:
            raise ValueError("the template names no field; write one in braces, such as '{title}\\n\\n{body}'")
        return cls(tuple(literals), tuple(fields), takes_numbers=True)

    @classmethod
    def of_field(cls, field: str) -> "Template":
        """The text of one field."""
        return cls(("", ""), (field,), takes_numbers=False)


@dataclass(frozen=True)
class Extraction:
    """How a record becomes a document."""

    template: Template
    language_field: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """What is read of a record; a dot leads into an inner record, unless a field's own name has it."""
        return (*self.template.fields, *([self.language_field] if self.language_field else []))

    def document(self, values: Sequence[Any], where: str) -> Document:
        """The document of one record; `values` are those of `fields`."""
        literals, fields = self.template.literals, self.template.fields
        replaced = 0
        parts = [literals[0]]
        for value, field, literal in zip(values, fields, literals[1:], strict=False):
            text, repaired = self._text(value, field, where)
            parts += (text, literal)
            replaced += repaired
        language = None
        if self.language_field is not None:
            language = _decode_value(values[-1])[0]
            if language is not None and not isinstance(language, str):
                raise UserError(f"{where}: the language field {self.language_field} is not text but {_kind(language)}.")
        return Document("".join(parts), replaced, language)

    def _text(self, value: Any, field: str, where: str) -> tuple[str, int]:
        value, replaced = _decode_value(value)
        if value is None:
            return "", replaced
        if isinstance(value, str):
            return value, replaced
        if self.template.takes_numbers and isinstance(value, int | float):
            return json.dumps(value), replaced
        raise UserError(f"{where}: field {field} is not text but {_kind(value)}.")


class JsonLines(NamedTuple):
    """Whole lines of a JSON lines file."""

    path: str
    first_line: int  # the number of the first one, from 1
    data: bytes

    def documents(self, extraction: Extraction) -> Iterator[Document]:
        for number, line in enumerate(self.data.split(b"\n"), start=self.first_line):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            decoded = decode_utf8(line)
            try:
                record = json.loads(decoded.text)
            except (ValueError, RecursionError) as error:
                reason = why_not_utf8(line) or (error.msg if isinstance(error, json.JSONDecodeError) else error)
                raise UserError(f"{where}: not JSON ({reason}); {_ONE_A_LINE}") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a JSON object; {_ONE_A_LINE}")
            document = extraction.document([_look_up(record, field, where) for field in extraction.fields], where)
            yield Document(document.text, document.replaced + decoded.replaced, document.language)


class Rows(NamedTuple):
    """Rows of a table, as an Arrow stream."""

    where: str
    data: bytes

    @classmethod
    def of(cls, where: str, rows: pa.RecordBatch | pa.Table) -> "Rows":
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write(rows)
        return cls(where, sink.getvalue().to_pybytes())

    def documents(self, extraction: Extraction) -> Iterator[Document]:
        with pa.ipc.open_stream(self.data) as reader:
            table = reader.read_all()
        columns = []
        for field in extraction.fields:
            column = _column(table, field, self.where)
            is_text = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
            if not (is_text or pa.types.is_null(column.type) or extraction.template.takes_numbers):
                raise UserError(f"{self.where}: column {field} holds {column.type}, not text.")
            try:
                columns.append(column.to_pylist())
            except (ValueError, OverflowError) as error:  # a date that Python has none for
                raise UserError(f"{self.where}: column {field} ({column.type}): {error}. Leave it out.") from error
        for values in zip(*columns, strict=True):
            yield extraction.document(values, self.where)


class TextFiles(NamedTuple):
    """Whole text files, each a document."""

    contents: list[bytes]

    def documents(self, extraction: Extraction) -> Iterator[Document]:
        return map(decode_utf8, self.contents)


Batch: TypeAlias = JsonLines | Rows | TextFiles


def decode_utf8(data: bytes) -> Document:
    """Decode, with U+FFFD for what is not UTF-8, and drop a byte order mark."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return Document(data.decode("utf-8"), 0)
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return Document(text, text.count("\ufffd") - data.count("\ufffd".encode()))


def why_not_utf8(data: bytes) -> str | None:
    """What tells that `data` is no text in UTF-8, and the remedy; None where nothing does."""
    if data.startswith(_OTHER_MARKS):
        return "it is text in UTF-16 or UTF-32: convert it to UTF-8"
    if b"\0" in data[:_LOOKED_AT]:
        return "it is not text: there are zero bytes in it; convert it to UTF-8 if it is in UTF-16 or UTF-32"
    return None


def top_level(field: str, names: Sequence[str]) -> str:
    """The column that holds `field`: itself, or the one before the first dot."""
    return field if field in names else field.partition(".")[0]


def no_field(where: str, field: str, fields: Sequence[str]) -> UserError:
    found = ", ".join(fields) or "none"
    return UserError(
        f"{where}: no field {field}; there are {found}. Choose one with --text-field "
        "(text_field, template or filters.language.field in a recipe)."
    )


def _decode_value(value: Any) -> tuple[Any, int]:
    """A field's value, text made valid, and the number of U+FFFD put in."""
    if isinstance(value, bytes):
        document = decode_utf8(value)
        return document.text, document.replaced
    if isinstance(value, str):
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        return _SURROGATE.subn("\ufffd", value)
    return value, 0


def _kind(value: Any) -> str:
    return type(value).__name__


def _look_up(record: dict[str, Any], field: str, where: str) -> Any:
    """The value of a record's field, of an inner record's after a dot; None below a null."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise no_field(where, field, list(record))
        value = value[name]
    return value


def _column(table: pa.Table, field: str, where: str) -> pa.ChunkedArray:
    """A table's column, of an inner record's after a dot; text as bytes.

    Arrow does not check that strings are UTF-8, and one that is not would stop the whole table.
    """
    name = top_level(field, table.column_names)
    if name not in table.column_names:
        raise no_field(where, field, table.column_names)
    column = table.column(name)
    for inner in field[len(name) + 1 :].split(".") if field != name else ():
        if not pa.types.is_struct(column.type) or column.type.get_field_index(inner) < 0:
            raise no_field(where, field, table.column_names)
        column = pc.struct_field(column, inner)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column
