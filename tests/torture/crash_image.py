"""From a log of operations to a disk as a power cut may leave it.

The model is a strict one, in the manner of ALICE (Pillai et al., OSDI 2014) and CrashMonkey (Mohan et al., OSDI 2018):

- fsync of a file makes its data and size durable, not its name.
- fsync of a folder makes the names in it durable, not the folder's own name in its parent.
- A rename happens as a whole or not at all.
- Of what was not synced, every sector of 512 bytes is as it was after any of the writes to it, or none; the size is any
  that the file had; every change of a name happened or not, but not before an earlier change of the same name.

Which of these it is follows from a seed.
"""

from __future__ import annotations

import copy
import os
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.torture.interposer import Kind

SECTOR = 512
HEADER = struct.Struct("<IIIIQQQ")

Fate = Literal["lost", "kept", "mixed"]
"""Of what was not synced: all of it gone, all of it there, or anything in between."""


@dataclass(frozen=True)
class Operation:
    """One record of the log; paths are below the root, without a leading slash."""

    kind: Kind
    path: str
    target: str
    inode: int
    offset: int
    data: bytes


def read_log(path: Path, root: Path) -> list[Operation]:
    """The operations of a log. A last record that is cut short was never finished."""
    raw, position, operations = path.read_bytes(), 0, []
    prefix = str(root.resolve())
    while position + HEADER.size <= len(raw):
        kind, path_bytes, target_bytes, _, inode, offset, data_bytes = HEADER.unpack_from(raw, position)
        position += HEADER.size
        parts = []
        for size in (path_bytes, target_bytes, data_bytes):
            parts.append(raw[position : position + size])
            position += size
        if position > len(raw):
            break
        name, target = (os.fsdecode(part).removeprefix(prefix).removeprefix("/") for part in parts[:2])
        operations.append(Operation(Kind(kind), name, target, inode, offset, parts[2]))
    return operations


