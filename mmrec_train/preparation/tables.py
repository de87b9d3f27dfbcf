"""Reading local tables, parquet and Arrow, in slices of about equal size."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmrec_train.errors import UserError
from mmrec_train.preparation.records import MOST_DOCUMENTS, Rows, no_field, top_level

PARQUET_SUFFIX, ARROW_SUFFIX = ".parquet", ".arrow"

_ARROW_MAGIC = b"ARROW1"  # a file; without it, a stream


def read_parquet(
    path: Path, fields: Sequence[str], first_row: int, batch_bytes: int
) -> Iterator[tuple[Rows, int, float]]:
    """Slices of the columns that hold `fields`, from `first_row` on.

    With each come the number of rows up to its end, and what part of all rows that is.
    """
    with pa.OSFile(os.fsencode(path)) as raw, pq.ParquetFile(raw, buffer_size=1 << 20) as file:
        columns = needed_columns(str(path), fields, file.schema_arrow.names)
        row = 0
        for group in range(file.metadata.num_row_groups):
            metadata = file.metadata.row_group(group)
            if row + metadata.num_rows <= first_row:
                row += metadata.num_rows
                continue
            count = rows_of(batch_bytes, metadata.num_rows, metadata.total_byte_size)
            for batch in file.iter_batches(count, row_groups=[group], columns=columns):
                begin = min(len(batch), max(0, first_row - row))
                for part in slices(batch.slice(begin), batch_bytes):
                    end = row + begin + len(part)
                    yield Rows.of(str(path), part), end, end / file.metadata.num_rows
                    begin += len(part)
                row += len(batch)


def read_arrow(
    path: Path, fields: Sequence[str], first_row: int, batch_bytes: int
) -> Iterator[tuple[Rows, int, float]]:
    """Like `read_parquet`, of an Arrow file or an Arrow stream."""
    with pa.memory_map(os.fsencode(path)) as file:
        is_file = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        file.seek(0)
        row = 0
        for batch, part_read in _file_batches(file) if is_file else _stream_batches(file):
            chosen = batch.select(needed_columns(str(path), fields, batch.schema.names))
            begin = min(len(batch), max(0, first_row - row))
            for part in slices(chosen.slice(begin), batch_bytes):
                begin += len(part)
                yield Rows.of(str(path), part), row + begin, part_read
            row += len(batch)


def needed_columns(where: str, fields: Sequence[str], names: list[str]) -> list[str]:
    """The columns that hold `fields`, each once; UserError for one that is not there."""
    columns = {top_level(field, names): field for field in fields}
    for column, field in columns.items():
        if column not in names:
            raise no_field(where, field, names)
        if names.count(column) > 1:
            raise UserError(f"{where}: {names.count(column)} columns are named {column}. Rename all but one.")
    return list(columns)


def rows_of(size: int, rows: int, total_bytes: int) -> int:
    """How many of `rows` rows, `total_bytes` together, are about `size` bytes."""
    return max(1, min(MOST_DOCUMENTS, size * rows // max(1, total_bytes)))


def slices(rows: pa.RecordBatch | pa.Table, size: int) -> Iterator[pa.RecordBatch | pa.Table]:
    """Consecutive parts of about `size` bytes, at least a row each. A part that is far larger is cut again.

    A dictionary's entries and views become values: else every part would have the whole dictionary, or all text.
    """
    count = rows_of(size, len(rows), rows.nbytes)
    for begin in range(0, len(rows), count):
        part = _with_own_values(rows.slice(begin, count))
        if len(part) > 1 and part.nbytes > 2 * size:
            yield from slices(part, size)
        else:
            yield part


def _with_own_values(rows: pa.RecordBatch | pa.Table) -> pa.RecordBatch | pa.Table:
    for number, field in enumerate(rows.schema):
        own = _own(field)
        if own != field:
            rows = rows.set_column(number, own, rows.column(number).cast(own.type))
    return rows


def _own(field: pa.Field) -> pa.Field:
    """The field of the same values, with no dictionary and no view of text at any depth."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    elif pa.types.is_string_view(kind):
        kind = pa.large_string()
    elif pa.types.is_binary_view(kind):
        kind = pa.large_binary()
    elif pa.types.is_struct(kind):
        kind = pa.struct([_own(inner) for inner in kind])
    elif pa.types.is_list(kind):
        kind = pa.list_(_own(kind.value_field))
    elif pa.types.is_large_list(kind):
        kind = pa.large_list(_own(kind.value_field))
    elif pa.types.is_fixed_size_list(kind):
        kind = pa.list_(_own(kind.value_field), kind.list_size)
    return field.with_type(kind)


def _file_batches(file: pa.NativeFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    """The batches of an Arrow file, and with each what part of the file has been read."""
    reader = pa.ipc.open_file(file)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number), (number + 1) / reader.num_record_batches


def _stream_batches(file: pa.NativeFile) -> Iterator[tuple[pa.RecordBatch, float]]:
    for batch in pa.ipc.open_stream(file):
        yield batch, file.tell() / file.size()
