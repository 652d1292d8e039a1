"""Tokenised windows of equal length on disk: what training reads, in any order, without reading it into memory.

A folder of Arrow IPC files, uncompressed and mapped, and `windows.json`, written last: without it the folder is
unfinished and is begun anew. 10 M tokens are 40 MB.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from jaxtyping import UInt32

from cluster.errors import CorruptTreeError, StorageError
from storage.durable import fsync_folder, write_file_durably

MANIFEST = "windows.json"
FORMAT_VERSION = 1

WINDOWS_PER_FILE = 65_536
"""256 MB at 1,024 tokens."""


@dataclass(frozen=True)
class WindowsManifest:
    """What a folder holds."""

    window_tokens: int
    num_windows: int
    files: tuple[str, ...]
    origin: Mapping[str, str]
    """Digests of what it was made of, by name: equal ones, equal windows."""
    num_documents: int = 0
    """Documents that were read."""
    num_tokens: int = 0
    """Their tokens."""

    @property
    def kept_share(self) -> float:
        """Of the tokens read, those in windows: a document's last tokens fill none."""
        return self.num_windows * self.window_tokens / max(self.num_tokens, 1)


class TokenWindows:
    """Windows of a finished folder, mapped."""

    def __init__(self, folder: Path) -> None:
        """Map a folder's files.

        Raises:
            StorageError: the folder is not finished, or of another format.
            CorruptTreeError: its files do not hold what the manifest says.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._columns: list[np.ndarray] = []
        for name in self.manifest.files:
            try:
                table = pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all()
            except (OSError, pa.ArrowInvalid) as error:
                raise CorruptTreeError(
                    f"{folder / name} is damaged ({error}); delete the folder and run again"
                ) from error
            chunks = table["tokens"].chunks
            self._columns += [chunk.values.to_numpy().reshape(-1, self.manifest.window_tokens) for chunk in chunks]
        self._ends = np.cumsum([len(column) for column in self._columns])
        if len(self) != self.manifest.num_windows:
            raise CorruptTreeError(
                f"{folder} holds {len(self)} windows, {MANIFEST} says {self.manifest.num_windows}; delete the folder "
                "and run again"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: Sequence[int] | np.ndarray) -> UInt32[np.ndarray, "n window_tokens"]:
        """Copies of these windows, in the order asked for.

        Raises:
            StorageError: a window that is not there.
        """
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise StorageError(f"{self.folder} has windows 0 to {len(self) - 1}, not {wanted.tolist()}")
        pieces = np.searchsorted(self._ends, wanted, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        out = np.empty((len(wanted), self.manifest.window_tokens), np.uint32)
        for row, (piece, index) in enumerate(zip(pieces.tolist(), wanted.tolist(), strict=True)):
            out[row] = self._columns[piece][index - starts[piece]]
        return out

    def sample(self, num_tokens: int) -> UInt32[np.ndarray, "n window_tokens"]:
        """At least one window, and about so many tokens where there are enough, evenly from all of them.

        Raises:
            StorageError: there is no window.
        """
        count = min(max(1, num_tokens // self.manifest.window_tokens), max(len(self), 1))
        return self.read(np.linspace(0, len(self) - 1, count).astype(np.int64))


class TokenWindowWriter:
    """Fills a folder from its beginning; whatever stood there unfinished is removed. Use as a context manager, then
    call `finish`."""

    def __init__(self, folder: Path, window_tokens: int, origin: Mapping[str, str]) -> None:
        """Begin a folder.

        Args:
            window_tokens: of every window.
            origin: digests of what the windows are made of.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self._window_tokens = window_tokens
        self._origin = dict(origin)
        self._schema = pa.schema([("tokens", pa.list_(pa.uint32(), window_tokens))])
        self._files: list[str] = []
        self._file: pa.OSFile | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._in_file = self.num_windows = 0

    def append(self, windows: UInt32[np.ndarray, "n window_tokens"]) -> None:
        """Add windows behind those there."""
        for first in range(0, len(windows), WINDOWS_PER_FILE):
            part = np.ascontiguousarray(windows[first : first + WINDOWS_PER_FILE], np.uint32)
            if self._writer is None or self._in_file + len(part) > WINDOWS_PER_FILE:
                self._close_file()
                self._files.append(f"part-{len(self._files):05d}.arrow")
                self._file = pa.OSFile(str(self.folder / self._files[-1]), "wb")
                self._writer = pa.ipc.new_file(self._file, self._schema)
            tokens = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), self._window_tokens)
            self._writer.write_batch(pa.record_batch([tokens], schema=self._schema))
            self._in_file += len(part)
            self.num_windows += len(part)

    def finish(self, num_documents: int, num_tokens: int) -> WindowsManifest:
        """Everything is written and on disk; of so many documents and tokens."""
        self._close_file()
        manifest = WindowsManifest(
            self._window_tokens, self.num_windows, tuple(self._files), self._origin, num_documents, num_tokens
        )
        content = json.dumps({"format_version": FORMAT_VERSION, **asdict(manifest)}, indent=2)
        write_file_durably(self.folder / MANIFEST, content.encode())
        fsync_folder(self.folder)
        return manifest

    def _close_file(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.close()
        self._file.close()
        with (self.folder / self._files[-1]).open("rb") as stream:
            os.fsync(stream.fileno())
        self._writer = self._file = None
        self._in_file = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close_file()


def is_finished(folder: Path) -> bool:
    """Whether a folder was written to its end."""
    return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> WindowsManifest:
    """What a folder holds.

    Raises:
        StorageError: the folder is not finished, or of another format.
    """
    try:
        fields = json.loads((folder / MANIFEST).read_text())
        if (version := fields.pop("format_version")) != FORMAT_VERSION:
            raise StorageError(f"{folder} is of format {version}, this program reads {FORMAT_VERSION}")
        return WindowsManifest(**{**fields, "files": tuple(fields["files"])})
    except FileNotFoundError as error:
        raise StorageError(f"{folder} holds no finished windows; run the command that makes them again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / MANIFEST} is damaged ({error}); delete the folder and run again") from error
