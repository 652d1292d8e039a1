"""What a database's log shows to be lost, and what only looks so."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.tree.log_check import forget_lost_commits, lost_commits

HEADER, PAGE = 32, 4096
FRAME = 24 + PAGE


@pytest.fixture
def died(tmp_path: Path) -> Callable[..., Path]:
    """Makes what a process leaves that dies after so many commits, of which the first were folded in, and the log
    begun anew for the others."""

    def make(folded: int, commits: int) -> Path:
        alive = tmp_path / "alive.sqlite"
        db = sqlite3.connect(alive, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA wal_autocheckpoint=0")
        db.execute("CREATE TABLE words (word TEXT)")
        for number in range(folded + commits):
            db.execute("INSERT INTO words VALUES (?)", (str(number) * 3000,))
            if number == folded - 1:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        dead = tmp_path / "dead.sqlite"
        for end in ("", "-wal"):
            shutil.copyfile(f"{alive}{end}", f"{dead}{end}")
        db.close()
        return dead

    return make


def _words(database: Path) -> int:
    with sqlite3.connect(database) as db:
        return db.execute("SELECT count(*) FROM words").fetchone()[0]


def _change(database: Path, at: int, data: bytes) -> None:
    with Path(f"{database}-wal").open("r+b") as log:
        log.seek(at)
        log.write(data)


def _flip(database: Path, at: int) -> None:
    log = Path(f"{database}-wal").read_bytes()
    _change(database, at, bytes([log[at] ^ 16]))


def _begin_anew(database: Path) -> bytes:
    """The header SQLite would write next."""
    alive = Path(f"{database}.next")
    for end in ("", "-wal"):
        shutil.copyfile(f"{database}{end}", f"{alive}{end}")
    db = sqlite3.connect(alive, isolation_level=None)
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    db.execute("INSERT INTO words VALUES ('next')")
    header = Path(f"{alive}-wal").read_bytes()[:HEADER]
    db.close()
    return header


@pytest.mark.parametrize(("folded", "commits"), [(0, 6), (4, 2), (6, 0)])
def test_a_sound_log_has_lost_nothing(died: Callable[..., Path], folded: int, commits: int) -> None:
    assert lost_commits(died(folded, commits)) == ""


@pytest.mark.parametrize("at", [1, 9, 13, 17, 21, 26])
def test_a_damaged_header_loses_every_commit_of_the_log(died: Callable[..., Path], at: int) -> None:
    database = died(2, 4)
    _flip(database, at)
    assert "frame 0 is damaged" in lost_commits(database)
    forget_lost_commits(database)
    assert lost_commits(database) == ""
    assert _words(database) == 2


@pytest.mark.parametrize("written", [4, 13, 16, 18, 20, 22, 24, 27, 31])
def test_a_header_half_written_when_the_log_is_begun_anew_loses_nothing(
    died: Callable[..., Path], written: int
) -> None:
    database = died(6, 0)
    header = _begin_anew(database)
    assert header[16:24] != Path(f"{database}-wal").read_bytes()[16:24]
    _change(database, 0, header[:written])
    assert lost_commits(database) == ""
    assert _words(database) == 6


def test_looking_at_the_database_leaves_the_locks_of_this_process_alone(died: Callable[..., Path]) -> None:
    database = died(6, 0)
    header = _begin_anew(database)
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("SELECT count(*) FROM words").fetchone() == (6,)
        assert _is_locked(database)
        _change(database, 0, header[:20])
        assert lost_commits(database) == ""
        assert _is_locked(database)


def _is_locked(database: Path) -> bool:
    """Whether another process may not have the file for itself, which is what SQLite's last user takes it for."""
    program = (
        "import fcntl, sys\n"
        "with open(sys.argv[1], 'r+b') as file:\n"
        "    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(database)], capture_output=True, text=True)
    assert done.returncode == 0 or "BlockingIOError" in done.stderr, done.stderr
    return done.returncode != 0


def test_damage_inside_is_told_from_damage_in_the_last_commit(died: Callable[..., Path]) -> None:
    database = died(0, 6)
    num_frames = (Path(f"{database}-wal").stat().st_size - HEADER) // FRAME
    _flip(database, HEADER + 2 * FRAME + 100)
    assert "frame 3 is damaged" in lost_commits(database)
    _flip(database, HEADER + 2 * FRAME + 100)
    _flip(database, HEADER + (num_frames - 1) * FRAME + 100)
    assert lost_commits(database) == ""
