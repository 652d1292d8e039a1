"""Garbage collection removes what nothing needs, and nothing else."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import StorageError
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.rebuild import EncodingBuilder
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching
from storage.versions.collect import Garbage
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, new_store, open_context, rows
from tests.storage.version_support import history, holds, is_sound, write_and_seal

ENCODING = encoding_of("float16")
ONE, TWO, THREE = Text("one", 100 * K), Text("two", 60 * K - 7), Text("three", 45 * K)
DAY_S = 86400.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


def collect(root: Path, writer: ContextWriter, *, keep_s: float = 0.0, dry_run: bool = False) -> Garbage:
    return Store(root).collect(writer, keep_s=keep_s, dry_run=dry_run)


def folders(root: Path) -> set[str]:
    return {path.name for path in (root / CONTEXT / "segments").iterdir()}


def test_a_context_without_history_has_no_garbage(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE, TWO)
        before = folders(root)
        found = collect(root, writer)
        assert (found.segments, found.journal_rows, found.versions, found.branches) == ([], 0, 0, [])
        assert folders(root) == before
    holds(root, ONE, TWO)


def test_what_was_rolled_back_goes_when_its_time_is_over(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        before = writer.version().seq
        write_and_seal(writer, TWO, THREE)
        after = writer.version().seq
        branching = Branching(writer)
        branching.roll_back(before)
        write_and_seal(writer, THREE)
        assert collect(root, writer, keep_s=DAY_S).segments == []
        holds(root, ONE, TWO, THREE, seq=after)
        size = len(folders(root))
        looked = collect(root, writer, dry_run=True)
        assert len(folders(root)) == size
        done = collect(root, writer)
        assert looked == done
        # Blocks 96 to 204 of the old branch: segments of 32 blocks each with their gists, and what lay in the journal.
        assert len(done.segments) == size - len(folders(root)) == 3
        assert done.documents == 2
        assert done.journal_rows > 0
        holds(root, ONE, THREE)
        with pytest.raises(StorageError, match=f"no version {after}"):
            ContextReader(root / CONTEXT, CONTEXT, seq=after)
        assert collect(root, writer).segments == []
        assert [entry.action for entry in history(root).audit(1)] == ["collect"]
    is_sound(root)


@pytest.mark.parametrize("held_by", ["tag", "lease", "fork"])
def test_what_is_held_stays_until_it_is_let_go(root: Path, held_by: str) -> None:
    store = Store(root)
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        before = writer.version().seq
        write_and_seal(writer, TWO)
        branching = Branching(writer)
        lease = None
        if held_by == "tag":
            branching.tag("release")
        elif held_by == "lease":
            lease = store.open_reader(CONTEXT)
        else:
            branching.fork("side")
        held = writer.version().seq
        branching.roll_back(before)
        write_and_seal(writer, THREE)
        collect(root, writer)
        if lease is not None:
            assert_holds(lease, [ONE, TWO], ENCODING)
            lease.close()
        elif held_by == "tag":
            holds(root, ONE, TWO, seq=held)
            branching.delete_tag("release")
        else:
            holds(root, ONE, TWO, branch="side")
            branching.discard("side")
        is_sound(root)
        assert collect(root, writer).segments
        holds(root, ONE, THREE)
    is_sound(root)


def test_a_lease_on_what_was_just_collected_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root)
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        before = writer.version().seq
        write_and_seal(writer, TWO)
        after = writer.version().seq
        Branching(writer).roll_back(before)
        take = store.set_pin

        def too_late(*pin) -> None:
            collect(root, writer)
            take(*pin)

        monkeypatch.setattr(store, "set_pin", too_late)
        with pytest.raises(StorageError, match=f"version {after} of context 'ctx' was collected"):
            store.open_reader(CONTEXT, seq=after)


def test_sealing_in_the_background_does_not_bring_back_what_goes(root: Path) -> None:
    with open_context(root) as writer:
        texts: list[Text] = []
        for number in range(12):
            kept = Text(f"kept{number}", 33 * K)
            writer.append([kept.span(ENCODING)])
            before = writer.version().seq
            writer.append([Text(f"gone{number}", 70 * K).span(ENCODING)])
            Branching(writer).roll_back(before)
            collect(root, writer)
            texts.append(kept)
        writer.flush()
        assert len(history(root).branches(retired=True)) == 1
    holds(root, *texts)
    is_sound(root)


def test_replaced_gists_go_and_unfinished_ones_stay(root: Path) -> None:
    new, newer = encoding_of("float32", width=6), encoding_of("float32", width=8)
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        builder = EncodingBuilder(writer, new)
        builder.put_nodes(1, 0, {"gists": ONE.gists(0, 100, new.arrays[0])})
        builder.put_nodes(2, 0, {"gists": torch.ones(3, 6)})
        builder.activate()
        unfinished = EncodingBuilder(writer, newer)
        unfinished.put_nodes(1, 0, {"gists": ONE.gists(0, 70, newer.arrays[0])})
        writer.flush()
        done = collect(root, writer)
        # Tokens share segments with the first gists, so those stay; the rest of them was in the journal.
        assert done.segments == []
        assert done.journal_rows == 2
        assert rows(writer, "SELECT count(*) FROM extents WHERE encoding_id = 1") == [(0,)]
        assert unfinished.level_counts() == (70,)
        with writer.reader() as reader:
            assert_holds(reader, [ONE], new)
    is_sound(root)


def test_no_version_number_comes_twice(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        branching = Branching(writer)
        highest = branching.fork("side").seq
        branching.discard("side")
        assert collect(root, writer).versions == 1
        assert writer.version().seq > highest
        write_and_seal(writer, TWO)
        branching.fork("again")
        assert len({c.seq for c in history(root).log("main")}) == len(history(root).log("main"))
        states = history(root).branches(retired=True)
        assert [b.name for b in states] == ["main", "again"]


def test_gists_that_were_collected_are_made_again_from_the_first_on(root: Path) -> None:
    new = encoding_of("float32", width=6)
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        Branching(writer).roll_back(writer.version().seq)

        def derive(encoding) -> EncodingBuilder:
            builder = EncodingBuilder(writer, encoding)
            begin = builder.level_counts()
            builder.put_nodes(1, 0, {"gists": ONE.gists(0, 100, encoding.arrays[0])})
            builder.put_nodes(2, 0, {"gists": torch.ones(3, encoding.arrays[0].width)})
            assert begin == ((96, 3) if encoding is ENCODING and shared else ())
            builder.activate()
            return builder

        shared = True
        derive(new)
        collect(root, writer)
        shared = False
        derive(ENCODING)
        with writer.reader() as reader:
            assert_holds(reader, [ONE], ENCODING)
    is_sound(root)


def test_files_that_a_crash_left_are_removed_by_the_next_writer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write_and_seal(writer, ONE)
        before = writer.version().seq
        write_and_seal(writer, TWO)
        Branching(writer).roll_back(before)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            left = collect(root, writer).segments
        assert {f".{name}.tmp-gone" for name in left} <= folders(root)
    with open_context(root):
        assert not [name for name in folders(root) if name.startswith(".")]
    holds(root, ONE)


def test_a_segment_of_which_little_is_needed_is_replaced_by_a_shorter_one(root: Path) -> None:
    with open_context(root, seal_in_background=False, segment_super_blocks=4) as writer:
        text = Text("long", 300 * K)
        write_and_seal(writer, text)
        branching = Branching(writer)
        branching.fork("side", at_block=40)
        branching.tag("all")
        side = ContextReader(root / CONTEXT, CONTEXT, "side")
        reading = ContextReader(root / CONTEXT, CONTEXT, "side")
        reading.tokens(0, 40)
        branching.roll_back(history(root).resolve("side"))
        found = collect(root, writer)
        assert (found.segments, found.shortened, found.journal_rows) == ([], [], 0)
        branching.delete_tag("all")
        looked = collect(root, writer, dry_run=True)
        done = collect(root, writer)
        assert looked == done
        assert (len(done.segments), len(done.shortened)) == (1, 1)
        node = ENCODING.node_bytes + K * 4 + 9
        assert done.shortened_bytes >= (128 - 32) * node
        clipped = Text("long", 40 * K, size_bytes=text.num_tokens)
        for reader in (side, reading):
            assert_holds(reader, [clipped], ENCODING)
            reader.close()
        holds(root, clipped)
        assert len(folders(root)) == 1
    is_sound(root)


@pytest.mark.parametrize("tagged", [False, True], ids=["as planned", "tagged meanwhile"])
def test_commits_go_on_while_shorter_segments_are_written(root: Path, *, tagged: bool) -> None:
    collecting, go_on, text = threading.Event(), threading.Event(), Text("long", 128 * K)
    go_on.set()

    def write(path: Path, data: bytes | memoryview) -> None:
        if not go_on.is_set():
            collecting.set()
            assert go_on.wait(30)
        path.write_bytes(data)

    with open_context(root, segment_super_blocks=4, seal_in_background=False, write_file=write) as writer:
        write_and_seal(writer, text)
        whole = writer.version().seq
        branching = Branching(writer)
        branching.fork("side", at_block=40)
        branching.roll_back(history(root).resolve("side"))
        go_on.clear()
        with ThreadPoolExecutor(1) as pool:
            collection = pool.submit(collect, root, writer)
            assert collecting.wait(30)
            writer.append([text.span(ENCODING, 40, 50)])
            if tagged:
                branching.tag("whole", whole)
            go_on.set()
            found = collection.result(30)
        assert len(found.shortened) == (0 if tagged else 1)
        writer.append([text.span(ENCODING, 50, 60)])
        holds(root, Text("long", 60 * K, size_bytes=text.num_tokens))
        if tagged:
            holds(root, text, seq=whole)
        assert len(folders(root)) == 1
    is_sound(root)


def test_documents_that_end_in_a_group_cut_by_a_fork_stay(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        texts = [Text(f"short{n}", 5 * K) for n in range(9)]
        write_and_seal(writer, *texts)
        Branching(writer).fork("side", at_block=40)
        Branching(writer).roll_back(history(root).resolve("side"))
        assert collect(root, writer).documents == 1
        holds(root, *texts[:8])
        holds(root, *texts[:8], branch="side")
    is_sound(root)


def test_branches_that_others_descend_from_keep_what_is_shared(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        branching = Branching(writer)
        write_and_seal(writer, ONE)
        for name in ("a", "b", "c"):
            branching.fork(name)
            writer.switch(name)
            write_and_seal(writer, Text(name, 70 * K))
        texts = [ONE, *(Text(name, 70 * K) for name in "abc")]
        branching.discard("a")
        branching.discard("b")
        collect(root, writer)
        is_sound(root)
        holds(root, *texts, branch="c")
        states = {b.name: b.state for b in history(root).branches(retired=True)}
        assert states == {"main": "live", "c": "live"}
        writer.switch("main")
        branching.discard("c")
        assert len(collect(root, writer).branches) == 3
        assert folders(root) == {name for name in folders(root) if "branch1_" in name}
        holds(root, ONE)
    is_sound(root)
