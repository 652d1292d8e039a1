"""Archives: tokens that curation took out of a context, compressed, until nobody may want them back.

An archive is a Parquet file in the context's folder, written once: a row a block, found again by its document and its
place in it, so that it stays right when the timeline moves. The file's name ends in the crc32c of its bytes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, StorageError
from storage.contract import DocumentInfo, TreeReader
from storage.durable import fsync_folder, make_folder_durably, write_file_durably
from storage.geometry import NO_TOKEN

ARCHIVE_FOLDER = "archive"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("content_sha256", pa.string()),
        ("block", pa.int32()),
        ("tokens", pa.list_(pa.uint32())),
    ],
    metadata={b"megacontext.archive": b"1"},
)
"""Version 1. `block` counts in the document; `tokens` are its real ones."""

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-crc([0-9a-f]{8})\.parquet")
"""When it was written and until when it is kept (unix seconds), a number, the checksum."""

Place = tuple[str, str, int]
"""`(key, content_sha256, block)` of an archived block."""


@dataclass(frozen=True)
class ArchiveFile:
    """One file."""

    path: Path
    written_at: int
    keep_until: int
    """Unix seconds; 0 is for ever."""

    def table(self) -> pa.Table:
        """Its rows.

        Raises:
            CorruptTreeError: its bytes are not what was written.
        """
        match = _NAME.fullmatch(self.path.name)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CorruptTreeError(f"archive {self.path} cannot be read: {error}") from error
        if match is None or google_crc32c.value(data) != int(match[4], 16):
            raise CorruptTreeError(f"archive {self.path} is damaged. Restore it from a backup.")
        return pq.read_table(pa.BufferReader(data))


class Archives:
    """The archives of one context."""

    def __init__(self, context_folder: Path) -> None:
        self.folder = context_folder / ARCHIVE_FOLDER

    def files(self) -> list[ArchiveFile]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in sorted(self.folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is not None:
                found.append(ArchiveFile(path, int(match[1]), int(match[2])))
        return sorted(found, key=lambda file: (file.written_at, file.path.name))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.path.stat().st_size for file in self.files())

    def add(
        self, reader: TreeReader, spans: Sequence[tuple[int, int]], *, keep_until: float, now: float | None = None
    ) -> Path | None:
        """Write the tokens of spans of blocks; durable when it returns. None when they have none.

        Args:
            reader: of a version in which they are whole.
            spans: `(first block, number of blocks)`.
            keep_until: unix seconds; 0 is for ever.
            now: unix seconds; None asks the clock.

        Raises:
            DiskFullError, StorageError: the disk refused; nothing is left behind.
        """
        rows: dict[str, list] = {name: [] for name in SCHEMA.names}
        for first, count in spans:
            for document, low, high in _documents_of(reader, first, count):
                tokens, counts = reader.tokens(low, high - low)
                for block in range(high - low):
                    if counts[block]:
                        rows["key"].append(document.meta.key)
                        rows["content_sha256"].append(document.meta.content_sha256)
                        rows["block"].append(low + block - document.first_block)
                        rows["tokens"].append(tokens[block, : counts[block]])
        return self._write(pa.table(rows, schema=SCHEMA), time.time() if now is None else now, keep_until)

    def _write(self, table: pa.Table, now: float, keep_until: float) -> Path | None:
        if table.num_rows == 0:
            return None
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", compression_level=9)
        data = sink.getvalue().to_pybytes()
        if not self.folder.exists():
            make_folder_durably(self.folder)
        number = len(self.files())
        path = self.folder / f"{int(now)}-{int(keep_until)}-{number:06d}-crc{google_crc32c.value(data):08x}.parquet"
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            write_file_durably(temporary, data)
            temporary.rename(path)
            fsync_folder(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot write archive {path}: {error}; nothing was pruned") from error
        return path

    def find(self, wanted: set[Place]) -> dict[Place, np.ndarray]:
        """Tokens of archived blocks, `(32,)` uint32 with NO_TOKEN in unused slots; those that are not archived are
        left out.

        Raises:
            CorruptTreeError: a file is damaged.
        """
        found: dict[Place, np.ndarray] = {}
        for file in reversed(self.files()):
            if len(found) == len(wanted):
                break
            table = file.table()
            places = zip(*(table.column(name).to_pylist() for name in ("key", "content_sha256", "block")), strict=True)
            tokens = table.column("tokens")
            for row, place in enumerate(places):
                if place in wanted and place not in found:
                    values = tokens[row].values.to_numpy()
                    found[place] = np.full(K, NO_TOKEN, np.uint32)
                    found[place][: len(values)] = values
        return found

    def expire(self, now: float) -> int:
        """Remove files that are kept no longer; returns their bytes."""
        return self._remove([file for file in self.files() if 0 < file.keep_until <= now])

    def forget(self, keys: set[str]) -> None:
        """Remove every block of some documents."""
        for file in self.files():
            table = file.table()
            kept = table.filter(~np.isin(np.array(table.column("key").to_pylist(), object), list(keys)))
            if kept.num_rows < table.num_rows:
                self._write(kept, file.written_at, file.keep_until)
                self._remove([file])

    def _remove(self, files: Sequence[ArchiveFile]) -> int:
        removed = 0
        for file in files:
            removed += file.path.stat().st_size
            file.path.unlink()
        if files:
            fsync_folder(self.folder)
        return removed


def _documents_of(reader: TreeReader, first: int, count: int) -> Iterator[tuple[DocumentInfo, int, int]]:
    """`(document, first block, stop block)` of the parts of documents in a span."""
    block, stop = first, first + count
    while block < stop:
        document = reader.document_at(block)
        high = min(stop, document.first_block + document.num_blocks)
        yield document, block, high
        block = high


def place_of(document: DocumentInfo, block: int) -> Place:
    """Where a block of the timeline is archived."""
    return document.meta.key, document.meta.content_sha256, block - document.first_block
