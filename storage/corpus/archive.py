"""Takes text files out of a wheel or source distribution, trusting nothing about it.

Nothing is written outside the given folder, no link or device is ever made, and what a small file may swell to is
bounded before it is unpacked. An archive is refused as a whole for a name that leads out of it: no honest one has that.
"""

from __future__ import annotations

import bz2
import calendar
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, cast

from cluster.errors import CorpusError
from storage.corpus.walk import os_reason

_DECOMPRESSORS: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
SUFFIXES = (".whl", ".zip", *_DECOMPRESSORS)
"""Of the archives that can be read. A wheel is a zip file without a top folder."""

_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # an encrypted zip file; as NotImplementedError: an unknown compression
    ValueError,  # numbers in headers that are none
)
_MAX_UNIX_TIME = 2**33


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may hold at most. Ten times what the largest well-known source distributions do."""

    total_bytes: int = 512 * 2**20
    """Unpacked size of the whole archive, in bytes, with what is not wanted of it."""
    file_bytes: int = 16 * 2**20
    """Size of a wanted file, in bytes."""
    num_members: int = 100_000


@dataclass(frozen=True, slots=True)
class _Member:
    """A regular file of an archive. `open` works until the next member is asked for."""

    name: str
    size_bytes: int
    modified_at: float
    open: Callable[[], IO[bytes] | None]


def extract(archive: Path, folder: Path, wanted: Callable[[str], bool], limits: ArchiveLimits) -> int:
    """Write the wanted files of an archive below `folder`, with the times of modification the archive gives.

    A source distribution's own top folder (`<name>-<version>/`) is taken off the paths. Links, devices and pipes are
    left out.

    Args:
        archive: its suffix, one of `SUFFIXES`, says what it is.
        folder: may be there; must hold nothing of the same names.
        wanted: whether to write a file, by its path in the archive, with `/`.
        limits: what is too large.

    Returns:
        The number of files written.

    Raises:
        CorpusError: damaged, too large, a name that leads out of the folder or comes twice, or the disk is full.
    """
    is_wheel = archive.name.endswith(".whl")
    num_written = 0
    try:
        for member in _members(archive, limits):
            parts = _safe_parts(archive, member.name)
            path = "/".join(parts if is_wheel else parts[1:])
            if path and wanted(path):
                if member.size_bytes > limits.file_bytes:
                    detail = f"{member.name} of {member.size_bytes} bytes; a text file may have {limits.file_bytes}"
                    raise CorpusError(_too_large(archive, detail))
                _write(member, folder / path)
                num_written += 1
    except _DAMAGE as error:
        raise CorpusError(f"{archive} is damaged: {error}. Delete it and run the same command again") from error
    except FileExistsError as error:
        name = os.path.relpath(error.filename, folder)
        raise CorpusError(f"{archive} holds {name!r} twice; it is not to be trusted") from error
    except OSError as error:  # gzip reports damage so too
        raise CorpusError(f"{archive} cannot be unpacked below {folder}: {os_reason(error)}") from error
    return num_written


def _write(member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = member.open()
    assert source is not None, "only regular files are members"
    with source, path.open("xb") as target:
        shutil.copyfileobj(source, target)
    os.utime(path, (member.modified_at, member.modified_at))


def _safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    """The components of a member's name; Windows' rules are the stricter ones about what leads elsewhere."""
    windows = PureWindowsPath(name)
    if windows.anchor or ".." in windows.parts or "\0" in name:
        raise CorpusError(f"{archive} holds {name!r}, which leads out of its folder; it is not to be trusted")
    return PurePosixPath(name).parts


def _too_large(archive: Path, detail: str) -> str:
    return f"{archive} is refused as too large: {detail}. Narrow the globs, or take another package"


def _members(archive: Path, limits: ArchiveLimits) -> Iterator[_Member]:
    if archive.name.endswith((".whl", ".zip")):
        return _zip_members(archive, limits)
    return _tar_members(archive, limits)


def _zip_members(archive: Path, limits: ArchiveLimits) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        if len(infos) > limits.num_members:
            raise CorpusError(_too_large(archive, f"{len(infos)} members; {limits.num_members} are allowed"))
        # A member never gives more bytes than its header says, so the sum of the headers is a bound.
        total = sum(info.file_size for info in infos)
        if total > limits.total_bytes:
            raise CorpusError(_too_large(archive, f"{total} bytes unpacked; {limits.total_bytes} are allowed"))
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            if not info.is_dir() and kind in (0, stat.S_IFREG):
                yield _Member(info.filename, info.file_size, _zip_time(info), lambda info=info: opened.open(info))


def _zip_time(info: zipfile.ZipInfo) -> float:
    try:
        return float(calendar.timegm((*info.date_time, 0, 0, 0)))  # has no time zone; UTC is the same everywhere
    except ValueError:  # month 0, as of archives without times
        return 0.0


class _BoundedStream:
    """A decompressed stream that refuses to give more than `limit` bytes, headers included."""

    def __init__(self, stream: IO[bytes], limit: int, message: str) -> None:
        self._stream, self._left, self._message = stream, limit, message

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise CorpusError(self._message)
        return data


def _tar_members(archive: Path, limits: ArchiveLimits) -> Iterator[_Member]:
    decompress = next(opener for suffix, opener in _DECOMPRESSORS.items() if archive.name.endswith(suffix))
    message = _too_large(archive, f"more than {limits.total_bytes} bytes unpacked")
    with decompress(archive, "rb") as stream:
        bounded = cast("IO[bytes]", _BoundedStream(stream, limits.total_bytes, message))
        # As a stream: seeking would decompress again, past the bound.
        with tarfile.open(fileobj=bounded, mode="r|") as opened:
            for number, info in enumerate(opened, start=1):
                if number > limits.num_members:
                    raise CorpusError(_too_large(archive, f"more than {limits.num_members} members"))
                # A sparse file says it is larger than its bytes in the stream, which are what is bounded.
                if info.isreg() and not info.issparse():
                    time = info.mtime if 0 <= info.mtime < _MAX_UNIX_TIME else 0
                    yield _Member(info.name, info.size, float(time), lambda info=info: opened.extractfile(info))
