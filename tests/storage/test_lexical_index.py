"""The lexical index as a file: one writer, readers beside it, killed at any moment, damaged, replaced."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DiskFullError, StorageError, WriterConflictError
from storage.contract import TreeReader
from storage.lexical.index import LEXICAL_FILE, LexicalWriter
from storage.lexical.search import LexicalSearcher
from storage.memory_tree import MemoryTree
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter
from tests.storage.lexical_support import ENCODING, UNPRUNED, decode, write
from tests.storage.support import CONTEXT, new_store, open_context

NUM_KILLS = 8


def text_number(number: int) -> str:
    """An endless sequence of documents, each with words of its own."""
    chance = random.Random(number)
    return " ".join(f"w{int(chance.paretovariate(0.7)) % 3000}" for _ in range(chance.randint(1, 300)))


def make_tree(num_texts: int) -> MemoryTree:
    tree = MemoryTree(ENCODING)
    write(tree, *(text_number(number) for number in range(num_texts)))
    return tree


def index_contents(folder: Path) -> dict[str, list]:
    """Everything an index holds, postings term by term."""
    with closing(sqlite3.connect(folder / LEXICAL_FILE)) as db:
        db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, postings, instance)")
        return {
            "postings": db.execute("SELECT term, doc FROM temp.vocabulary ORDER BY term, doc").fetchall(),
            "terms": db.execute("SELECT * FROM terms ORDER BY term").fetchall(),
            "lengths": db.execute("SELECT * FROM lengths ORDER BY number").fetchall(),
            "state": db.execute("SELECT * FROM state").fetchall(),
        }


def build(folder: Path, reader: TreeReader, batch_blocks: int = 64) -> dict[str, list]:
    folder.mkdir(exist_ok=True)
    with LexicalWriter(folder, decode, batch_blocks=batch_blocks) as writer:
        writer.advance(reader)
        assert writer.num_blocks == reader.version.num_blocks
    return index_contents(folder)


def found_by(folder: Path, reader: TreeReader) -> list[list[int]]:
    with LexicalSearcher(folder, decode) as searcher:
        queries = [text_number(number)[:80] for number in range(0, 30, 3)]
        return [searcher.search(reader, query, 20, parameters=UNPRUNED)[0].tolist() for query in queries]


def test_the_index_does_not_depend_on_batches(tmp_path: Path) -> None:
    tree = make_tree(150)
    whole = build(tmp_path / "whole", tree.reader(), 10_000)
    assert len(whole["lengths"]) > 1
    assert build(tmp_path / "single", make_tree(3).reader(), 1) == build(tmp_path / "few", make_tree(3).reader(), 7)
    grown = MemoryTree(ENCODING)
    with LexicalWriter(tmp_path, decode, batch_blocks=100) as writer:
        for number in range(150):
            write(grown, text_number(number))
            if number % 10 == 9:
                assert writer.advance(grown.reader()) > 0
                assert writer.advance(grown.reader()) == 0
    assert index_contents(tmp_path) == whole


def test_a_writer_goes_on_where_another_stopped(tmp_path: Path) -> None:
    tree = make_tree(20)
    build(tmp_path, tree.reader())
    write(tree, *(text_number(number) for number in range(20, 30)))
    with LexicalWriter(tmp_path, decode) as writer:
        before = writer.num_blocks
        assert before > 0
        assert writer.advance(tree.reader()) == tree.version().num_blocks - before
    assert index_contents(tmp_path) == build(tmp_path / "new", make_tree(30).reader())


def test_one_writer(tmp_path: Path) -> None:
    with LexicalWriter(tmp_path, decode), pytest.raises(WriterConflictError, match="another process builds"):
        LexicalWriter(tmp_path, decode)
    LexicalWriter(tmp_path, decode).close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot index"):
        LexicalWriter(tmp_path / "none", decode)


# -- damage ------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def not_sqlite(path: Path) -> None:
    path.write_bytes(b"lexical" * 1000)


def overwritten(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096 : len(raw) // 2] = random.Random(0).randbytes(len(raw) // 2 - 4096)
    path.write_bytes(raw)


def other_tables(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE state (something TEXT)")


def other_format(path: Path) -> None:
    execute(path, "UPDATE state SET format = 99")


def other_branch(path: Path) -> None:
    execute(path, "UPDATE state SET branch_id = 7")


def without_state(path: Path) -> None:
    execute(path, "DELETE FROM state")


def without_postings(path: Path) -> None:
    execute(path, "DELETE FROM postings_data WHERE id > 100")


def without_lengths(path: Path) -> None:
    execute(path, "DELETE FROM lengths")


def other_context(path: Path) -> None:
    tree = MemoryTree(ENCODING)
    write(tree, "another text " * 40)
    path.unlink()
    build(path.parent, tree.reader())


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)


DAMAGES = [
    truncated,
    emptied,
    not_sqlite,
    overwritten,
    other_tables,
    other_format,
    other_branch,
    without_state,
    without_postings,
    without_lengths,
    other_context,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_foreign_is_rebuilt(damage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = make_tree(60).reader()
    whole = build(tmp_path, reader)
    expected = found_by(tmp_path, reader)
    damage(tmp_path / LEXICAL_FILE)
    # A search is right meanwhile, or the damage is where it did not look.
    assert found_by(tmp_path, reader) == expected
    assert "cannot be used" in caplog.text
    caplog.clear()
    assert build(tmp_path, reader) == whole
    assert "built anew" in caplog.text
    caplog.clear()
    assert found_by(tmp_path, reader) == expected
    assert not caplog.text


def test_a_deleted_file_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = make_tree(30).reader()
    whole = build(tmp_path, reader)
    expected = found_by(tmp_path, reader)
    (tmp_path / LEXICAL_FILE).unlink()
    assert found_by(tmp_path, reader) == expected
    # A log without its file, as a crash may leave one, is not taken for the new file's.
    (tmp_path / f"{LEXICAL_FILE}-wal").write_bytes(b"stale" * 5000)
    assert build(tmp_path, reader) == whole
    assert not caplog.text


def test_a_context_that_went_back_is_indexed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path, make_tree(30).reader())
    assert build(tmp_path, make_tree(10).reader()) == build(tmp_path / "new", make_tree(10).reader())
    assert "it holds" in caplog.text


def test_a_search_survives_a_rebuild(tmp_path: Path) -> None:
    reader = make_tree(30).reader()
    build(tmp_path, reader)
    with LexicalSearcher(tmp_path, decode) as searcher:

        def search() -> list[int]:
            return searcher.search(reader, text_number(3), 5)[0].tolist()

        expected = search()
        other_tables(tmp_path / LEXICAL_FILE)
        assert search() == expected
        build(tmp_path, reader)
        assert search() == expected


def test_an_unwritable_disk_is_no_damage(tmp_path: Path) -> None:
    tree = make_tree(10)
    build(tmp_path, tree.reader())
    before = index_contents(tmp_path)
    write(tree, *(text_number(number) for number in range(10, 200)))
    with LexicalWriter(tmp_path, decode) as writer:
        mark = writer.num_blocks
        assert writer._db is not None
        pages = writer._db.execute("PRAGMA page_count").fetchone()[0]
        writer._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DiskFullError):
            writer.advance(tree.reader())
        assert writer.num_blocks == mark
    assert index_contents(tmp_path) == before


def test_an_index_in_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_tree(30).reader()
    build(tmp_path, reader)
    expected = found_by(tmp_path, reader)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"{LEXICAL_FILE}{suffix}").unlink(missing_ok=True)
    # Root may write anywhere, so the answer is given for it.
    monkeypatch.setattr("storage.lexical.reader.os.access", lambda *_: False)
    assert found_by(tmp_path, reader) == expected
    assert not (tmp_path / f"{LEXICAL_FILE}-shm").exists()


# -- at the same time --------------------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path: Path) -> Iterator[ContextWriter]:
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path) as writer:
        yield writer


def test_commits_and_searches_go_on_beside_indexing(context: ContextWriter) -> None:
    errors: list[BaseException] = []
    done = threading.Event()

    def index() -> None:
        try:
            with LexicalWriter(context.folder, decode, batch_blocks=5) as writer:
                while not done.is_set() or writer.num_blocks < context.version().num_blocks:
                    with context.reader() as reader:
                        writer.advance(reader)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=index)
    thread.start()
    try:
        with LexicalSearcher(context.folder, decode) as searcher:
            for number in range(40):
                write(context, f"{text_number(number)} needle{number}")
                with context.reader() as reader:
                    blocks, _ = searcher.search(reader, f"needle{number} needle{number // 2}", 99)
                    tokens = decode([reader.tokens(0, reader.version.num_blocks)[0].reshape(-1) % 256])[0]
                    assert tokens.rstrip("\xff�").endswith(f"needle{number}")
                    assert reader.version.num_blocks - 1 in blocks
                    assert blocks.max() < reader.version.num_blocks
    finally:
        done.set()
        thread.join(60)
    assert not errors
    with context.reader() as reader:
        expected = build(context.folder.parent / "undisturbed", reader)
    assert index_contents(context.folder) == expected


def index_for_ever(folder: Path, say: Connection) -> None:
    """What is killed: index in small batches, and say the mark after each round."""
    with LexicalWriter(folder, decode, batch_blocks=3) as writer, ContextReader(folder, CONTEXT) as reader:
        say.send(writer.num_blocks)
        writer.advance(reader)
        say.send(writer.num_blocks)
        time.sleep(60)


def test_kill_between_and_within_batches(context: ContextWriter, tmp_path: Path) -> None:
    write(context, *(text_number(number) for number in range(120)))
    folder = context.folder
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    chance = random.Random()
    marks = [0]
    with context.reader() as reader:
        whole = build(tmp_path / "undisturbed", reader)
        expected = found_by(tmp_path / "undisturbed", reader)
        for _ in range(NUM_KILLS):
            receive, send = processes.Pipe(duplex=False)
            child = processes.Process(target=index_for_ever, args=(folder, send))
            child.start()
            assert receive.poll(60)
            assert receive.recv() >= marks[-1]
            time.sleep(chance.uniform(0.0, 0.1))
            child.kill()
            child.join()
            assert child.exitcode == -9
            receive.close()
            send.close()
            child.close()
            marks.append(check_consistent(folder))
            assert marks[-1] >= marks[-2]
            assert found_by(folder, reader) == expected
        assert any(0 < mark < reader.version.num_blocks for mark in marks), "no kill came in the middle"
        assert build(folder, reader) == whole


def check_consistent(folder: Path) -> int:
    """Mark, rows, counts and lengths of one file tell the same; returns the mark."""
    found = index_contents(folder)
    mark = found["state"][0][3]
    lengths = np.concatenate([np.frombuffer(row[1], "<u4") for row in found["lengths"]] or [np.empty(0, "<u4")])
    assert len(lengths) == mark
    assert lengths.sum() == found["state"][0][4] == len(found["postings"])
    assert {block for _, block in found["postings"]} <= set(range(mark))
    assert sum(row[1] for row in found["terms"]) == sum("#" not in term for term, _ in found["postings"])
    return mark
