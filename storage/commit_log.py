"""What SQLite's log holds behind the point at which SQLite stops to read it.

SQLite takes the first frame whose checksum is wrong for the end of the log and says nothing. After a power cut that is
right: a commit is synced before the next one begins, so there is at most one behind that point. Two or more that follow
from one another mean that a frame was damaged later, and that commits which were acknowledged are not seen any more.
(Commits that failed can also lie there; none follows from another, because each began at the end that is seen.)
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from cluster.errors import CorruptTreeError

# https://www.sqlite.org/fileformat2.html#the_write_ahead_log and https://www.sqlite.org/walformat.html
_HEADER_BYTES = 32
_FRAME_HEADER = np.dtype([("page", ">u4"), ("pages_after_commit", ">u4"), ("salt", "S8"), ("checksum", "S8")])
_BIG_ENDIAN = 0x377F0683


def check_log(catalogue: Path) -> None:
    """Look behind the end of a catalogue's log; a connection to it must be open and have read.

    Raises:
        CorruptTreeError: commits are cut off by a damaged frame.
    """
    unseen = _num_unseen_commits(catalogue)
    if unseen > 1:
        raise CorruptTreeError(
            f"{catalogue}-wal is damaged: {unseen} commits behind the damage cannot be read. Restore it and the catalogue "
            "from a backup. To give these commits up: sqlite3 "
            f"{catalogue.name} 'PRAGMA wal_checkpoint(TRUNCATE)'"
        )


def _num_unseen_commits(catalogue: Path) -> int:
    log, shared_memory = Path(f"{catalogue}-wal"), Path(f"{catalogue}-shm")
    try:
        with catalogue.open("rb") as file:
            page_bytes = struct.unpack(">H", file.read(18)[16:])[0]
        data = log.read_bytes()
        # Read after the log: what a live writer adds meanwhile is seen.
        with shared_memory.open("rb") as file:
            index = file.read(48)
        with log.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return 0
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    stride = _FRAME_HEADER.itemsize + page_bytes
    num_frames = (len(data) - _HEADER_BYTES) // stride
    # A log that was begun anew meanwhile is another.
    if page_bytes < 512 or num_frames < 1 or len(index) < 48 or header != data[:_HEADER_BYTES]:
        return 0
    frames = np.ndarray(num_frames, _FRAME_HEADER, data, _HEADER_BYTES, strides=(stride,))
    if _is_sound(header):
        salt = header[16:24]
        if index[32:40] != salt:
            return 0
    else:
        salt = frames["salt"][0]
    num_seen = int(struct.unpack("=I", index[16:20])[0])
    # NumPy strips zeros at the end of such strings, so both sides go through it.
    ours = frames["salt"] == np.array(salt, "S8")
    commits = ours & (frames["pages_after_commit"] > 0)
    if commits[num_seen:].sum() < 2:
        return 0
    order = _byte_order(header)
    most = in_row = 0
    for number in range(num_seen + 1, num_frames):
        start = _HEADER_BYTES + number * stride
        before = data[start - stride + 16 : start - stride + 24]
        parts = data[start : start + 8] + data[start + 24 : start + stride]
        if not ours[number] or _checksum(parts, order, struct.unpack(">2I", before)) != data[start + 16 : start + 24]:
            in_row = 0
        in_row += int(commits[number])
        most = max(most, in_row)
    return most


def _byte_order(header: bytes) -> str:
    return ">" if struct.unpack(">I", header[:4])[0] == _BIG_ENDIAN else "<"


def _is_sound(header: bytes) -> bool:
    return _checksum(header[:24], _byte_order(header), (0, 0)) == header[24:32]


def _checksum(data: bytes, order: str, before: tuple[int, ...]) -> bytes:
    """SQLite's, of a multiple of 8 bytes, going on from that of what precedes them."""
    first, second = before
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return struct.pack(">2I", first, second)
