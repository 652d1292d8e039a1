"""Finds commits that SQLite's log has lost: it takes a damaged frame for the log's end, and says nothing.

A commit is acknowledged when its frames are synced, and only then does the next one begin. So a damaged frame that is
followed by frames of a later commit was on the disk once, and what SQLite drops was acknowledged. Damage in the last
commit of a log cannot be told from one that a power cut left half written.

A frame's checksum goes on from that of the frame before it, which its header holds: two frames belong together when
the second follows from the first, whatever precedes them. Format: https://www.sqlite.org/fileformat2.html#walformat

A log is begun anew once all of it is in the database file, by a header written over the old one, before the old frames.
A header of which half was written looks like a damaged one; the database then holds every page those frames hold.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
from pathlib import Path

import numpy as np

from storage.durable import fsync_folder, write_file_durably

_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_MAGIC = (0x377F0682, 0x377F0683)
"""The second is of logs whose checksums read words as big-endian."""

Sum = tuple[int, int]


@functools.lru_cache(maxsize=4)
def _weights(num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """What each pair of words adds to the two sums: `(4, num_pairs)`, and what the seed does: `(4,)`, uint32.

    The checksum `s0 += x0 + s1; s1 += x1 + s0` over pairs is linear modulo 2^32, so that all of a frame is one product
    instead of a loop over a thousand words.
    """
    weights = np.empty((4, num_pairs), np.uint32)
    # A pair's own step gives (x0, x0 + x1); each later step maps (a, b) to (a + b, a + 2b).
    power = [1, 0, 0, 1]
    for pair in reversed(range(num_pairs)):
        a, b, c, d = power
        weights[:, pair] = ((a + b) % 2**32, b, (c + d) % 2**32, d)
        power = [(a + b) % 2**32, (a + 2 * b) % 2**32, (c + d) % 2**32, (c + 2 * d) % 2**32]
    return weights, np.array(power, np.uint32)


def _checksum(data: bytes, seed: Sum, order: str) -> Sum:
    words = np.frombuffer(data, f"{order}u4").astype(np.uint32).reshape(-1, 2)
    weights, power = _weights(len(words))
    x, y = words[:, 0], words[:, 1]
    s0 = int((weights[0] * x + weights[1] * y).sum(dtype=np.uint32))
    s1 = int((weights[2] * x + weights[3] * y).sum(dtype=np.uint32))
    a, b, c, d = (int(value) for value in power)
    return (s0 + a * seed[0] + b * seed[1]) % 2**32, (s1 + c * seed[0] + d * seed[1]) % 2**32


def _stored(data: bytes, offset: int) -> Sum:
    return int.from_bytes(data[offset : offset + 4], "big"), int.from_bytes(data[offset + 4 : offset + 8], "big")


def lost_commits(database: Path) -> str:
    """What a database's log shows to be lost, in words; empty when it shows nothing.

    May run beside a writer. Only the log is opened, on which SQLite holds no locks; the database is read by SQLite.

    Args:
        database: the file whose `-wal` is looked at.
    """
    path = Path(f"{database}-wal")
    for _ in range(5):
        try:
            data = path.read_bytes()
            with path.open("rb") as file:
                same = file.read(_HEADER_BYTES) == data[:_HEADER_BYTES]
        except FileNotFoundError:
            return ""
        # A log that was begun anew while it was read begins with another header.
        if same:
            frame = _first_damaged(data, database)
            if frame is None:
                return ""
            return (
                f"{path}: frame {frame} is damaged, and commits that were acknowledged behind it are gone; an "
                "earlier version is served, whole. Restore the context from a backup, or go on from that version"
            )
    return ""


def forget_lost_commits(database: Path) -> None:
    """Cut a log where SQLite ends it, and keep what it was beside it, as `<database>-wal.damaged`. For when nothing has
    the database open: it is then what it has been read as since the damage."""
    path = Path(f"{database}-wal")
    data = path.read_bytes()
    frame = _first_damaged(data, database)
    if frame is None:
        return
    write_file_durably(Path(f"{path}.damaged"), data)
    size = _FRAME_HEADER_BYTES + int.from_bytes(data[8:12], "big")
    with path.open("r+b") as file:
        file.truncate(_HEADER_BYTES + (frame - 1) * size if frame else 0)
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def _first_damaged(data: bytes, database: Path) -> int | None:
    """Number, from 1, of a damaged frame (0 is the header) that later commits follow."""
    if len(data) < _HEADER_BYTES:
        return None
    order = ">" if data[3] & 1 else "<"
    page = int.from_bytes(data[8:12], "big")
    header_is_sound = (
        int.from_bytes(data[:4], "big") in _MAGIC
        and _checksum(data[:24], (0, 0), order) == _stored(data, 24)
        and page >= 512
        and page & (page - 1) == 0
    )
    if not header_is_sound:
        return 0 if _header_was_damaged(data, database) else None
    size = _FRAME_HEADER_BYTES + page
    frames = _frames(data, size)
    salts, running = data[16:24], _stored(data, 24)
    for number, frame in enumerate(frames):
        running = _checksum(frame[:8] + frame[_FRAME_HEADER_BYTES:], running, order)
        if frame[8:16] != salts or running != _stored(frame, 16):
            # Its own checksum, or the one it should have had, is what the next one goes on from.
            seeds = (running, _stored(frame, 16))
            return number + 1 if _commits_follow(frames[number:], seeds, salts, order) else None
    return None


def _commits_follow(frames: list[bytes], seeds: tuple[Sum, ...], salts: bytes, order: str) -> bool:
    """Whether a commit ends in a damaged frame or behind it, and another frame follows from that one."""
    before = seeds
    ended = frames[0][4:8] != bytes(4)
    for frame in frames[1:]:
        body = frame[:8] + frame[_FRAME_HEADER_BYTES:]
        stored = _stored(frame, 16)
        follows = frame[8:16] == salts and any(_checksum(body, seed, order) == stored for seed in before)
        if follows and ended:
            return True
        # A chain that breaks may begin anew with the next frame; what ended before it proves nothing then.
        ended = frame[4:8] != bytes(4) and (follows or frame[8:16] == salts)
        before = (stored,)
    return False


def _header_was_damaged(data: bytes, database: Path) -> bool:
    """Whether a header that is not sound stands before frames of its own time, with commits the database misses."""
    for order in ("<", ">"):
        for page in (1 << bits for bits in range(9, 17)):
            frames = _frames(data, _FRAME_HEADER_BYTES + page)
            # A log begun anew changes both salts; damage one of them at most.
            ours = frames and (frames[0][8:12] == data[16:20] or frames[0][12:16] == data[20:24])
            if ours and _commits_follow(frames, (_stored(frames[0], 16),), frames[0][8:16], order):
                return not _folded_in(frames, database)
    return False


def _folded_in(frames: list[bytes], database: Path) -> bool:
    """Whether a database file holds all that the frames of a log have committed.

    A frame's header begins with the number of its page, from 1, and, of a commit's last one, the database's size.
    """
    salts, committed = frames[0][8:16], {}
    pending: dict[int, bytes] = {}
    for frame in frames:
        if frame[8:16] != salts:
            break
        pending[int.from_bytes(frame[:4], "big")] = frame[_FRAME_HEADER_BYTES:]
        if frame[4:8] != bytes(4):
            committed.update(pending)
            pending.clear()
    # Through SQLite: were the file opened here, closing it would drop all locks that this process has on it.
    try:
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?immutable=1", uri=True)) as connection:
            image = memoryview(connection.serialize())
    except sqlite3.Error:
        return False
    return all(image[(number - 1) * len(page) : number * len(page)] == page for number, page in committed.items())


def _frames(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(_HEADER_BYTES, len(data) - size + 1, size)]
