"""A row of a table (JSON Lines, Parquet, Hugging Face) is one document."""

from __future__ import annotations

from collections.abc import Mapping

from storage.corpus.decoding import refuse_text
from storage.corpus.document import CorpusItem, Document, QuarantinedItem
from storage.corpus.shard import ReadOptions, refuse_size


def read_row(
    row: Mapping[str, object],
    position: str,
    options: ReadOptions,
    *,
    size_bytes: int,
    modified_at: float | None,
) -> CorpusItem:
    """The document of a row, or why it is none.

    Args:
        row: column name to value; must hold all columns that are there, so that a message can list them.
        position: `<file>#<position>`; names the row in the quarantine table, and the document when
            `options.uri_column` is empty.
        size_bytes: size of the row, reported when its text has none.
        modified_at: unix seconds of the file that holds the row.
    """
    text = row.get(options.text_column)
    if text is None:
        return QuarantinedItem(position, "missing_column", _absence(row, options.text_column), size_bytes)
    if not isinstance(text, str):
        detail = f"column {options.text_column!r} holds a {type(text).__name__}"
        return QuarantinedItem(position, "not_text", detail, size_bytes)
    uri = position
    if options.uri_column:
        value = row.get(options.uri_column)
        if value is None or value == "":
            return QuarantinedItem(position, "missing_column", _absence(row, options.uri_column), size_bytes)
        if isinstance(value, bool) or not isinstance(value, str | int):
            detail = f"column {options.uri_column!r} holds a {type(value).__name__}, not a name or a number"
            return QuarantinedItem(position, "not_text", detail, size_bytes)
        uri = str(value)
    try:
        raw = text.encode()
        uri.encode()
    except UnicodeEncodeError as error:  # JSON escapes can spell half of a surrogate pair
        detail = f"lone surrogate at position {error.start}: {error.reason}"
        return QuarantinedItem(position, "undecodable", detail, size_bytes)
    if refused := refuse_size(position, len(raw), options):
        return refused
    if refusal := refuse_text(text):
        return QuarantinedItem(position, refusal.reason, refusal.detail, len(raw))
    return Document.from_raw(uri, text, raw, modified_at, options.tags)


def _absence(row: Mapping[str, object], column: str) -> str:
    if column in row:
        return f"column {column!r} is {'empty' if row[column] == '' else 'null'}"
    names = ", ".join(repr(name) for name in list(row)[:20])
    return f"no column {column!r}; the row has {names or 'none'}"
