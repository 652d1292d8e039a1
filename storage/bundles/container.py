"""The file of a bundle: a plain tar archive (POSIX ustar) of which every byte but the members' contents is determined.

A header says a member's name and size and nothing else. A reader does not interpret headers: it makes each anew from
name and size, and compares. So links, folders, owners, sparse or compressed files and whatever else a tar can be are
refused without being understood, while `tar` lists and extracts a bundle like any other archive.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.errors import BundleError, DiskFullError
from storage.durable import fsync_folder

MAX_MEMBERS = 2**16
"""Members of a bundle: at 8,192 blocks each about 17 G tokens."""

_UNIT = tarfile.BLOCKSIZE
_END = bytes(2 * _UNIT)
_MAX_MEMBER_BYTES = 8**11 - 1
"""What a ustar header can say."""
_PIECE_BYTES = 2**20
_NAME = re.compile(rb"[a-z][a-z0-9-]*(\.[a-z0-9]+)?")
_SIZE = re.compile(rb"[0-7]{11}")


@dataclass(frozen=True)
class Member:
    """A member: what a manifest says of it."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Place:
    """Where a member's content lies in the file."""

    offset: int
    num_bytes: int


def _header(name: str, num_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(num_bytes: int) -> int:
    return -num_bytes % _UNIT


class MemberWriter:
    """Takes the content of one member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append to the content."""
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def finished(self, name: str) -> Member:
        """What has been written."""
        return Member(name, self.num_bytes, self._hash.hexdigest())


class ContainerWriter:
    """Writes a bundle's file beside its place, and moves it there when it is complete and on the disk."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Begin a file.

        Raises:
            BundleError: there is something at `path` and `overwrite` is False, or its folder cannot be written.
        """
        self.path = path
        self._overwrite = overwrite
        self._check_free()
        self._temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        self.members: list[Member] = []
        with _written(path):
            self._file = self._temporary.open("xb")

    def _check_free(self) -> None:
        if self.path.is_dir():
            raise BundleError(f"{self.path} is a folder; give the name of a file")
        if self.path.exists() and not self._overwrite:
            raise BundleError(f"{self.path} is there already; give another name, or --overwrite true to replace it")

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[MemberWriter]:
        """Write a member; it counts once the block is left."""
        with _written(self.path):
            start = self._file.tell()
            self._file.write(bytes(_UNIT))
            content = MemberWriter(self._file)
            yield content
            if content.num_bytes > _MAX_MEMBER_BYTES or len(self.members) == MAX_MEMBERS:
                raise BundleError(f"{self.path}: too much for one bundle at {name}; export it in spans")
            self._file.write(bytes(_padding(content.num_bytes)))
            self._file.seek(start)
            self._file.write(_header(name, content.num_bytes))
            self._file.seek(0, os.SEEK_END)
        self.members.append(content.finished(name))

    def commit(self) -> None:
        """End the file, sync it, and give it its name.

        Raises:
            BundleError: something is at its place by now and is not to be overwritten.
            DiskFullError: the disk refused.
        """
        with _written(self.path):
            self._file.write(_END)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._check_free()
            self._temporary.replace(self.path)
            fsync_folder(self.path.parent)

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # What still has its temporary name was not committed.
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFullError(
                f"the disk (or quota) under {path.parent} is full; nothing was left there. Free space and run the same "
                "command again."
            ) from error
        raise BundleError(f"cannot write {path}: {error}. Check the folder and its permissions.") from error


class ContainerReader:
    """The members of a bundle's file, found and checked without reading their contents."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            BundleError: it cannot be read, is no bundle, or is not whole.
        """
        self.path = path
        # Anything but a file could make the opening wait for ever.
        if not path.is_file():
            raise BundleError(f"there is no file {path}")
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error}") from error
        try:
            self._places = self._scan(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self._file.close()
            raise

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every member by name, in the order of the file."""
        return {name: place.num_bytes for name, place in self._places.items()}

    def _scan(self, num_bytes: int) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        at = 0
        while (header := self._read(at, _UNIT)) != _END[:_UNIT]:
            name, size = header[:100].rstrip(b"\0"), header[124:135]
            if not _NAME.fullmatch(name) or not _SIZE.fullmatch(size):
                raise self._refused(f"it has no plain member at byte {at:,}", bundle=at > 0)
            place = _Place(at + _UNIT, int(size, 8))
            if header != _header(name.decode(), place.num_bytes):
                raise self._refused(f"the header of {name.decode()} says more than a name and a size", bundle=at > 0)
            if name.decode() in places or len(places) == MAX_MEMBERS:
                raise self._refused(f"it has {name.decode()} twice, or more than {MAX_MEMBERS:,} members")
            content_stop = place.offset + place.num_bytes
            at = content_stop + _padding(place.num_bytes)
            if at > num_bytes:
                raise self._refused(f"it ends within {name.decode()}")
            if self._read(content_stop, at - content_stop).strip(b"\0"):
                raise self._refused(f"there are bytes behind {name.decode()} that belong to nothing")
            places[name.decode()] = place
        if num_bytes != at + len(_END) or self._read(at, len(_END)) != _END:
            raise self._refused("it does not end where its last member does")
        return places

    def read(self, member: Member) -> bytes:
        """A member's content, as its checksum says.

        Raises:
            BundleError: it is another.
        """
        place = self._places[member.name]
        data = self._read(place.offset, place.num_bytes)
        if hashlib.sha256(data).hexdigest() != member.sha256:
            raise self._damaged(member)
        return data

    def read_unchecked(self, name: str, limit: int) -> bytes:
        """A member's content before anything is known of it.

        Raises:
            BundleError: there is no such member, or it is larger than `limit` bytes.
        """
        place = self._places.get(name)
        if place is None or place.num_bytes > limit:
            raise self._refused(f"it has no {name}, or one of more than {limit:,} bytes", bundle=place is not None)
        return self._read(place.offset, place.num_bytes)

    def lines(self, member: Member, limit: int) -> Iterator[bytes]:
        """A member's lines without their ends. The checksum is compared behind the last one.

        Raises:
            BundleError: a line of more than `limit` bytes, a last one without an end, or another content.
        """
        place = self._places[member.name]
        digest = hashlib.sha256()
        rest = b""
        for start in range(0, place.num_bytes, _PIECE_BYTES):
            piece = self._read(place.offset + start, min(_PIECE_BYTES, place.num_bytes - start))
            digest.update(piece)
            *lines, rest = (rest + piece).split(b"\n")
            if max(map(len, (*lines, rest))) > limit:
                raise self._refused(f"{member.name} has a line of more than {limit:,} bytes")
            yield from lines
        if digest.hexdigest() != member.sha256:
            raise self._damaged(member)
        if rest:
            raise self._refused(f"the last line of {member.name} does not end")

    def _read(self, offset: int, num_bytes: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(num_bytes)
        except OSError as error:
            raise BundleError(f"cannot read {self.path}: {error}") from error
        if len(data) != num_bytes:
            raise self._refused("it ends too early", bundle=offset > 0)
        return data

    def _damaged(self, member: Member) -> BundleError:
        return self._refused(f"{member.name} is not what its checksum says")

    def _refused(self, what: str, *, bundle: bool = True) -> BundleError:
        if not bundle:
            return BundleError(f"{self.path} is no bundle of `tree export`: {what}")
        return BundleError(f"{self.path} is damaged or was changed: {what}. Copy or export it again.")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
