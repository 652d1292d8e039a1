import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.corpus.document import CorpusItem, Document, QuarantinedItem
from storage.corpus.json_lines import JsonLinesPart, plan_json_lines
from storage.corpus.shard import ReadOptions
from tests.storage.corpus.support import documents, file_ref, reasons, uris


def read(path: Path, range_bytes: int = 2**24, **options) -> list[CorpusItem]:
    read_options = ReadOptions(**options)
    parts = plan_json_lines(file_ref(path), range_bytes)
    return [item for part in parts for item in pickle.loads(pickle.dumps(part)).read(read_options)]


def test_rows_are_named_by_the_offset_of_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "é"}\n\n  \r\n{"text": "two\\nlines"}\r\n{"text": "no line end"}'.encode())
    items = read(path)
    raw = path.read_bytes()
    assert uris(items) == [
        f"rows.jsonl#{raw.index(line)}" for line in ('{"text": "é'.encode(), b'{"text": "two', b'{"text": "no')
    ]
    assert [document.text for document in documents(items)] == ["é", "two\nlines", "no line end"]
    assert documents(items)[0].modified_at == path.stat().st_mtime


def test_every_kind_of_bad_line_is_set_aside_and_reading_goes_on(tmp_path: Path) -> None:
    lines = {
        b'{"text": "good"}': None,
        b'{"text": "cut': "malformed",
        b'["a", "list"]': "malformed",
        b"17": "malformed",
        b'{"text": ' + b"[" * 200_000: "malformed",  # deeper than the parser goes
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "malformed",  # longer than int() takes
        b'{"text": "caf\xe9"}': "undecodable",
        b'{"text": "\\ud83d"}': "undecodable",
        b'{"other": "x"}': "missing_column",
        b'{"text": null}': "missing_column",
        b'{"text": 5}': "not_text",
        b'{"text": "  "}': "empty",
        b'{"text": "a\\u0000b"}': "binary",
        b'{"text": "' + b"x" * 300_000 + b'"}': "oversized",
        b'{"text": "last"}': None,
    }
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    items = read(path, max_document_bytes=250_000)
    offset, expected = 0, {}
    for line, reason in lines.items():
        if reason:
            expected[f"rows.jsonl#{offset}"] = reason
        offset += len(line) + 1
    assert reasons(items) == expected
    assert [document.text for document in documents(items)] == ["good", "last"]
    assert all(item.detail and item.size_bytes for item in items if isinstance(item, QuarantinedItem))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert [document.text for document in documents(read(path))] == ["a", "b"]


def test_an_empty_file_says_so_and_a_blank_one_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert reasons(read(path)) == {"rows.jsonl": "empty"}
    path.write_bytes(b"\n\r\n \n")
    assert read(path) == []


LINES = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(
            lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
        ),
        st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")),
        st.sampled_from([b"", b"  ", b"\r", b"x" * 100_000]),
    ),
    max_size=12,
)


@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 200), st.integers(5, 60))
def test_ranges_read_apart_give_what_reading_in_one_go_gives(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    line_end: bytes,
    ends: bool,
    range_bytes: int,
    max_document_bytes: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_bytes(line_end.join(lines) + (line_end if ends else b""))
    whole = read(path, max_document_bytes=max_document_bytes)
    size = path.stat().st_size
    range_bytes = max(range_bytes, size // 500)  # keeps the number of ranges of a 100 kB line bounded
    assert read(path, range_bytes, max_document_bytes=max_document_bytes) == whole
    # Against a reading that knows nothing of ranges: one item a line that is not blank (or too long to tell).
    contents = [line.removesuffix(b"\r") for line in path.read_bytes().split(b"\n")]
    num_rows = sum(bool(content.strip()) or len(content) > max_document_bytes for content in contents)
    assert len(whole) == (num_rows if size else 1)
    for item in documents(whole):
        assert item.size_bytes <= max_document_bytes


def test_memory_does_not_grow_with_the_file_or_with_a_giant_line(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    row = json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 40}) + "\n"
    with open(path, "w") as file:
        for _ in range(20):
            file.write(row * (2**20 // len(row)))
        file.write('{"text": "')
        for _ in range(20):
            file.write("y" * 2**20)
        file.write('"}\n{"text": "after"}\n')
    assert path.stat().st_size > 40e6
    options = ReadOptions(max_document_bytes=2**20)
    num_documents, last = 0, None
    tracemalloc.start()
    try:
        for part in plan_json_lines(file_ref(path), 2**24):
            for item in part.read(options):
                num_documents += isinstance(item, Document)
                last = item
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_documents == 20 * (2**20 // len(row)) + 1
    assert isinstance(last, Document)
    assert last.text == "after"
    assert peak < 4e6


def test_a_file_that_went_away_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    (part,) = plan_json_lines(file_ref(path), 100)
    path.unlink()
    assert list(part.read(ReadOptions())) == [
        QuarantinedItem("rows.jsonl#0", "unreadable", "No such file or directory", 0)
    ]


def test_a_truncated_file_ends_early_without_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    assert list(JsonLinesPart(file_ref(path), 1000, 2000).read(ReadOptions())) == []
