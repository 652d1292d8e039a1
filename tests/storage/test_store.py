"""Stores and contexts: who may open what, and what the others are told."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import (
    ContextNotFoundError,
    CorruptTreeError,
    IncompatibleTreeError,
    StaleWriterError,
    StorageError,
    WriterConflictError,
)
from storage import store
from storage.schema import FORMAT_VERSION
from storage.store import Store
from storage.tree import catalogue
from storage.tree.reader import ContextReader
from storage.tree.verify import verify_context
from tests.storage.support import CONTEXT, IDENTITY, Text, assert_holds, encoding_of, new_store, open_context

ENCODING = encoding_of()
TEXT = Text("doc", 70 * K)


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    """A store whose context holds `TEXT`, partly sealed."""
    made = new_store(tmp_path / "store", ENCODING)
    with open_context(made.root) as writer:
        writer.append([TEXT.span(ENCODING)])
        writer.flush()
    return made


def assert_as_good_as_before(made: Store) -> None:
    with made.open_reader(CONTEXT) as reader:
        assert_holds(reader, [TEXT], ENCODING)
    with made.open_writer(CONTEXT, IDENTITY, ENCODING) as writer:
        assert writer.append([TEXT.span(ENCODING)]).skipped_blocks == 70
    assert verify_context(made.root / CONTEXT, CONTEXT).ok


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_a_store_lists_what_it_holds(tmp_path: Path) -> None:
    made = Store(tmp_path / "new" / "store", create=True)
    assert made.contexts() == []
    for name in ("b", "a"):
        made.create_context(name, IDENTITY, ENCODING)
    assert [info.name for info in made.contexts()] == ["a", "b"]
    assert [info.name for info in Store(made.root).contexts()] == ["a", "b"]
    assert made.has_context("a")
    assert not made.has_context("c")
    assert made.identity("a") == (IDENTITY, ENCODING)
    assert made.folder("a") == made.root / "a"
    assert sorted(path.name for path in made.root.iterdir() if path.is_dir()) == ["a", "b"]


def test_an_unknown_context_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    made = new_store(tmp_path, ENCODING)
    made.create_context("other", IDENTITY, ENCODING)
    with pytest.raises(ContextNotFoundError, match="no context 'missing'; it has: ctx, other"):
        made.open_reader("missing")
    with pytest.raises(ContextNotFoundError, match="no context 'missing'"):
        made.open_writer("missing", IDENTITY, ENCODING)
    assert not (tmp_path / "missing").exists()


def test_no_store_is_no_empty_store(tmp_path: Path) -> None:
    with pytest.raises(ContextNotFoundError, match=r"no store at .*--store.root"):
        Store(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_opening_can_create(tmp_path: Path) -> None:
    made = Store(tmp_path, create=True)
    for _ in range(2):
        with made.open_writer("fresh", IDENTITY, ENCODING, create=True) as writer:
            writer.append([TEXT.span(ENCODING)])
    assert [(info.name, info.epoch) for info in made.contexts()] == [("fresh", 2)]


def test_a_context_whose_listing_was_lost_is_found_again(filled: Store) -> None:
    # A crash between the folder's rename and the store's own commit leaves this.
    with closing(sqlite3.connect(filled.root / store.STORE_FILE, isolation_level=None)) as db:
        db.execute("DELETE FROM contexts")
    with filled.open_writer(CONTEXT, IDENTITY, ENCODING, create=True) as writer:
        assert writer.version().num_blocks == 70
    assert_as_good_as_before(filled)


def test_an_unknown_branch_or_version_is_refused(filled: Store) -> None:
    with pytest.raises(StorageError, match="no version 'side': give a branch .main."):
        filled.open_reader(CONTEXT, "side")
    with pytest.raises(StorageError, match="has no version 99, or not any more; the newest is 2"):
        filled.open_reader(CONTEXT, seq=99)
    with filled.open_reader(CONTEXT, seq=1) as reader:
        assert reader.version.num_blocks == 0


# -- what made the tree ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_model_digest": "sha256:new"}, ["base_model_digest", "sha256:base", "sha256:new"]),
        ({"tokenizer_digest": "sha256:other"}, ["tokenizer_digest", "sha256:tokenizer", "sha256:other"]),
        ({"tokens_per_block": 16}, ["tokens_per_block", "32", "16"]),
    ],
)
def test_another_base_model_or_tokenizer_is_refused(filled: Store, change: dict, named: list[str]) -> None:
    with pytest.raises(IncompatibleTreeError) as refused:
        filled.open_writer(CONTEXT, replace(IDENTITY, **change), ENCODING)
    assert all(part in str(refused.value) for part in [*named, "--store.context"])
    assert_as_good_as_before(filled)


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        (replace(ENCODING, gistnet_digest="sha256:new"), ["gistnet_digest", ENCODING.gistnet_digest, "sha256:new"]),
        (replace(encoding_of("int8"), gistnet_digest=ENCODING.gistnet_digest), ["arrays", "'float32'", "'int8'"]),
        (replace(encoding_of(width=8), gistnet_digest=ENCODING.gistnet_digest), ["'width': 4", "'width': 8"]),
        (replace(encoding_of(rows=2), gistnet_digest=ENCODING.gistnet_digest), ["'rows_per_node': 1"]),
    ],
)
def test_another_gistnet_dtype_or_dim_is_refused(filled: Store, encoding, named: list[str]) -> None:
    with pytest.raises(IncompatibleTreeError) as refused:
        filled.open_writer(CONTEXT, IDENTITY, encoding)
    assert all(part in str(refused.value) for part in [*named, "rebuild-gists"])
    assert_as_good_as_before(filled)


def test_a_newer_format_is_refused(filled: Store) -> None:
    path = filled.root / CONTEXT / catalogue.CATALOGUE_FILE
    with closing(catalogue.connect(path.parent, read_only=False)) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'format_version'", (str(FORMAT_VERSION + 1),))
    before = path.read_bytes()
    for read in (lambda: filled.open_reader(CONTEXT), lambda: filled.open_writer(CONTEXT, IDENTITY, ENCODING)):
        with pytest.raises(IncompatibleTreeError, match=f"format {FORMAT_VERSION + 1}; this program knows up to"):
            read()
    assert path.read_bytes() == before


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(filled: Store) -> None:
    with filled.open_writer(CONTEXT, IDENTITY, ENCODING, owner="job one"):
        with pytest.raises(WriterConflictError, match=r"written by another process \(job one\)"):
            filled.open_writer(CONTEXT, IDENTITY, ENCODING)
        with filled.open_reader(CONTEXT) as reader:
            assert_holds(reader, [TEXT], ENCODING)
    assert_as_good_as_before(filled)


def test_a_writer_in_another_process_is_refused_until_the_first_dies(filled: Store) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import sys, time
                from pathlib import Path
                from tests.storage.support import open_context
                writer = open_context(Path(sys.argv[1]), owner="the other process")
                print("open", flush=True)
                time.sleep(60)
                """
            ),
            str(filled.root),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(WriterConflictError, match="the other process"):
            filled.open_writer(CONTEXT, IDENTITY, ENCODING)
    finally:
        child.kill()
        child.communicate()
    assert_as_good_as_before(filled)


