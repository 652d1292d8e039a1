"""Archives: tokens that curation took out of a context, compressed, until nobody may want them back.

An archive is a Parquet file in the context's folder, written once: a row a block, found again by its document and its
place in it, so that it stays right when the timeline moves. A document may go on in another way on another branch, so a
block's gists, which are never dropped and move along bit for bit, tell which of the two it is. The file's name ends in
the crc32c of its bytes.
"""

from __future__ import annotations

import contextlib
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
from cluster.errors import CorruptTreeError
from storage.contract import DocumentInfo
from storage.durable import disk_errors, fsync_folder, make_folder_durably, write_file_durably
from storage.geometry import NO_TOKEN
from storage.tree.reader import ContextReader

ARCHIVE_FOLDER = "archive"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("content_sha256", pa.string()),
        ("block", pa.int32()),
        ("gists_crc", pa.uint32()),
        ("tokens", pa.list_(pa.uint32())),
    ],
    metadata={b"megacontext.archive": b"2"},
)
"""Version 2. `block` counts in the document; `gists_crc` is the crc32c of all its arrays of LOD1 as they are stored, in
the order of the encoding; `tokens` are its real ones. Version 1 had no `gists_crc`."""

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-crc([0-9a-f]{8})\.parquet")
"""When it was written and until when it is kept (unix seconds), a number, the checksum."""

Place = tuple[str, str, int, int]
"""`(key, content_sha256, block, gists_crc)` of an archived block."""


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
        self, reader: ContextReader, spans: Sequence[tuple[int, int]], *, keep_until: float, now: float | None = None
    ) -> Path | None:
        """Write the tokens of spans of blocks, of pruned ones too where they are kept yet; durable when it returns.

        Args:
            reader: of a version that holds them.
            spans: `(first block, number of blocks)`.
            keep_until: unix seconds; 0 is for ever.
            now: unix seconds; None asks the clock.

        Returns:
            The file; None where the spans have no tokens.

        Raises:
            DiskFullError, StorageError: the disk refused; nothing is left behind.
        """
        rows: dict[str, list] = {name: [] for name in SCHEMA.names}
        for first, count in spans:
            for document, low, high in _documents_of(reader, first, count):
                stored = reader.stored_arrays(0, low, high - low)
                tokens, counts = stored["tokens"].reshape(-1, K), stored["num_tokens"].reshape(-1)
                there = np.flatnonzero(tokens[:, 0] != NO_TOKEN)
                places = places_of(reader, document, (low + there).tolist())
                for block, place in zip(there.tolist(), places, strict=True):
                    for name, value in zip(SCHEMA.names, (*place, tokens[block, : counts[block]]), strict=True):
                        rows[name].append(value)
        return self._write(pa.table(rows, schema=SCHEMA), time.time() if now is None else now, keep_until)

    def _write(self, table: pa.Table, now: float, keep_until: float) -> Path | None:
        if table.num_rows == 0:
            return None
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", compression_level=9)
        data = sink.getvalue().to_pybytes()
        with disk_errors(f"cannot write an archive in {self.folder}, so nothing was pruned"):
            # Also where it is there: who made it may have been killed before its name was durable.
            make_folder_durably(self.folder)
            self._remove_half_written()
            number = len(self.files())
            path = self.folder / f"{int(now)}-{int(keep_until)}-{number:06d}-crc{google_crc32c.value(data):08x}.parquet"
            temporary = path.with_name(f".{path.name}.tmp")
            try:
                write_file_durably(temporary, data)
                temporary.rename(path)
                fsync_folder(self.folder)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        return path

    def find(self, wanted: set[Place]) -> dict[Place, np.ndarray]:
        """Tokens of archived blocks, `(32,)` uint32 with NO_TOKEN in unused slots; those that are not archived are
        left out.

        Raises:
            CorruptTreeError: a file is damaged.
        """
        found: dict[Place, np.ndarray] = {}
        # Of archives without `gists_crc`, what can be meant is what all rows of a place agree on.
        unmarked: dict[tuple[str, str, int], np.ndarray | None] = {}
        for file in reversed(self.files()):
            if len(found) == len(wanted):
                break
            table = file.table()
            marked = "gists_crc" in table.column_names
            names = SCHEMA.names[: 4 if marked else 3]
            places = zip(*(table.column(name).to_pylist() for name in names), strict=True)
            tokens = table.column("tokens")
            for row, place in enumerate(places):
                if not marked:
                    values = _block_of(tokens[row])
                    before = unmarked.setdefault(place, values)
                    if before is not None and not np.array_equal(before, values):
                        unmarked[place] = None
                elif place in wanted and place not in found:
                    found[place] = _block_of(tokens[row])
        for place in wanted - found.keys():
            values = unmarked.get(place[:3])
            if values is not None:
                found[place] = values
        return found

    def expire(self, now: float) -> int:
        """Remove files that are kept no longer; returns their bytes.

        Raises:
            StorageError: the disk refused; the same call goes on.
        """
        return self._remove([file for file in self.files() if 0 < file.keep_until <= now])

    def forget(self, keys: set[str]) -> None:
        """Remove every block of some documents.

        Raises:
            StorageError: the disk refused; the same call goes on.
        """
        if not self.folder.is_dir():
            return
        with disk_errors(f"cannot remove what is half written in {self.folder}"):
            self._remove_half_written()
        for file in self.files():
            table = file.table()
            kept = table.filter(~np.isin(np.array(table.column("key").to_pylist(), object), list(keys)))
            if kept.num_rows < table.num_rows:
                self._write(kept, file.written_at, file.keep_until)
                self._remove([file])

    def _remove(self, files: Sequence[ArchiveFile]) -> int:
        removed = 0
        with disk_errors(f"cannot remove archives in {self.folder}"):
            for file in files:
                removed += file.path.stat().st_size
                file.path.unlink()
            if files:
                fsync_folder(self.folder)
        return removed

    def _remove_half_written(self) -> None:
        """What a process left that was killed: it holds tokens. Only the context's writer writes here."""
        left = list(self.folder.glob(".*.parquet.tmp"))
        for path in left:
            path.unlink()
        if left:
            fsync_folder(self.folder)


