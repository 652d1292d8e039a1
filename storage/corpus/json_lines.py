"""JSON Lines, cut into byte ranges that workers read on their own.

A range owns the lines that *begin* in it, so ranges need no scan to be planned and give every line exactly
once. A row is named by the byte offset of its line, `<file>#<offset>`: a row number would need a scan of all
before it. Blank lines are no rows.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from storage.corpus.document import CorpusItem, QuarantinedItem
from storage.corpus.rows import read_row
from storage.corpus.shard import Part, ReadOptions, RefusedPart
from storage.corpus.walk import FileRef, os_reason

_SKIP_BYTES = 64 * 2**10


def plan_json_lines(file: FileRef, range_bytes: int) -> Iterator[Part]:
    """Cut a file into ranges of `range_bytes`."""
    if file.size_bytes == 0:
        yield RefusedPart(QuarantinedItem(file.uri, "empty", "no bytes", 0))
    for start in range(0, file.size_bytes, range_bytes):
        yield JsonLinesPart(file, start, min(start + range_bytes, file.size_bytes))


@dataclass(frozen=True, slots=True)
class JsonLinesPart:
    """The lines of a file that begin in the bytes [start, stop)."""

    file: FileRef
    start: int
    stop: int

    @property
    def estimated_bytes(self) -> int:
        return self.stop - self.start

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        """Yield the rows of the range. A line above `options.max_document_bytes` is never held whole."""
        offset = self.start
        try:
            with open(self.file.path, "rb") as stream:
                modified_at = os.fstat(stream.fileno()).st_mtime
                for offset, size, line in read_lines(stream, self.start, self.stop, options.max_document_bytes):
                    position = f"{self.file.uri}#{offset}"
                    if line is None:
                        detail = f"line of {size} bytes; corpus.max_document_bytes is {options.max_document_bytes}"
                        yield QuarantinedItem(position, "oversized", detail, size)
                    elif not line.isspace():
                        yield _parse(line, position, options, size, modified_at)
        except OSError as error:
            yield QuarantinedItem(f"{self.file.uri}#{offset}", "unreadable", os_reason(error), 0)


def _parse(line: bytes, position: str, options: ReadOptions, size: int, modified_at: float) -> CorpusItem:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        detail = f"not UTF-8 at byte {error.start} of the line: {error.reason}"
        return QuarantinedItem(position, "undecodable", detail, size)
    except json.JSONDecodeError as error:
        return QuarantinedItem(position, "malformed", f"{error.msg} at column {error.colno} of the line", size)
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer of thousands of digits, brackets a thousand deep
        return QuarantinedItem(position, "malformed", f"{type(error).__name__}: {error}", size)
    if not isinstance(row, dict):
        detail = f"the line holds a {type(row).__name__}, not an object"
        return QuarantinedItem(position, "malformed", detail, size)
    return read_row(row, position, options, size_bytes=size, modified_at=modified_at)


def read_lines(stream: BinaryIO, start: int, stop: int, max_line_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield `(offset, size_bytes, line)` of non-empty lines that begin in [start, stop), without line ends.

    `line` is None for a line of more than `max_line_bytes`, which is counted piece by piece and dropped. A
    UTF-8 byte-order mark at the start of the file is not part of its first line.
    """
    position = _seek_to_line(stream, start, stop)
    limit = max_line_bytes + 2  # room for "\r\n"
    while position < stop:
        piece = stream.readline(limit)
        if not piece:
            return
        offset, num_read = position, len(piece)
        complete = piece.endswith(b"\n") or num_read < limit
        while not complete:
            rest = stream.readline(_SKIP_BYTES)
            num_read += len(rest)
            complete = not rest or rest.endswith(b"\n")
            piece = b""
        position = offset + num_read
        if not piece:
            yield offset, num_read, None
            continue
        line = piece.removesuffix(b"\n").removesuffix(b"\r")
        if offset == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > max_line_bytes:
            yield offset, num_read, None
        elif line:
            yield offset, num_read, line


def _seek_to_line(stream: BinaryIO, start: int, stop: int) -> int:
    """Go to the first line that begins at or after `start`; gives up at `stop`. Returns the position."""
    if start == 0:
        return 0
    position = start - 1  # when the byte before is a line end, a line begins exactly at start
    stream.seek(position)
    while position < stop:
        piece = stream.readline(_SKIP_BYTES)
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position
