"""Windows and spans as Arrow rows: the form in which they travel through Ray Data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

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


def packed_row(item: PackedItem) -> dict[str, Any]:
    """A packed item as a row of `PACKED_SCHEMA`."""
    if isinstance(item, Window):
        return {
            "kind": DATA,
            "document": json.dumps(asdict(item.document)),
            "first_block": item.first_block,
            "last": item.last,
            "tokens": item.tokens.tobytes(),
        }
    kind = SKIPPED if isinstance(item, Skipped) else QUARANTINED
    return {"kind": kind, "document": json.dumps(asdict(item)), "first_block": 0, "last": True, "tokens": b""}


def window_from(row: dict[str, Any]) -> Window:
    """The window of a data row."""
    tokens = np.frombuffer(row["tokens"], np.uint32)
    return Window(_document(row["document"]), row["first_block"], tokens, row["last"])


def span_row(span: SpanWrite) -> dict[str, Any]:
    """A span whose arrays are stored bytes, as a row of `encoded_schema`."""
    return {
        "kind": DATA,
        "document": json.dumps(asdict(span.document)),
        "first_block": span.first_block,
        "last": span.last,
        "tokens": span.tokens.tobytes(),
        "num_tokens": span.num_tokens.tobytes(),
        **{name: np.asarray(values).tobytes() for name, values in span.arrays.items()},
    }


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
