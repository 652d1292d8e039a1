"""Rows of the catalogue that say who did what: versions, and the audit log."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage.row_checksums import row_crc


@dataclass(frozen=True)
class Writing:
    """On whose behalf a writer commits."""

    author: str
    job: str
    """The run and job, or the process, that holds the writer's place."""

    @classmethod
    def of_this_process(cls, job: str = "") -> Writing:
        """The user that this process runs as; without a job, the process itself."""
        return cls(_user(), job or f"pid {os.getpid()} on {socket.gethostname()}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # In a container a user may have a number and no name.
        return f"uid {os.getuid()}"


def insert_commit(
    db: sqlite3.Connection,
    writing: Writing,
    branch_id: int,
    encoding_id: int,
    num_tokens: int,
    counts: Sequence[int],
    request_id: str,
    message: str = "",
) -> int:
    """Add a version and move the branch's tip to it; call inside a transaction. Returns its seq."""
    seq = int(db.execute("SELECT coalesce(max(seq), 0) + 1 FROM commits").fetchone()[0])
    # In the order of the columns' names, as their checksum has them.
    row = (
        writing.author,
        branch_id,
        time.time(),
        encoding_id,
        writing.job,
        f"[{', '.join(map(str, counts))}]",
        message,
        num_tokens,
        request_id,
        seq,
    )
    db.execute(
        "INSERT INTO commits (author, branch_id, created_at, encoding_id, job, level_counts, message, num_tokens, "
        "request_id, seq, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, row_crc(*row)),
    )
    # Also a check: a page that has lost its last rows is sound otherwise, and an earlier version would be served.
    db.execute("UPDATE branches SET head_seq = ? WHERE branch_id = ?", (seq, branch_id))
    return seq


def insert_audit(db: sqlite3.Connection, writing: Writing, action: str, detail: Mapping[str, object]) -> None:
    """Add a line to the audit log; call inside the transaction of what it tells of."""
    db.execute(
        "INSERT INTO audit (at, actor, action, detail) VALUES (?, ?, ?, ?)",
        (time.time(), f"{writing.author}, {writing.job}", action, json.dumps(detail)),
    )