def check_archives(context_folder: Path) -> list[str]:
    """One line for each archive of a context that is damaged, naming it."""
    problems = []
    for file in Archives(context_folder).files():
        try:
            file.table()
        except CorruptTreeError as error:
            problems.append(str(error))
    return problems


def _block_of(tokens: pa.ListScalar) -> np.ndarray:
    values = tokens.values.to_numpy()
    block = np.full(K, NO_TOKEN, np.uint32)
    block[: len(values)] = values
    return block


def _documents_of(reader: ContextReader, first: int, count: int) -> Iterator[tuple[DocumentInfo, int, int]]:
    """`(document, first block, stop block)` of the parts of documents in a span."""
    block, stop = first, first + count
    while block < stop:
        document = reader.document_at(block)
        high = min(stop, document.first_block + document.num_blocks)
        yield document, block, high
        block = high


def places_of(reader: ContextReader, document: DocumentInfo, blocks: Sequence[int]) -> list[Place]:
    """Where blocks of a document, counted on the timeline and in its order, are archived."""
    meta, places = document.meta, []
    for run in np.split(np.array(blocks, np.int64), np.flatnonzero(np.diff(blocks) != 1) + 1):
        if len(run):
            arrays = reader.stored_arrays(1, int(run[0]), len(run)).values()
            for number, block in enumerate(run.tolist()):
                gists = b"".join(values.reshape(len(run), -1)[number].tobytes() for values in arrays)
                place = block - document.first_block, google_crc32c.value(gists)
                places.append((meta.key, meta.content_sha256, *place))
    return places
