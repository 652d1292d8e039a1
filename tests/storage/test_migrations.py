"""Trees of older formats are migrated by their next writer, and by nobody else."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import (
    CorruptTreeError,
    IncompatibleTreeError,
    StorageError,
)
from storage.contract import DocumentMark
from storage.row_checksums import register
from storage.tree import catalogue
from storage.tree.reader import ContextReader
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.verify import verify_context
from storage.versions.branching import Branching
from tests.storage.support import CONTEXT, Text, encoding_of, new_store, open_context, rows
from tests.storage.version_support import clipped, holds, is_sound, write

ENCODING = encoding_of("float16", key_width=3)
ONE, TWO, THREE = Text("one", 1100 * K), Text("two", 60 * K - 7), Text("three", 45 * K)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


def to_format_2(db: sqlite3.Connection) -> None:
    """Take a catalogue back to the format without checksums of rows."""
    triggers = db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE '%_crc_%'").fetchall()
    for (trigger,) in triggers:
        db.execute(f"DROP TRIGGER {trigger}")
    assert len(triggers) == 3 * len({trigger.partition("_crc_")[0] for (trigger,) in triggers}) >= 36
    db.execute("DROP TRIGGER audit_is_not_changed")
    for table in {trigger.partition("_crc_")[0] for (trigger,) in triggers}:
        db.execute(f"ALTER TABLE {table} DROP COLUMN crc")
    for table in ("block_states", "growth"):
        db.execute(f"DROP TABLE {table}")
    db.execute("CREATE TABLE node_states (branch_id INTEGER)")
    db.execute(
        "CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    )
    for row_id, payload in db.execute("SELECT row_id, payload FROM journal").fetchall():
        db.execute("UPDATE journal SET crc = ? WHERE row_id = ?", (google_crc32c.value(payload), row_id))
    db.execute("DELETE FROM meta WHERE key = 'schema_crc'")
    db.execute("UPDATE meta SET value = '2' WHERE key = 'format_version'")


def schema_of(db: sqlite3.Connection) -> dict[str, list[tuple]]:
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name").fetchall()
    return {table: db.execute(f"PRAGMA table_info({table})").fetchall() for table in tables} | {"": triggers}


def test_a_tree_without_checksums_of_rows_is_migrated_by_its_next_writer(root: Path, tmp_path: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write(writer, TWO)
        Branching(writer).fork("side", at_block=40)
    path = root / CONTEXT / catalogue.CATALOGUE_FILE
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        fresh = schema_of(db)
        to_format_2(db)
        row_id, payload = db.execute("SELECT min(row_id), payload FROM journal").fetchone()
        db.execute("UPDATE journal SET payload = ? WHERE row_id = ?", (b"\xff" + payload[1:], row_id))
    with pytest.raises(IncompatibleTreeError, match="format 2, this program writes 5"):
        ContextReader(root / CONTEXT, CONTEXT)
    with open_context(root, seal_in_background=False), closing(sqlite3.connect(path)) as db:
        assert schema_of(db) == fresh
    # What was damaged before is damaged still.
    found = verify_context(root / CONTEXT, CONTEXT).problems
    assert len(found) == 1
    assert "journal row of LOD" in found[0]
    # A format number that rotted is no reason to give damaged rows new checksums.
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        register(db)
        db.execute("UPDATE meta SET value = '2' WHERE key = 'format_version'")
    with pytest.raises(CorruptTreeError, match="format version is damaged"):
        open_context(root)


def to_format_3(db: sqlite3.Connection) -> None:
    """Take a catalogue back to the format whose commits changed the row of the open document."""
    register(db)
    for trigger, text in db.execute("SELECT name, sql FROM sqlite_master WHERE name LIKE '%_crc_of_new'").fetchall():
        db.execute(f"DROP TRIGGER {trigger}")
        db.execute(text.replace(" WHEN NEW.crc IS NULL", ""))
    db.execute("UPDATE documents SET num_blocks = 20, num_tokens = 640 WHERE state = 'open'")
    db.execute("UPDATE meta SET value = '3' WHERE key = 'format_version'")
    catalogue._note_schema(db)


def test_a_tree_whose_commits_changed_the_document_is_migrated_by_its_next_writer(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        Branching(writer).fork("side")
        write(writer, TWO)
        writer.append([ONE.span(ENCODING, 0, 20)])
        writer.append_tail(ONE.meta, 20 * K, ONE.tokens(20 * K, 20 * K + 7))
    path = root / CONTEXT / catalogue.CATALOGUE_FILE
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        fresh = schema_of(db)
        to_format_3(db)
        assert schema_of(db) != fresh
    with pytest.raises(IncompatibleTreeError, match="format 3, this program writes 5"):
        ContextReader(root / CONTEXT, CONTEXT)
    with open_context(root, seal_in_background=False) as writer:
        assert writer.marks(["one"])["one"] == DocumentMark(20, 20 * K, 7, "open")
        with writer.reading() as db:
            assert schema_of(db) == fresh
        writer.append([ONE.span(ENCODING, 20)])
    holds(root, TWO, ONE)
    holds(root, branch="side")
    is_sound(root)


def test_a_tree_of_the_first_format_is_migrated_by_its_next_writer(root: Path, tmp_path: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
    path = root / CONTEXT / catalogue.CATALOGUE_FILE
    with sqlite3.connect(path, isolation_level=None) as db:
        schema = {t: db.execute(f"PRAGMA table_info({t})").fetchall() for t in ("branches", "commits", "tags")}
        to_format_2(db)
        for trigger in ("audit_is_not_changed", "audit_is_not_shortened"):
            db.execute(f"DROP TRIGGER {trigger}")
        later = {
            "branches": "fork_seq fork_encoding_id bases documents_from state created_at retired_at",
            "commits": "author job message",
            "tags": "author message",
        }
        for table, columns in later.items():
            for column in columns.split():
                db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'format_version'")
    db.close()
    with open_context(root) as writer:
        for table, columns in schema.items():
            assert rows(writer, f"PRAGMA table_info({table})") == columns
        Branching(writer).fork("side", at_block=40)
        write(writer, THREE)
        with pytest.raises(StorageError, match="append-only"):
            rows(writer, "DELETE FROM audit")
    holds(root, TWO, THREE)
    holds(root, clipped(TWO, 40), branch="side")


def to_format_4(root: Path, db: sqlite3.Connection) -> None:
    """Give the segments' shards the names they had: every chunk number a folder."""
    register(db)
    for segment_id, name, body in db.execute("SELECT segment_id, folder, manifest FROM segments").fetchall():
        folder = root / CONTEXT / SEGMENT_FOLDER / name
        manifest = json.loads(body)
        for relative in list(manifest):
            path, entry = folder / relative, manifest.pop(relative)
            if path.name == "zarr.json":
                text = path.read_text().replace('"separator": "."', '"separator": "/"')
                path.write_text(text)
                entry = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            else:
                older = path.parent / path.name.replace(".", "/")
                older.parent.mkdir(parents=True)
                path.rename(older)
                relative = older.relative_to(folder).as_posix()
            manifest[relative] = entry
        db.execute("UPDATE segments SET manifest = ? WHERE segment_id = ?", (json.dumps(manifest), segment_id))
    db.execute("UPDATE meta SET value = '4' WHERE key = 'format_version'")


