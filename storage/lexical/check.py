"""Whether a context's lexical index says what its blocks say, as far as that can be told without reading text."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from storage import row_checksums
from storage.lexical.index import LEXICAL_FILE, LEXICAL_FORMAT, IndexState, damaged_rows, is_damage
from storage.tree import catalogue
from storage.tree.log_check import lost_commits

REMEDY = "the index is derived: delete it, or let `tree repair` build it anew"


def check_index(folder: Path, num_blocks: Mapping[int, int]) -> list[str]:
    """One line for each thing that is wrong with a context's index; empty where there is none.

    Args:
        folder: of the context.
        num_blocks: blocks of the newest version of each branch, by its number.

    Raises:
        StorageError: the machine refused to read.
    """
    path = folder / LEXICAL_FILE
    if not path.exists():
        return []
    try:
        with contextlib.closing(_connect(path)) as db:
            found = list(_problems(db, num_blocks))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.OperationalError) and not is_damage(error):
            with catalogue.translated(path):
                raise
        found = [str(error)]
    if lost := lost_commits(path):
        found.append(lost)
    return [f"{path}: {problem}; {REMEDY}" for problem in found]


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30.0)
    row_checksums.register(db)
    return db


def _problems(db: sqlite3.Connection, num_blocks: Mapping[int, int]) -> list[str]:
    problems = [row[0] for row in db.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
    if problems:
        return problems
    with catalogue.snapshot(db):
        state = IndexState.load(db)
        if state.format != LEXICAL_FORMAT:
            # Of another program: the next indexer builds it anew.
            return []
        problems += damaged_rows(db)
        if not problems:
            problems += _terms_that_differ(db)
    stored = num_blocks.get(state.branch_id)
    if stored is not None and state.num_blocks > stored:
        problems.append(
            f"{state.num_blocks} blocks of branch {state.branch_id} were committed when it was made, {stored} are "
            "there: the context lost commits, or is an earlier copy"
        )
    return problems


def _terms_that_differ(db: sqlite3.Connection) -> list[str]:
    """Compare the table of terms with the postings: in how many blocks each occurs, and how often at most."""
    db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, postings, row)")
    counted: dict[str, tuple[int, int]] = {}
    for listed, blocks in db.execute("SELECT term, doc FROM temp.vocabulary"):
        # `term#n` is the n-th occurrence of a term in a block.
        term, _, number = listed.rpartition("#")
        if term:
            first = counted.get(term, (0, 1))
            counted[term] = (first[0], max(first[1], int(number)))
        else:
            counted[listed] = (blocks, counted.get(listed, (0, 1))[1])
    stored = {term: (blocks, most) for term, blocks, most in db.execute("SELECT term, num_blocks, most FROM terms")}
    wrong = sorted(term for term in counted.keys() | stored.keys() if counted.get(term) != stored.get(term))
    return [f"term {wrong[0]!r} and {len(wrong) - 1} more are not counted as the postings say"] if wrong else []
