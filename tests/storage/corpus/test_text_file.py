import hashlib
import os
from pathlib import Path

import pytest

from storage.corpus.document import CorpusItem, Document, QuarantinedItem
from storage.corpus.shard import ReadOptions
from storage.corpus.text_file import TextFilePart
from tests.storage.corpus.support import file_ref


def read(path: Path, options: ReadOptions | None = None) -> CorpusItem:
    (item,) = TextFilePart(file_ref(path)).read(options or ReadOptions())
    return item


def test_a_file_becomes_a_document_with_its_provenance(tmp_path: Path) -> None:
    path = tmp_path / "notes.unknown-extension"
    raw = "\ufeffline one\r\nline two\n".encode()
    path.write_bytes(raw)
    os.utime(path, (1_700_000_000, 1_700_000_000.25))
    document = read(path, ReadOptions(tags=("a", "b")))
    assert document == Document(
        uri="notes.unknown-extension",
        text="line one\r\nline two\n",
        content_sha256=hashlib.sha256(raw).hexdigest(),
        size_bytes=len(raw),
        modified_at=1_700_000_000.25,
        tags=("a", "b"),
    )


@pytest.mark.parametrize("suffix", [".py", ".pyi", ".pyw"])
def test_python_suffixes_honour_the_cookie(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"old{suffix}"
    path.write_bytes("# coding: cp1252\nprice = '5 €'\n".encode("cp1252"))
    document = read(path)
    assert isinstance(document, Document)
    assert "5 €" in document.text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(b"", "empty"), (b"\n \n", "empty"), (b"a\0b", "binary"), (b"caf\xe9", "undecodable")],
)
def test_what_is_no_text_is_set_aside(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(raw)
    item = read(path)
    assert isinstance(item, QuarantinedItem)
    assert (item.uri, item.reason, item.size_bytes) == ("file.txt", reason, len(raw))
    assert item.detail


def test_the_size_limit_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"x" * 100)
    assert isinstance(read(path, ReadOptions(max_document_bytes=100)), Document)
    item = read(path, ReadOptions(max_document_bytes=99))
    assert isinstance(item, QuarantinedItem)
    assert (item.reason, item.size_bytes) == ("oversized", 100)
    assert "99" in item.detail


def test_a_file_that_grew_after_it_was_listed_is_still_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"x")
    part = TextFilePart(file_ref(path))
    path.write_bytes(b"x" * 1000)
    (item,) = part.read(ReadOptions(max_document_bytes=10))
    assert isinstance(item, QuarantinedItem)
    assert item.reason == "oversized"


def test_a_file_that_went_away_is_unreadable_with_the_systems_words(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"x")
    part = TextFilePart(file_ref(path))
    path.unlink()
    (item,) = part.read(ReadOptions())
    assert item == QuarantinedItem("file.txt", "unreadable", "No such file or directory", 1)