def test_a_writer_that_was_taken_over_is_fenced(filled: Store) -> None:
    more = Text("more", 100 * K)
    with open_context(filled.root, seal_in_background=False) as stale:
        version = stale.version()
        # What a takeover on another machine, where this lock does not reach, does.
        with closing(catalogue.connect(stale.folder, read_only=False)) as other:
            other.execute("UPDATE writer SET epoch = epoch + 1, owner = 'pid 7 on node-b'")
        for write in (
            lambda: stale.append([more.span(ENCODING)]),
            lambda: stale.append_tail(more.meta, 0, more.tokens(0, 5)),
            lambda: stale.put_nodes(2, 0, {"gists": np.zeros((1, 4), np.float32)}),
        ):
            with pytest.raises(StaleWriterError, match="taken over by pid 7 on node-b"):
                write()
        assert stale.version() == version
    assert_as_good_as_before(filled)


def test_a_fenced_writer_seals_nothing_and_leaves_no_files(filled: Store) -> None:
    more = Text("more", 100 * K)
    with open_context(filled.root, seal_in_background=False) as stale:
        stale.append([more.span(ENCODING)])
        with closing(catalogue.connect(stale.folder, read_only=False)) as other:
            other.execute("UPDATE writer SET epoch = epoch + 1")
        segments = sorted(path.name for path in (stale.folder / "segments").iterdir())
        with pytest.raises(StaleWriterError):
            stale.flush()
        assert sorted(path.name for path in (stale.folder / "segments").iterdir()) == segments
    with filled.open_reader(CONTEXT) as reader:
        assert_holds(reader, [TEXT, more], ENCODING)


