"""A backup is a store of its own, taken while its source is written."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ContextNotFoundError, CorruptTreeError, StorageError, WriterConflictError
from storage.store import Store
from storage.versions import backup as backup_module
from storage.versions.backup import back_up
from storage.versions.branching import Branching
from storage.versions.history import History
from tests.storage.support import CONTEXT, IDENTITY, Text, assert_holds, encoding_of, new_store, open_context
from tests.storage.version_support import holds, is_sound, write_and_seal

ENCODING = encoding_of("float16")
ONE, TWO, THREE = Text("one", 100 * K), Text("two", 60 * K - 7), Text("three", 45 * K)


@pytest.fixture
def source(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store", ENCODING)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "backup"


def is_whole(root: Path, *texts: Text) -> None:
    is_sound(root)
    holds(root, *texts)


def test_a_backup_is_a_store_that_can_be_written_on(source: Store, target: Path) -> None:
    with open_context(source.root) as writer:
        write_and_seal(writer, ONE)
        writer.append_tail(TWO.meta, 0, TWO.tokens(0, 20))
        done = back_up(source, CONTEXT, target)
        assert (done.segments, done.copied_segments, done.removed_segments) == (3, 3, 0)
        assert done.seq == writer.version().seq
    is_whole(target, ONE)
    with Store(target).open_writer(CONTEXT, IDENTITY, ENCODING) as writer:
        with writer.reader() as reader:
            tail = reader.tail()
        assert tail is not None
        assert tail.tokens.tolist() == TWO.tokens(0, 20).tolist()
        write_and_seal(writer, TWO)
    is_whole(target, ONE, TWO)


def test_the_next_backup_copies_what_is_new_and_drops_what_is_gone(source: Store, target: Path) -> None:
    with open_context(source.root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        before = writer.version().seq
        assert back_up(source, CONTEXT, target).copied_segments == 3
        assert back_up(source, CONTEXT, target).copied_segments == 0
        write_and_seal(writer, TWO)
        assert back_up(source, CONTEXT, target).copied_segments == 2
        is_whole(target, ONE, TWO)
        Branching(writer).roll_back(before)
        source.collect(writer, keep_s=0.0)
        write_and_seal(writer, THREE)
        last = back_up(source, CONTEXT, target)
        assert last.removed_segments == 2
        is_whole(target, ONE, THREE)
        assert [t.name for t in History(target / CONTEXT, CONTEXT).tags()] == []


def test_it_is_taken_while_a_writer_goes_on(source: Store, target: Path) -> None:
    stop = threading.Event()
    texts = [Text(f"text{n}", 40 * K + n) for n in range(400)]
    with open_context(source.root) as writer:

        def go_on() -> None:
            for text in texts:
                if stop.is_set():
                    return
                writer.append([text.span(ENCODING)])

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            for _ in range(4):
                back_up(source, CONTEXT, target)
                with Store(target).open_reader(CONTEXT) as reader:
                    num_documents = len(reader.documents())
                is_whole(target, *texts[:num_documents])
        finally:
            stop.set()
            thread.join()


def test_a_collection_that_runs_into_it_makes_it_look_again(
    source: Store, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_context(source.root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        before = writer.version().seq
        write_and_seal(writer, TWO)
        Branching(writer).roll_back(before)
        copy_catalogue = backup_module._copy_catalogue
        looks = []

        def then_collect(*paths: Path):
            found = copy_catalogue(*paths)
            looks.append(len(found[0]))
            source.collect(writer, keep_s=0.0)
            return found

        monkeypatch.setattr(backup_module, "_copy_catalogue", then_collect)
        back_up(source, CONTEXT, target)
        assert looks == [5, 3]
    is_whole(target, ONE)


def test_what_cannot_be_copied_leaves_the_backup_of_before(source: Store, target: Path) -> None:
    with open_context(source.root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        back_up(source, CONTEXT, target)
        write_and_seal(writer, TWO)
    shard = max(source.folder(CONTEXT).glob("segments/*/lod1/gists/c.0.0"))
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptTreeError, match=f"{shard}: checksum does not match"):
        back_up(source, CONTEXT, target)
    is_whole(target, ONE)
    assert not [path for path in target.rglob("*") if ".tmp-" in path.name]


def test_another_history_under_the_same_numbers_is_copied_as_itself(
    source: Store, target: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    with open_context(source.root) as writer:
        write_and_seal(writer, ONE)
    back_up(source, CONTEXT, first)
    with open_context(source.root) as writer:
        write_and_seal(writer, TWO)
    back_up(source, CONTEXT, target)
    shutil.rmtree(source.root)
    shutil.copytree(first, source.root)
    with open_context(source.root) as writer:
        write_and_seal(writer, Text("other", TWO.num_tokens))
    done = back_up(Store(source.root), CONTEXT, target)
    assert done.copied_segments == done.removed_segments == 2
    is_whole(target, ONE, Text("other", TWO.num_tokens))


def test_where_it_cannot_go(source: Store, target: Path) -> None:
    with pytest.raises(StorageError, match="is the store itself"):
        back_up(source, CONTEXT, source.root)
    with pytest.raises(ContextNotFoundError):
        back_up(source, "nobody", target)
    back_up(source, CONTEXT, target)
    with open_context(target), pytest.raises(WriterConflictError):
        back_up(source, CONTEXT, target)
    (target / "file").write_text("")
    with pytest.raises(StorageError):
        back_up(source, CONTEXT, target / "file")


def test_a_lost_store_is_had_back_from_its_backup(source: Store, target: Path) -> None:
    with open_context(source.root) as writer:
        write_and_seal(writer, ONE, TWO)
        Branching(writer).tag("v1")
        back_up(source, CONTEXT, target)
    shutil.rmtree(source.root)
    shutil.copytree(target, source.root)
    is_whole(source.root, ONE, TWO)
    with Store(source.root).open_reader(CONTEXT, "v1") as reader:
        assert_holds(reader, [ONE, TWO], ENCODING)
    with sqlite3.connect(source.root / CONTEXT / "catalogue.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
