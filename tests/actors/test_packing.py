"""Documents become windows, and stored ones do not come again."""

from __future__ import annotations

import numpy as np
import pytest

from actors.packing import Packer, Skipped, Window, batched_windows, document_meta, windows_of
from cluster.config import BaseLMConfig
from models.tokenizer import Tokenizer
from storage.contract import DocumentMark
from storage.corpus import Document, QuarantinedItem
from tests.actors.helpers import make_documents


@pytest.fixture
def tokenizer(tiny_lm_config: BaseLMConfig) -> Tokenizer:
    return Tokenizer.load(tiny_lm_config)


def test_windows_cover_a_document_in_order() -> None:
    meta = document_meta(make_documents([3])[0])
    tokens = np.arange(2500, dtype=np.uint32)
    windows = list(windows_of(meta, tokens))
    assert [window.first_block for window in windows] == [0, 32, 64]
    assert [window.last for window in windows] == [False, False, True]
    np.testing.assert_array_equal(np.concatenate([window.tokens for window in windows]), tokens)


@pytest.mark.parametrize(("stored", "first"), [(0, 0), (1, 0), (31, 0), (32, 32), (40, 32), (64, 64)])
def test_a_resumed_document_begins_at_its_window(stored: int, first: int) -> None:
    meta = document_meta(make_documents([3])[0])
    windows = list(windows_of(meta, np.arange(2500, dtype=np.uint32), stored))
    assert windows[0].first_block == first


def test_exact_windows_end_with_last() -> None:
    windows = list(windows_of(document_meta(make_documents([3])[0]), np.arange(2048, dtype=np.uint32)))
    assert [window.last for window in windows] == [False, True]


def test_packing_keeps_order_and_leaves_out_what_is_stored(tokenizer: Tokenizer) -> None:
    documents = make_documents([50, 60, 400])
    bad = QuarantinedItem("bad.bin", "binary", "NUL bytes", 3)
    marks = {
        documents[0].key: DocumentMark(5, 150, 0, "complete"),
        documents[2].key: DocumentMark(40, 1280, 0, "open"),
    }
    asked: list[list[str]] = []

    def ask(keys: object) -> dict[str, DocumentMark]:
        asked.append(list(keys))  # type: ignore[call-overload]
        return marks

    items = list(Packer(tokenizer, ask).pack([documents[0], bad, documents[1], documents[2]]))
    assert items[0] == Skipped(documents[0].key, 150)
    assert items[1] == bad
    windows = [item for item in items if isinstance(item, Window)]
    assert {window.document.uri for window in windows} == {"doc1.txt", "doc2.txt"}
    resumed = [window for window in windows if window.document.uri == "doc2.txt"]
    assert resumed[0].first_block == 32
    assert asked == [[document.key for document in documents]]


def test_the_same_document_twice_is_asked_about_twice(tokenizer: Tokenizer) -> None:
    document = make_documents([40])[0]
    asked: list[list[str]] = []

    def marks(keys: object) -> dict[str, DocumentMark]:
        asked.append(list(keys))  # type: ignore[call-overload]
        return {} if len(asked) == 1 else {document.key: DocumentMark(3, 90, 0, "complete")}

    items = list(Packer(tokenizer, marks).pack([document, document]))
    assert isinstance(items[-1], Skipped)
    assert len(asked) == 2


def test_a_document_without_tokens_is_quarantined(tokenizer: Tokenizer) -> None:
    empty = Document.from_raw("void.txt", "", b"")
    (item,) = Packer(tokenizer, lambda _: {}).pack([empty])
    assert isinstance(item, QuarantinedItem)
    assert item.reason == "empty"


def test_batches_hold_windows_and_pass_the_rest_on(tokenizer: Tokenizer) -> None:
    others: list[object] = []
    bad = QuarantinedItem("bad.bin", "binary", "NUL bytes", 3)
    packed = Packer(tokenizer, lambda _: {}).pack([bad, *make_documents([400, 10, 10])])
    batches = list(batched_windows(packed, 2, others.append))
    assert others == [bad]
    assert all(len(batch) == 2 for batch in batches[:-1])
    assert sum(len(batch) for batch in batches) >= 4


def test_lone_surrogates_are_quarantined(tokenizer: Tokenizer) -> None:
    broken = Document("odd.jsonl#0", "half a pair: \ud800", "00", 20)
    fine = make_documents([5])[0]
    items = list(Packer(tokenizer, lambda _: {}).pack([broken, fine]))
    assert isinstance(items[0], QuarantinedItem)
    assert items[0].reason == "undecodable"
    assert isinstance(items[1], Window)
