"""Full disks, failing writes and unlucky moments: what is refused is said, what was acknowledged stays."""

from __future__ import annotations

import errno
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import DiskFullError, StorageError
from storage.tree import journal, sealing
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
from tests.storage.support import CONTEXT, Text, assert_holds, follow, new_store, open_context, rows


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


# -- no room for segments ----------------------------------------------------------------------------------------------


def test_commits_go_on_while_sealing_has_no_room_and_sealing_catches_up(root: Path, disk: Disk) -> None:
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    with open_context(root, write_file=disk.write) as writer:
        writer.append([ONE.span(ENCODING)])
        wait_for(lambda: isinstance(writer.sealer.error, DiskFullError), "sealing to be refused")
        writer.append([TWO.span(ENCODING)])
        follow(writer, ENCODING)
        assert_reads(writer, ONE, TWO)
        with pytest.raises(DiskFullError, match="no space for a segment.*safe in the journal"):
            writer.flush()
        assert num_sealed(writer) == 0
        assert segment_folders(root) == set()
        disk.error = None
        writer.flush()
        assert writer.sealer.error is None
        assert num_sealed(writer) == 160
        assert_reads(writer, ONE, TWO)
    assert verify_context(root / CONTEXT, CONTEXT).ok


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), ValueError("a mistake")], ids=repr
)
def test_sealing_in_the_background_survives_what_it_meets(root: Path, disk: Disk, error: Exception) -> None:
    disk.error = error
    with open_context(root, write_file=disk.write) as writer:
        writer.append([ONE.span(ENCODING)])
        wait_for(lambda: writer.sealer.error is not None, "sealing to be refused")
        assert isinstance(writer.sealer.error, DiskFullError) == (error.args[0] == errno.ENOSPC)
        disk.error = None
        writer.append([TWO.span(ENCODING)])
        wait_for(lambda: num_sealed(writer) == 160 - 160 % 32, "sealing to catch up")
        wait_for(lambda: writer.sealer.error is None, "the error to be forgotten")
        assert_reads(writer, ONE, TWO)


def test_what_was_left_in_the_journal_is_sealed_by_the_next_writer(root: Path, disk: Disk) -> None:
    disk.error = OSError(errno.ENOSPC, "full")
    with open_context(root, write_file=disk.write) as writer:
        writer.append([ONE.span(ENCODING)])
    with open_context(root) as writer:
        wait_for(lambda: num_sealed(writer) == 96, "the leftovers to be sealed")
        assert_reads(writer, ONE)


def test_a_segment_whose_commit_found_the_disk_full_is_removed_and_written_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_context(root, seal_in_background=False) as writer:
        writer.append([ONE.span(ENCODING)])
        with monkeypatch.context() as patch:
            patch.setattr(
                sealing.SealedSegment, "record", raising(sqlite3.OperationalError("database or disk is full"))
            )
            with pytest.raises(DiskFullError):
                writer.flush()
        assert segment_folders(root) == set()
        writer.flush()
        assert num_sealed(writer) == 96
        assert_reads(writer, ONE)


