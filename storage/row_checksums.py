"""A checksum for every row of a SQLite table, kept by the database itself.

SQLite notices a flipped bit where it breaks a page's structure, not in a letter or a number. So each table gets a
column `crc`, the crc32c of the row's other columns; triggers set it whenever a row is written, by whatever statement,
and refuse to change a row that is damaged, which would make its damage look sound. They call `row_crc`, which every
connection that writes must `register`; reading needs nothing. A row that comes with its checksum keeps it: a trigger
writes the row twice, which is much of a commit's time.

Under the checksum are the row's columns in the order of their names, as a JSON array without spaces, in ASCII, floats
in the fewest digits that give them back; a blob is `{"blob":"<hexadecimal digits>"}`.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring_ascii

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


_encode = json.JSONEncoder(separators=(",", ":"), default=_plain).encode
# What `_encode` gives for these, without making an encoder for every value of every commit.
_ENCODE: dict[type, Callable[..., str]] = {
    str: encode_basestring_ascii,
    int: int.__repr__,
    float: lambda value: float.__repr__(value) if math.isfinite(value) else _encode(value),
}


def row_crc(*values: object) -> int:
    """crc32c of a row's columns, given in the order of their names."""
    text = ",".join([_ENCODE.get(type(value), _encode)(value) for value in values])
    return google_crc32c.value(f"[{text}]".encode())


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
        db.execute(f"UPDATE {table} SET {COLUMN} = {FUNCTION}({', '.join(columns_of(db, table))})")
    guard(db, tables)


def guard(db: sqlite3.Connection, tables: Sequence[str]) -> None:
    """Give tables their triggers, in the place of those they have; inside a transaction."""
    for table in tables:
        columns = columns_of(db, table)
        listed = ", ".join(columns)
        before = ", ".join(f"OLD.{column}" for column in columns)
        row = " AND ".join(f"{column} = NEW.{column}" for column in _key_of(db, table))
        seal = f"UPDATE {table} SET {COLUMN} = {FUNCTION}({listed})"
        for trigger in ("of_new", "of_changed", "is_right"):
            db.execute(f"DROP TRIGGER IF EXISTS {table}_crc_{trigger}")
        db.execute(
            f"CREATE TRIGGER {table}_crc_of_new AFTER INSERT ON {table} WHEN NEW.{COLUMN} IS NULL "
            f"BEGIN {seal} WHERE {row}; END"
        )
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
