"""Blocks that go straight into segments: gathered, written behind the feed, refused by the disk."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import DiskFullError, OutOfOrderError
from storage.tree import sealing
from storage.tree.bulk_writer import BulkWriter
from storage.tree.verify import verify_context
from tests.storage.fault_support import (
    ENCODING,
    ONE,
    TWO,
    Disk,
    assert_reads,
    num_sealed,
    raising,
    segment_folders,
    wait_for,
)
from tests.storage.support import CONTEXT, Text, follow, new_store, open_context, put, rows


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


def test_a_bulk_write_without_room_stores_nothing_and_the_marks_say_where_to_go_on(root: Path, disk: Disk) -> None:
    with open_context(root, write_file=disk.write) as writer:
        bulk = BulkWriter(writer)
        assert bulk.append([ONE.span(ENCODING, 0, 40)]).pending_blocks == 8
        disk.error = OSError(errno.ENOSPC, "full")
        assert bulk.append([ONE.span(ENCODING, 40, 60)]).pending_blocks == 28
        with pytest.raises(DiskFullError):
            bulk.append([ONE.span(ENCODING, 60, 70)])
        assert bulk.marks(["one"])["one"].num_blocks == 32
        with pytest.raises(OutOfOrderError, match="stored up to block 32; the span starts at 70"):
            bulk.append([ONE.span(ENCODING, 70, 80)])
        disk.error = None
        assert put(bulk, ONE.span(ENCODING, 20), TWO.span(ENCODING)) == (68 + 60, 12)
        assert_reads(bulk, ONE, TWO)
    assert verify_context(root / CONTEXT, CONTEXT).ok


def test_a_bulk_segment_whose_commit_found_the_disk_full_is_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_context(root) as writer:
        bulk = BulkWriter(writer)
        with monkeypatch.context() as patch:
            patch.setattr(
                sealing.SealedSegment, "record", raising(sqlite3.OperationalError("database or disk is full"))
            )
            with pytest.raises(DiskFullError):
                bulk.append([ONE.span(ENCODING)])
        assert segment_folders(root) == set()
        assert writer.version().num_blocks == 0
        put(bulk, ONE.span(ENCODING))
        assert_reads(bulk, ONE)


def test_segments_of_a_fast_feed_share_a_commit_and_none_waits_for_ever(root: Path) -> None:
    long = Text("long", 12 * 32 * K)
    with open_context(root) as writer:
        bulk = BulkWriter(writer, gather_s=3600.0)
        # The first has nobody to wait for; then eight of them fill.
        assert bulk.append([long.span(ENCODING, 0, 40)]).pending_blocks == 40
        wait_for(lambda: writer.version().num_blocks == 32, "the first segment")
        seq = bulk.version().seq
        told = bulk.append([long.span(ENCODING, 40, 9 * 32 - 1)]).new_blocks
        # A segment counts when its thread is done, a moment after its commit.
        assert told in {0, 32}
        assert bulk.append([long.span(ENCODING, 9 * 32 - 1, 10 * 32)]).new_blocks == 32 - told
        wait_for(lambda: writer.version().num_blocks == 9 * 32, "eight segments")
        assert bulk.version().seq == seq + 1
        assert rows(writer, "SELECT first, count FROM extents WHERE lod = 1 ORDER BY first") == [(0, 32), (32, 256)]
        told = bulk.append([long.span(ENCODING, 10 * 32)]).new_blocks
        assert told in {0, 8 * 32}
        assert bulk.flush().new_blocks == 11 * 32 - told
        assert rows(writer, "SELECT count(*) FROM journal WHERE lod < 2") == [(0,)]
        assert_reads(bulk, long)


def test_while_a_segment_is_written_the_feed_and_the_levels_above_go_on(root: Path, disk: Disk) -> None:
    with open_context(root, write_file=disk.write) as writer:
        bulk = BulkWriter(writer, gather_s=1e-6)
        put(bulk, ONE.span(ENCODING, 0, 64))
        disk.busy.clear()
        disk.go_on.clear()
        assert bulk.append([ONE.span(ENCODING, 64, 96)]).pending_blocks == 32
        assert disk.busy.wait(20)
        # Neither the next spans nor nodes of stored blocks nor marks wait for the disk.
        assert bulk.append([ONE.span(ENCODING, 96), TWO.span(ENCODING, 0, 10)]).pending_blocks == 32 + 4 + 10
        follow(bulk, ENCODING)
        assert bulk.version().level_counts == (64, 2)
        assert bulk.marks(["one", "two"]).keys() == {"one"}
        disk.go_on.set()
        assert bulk.flush().new_blocks == 46
        put(bulk, TWO.span(ENCODING, 10))
        assert_reads(bulk, ONE, TWO)
        bulk.close()
    assert verify_context(root / CONTEXT, CONTEXT).ok


def test_a_segment_that_could_not_be_written_is_told_to_the_next_call(root: Path, disk: Disk) -> None:
    with open_context(root, write_file=disk.write) as writer:
        bulk = BulkWriter(writer, gather_s=1e-6)
        put(bulk, ONE.span(ENCODING, 0, 32))
        disk.error = OSError(errno.ENOSPC, "full")
        assert bulk.append([ONE.span(ENCODING, 32, 70)]).pending_blocks == 38
        wait_for(lambda: disk.num_refused > 0, "the disk to refuse")
        with pytest.raises(DiskFullError):
            bulk.flush()
        assert bulk.marks(["one"])["one"].num_blocks == 32
        with pytest.raises(OutOfOrderError, match="stored up to block 32; the span starts at 70"):
            bulk.append([ONE.span(ENCODING, 70)])
        disk.error = None
        put(bulk, ONE.span(ENCODING, 32))
        assert_reads(bulk, ONE)
        bulk.close()
    assert verify_context(root / CONTEXT, CONTEXT).ok


def test_a_segment_is_not_put_where_something_else_was_written_meanwhile(root: Path, disk: Disk) -> None:
    with open_context(root, write_file=disk.write) as writer:
        bulk = BulkWriter(writer, gather_s=1e-6)
        put(bulk, ONE.span(ENCODING, 0, 32))
        folders = segment_folders(root)
        disk.busy.clear()
        disk.go_on.clear()
        bulk.append([ONE.span(ENCODING, 32, 64)])
        assert disk.busy.wait(20)
        writer.append([ONE.span(ENCODING, 32, 40)])
        disk.go_on.set()
        with pytest.raises(OutOfOrderError, match="changed while a segment was written"):
            bulk.flush()
        assert segment_folders(root) == folders
        put(bulk, ONE.span(ENCODING, 40))
        assert_reads(bulk, ONE)
        bulk.close()
    assert verify_context(root / CONTEXT, CONTEXT).ok


def test_a_bulk_write_waits_for_the_sealing_in_front_of_it(root: Path, disk: Disk) -> None:
    with open_context(root, write_file=disk.write) as writer:
        bulk = BulkWriter(writer)
        put(bulk, ONE.span(ENCODING, 0, 10))
        disk.go_on.clear()
        disk.busy.clear()
        # Fills the first segment through the journal; the sealing thread now holds its lock and will want the writer's.
        bulk.append([ONE.span(ENCODING, 10, 32)])
        assert disk.busy.wait(20)
        direct = threading.Thread(target=bulk.append, args=([ONE.span(ENCODING, 32)],), daemon=True)
        direct.start()
        time.sleep(0.1)
        # Commits are not held up by it.
        assert writer.marks(["one"])["one"].num_blocks == 32
        disk.go_on.set()
        direct.join(20)
        assert not direct.is_alive(), "the bulk write and the sealing thread wait for each other"
        bulk.flush()
        assert num_sealed(writer) == 96
        assert_reads(bulk, ONE)
    assert verify_context(root / CONTEXT, CONTEXT).ok
