"""The model of a disk keeps what was synced, and nothing else for sure."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.torture.crash_image import SECTOR, Disk, Fate, Operation
from tests.torture.interposer import Kind


def op(kind: Kind, path: str = "", target: str = "", inode: int = 0, offset: int = 0, data: bytes = b"") -> Operation:
    return Operation(kind, path, target, inode, offset, data)


def new_file(path: str, inode: int, data: bytes, *, synced: bool = True) -> list[Operation]:
    made = [op(Kind.OPEN, path, inode=inode), op(Kind.WRITE, path, inode=inode, data=data)]
    return [*made, op(Kind.SYNC, path, inode=inode)] if synced else made


@pytest.fixture
def base(scratch: Path) -> Path:
    folder = scratch / "base"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    return folder


def cut(base: Path, operations: list[Operation], fate: Fate = "lost", seed: int = 0) -> dict[str, bytes]:
    """Files a cut leaves; folders as empty bytes."""
    disk = Disk(base)
    disk.replay(operations)
    image = base.parent / f"image{len(list(base.parent.iterdir()))}"
    disk.cut(image, random.Random(seed), fate)
    found = {}
    for path in sorted(image.rglob("*")):
        found[path.relative_to(image).as_posix()] = path.read_bytes() if path.is_file() else b""
    return found


def test_a_synced_file_needs_its_folder_synced(base: Path) -> None:
    operations = new_file("new", 7, b"abc")
    assert cut(base, operations) == {"old": b"old"}
    assert cut(base, [*operations, op(Kind.SYNC_FOLDER)]) == {"old": b"old", "new": b"abc"}


def test_a_synced_name_does_not_bring_the_data(base: Path) -> None:
    operations = [*new_file("new", 7, b"abc", synced=False), op(Kind.SYNC_FOLDER)]
    assert cut(base, operations) == {"old": b"old", "new": b""}
    assert cut(base, operations, "kept") == {"old": b"old", "new": b"abc"}


def test_a_folder_is_as_durable_as_its_name(base: Path) -> None:
    operations = [op(Kind.MKDIR, "f"), *new_file("f/new", 7, b"abc"), op(Kind.SYNC_FOLDER, "f")]
    assert cut(base, operations) == {"old": b"old"}
    assert cut(base, [*operations, op(Kind.SYNC_FOLDER)]) == {"old": b"old", "f": b"", "f/new": b"abc"}


def test_a_rename_happens_as_a_whole_or_not_at_all(base: Path) -> None:
    operations = [*new_file("tmp", 7, b"abc"), op(Kind.SYNC_FOLDER), op(Kind.RENAME, "tmp", target="old")]
    found = [cut(base, operations, "mixed", seed) for seed in range(20)]
    assert {tuple(each.items()) for each in found} == {(("old", b"old"), ("tmp", b"abc")), (("old", b"abc"),)}


def test_changes_of_a_name_keep_their_order(base: Path) -> None:
    operations = [op(Kind.REMOVE, "old"), *new_file("old", 7, b"abc")]
    found = [cut(base, operations, "mixed", seed) for seed in range(30)]
    assert {each.get("old") for each in found} == {b"old", None, b"abc"}


def test_unsynced_writes_are_torn_by_the_sector(base: Path) -> None:
    synced = [*new_file("new", 7, b"a" * 3 * SECTOR), op(Kind.SYNC_FOLDER)]
    operations = [*synced, op(Kind.WRITE, "new", inode=7, data=b"b" * 3 * SECTOR)]
    seen = {cut(base, operations, "mixed", seed)["new"] for seed in range(60)}
    assert seen == {b"".join(letter * SECTOR for letter in (x, y, z)) for x in AB for y in AB for z in AB}


AB = (b"a", b"b")


def test_an_unsynced_size_is_any_it_had(base: Path) -> None:
    operations = [*new_file("new", 7, b"abcdef"), op(Kind.SYNC_FOLDER), op(Kind.TRUNCATE, "new", inode=7, offset=2)]
    assert {cut(base, operations, "mixed", seed)["new"] for seed in range(30)} == {b"ab", b"ab\0\0\0\0", b"abcdef"}


def test_what_cannot_be_replayed_is_refused(base: Path) -> None:
    with pytest.raises(NotImplementedError, match="new: mmap"):
        cut(base, [op(Kind.UNSUPPORTED, "new", data=b"mmap")])
