"""Windows and spans survive their way through Arrow tables bit for bit, the other rows in their places."""

from __future__ import annotations

import numpy as np
import pytest

from actors.compactor import span_of
from actors.packing import PackedItem, Skipped, Window
from actors.rows import encoded_table, other_items, packed_table, spans_from, windows_from
from storage.contract import DocumentMeta
from storage.corpus import QuarantinedItem
from storage.schema import GISTS, KEYS, ArraySpec

DOCUMENT = DocumentMeta("key", "file:///ä.txt", "ab" * 32, 70, 12.5, ("code", "python"))
WINDOW = Window(DOCUMENT, 32, np.arange(70, dtype=np.uint32), last=True)
SHORTER = Window(DOCUMENT, 0, np.arange(5, 69, dtype=np.uint32), last=False)
SKIPPED = Skipped("other", 7)
QUARANTINED = QuarantinedItem("file:///bad", "empty", "no text", 0)


def specs(dtype: str) -> tuple[ArraySpec, ...]:
    return (ArraySpec(GISTS, 8, 2, dtype), ArraySpec(KEYS, 64, 1, dtype))  # type: ignore[arg-type]


def test_windows_come_back_as_they_were() -> None:
    table = packed_table([SKIPPED, WINDOW, QUARANTINED, SHORTER])
    assert [w.document for w in windows_from(table)] == [DOCUMENT, DOCUMENT]
    for found, expected in zip(windows_from(table), [WINDOW, SHORTER], strict=True):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert (found.first_block, found.last) == (expected.first_block, expected.last)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_spans_come_back_as_they_were(dtype: str) -> None:
    items: list[PackedItem] = [WINDOW, SKIPPED, SHORTER, QUARANTINED]
    rng = np.random.default_rng(0)
    spans = []
    for window, counts in ((WINDOW, [32, 32, 6]), (SHORTER, [32, 32])):
        arrays = {
            GISTS: rng.normal(size=(len(counts) * 2, 8)).astype(np.float32),
            KEYS: rng.normal(size=(len(counts), 64)).astype(np.float32),
        }
        spans.append(span_of(window, np.array(counts, np.uint8), arrays, specs(dtype)))
    table = encoded_table(packed_table(items), spans, specs(dtype))
    assert list(other_items(table)) == [SKIPPED, QUARANTINED]
    found = list(spans_from(table, specs(dtype)))
    assert len(found) == 2
    for mine, theirs in zip(found, spans, strict=True):
        mine.check()
        assert (mine.document, mine.first_block, mine.last) == (theirs.document, theirs.first_block, theirs.last)
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_array_equal(mine.num_tokens, theirs.num_tokens)
        assert mine.arrays.keys() == theirs.arrays.keys()
        for name, values in mine.arrays.items():
            assert np.asarray(values).dtype == np.asarray(theirs.arrays[name]).dtype
            np.testing.assert_array_equal(np.asarray(values), np.asarray(theirs.arrays[name]))


def test_tables_without_windows_hold_the_other_items() -> None:
    table = encoded_table(packed_table([SKIPPED]), [], specs("float16"))
    assert list(other_items(table)) == [SKIPPED]
    assert list(spans_from(table, specs("float16"))) == []
    assert packed_table([]).num_rows == 0
