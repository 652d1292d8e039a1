"""A half-stored document comes first, once, and nothing else changes its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import CorpusConfig
from storage.contract import DocumentMeta
from storage.corpus.document import Document
from storage.corpus.resume import interrupted_first
from storage.corpus.source import open_corpus, read_corpus


def meta_of(document: Document) -> DocumentMeta:
    return DocumentMeta(document.key, document.uri)


@pytest.mark.parametrize("split", ["all", "train"])
def test_a_half_stored_document_comes_first_and_once(tmp_path: Path, split: str) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(f"text number {number}")
    rows = [json.dumps({"text": f"row {number}"}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "bad.txt").write_bytes(b"\0\1")
    source = open_corpus(CorpusConfig(paths=[str(tmp_path)], split=split))  # pyright: ignore[reportArgumentType]
    items = list(read_corpus(source))
    documents = [item for item in items if isinstance(item, Document)]
    assert len(documents) > 30
    for chosen in (documents[0], documents[7], documents[-1]):
        resumed = list(read_corpus(interrupted_first(source, meta_of(chosen))))
        assert resumed == [chosen, *(item for item in items if item != chosen)]


def test_a_document_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    source = open_corpus(CorpusConfig(paths=[str(tmp_path)]))
    assert interrupted_first(source, DocumentMeta("one.txt@of-before", "one.txt")) is source
