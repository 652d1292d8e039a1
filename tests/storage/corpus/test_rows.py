import pytest

from storage.corpus.document import Document, QuarantinedItem
from storage.corpus.rows import read_row
from storage.corpus.shard import ReadOptions


def read(row: dict[str, object], **options):
    return read_row(row, "f.jsonl#7", ReadOptions(**options), size_bytes=55, modified_at=3.0)


def test_a_row_is_named_by_its_place_or_by_its_uri_column() -> None:
    assert read({"text": "hé"}) == Document.from_raw("f.jsonl#7", "hé", "hé".encode(), 3.0)
    assert read({"body": "x", "id": "doc/1"}, text_column="body", uri_column="id").uri == "doc/1"
    assert read({"text": "x", "id": 0}, uri_column="id").uri == "0"


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({}, "missing_column", "the row has none"),
        ({"content": "x", "n": 1}, "missing_column", "no column 'text'; the row has 'content', 'n'"),
        ({"text": None, "id": "u"}, "missing_column", "column 'text' is null"),
        ({"text": 3, "id": "u"}, "not_text", "int"),
        ({"text": ["x"], "id": "u"}, "not_text", "list"),
        ({"text": "x"}, "missing_column", "no column 'id'; the row has 'text'"),
        ({"text": "x", "id": None}, "missing_column", "column 'id' is null"),
        ({"text": "x", "id": ""}, "missing_column", "column 'id' is empty"),
        ({"text": "x", "id": True}, "not_text", "bool"),
        ({"text": "x", "id": {"a": 1}}, "not_text", "dict"),
        ({"text": "half \ud83d pair", "id": "u"}, "undecodable", "position 5"),
        ({"text": "x", "id": "\ud83d"}, "undecodable", "surrogate"),
        ({"text": "", "id": "u"}, "empty", "no text"),
        ({"text": " \n", "id": "u"}, "empty", "white space"),
        ({"text": "a\0", "id": "u"}, "binary", "NUL character at position 1"),
        ({"text": "é" * 11, "id": "u"}, "oversized", "20"),
    ],
)
def test_a_bad_row_is_set_aside_by_its_place(row: dict[str, object], reason: str, said: str) -> None:
    item = read(row, uri_column="id", max_document_bytes=20)
    assert isinstance(item, QuarantinedItem)
    assert (item.uri, item.reason) == ("f.jsonl#7", reason)
    assert said in item.detail


def test_the_size_limit_counts_utf8_bytes_inclusively() -> None:
    assert isinstance(read({"text": "é" * 10}, max_document_bytes=20), Document)