@dataclass(eq=False)
class _File:
    durable: bytes = b""
    pending: list[Operation] = field(default_factory=list)

    def sync(self) -> None:
        self.durable = self.now()
        self.pending = []

    def now(self) -> bytes:
        """What a running program reads."""
        data = bytearray(self.durable)
        for operation in self.pending:
            _apply(data, operation)
        return bytes(data)

    def cut(self, chance: random.Random, fate: Fate) -> bytes:
        """What the power cut leaves."""
        if fate == "lost" or not self.pending:
            return self.durable
        if fate == "kept":
            return self.now()
        data, sizes = bytearray(self.durable), [len(self.durable)]
        past: dict[int, list[bytes]] = {}
        for operation in self.pending:
            stop = max(len(data), operation.offset + len(operation.data))
            if operation.kind == Kind.WRITE:
                stop = operation.offset + len(operation.data)
            touched = range(operation.offset // SECTOR, -(-stop // SECTOR))
            for sector in touched:
                past.setdefault(sector, [_sector(data, sector)])
            _apply(data, operation)
            for sector in touched:
                past[sector].append(_sector(data, sector))
            sizes.append(len(data))
        left = bytearray(self.durable)
        for sector, versions in past.items():
            start = sector * SECTOR
            left.extend(bytes(max(0, start + SECTOR - len(left))))
            left[start : start + SECTOR] = chance.choice(versions)
        size = chance.choice(sizes)
        return bytes(left[:size].ljust(size, b"\0"))


def _sector(data: bytearray, number: int) -> bytes:
    return bytes(data[number * SECTOR : (number + 1) * SECTOR]).ljust(SECTOR, b"\0")


@dataclass(eq=False)
class _Folder:
    durable: dict[str, _Node] = field(default_factory=dict)
    now: dict[str, _Node] = field(default_factory=dict)


_Node = _File | _Folder


@dataclass(eq=False)
class _Naming:
    """A change of one or, for a rename, two names."""

    places: list[tuple[_Folder, str, _Node | None]]

    def touches(self, folder: _Folder) -> bool:
        return any(place[0] is folder for place in self.places)

    def names(self) -> set[tuple[int, str]]:
        return {(id(folder), name) for folder, name, _ in self.places}

    def make_durable(self) -> None:
        _set(self.places, durable=True)


class Disk:
    """A folder and everything that was done to it since it was looked at: all that was there then is durable."""

    def __init__(self, root: Path) -> None:
        self._files: dict[int, _File] = {}
        self._naming: list[_Naming] = []
        self._root = self._look(root)

    def _look(self, path: Path) -> _Folder:
        folder = _Folder()
        for entry in path.iterdir():
            if entry.is_dir():
                folder.durable[entry.name] = self._look(entry)
            else:
                folder.durable[entry.name] = self._files[entry.stat().st_ino] = _File(entry.read_bytes())
        folder.now = dict(folder.durable)
        return folder

    def copy(self) -> Disk:
        """Another one of the same state."""
        return copy.deepcopy(self)

    def replay(self, operations: Sequence[Operation]) -> None:
        """Do these operations."""
        for operation in operations:
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        match operation.kind:
            case Kind.WRITE | Kind.TRUNCATE:
                self._files[operation.inode].pending.append(operation)
            case Kind.SYNC:
                self._files[operation.inode].sync()
            case Kind.SYNC_FOLDER:
                self._sync_folder(self._folder(operation.path))
            case Kind.OPEN:
                # An inode number may come again; the newest file has it.
                file = self._files[operation.inode] = _File()
                self._name([(*self._place(operation.path), file)])
            case Kind.MKDIR:
                self._name([(*self._place(operation.path), _Folder())])
            case Kind.REMOVE:
                self._name([(*self._place(operation.path), None)])
            case Kind.RENAME:
                source, name = self._place(operation.path)
                self._name([(source, name, None), (*self._place(operation.target), source.now[name])])
            case Kind.NOTE:
                pass
            case _:
                raise NotImplementedError(f"{operation.path}: {operation.data.decode()} cannot be replayed")

    def _folder(self, path: str) -> _Folder:
        found: _Node = self._root
        for name in Path(path).parts:
            assert isinstance(found, _Folder)
            found = found.now[name]
        assert isinstance(found, _Folder)
        return found

    def _place(self, path: str) -> tuple[_Folder, str]:
        head, _, name = path.rpartition("/")
        return self._folder(head), name

    def _name(self, places: list[tuple[_Folder, str, _Node | None]]) -> None:
        _set(places, durable=False)
        self._naming.append(_Naming(places))

    def _sync_folder(self, folder: _Folder) -> None:
        """Make its changes of names durable, and what they build on: a rename has another end, which has a past."""
        needed: set[tuple[int, str]] = set()
        waiting = []
        for naming in reversed(self._naming):
            if naming.touches(folder) or naming.names() & needed:
                needed |= naming.names()
            else:
                waiting.append(naming)
        kept = {id(naming) for naming in waiting}
        for naming in self._naming:
            if id(naming) not in kept:
                naming.make_durable()
        self._naming = waiting[::-1]

    def cut(self, image: Path, chance: random.Random, fate: Fate) -> None:
        """Cut the power, and write what is left into the new folder `image`. Ends the life of this object."""
        dropped: set[tuple[int, str]] = set()
        for naming in self._naming:
            happens = {"lost": False, "kept": True, "mixed": chance.random() < 0.5}[fate]
            if happens and not naming.names() & dropped:
                naming.make_durable()
            else:
                dropped |= naming.names()
        self._write(self._root, image, chance, fate)

    def _write(self, folder: _Folder, path: Path, chance: random.Random, fate: Fate) -> None:
        path.mkdir()
        for name, node in folder.durable.items():
            if isinstance(node, _Folder):
                self._write(node, path / name, chance, fate)
            else:
                (path / name).write_bytes(node.cut(chance, fate))


def _apply(data: bytearray, operation: Operation) -> None:
    if operation.kind == Kind.TRUNCATE:
        del data[operation.offset :]
        data.extend(bytes(operation.offset - len(data)))
        return
    data.extend(bytes(max(0, operation.offset - len(data))))
    data[operation.offset : operation.offset + len(operation.data)] = operation.data


def _set(places: list[tuple[_Folder, str, _Node | None]], *, durable: bool) -> None:
    for folder, name, node in places:
        names = folder.durable if durable else folder.now
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node
