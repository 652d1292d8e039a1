"""A text file is one document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from storage.corpus.decoding import Refusal, decode_text
from storage.corpus.document import CorpusItem, Document, QuarantinedItem
from storage.corpus.shard import ReadOptions, refuse_size
from storage.corpus.walk import FileRef, os_reason

_PYTHON_SUFFIXES = (".py", ".pyi", ".pyw")


@dataclass(frozen=True, slots=True)
class TextFilePart:
    """One file of text, Markdown, source code, …: any extension."""

    file: FileRef

    @property
    def estimated_bytes(self) -> int:
        return self.file.size_bytes

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        """Yield the file's document, or why there is none. An oversized file is not read at all."""
        yield _read(self.file, options)


def _read(file: FileRef, options: ReadOptions) -> CorpusItem:
    try:
        with open(file.path, "rb") as stream:
            stat = os.fstat(stream.fileno())
            if refused := refuse_size(file.uri, stat.st_size, options):
                return refused
            raw = stream.read(stat.st_size)  # what is appended meanwhile is for the next run
    except OSError as error:
        return QuarantinedItem(file.uri, "unreadable", os_reason(error), file.size_bytes)
    text = decode_text(raw, is_python=file.path.endswith(_PYTHON_SUFFIXES))
    if isinstance(text, Refusal):
        return QuarantinedItem(file.uri, text.reason, text.detail, len(raw))
    return Document.from_raw(file.uri, text, raw, stat.st_mtime, options.tags)
