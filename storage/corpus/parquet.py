"""Parquet, read a few rows at a time; shards are runs of row groups.

Footers are read when the corpus is opened: they give the columns, the size of the text, and the number of a
group's first row, so that a row is named `<file>#<row>` with its place in the whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import CorpusError
from storage.corpus.document import CorpusItem, QuarantinedItem
from storage.corpus.rows import read_row
from storage.corpus.shard import ReadOptions, refuse_size
from storage.corpus.walk import FileRef, os_reason

_BATCH_BYTES = 2**20
_MAX_BATCH_ROWS = 1024
# Without a buffer (and with pre-buffering) Arrow fetches a row group's whole column before the first row.
_READ_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ParquetPart:
    """The rows of the row groups [start_group, stop_group)."""

    file: FileRef
    start_group: int
    stop_group: int
    first_row: int
    """Row number, in the file, of the first row."""
    num_bytes: int
    """Uncompressed size of the text column in these groups."""

    @property
    def estimated_bytes(self) -> int:
        return self.num_bytes

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        """Yield the rows. A damaged row group is set aside from where it breaks; the next one is read."""
        first_row, group = self.first_row, self.start_group
        try:
            with _open(self.file) as table:
                for group in range(self.start_group, self.stop_group):
                    yield from _read_group(table, self.file, group, first_row, options)
                    first_row += table.metadata.row_group(group).num_rows
        except (pa.ArrowException, OSError, IndexError) as error:  # IndexError: fewer groups than were listed
            yield _refuse(error, f"{self.file.uri}#group{group}", 0)


def plan_parquet(file: FileRef, options: ReadOptions, part_bytes: int) -> list[ParquetPart] | QuarantinedItem:
    """Cut a file into runs of row groups of about `part_bytes` of text, by its footer alone.

    Raises:
        CorpusError: the file lacks a column the configuration names, or it holds no text.
    """
    if file.size_bytes == 0:
        return QuarantinedItem(file.uri, "empty", "no bytes", 0)
    try:
        with _open(file) as table:
            schema, footer = table.schema_arrow, table.metadata
            _check_columns(schema, file, options)
            leaves = [footer.schema.column(leaf).path for leaf in range(footer.num_columns)]
            leaf = leaves.index(options.text_column)
            groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
            sizes = [(group.num_rows, group.column(leaf).total_uncompressed_size) for group in groups]
    except (pa.ArrowException, OSError) as error:
        return _refuse(error, file.uri, file.size_bytes)
    if not any(group_rows for group_rows, _ in sizes):
        return QuarantinedItem(file.uri, "empty", "no rows", file.size_bytes)
    parts: list[ParquetPart] = []
    start = first_row = num_rows = num_bytes = 0
    for group, (group_rows, group_bytes) in enumerate(sizes):
        num_rows, num_bytes = num_rows + group_rows, num_bytes + group_bytes
        if num_bytes >= part_bytes or group == len(sizes) - 1:
            parts.append(ParquetPart(file, start, group + 1, first_row, num_bytes))
            start, first_row, num_rows, num_bytes = group + 1, first_row + num_rows, 0, 0
    return parts


@contextmanager
def _open(file: FileRef) -> Iterator[pq.ParquetFile]:
    with (
        pa.OSFile(file.path) as source,
        pq.ParquetFile(
            source, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, page_checksum_verification=True
        ) as table,
    ):
        yield table


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _check_columns(schema: pa.Schema, file: FileRef, options: ReadOptions) -> None:
    for key, column in (("text_column", options.text_column), ("uri_column", options.uri_column)):
        if key == "uri_column" and not column:
            continue
        there = ", ".join(f"{field.name!r} ({field.type})" for field in schema) or "none"
        index = schema.get_field_index(column)
        if index < 0:
            raise CorpusError(
                f"corpus.{key}={column!r} is not a column of {file.path}. Its columns are: {there}. "
                f"Set --corpus.{key} to one of them"
            )
        kind = schema.field(index).type
        if not (_is_string(kind) or (key == "uri_column" and pa.types.is_integer(kind))):
            raise CorpusError(
                f"corpus.{key}={column!r} of {file.path} holds {kind}, not strings. Its columns are: "
                f"{there}. Set --corpus.{key} to a string column"
            )


def _read_group(
    table: pq.ParquetFile, file: FileRef, group: int, first_row: int, options: ReadOptions
) -> Iterator[CorpusItem]:
    columns = [options.text_column] + ([options.uri_column] if options.uri_column else [])
    stats = table.metadata.row_group(group)
    mean_bytes = max(1, stats.total_byte_size // max(1, stats.num_rows))
    batch_rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // mean_bytes))
    row = first_row
    try:
        for batch in table.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns, use_threads=False):
            values = [_plain(batch.column(name)) for name in columns]
            for index in range(batch.num_rows):
                yield _read_scalars([column[index] for column in values], file, row, options)
                row += 1
    except (pa.ArrowException, OSError) as error:
        yield _refuse(error, f"{file.uri}#{row}", 0)


def _plain(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _read_scalars(scalars: list[pa.Scalar], file: FileRef, row: int, options: ReadOptions) -> CorpusItem:
    position = f"{file.uri}#{row}"
    text = scalars[0]
    size = 0
    if text.is_valid:
        size = text.as_buffer().size
        if refused := refuse_size(position, size, options):  # before a Python string is made of it
            return refused
    try:
        values = {options.text_column: text.as_py()}
        if options.uri_column:
            values[options.uri_column] = scalars[1].as_py()
    except UnicodeDecodeError as error:  # Parquet does not check its strings
        detail = f"not UTF-8 at byte {error.start}: {error.reason}"
        return QuarantinedItem(position, "undecodable", detail, size)
    return read_row(values, position, options, size_bytes=size, modified_at=file.modified_ns / 1e9)


def _refuse(error: Exception, uri: str, size_bytes: int) -> QuarantinedItem:
    """The system's errors carry an error number; Arrow reports damage as ArrowInvalid or a bare OSError."""
    if isinstance(error, OSError) and error.errno is not None:
        return QuarantinedItem(uri, "unreadable", os_reason(error), size_bytes)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return QuarantinedItem(uri, "malformed", first_line[:300], size_bytes)