def test_a_segment_whose_commit_failed_for_another_reason_is_left_to_recovery(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_context(root, seal_in_background=False) as writer:
        writer.append([ONE.span(ENCODING)])
        with monkeypatch.context() as patch:
            patch.setattr(sealing.SealedSegment, "record", raising(sqlite3.OperationalError("disk I/O error")))
            with pytest.raises(StorageError, match="disk I/O error"):
                writer.flush()
        # fsync failed, but the commit may be on the disk: its files must be, too.
        (left,) = segment_folders(root)
        writer.flush()
        assert left in segment_folders(root)
        assert num_sealed(writer) == 96
        assert_reads(writer, ONE)
    with open_context(root) as writer:
        assert left not in segment_folders(root)
        assert_reads(writer, ONE)
    assert verify_context(root / CONTEXT, CONTEXT).ok


# -- no room for commits -----------------------------------------------------------------------------------------------


def test_a_commit_without_room_stores_nothing_and_work_resumes(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        writer.append([ONE.span(ENCODING, 0, 50)])
        version, marks = writer.version(), writer.marks(["one"])
        [(pages,)] = rows(writer, "PRAGMA page_count")
        rows(writer, f"PRAGMA max_page_count = {pages + 1}")
        for write in (
            lambda: writer.append([ONE.span(ENCODING, 50), TWO.span(ENCODING)]),
            lambda: writer.append_tail(ONE.meta, 50 * K, ONE.tokens(50 * K, 60 * K).repeat(8)),
        ):
            for _ in range(2):
                with pytest.raises(DiskFullError, match="nothing of this write was stored"):
                    write()
                assert writer.version() == version
                assert writer.marks(["one", "two"]) == marks
                assert writer.open_document() == ONE.meta
        with writer.reader() as reader:
            assert reader.version == version
            assert reader.tail() is None
            np.testing.assert_array_equal(reader.tokens(0, 50)[0], ONE.packed(0, 50)[0])
        rows(writer, "PRAGMA max_page_count = 1073741823")
        writer.append([ONE.span(ENCODING, 50), TWO.span(ENCODING)])
        writer.flush()
        assert_reads(writer, ONE, TWO)
    assert verify_context(root / CONTEXT, CONTEXT).ok


def test_a_commit_waits_for_whoever_reads_with_the_same_connection(root: Path) -> None:
    entered, order = threading.Event(), []

    def commit() -> None:
        entered.set()
        with writer.commit():
            order.append("committed")

    with open_context(root) as writer:
        thread = threading.Thread(target=commit)
        with writer.reading():
            thread.start()
            entered.wait()
            thread.join(timeout=0.2)
            order.append("read")
        thread.join()
    assert order == ["read", "committed"]


@pytest.mark.parametrize(
    "error",
    [sqlite3.OperationalError("disk I/O error"), KeyboardInterrupt(), MemoryError(), ValueError("a mistake")],
    ids=repr,
)
def test_a_failing_commit_leaves_the_writer_usable(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with open_context(root) as writer:
        writer.append([ONE.span(ENCODING, 0, 10)])
        writer.append_tail(ONE.meta, 10 * K, ONE.tokens(10 * K, 11 * K))
        version, marks = writer.version(), writer.marks(["one"])
        with monkeypatch.context() as patch:
            patch.setattr(journal, "insert_all", raising(error))
            with pytest.raises((StorageError, type(error))):
                writer.append([ONE.span(ENCODING, 10), TWO.span(ENCODING)])
        with writer.reading() as db:
            assert not db.in_transaction
        assert (writer.version(), writer.marks(["one", "two"])) == (version, marks)
        assert writer.open_document() == ONE.meta
        writer.append([ONE.span(ENCODING, 10), TWO.span(ENCODING)])
        assert_reads(writer, ONE, TWO)
    assert verify_context(root / CONTEXT, CONTEXT).ok


# -- a disk that is really full ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("bulk", [False, True], ids=["journal", "bulk"])
def test_a_disk_that_is_really_full(small_disk: Path, bulk: bool) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    reserve = small_disk / "reserve"
    reserve.write_bytes(bytes(1 << 18))
    new_store(small_disk, ENCODING)
    text = Text("doc", 40_000 * K)
    context = open_context(small_disk)
    tree = BulkWriter(context) if bulk else context

    def fill() -> None:
        while True:
            mark = tree.marks(["doc"]).get("doc")
            first = mark.num_blocks if mark else 0
            tree.append([text.span(ENCODING, first, first + 64)])

    with pytest.raises(DiskFullError):
        fill()
    stored = tree.marks(["doc"])["doc"].num_blocks
    assert stored > 100
    assert_reads(tree, Text("doc", stored * K, size_bytes=text.num_tokens))
    with pytest.raises(DiskFullError):
        fill()
    ballast.unlink()
    while True:
        try:
            fill()
        except DiskFullError:
            break
    more = tree.marks(["doc"])["doc"].num_blocks
    assert more > stored + 100
    context.close()
    report = verify_context(small_disk / CONTEXT, CONTEXT)
    assert report.ok, report.problems
    # A writer enters itself in the catalogue, for which the last bytes may be missing; readers need none.
    reserve.unlink()
    with open_context(small_disk, seal_in_background=False) as again, again.reader() as reader:
        assert again.version().num_blocks == more
        assert_holds(reader, [Text("doc", more * K, size_bytes=text.num_tokens)], ENCODING)


# -- unlucky moments ---------------------------------------------------------------------------------------------------


def test_readers_never_miss_a_node_while_it_moves_into_a_segment(root: Path) -> None:
    text = Text("doc", 2000 * K)
    spec = ENCODING.arrays[0]
    num_reads, faults, done = [0, 0], [], threading.Event()

    def read_on(number: int) -> None:
        chosen = np.random.default_rng(number)
        try:
            while not done.is_set():
                with writer.reader() as reader:
                    size = reader.version.num_blocks
                    # The same reader over several seals: its list of segments is the one it began with.
                    for _ in range(20):
                        blocks = chosen.integers(0, size, 8)
                        wanted = torch.cat([text.gists(block, block + 1, spec) for block in blocks])
                        assert torch.equal(reader.read("gists", 1, blocks).reshape(8, -1), wanted)
                        first = int(chosen.integers(0, size))
                        tokens, _ = reader.tokens(first, min(50, size - first))
                        np.testing.assert_array_equal(tokens, text.packed(first, min(first + 50, size))[0])
                        num_reads[number] += 1
        except BaseException as error:
            faults.append(error)

    with open_context(root) as writer:
        writer.append([text.span(ENCODING, 0, 20)])
        threads = [threading.Thread(target=read_on, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for first in range(20, 2000, 9):
            writer.append([text.span(ENCODING, first, min(first + 9, 2000))])
        while min(num_reads) < 40 and not faults:
            time.sleep(0.01)
        done.set()
        for thread in threads:
            thread.join()
        assert not faults, faults
        writer.flush()
        assert_reads(writer, text)


def test_a_context_that_is_written_and_sealed_meanwhile_verifies(root: Path) -> None:
    text = Text("doc", 1500 * K)
    with open_context(root) as writer:
        writer.append([text.span(ENCODING, 0, 20)])
        reports = []

        def verify() -> None:
            while writer.version().num_blocks < 1500:
                reports.append(verify_context(root / CONTEXT, CONTEXT))

        thread = threading.Thread(target=verify)
        thread.start()
        for first in range(20, 1500, 7):
            writer.append([text.span(ENCODING, first, min(first + 7, 1500))])
        thread.join()
    assert reports
    assert [report.problems for report in reports if not report.ok] == []