def test_a_tree_whose_shards_lie_in_folders_is_read_and_goes_on(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, ONE)
    with closing(sqlite3.connect(root / CONTEXT / catalogue.CATALOGUE_FILE, isolation_level=None)) as db:
        to_format_4(root, db)
    with pytest.raises(IncompatibleTreeError, match="format 4, this program writes 5"):
        ContextReader(root / CONTEXT, CONTEXT)
    with open_context(root) as writer:
        write(writer, TWO)
    segments = root / CONTEXT / SEGMENT_FOLDER
    older, newer = set(segments.glob("*/lod1/gists/c/0/0")), set(segments.glob("*/lod1/gists/c.0.0"))
    assert older
    assert newer
    holds(root, ONE, TWO)
    is_sound(root)
    for shard in (*older, *newer):
        # For everybody else they are Zarr, the one as the other.
        folder = next(parent for parent in shard.parents if parent.name.endswith(".zarr"))
        gists = zarr.open_group(str(folder), mode="r")["lod1/gists"]
        assert isinstance(gists, zarr.Array)
        assert np.isfinite(np.asarray(gists[:])).all()
    shard = min(older)
    data = bytearray(shard.read_bytes())
    data[9] ^= 1
    shard.write_bytes(data)
    (problem, *_) = verify_context(root / CONTEXT, CONTEXT).problems
    assert "lod1/gists/c/0/0" in problem
