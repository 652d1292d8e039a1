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
    cursor = db.execute(
        "INSERT INTO commits (branch_id, encoding_id, num_tokens, level_counts, created_at, request_id, author, job, "
        "message) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            branch_id,
            encoding_id,
            num_tokens,
            f"[{', '.join(map(str, counts))}]",
            time.time(),
            request_id,
            writing.author,
            writing.job,
            message,
        ),
    )
    seq = cursor.lastrowid
    assert seq is not None
    db.execute("UPDATE branches SET head_seq = ? WHERE branch_id = ?", (seq, branch_id))
    return seq


def insert_audit(db: sqlite3.Connection, writing: Writing, action: str, detail: Mapping[str, object]) -> None:
    """Add a line to the audit log; call inside the transaction of what it tells of."""
    db.execute(
        "INSERT INTO audit (at, actor, action, detail) VALUES (?, ?, ?, ?)",
        (time.time(), f"{writing.author}, {writing.job}", action, json.dumps(detail)),
    )