def test_a_closed_writer_and_reader_say_so(filled: Store) -> None:
    writer = open_context(filled.root)
    reader = writer.reader()
    reader.close()
    writer.close()
    writer.close()
    for use in (
        lambda: writer.append([Text("more", 5).span(ENCODING)]),
        lambda: writer.close_document("doc"),
        lambda: reader.documents(),
    ):
        with pytest.raises(StorageError) as refused:
            use()
        assert not isinstance(refused.value, CorruptTreeError)


def test_closing_ends_the_sealing_thread(filled: Store) -> None:
    before = threading.active_count()
    with open_context(filled.root):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_refusal_after_opening_gives_the_place_back(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = sqlite3.connect(filled.root / store.STORE_FILE, isolation_level=None)
    refuse.execute("CREATE TRIGGER refuse BEFORE UPDATE ON contexts BEGIN SELECT RAISE(ABORT, 'refused'); END")
    with pytest.raises(StorageError, match="refused"):
        filled.open_writer(CONTEXT, IDENTITY, ENCODING)
    refuse.execute("DROP TRIGGER refuse")
    refuse.close()
    assert_as_good_as_before(filled)


def test_a_damaged_branch_table_is_an_error_of_ours(filled: Store) -> None:
    path = filled.root / CONTEXT / catalogue.CATALOGUE_FILE
    with closing(sqlite3.connect(path)) as db:
        page_size = db.execute("PRAGMA page_size").fetchone()[0]
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'branches'").fetchone()[0]
    data = bytearray(path.read_bytes())
    data[(page - 1) * page_size : page * page_size] = b"\xff" * page_size
    path.write_bytes(data)
    for use in (lambda: filled.identity(CONTEXT), lambda: filled.open_reader(CONTEXT)):
        with pytest.raises(CorruptTreeError, match=r"catalogue\.sqlite is damaged"):
            use()


# -- readers -----------------------------------------------------------------------------------------------------------


def test_a_pin_is_held_until_the_reader_is_closed(filled: Store) -> None:
    with filled.open_reader(CONTEXT) as first, filled.open_reader(CONTEXT, seq=1):
        assert filled.pins(CONTEXT) == [1, 2]
        first.renew()
        assert filled.pins(CONTEXT) == [1, 2]
        assert filled.pins("other") == []
    assert filled.pins(CONTEXT) == []


def test_a_lease_runs_out_unless_it_is_renewed(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1e9
    monkeypatch.setattr(store.time, "time", lambda: clock)
    with filled.open_reader(CONTEXT) as kept, filled.open_reader(CONTEXT, seq=1):
        clock += store.LEASE_S * 0.75
        kept.renew()
        clock += store.LEASE_S * 0.5
        assert filled.pins(CONTEXT) == [2]
        clock += store.LEASE_S
        assert filled.pins(CONTEXT) == []
        kept.renew()
        assert filled.pins(CONTEXT) == [2]


@contextmanager
def as_reader_without_write_permission(folder: Path) -> Iterator[None]:
    """Permissions count, also when the tests are run by root."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    outside = [parent for parent in folder.parents if not os.stat(parent).st_mode & 0o005]
    modes = [os.stat(parent).st_mode for parent in outside]
    is_root = os.geteuid() == 0
    if is_root:
        for parent, mode in zip(outside, modes, strict=True):
            parent.chmod(mode | 0o055)
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for parent, mode in zip(outside, modes, strict=True):
            parent.chmod(mode)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_read_only_folder_can_be_read_and_verified(filled: Store) -> None:
    folder = filled.root / CONTEXT
    assert not Path(f"{folder / catalogue.CATALOGUE_FILE}-wal").exists()
    with as_reader_without_write_permission(folder):
        with ContextReader(folder, CONTEXT) as reader:
            assert_holds(reader, [TEXT], ENCODING)
            assert reader.tail() is None
        assert verify_context(folder, CONTEXT).ok
        with pytest.raises(StorageError, match="Check the folder's permissions"):
            open_context(filled.root)
    assert_as_good_as_before(filled)


def test_a_read_only_copy_with_an_unfolded_log_is_refused_rather_than_read_short(filled: Store) -> None:
    folder = filled.root / CONTEXT
    more = Text("more", 40)
    copy = filled.root.parent / "copy" / CONTEXT
    with open_context(filled.root) as writer:
        writer.append([more.span(ENCODING)])
        shutil.copytree(folder, copy)
    Path(f"{copy / catalogue.CATALOGUE_FILE}-shm").unlink()
    with as_reader_without_write_permission(copy), pytest.raises(StorageError, match="read-only and holds commits"):
        ContextReader(copy, CONTEXT)
    with ContextReader(copy, CONTEXT) as reader:
        assert_holds(reader, [TEXT, more], ENCODING)


def test_a_reader_outlives_the_writer(filled: Store) -> None:
    writer = open_context(filled.root)
    reader = writer.reader()
    writer.append([Text("more", 100 * K).span(ENCODING)])
    writer.flush()
    writer.close()
    assert_holds(reader, [TEXT], ENCODING)
    reader.close()
    assert verify_context(filled.root / CONTEXT, CONTEXT).ok


# -- damage ------------------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _overwrite_head(path: Path) -> None:
    path.write_bytes(b"no database at all, just text".ljust(200) + path.read_bytes()[200:])


def _overwrite_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)


def _drop_meta(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DELETE FROM meta")


DAMAGE = {
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "a few bytes": lambda path: path.write_bytes(b"SQLite"),
    "not sqlite": _overwrite_head,
    "pages overwritten": _overwrite_middle,
    "no meta": _drop_meta,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_corrupt_catalogue_is_named_and_left_alone(filled: Store, kind: str) -> None:
    path = filled.root / CONTEXT / catalogue.CATALOGUE_FILE
    DAMAGE[kind](path)
    before = path.read_bytes() if path.exists() else None
    for use in (
        lambda: filled.identity(CONTEXT),
        lambda: filled.open_reader(CONTEXT),
        lambda: filled.open_writer(CONTEXT, IDENTITY, ENCODING),
        lambda: verify_context(filled.root / CONTEXT, CONTEXT),
    ):
        with pytest.raises(CorruptTreeError, match=r"catalogue\.sqlite") as refused:
            use()
        assert refused.value.exit_code == 5
    assert (path.read_bytes() if path.exists() else None) == before


def test_overwritten_data_pages_are_found_and_never_served(filled: Store) -> None:
    path = filled.root / CONTEXT / catalogue.CATALOGUE_FILE
    with closing(sqlite3.connect(path)) as db:
        page_size = db.execute("PRAGMA page_size").fetchone()[0]
        root_page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'journal'").fetchone()[0]
    data = bytearray(path.read_bytes())
    data[(root_page - 1) * page_size : root_page * page_size] = b"\xff" * page_size
    path.write_bytes(data)
    report = verify_context(filled.root / CONTEXT, CONTEXT)
    assert not report.ok
    assert "catalogue.sqlite" in report.problems[0]
    with filled.open_reader(CONTEXT) as reader:
        np.testing.assert_array_equal(reader.tokens(0, 64)[0], TEXT.packed(0, 64)[0])
        with pytest.raises(CorruptTreeError, match=r"catalogue\.sqlite is damaged"):
            reader.tokens(64, 6)
