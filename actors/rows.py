"""Windows and spans as Arrow rows: the form in which they travel through Ray Data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from actors.packing import PackedItem, Skipped, Window
from cluster.config import TOKENS_PER_BLOCK as K
from storage.contract import DocumentMeta, SpanWrite
from storage.corpus import QuarantinedItem
from storage.schema import ArraySpec

DATA, SKIPPED, QUARANTINED = "data", "skipped", "quarantined"

_META = [("kind", pa.string()), ("document", pa.string()), ("first_block", pa.int64()), ("last", pa.bool_())]
PACKED_SCHEMA = pa.schema([*_META, ("tokens", pa.large_binary())])


def encoded_schema(specs: Sequence[ArraySpec]) -> pa.Schema:
    """Rows of spans: the window's tokens replaced by slots, counts, and one column a stored array."""
    arrays = [(stored.name, pa.large_binary()) for spec in specs for stored in spec.stored()]
    return pa.schema([*_META, ("tokens", pa.large_binary()), ("num_tokens", pa.large_binary()), *arrays])


def packed_table(items: Sequence[PackedItem]) -> pa.Table:
    """Packed items as rows of `PACKED_SCHEMA`."""
    columns = (
        pa.array([_kind(item) for item in items], pa.string()),
        pa.array([json.dumps(asdict(item.document if isinstance(item, Window) else item)) for item in items]),
        pa.array([item.first_block if isinstance(item, Window) else 0 for item in items], pa.int64()),
        pa.array([item.last if isinstance(item, Window) else True for item in items], pa.bool_()),
        _binary([item.tokens if isinstance(item, Window) else _NOTHING for item in items]),
    )
    return pa.Table.from_arrays(columns, schema=PACKED_SCHEMA)


def windows_from(table: pa.Table) -> list[Window]:
    """The windows of a packed table's data rows; their tokens are views of the table's memory."""
    columns = [table[name].to_pylist() for name, _ in _META]
    return [
        Window(_document(document), first_block, np.frombuffer(table["tokens"][row].as_buffer(), np.uint32), last)
        for row, (kind, document, first_block, last) in enumerate(zip(*columns, strict=True))
        if kind == DATA
    ]


def encoded_table(packed: pa.Table, spans: Sequence[SpanWrite], specs: Sequence[ArraySpec]) -> pa.Table:
    """A packed table with its windows replaced by their spans, whose arrays are stored bytes; other rows stay."""
    schema = encoded_schema(specs)
    remaining = iter(spans)
    rows = [next(remaining) if kind == DATA else None for kind in packed["kind"].to_pylist()]

    def values(span: SpanWrite | None, name: str) -> np.ndarray:
        if span is None:
            return _NOTHING
        return getattr(span, name) if name in {"tokens", "num_tokens"} else np.asarray(span.arrays[name])

    binary = schema.names[len(_META) :]
    columns = [_binary([values(span, name) for span in rows]) for name in binary]
    return pa.Table.from_arrays([*(packed[name] for name, _ in _META), *columns], schema=schema)


_NOTHING = np.empty(0, np.uint8)


def _kind(item: PackedItem) -> str:
    if isinstance(item, Window):
        return DATA
    return SKIPPED if isinstance(item, Skipped) else QUARANTINED


def _binary(pieces: Sequence[np.ndarray]) -> pa.Array:
    """A column of the pieces' bytes. Copies once; a list of `bytes` objects would be copied twice."""
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([piece.nbytes for piece in pieces], out=offsets[1:])
    content = np.empty(offsets[-1], np.uint8)
    for piece, start, stop in zip(pieces, offsets, offsets[1:], strict=False):
        content[start:stop] = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    return pa.Array.from_buffers(pa.large_binary(), len(pieces), [None, pa.py_buffer(offsets), pa.py_buffer(content)])


def spans_from(table: pa.Table, specs: Sequence[ArraySpec]) -> Iterator[SpanWrite]:
    """The spans of a table's data rows, in order; their arrays are views of the table's memory."""
    stored_arrays = [stored for spec in specs for stored in spec.stored()]
    for index in range(table.num_rows):
        if table["kind"][index].as_py() != DATA:
            continue

        def column(name: str, dtype: str, row: int = index) -> np.ndarray:
            return np.frombuffer(table[name][row].as_buffer(), dtype)

        arrays = {s.name: column(s.name, s.dtype).reshape(-1, s.width) for s in stored_arrays}
        yield SpanWrite(
            _document(table["document"][index].as_py()),
            table["first_block"][index].as_py(),
            column("tokens", "<u4").reshape(-1, K),
            column("num_tokens", "|u1"),
            arrays,
            table["last"][index].as_py(),
        )


def other_items(table: pa.Table) -> Iterator[Skipped | QuarantinedItem]:
    """What a table holds beside data rows."""
    for index in range(table.num_rows):
        kind = table["kind"][index].as_py()
        if kind != DATA:
            fields = json.loads(table["document"][index].as_py())
            yield Skipped(**fields) if kind == SKIPPED else QuarantinedItem(**fields)


def _document(text: str) -> DocumentMeta:
    fields = json.loads(text)
    return DocumentMeta(**{**fields, "tags": tuple(fields["tags"])})
