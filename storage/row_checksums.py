"""A checksum for every row of a SQLite table, kept by the database itself.

SQLite notices a flipped bit where it breaks a page's structure, not in a letter or a number. So each table gets a
column `crc`, the crc32c of the row's other columns; triggers set it whenever a row is written, by whatever statement,
and refuse to change a row that is damaged, which would make its damage look sound. They call `row_crc`, which every
connection that writes must `register`; reading needs nothing.

Under the checksum are the row's columns in the order of their names, as a JSON array without spaces, in ASCII, floats
in the fewest digits that give them back; a blob is `{"blob":"<hexadecimal digits>"}`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence

import google_crc32c

COLUMN = "crc"
FUNCTION = "row_crc"
LEFT_OUT = frozenset({COLUMN, "head_seq"})
"""Columns that are not under it. A branch's `head_seq` changes with every commit and follows from other rows: it is the
branch's newest version, which is checked where it is used."""
DAMAGED = "is damaged: its checksum does not match"
"""In the words of whoever finds it."""


class _Text(bytes):
    """Text as it lies in the file, which damage may have made undecodable."""


def _plain(value: bytes) -> object:
    if isinstance(value, _Text):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"damaged": value.hex()}
    return {"blob": value.hex()}


# The encoder in C: a commit computes five of these.
_encode = json.JSONEncoder(separators=(",", ":"), default=_plain).encode


def row_crc(*values: object) -> int:
    """crc32c of a row's columns, given in the order of their names."""
    return google_crc32c.value(_encode(values).encode())


def register(connection: sqlite3.Connection) -> None:
    """Give a connection the function that the triggers and `sound` call."""
    connection.create_function(FUNCTION, -1, row_crc, deterministic=True)


def columns_of(db: sqlite3.Connection, table: str) -> list[str]:
    """A table's columns under the checksum, in its order."""
    return sorted(row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] not in LEFT_OUT)


def _key_of(db: sqlite3.Connection, table: str) -> list[str]:
    found = [(row[5], row[1]) for row in db.execute(f"PRAGMA table_info({table})") if row[5]]
    return [name for _, name in sorted(found)]


def protect(db: sqlite3.Connection, tables: Sequence[str]) -> None:
    """Give tables their column and triggers, and rows that are there their checksums; inside a transaction."""
    for table in tables:
        db.execute(f"ALTER TABLE {table} ADD COLUMN {COLUMN} INTEGER")
        columns = columns_of(db, table)
        listed = ", ".join(columns)
        before = ", ".join(f"OLD.{column}" for column in columns)
        row = " AND ".join(f"{column} = NEW.{column}" for column in _key_of(db, table))
        seal = f"UPDATE {table} SET {COLUMN} = {FUNCTION}({listed})"
        db.execute(seal)
        db.execute(f"CREATE TRIGGER {table}_crc_of_new AFTER INSERT ON {table} BEGIN {seal} WHERE {row}; END")
        db.execute(
            f"CREATE TRIGGER {table}_crc_of_changed AFTER UPDATE OF {listed} ON {table} BEGIN {seal} WHERE {row}; END"
        )
        db.execute(
            f"CREATE TRIGGER {table}_crc_is_right BEFORE UPDATE OF {listed} ON {table} "
            f"WHEN OLD.{COLUMN} IS NOT {FUNCTION}({before}) "
            f"BEGIN SELECT RAISE(ABORT, 'a row of {table} {DAMAGED}'); END"
        )


def sound(columns: Sequence[str], alias: str) -> str:
    """SQL for whether a row of a table is what was written, for a connection that is registered.

    Args:
        columns: `columns_of` the table.
        alias: its name in the statement.
    """
    return f"{alias}.{COLUMN} IS {FUNCTION}({', '.join(f'{alias}.{column}' for column in columns)})"


def damaged_rows(db: sqlite3.Connection, table: str) -> Iterator[str]:
    """Every row whose checksum does not match, named by its key."""
    columns, key = columns_of(db, table), _key_of(db, table)
    text_factory = db.text_factory
    db.text_factory = _Text
    try:
        for *values, crc in db.execute(f"SELECT {', '.join(columns)}, {COLUMN} FROM {table}"):
            if row_crc(*values) != crc:
                named = dict(zip(columns, values, strict=True))
                shown = ", ".join(f"{column} {_shown(named[column])}" for column in key)
                yield f"row of {table} ({shown}) {DAMAGED}"
    finally:
        db.text_factory = text_factory


def _shown(value: object) -> str:
    return repr(value.decode(errors="replace")) if isinstance(value, bytes) else repr(value)
