"""Branches, tags and versions: what is shared, what is not, and what is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import (
    BranchConflictError,
    CorruptTreeError,
    OutOfOrderError,
    StorageError,
)
from storage.contract import DocumentMark
from storage.tree import catalogue
from storage.tree.reader import ContextReader
from storage.tree.rebuild import EncodingBuilder
from storage.tree.verify import verify_context
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, follow, new_store, open_context, rows
from tests.storage.version_support import clipped, history, holds, is_sound, write

ENCODING = encoding_of("float16", key_width=3)
ONE, TWO, THREE = Text("one", 1100 * K), Text("two", 60 * K - 7), Text("three", 45 * K)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


def end_what_is_open(writer: ContextWriter) -> None:
    growing = writer.open_document()
    if growing is not None:
        writer.close_document(growing.key)


@pytest.mark.parametrize("at", [0, 1, 31, 32, 33, 1000, 1024, 1099, 1100, 1101, 1130, 1160])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_fork_shares_what_is_before_it_and_goes_its_own_way(root: Path, at: int, sealed: bool) -> None:
    with open_context(root, seal_in_background=False, segment_super_blocks=8) as writer:
        write(writer, ONE, TWO)
        if sealed:
            writer.flush()
        version = Branching(writer).fork("side", at_block=at)
        assert (version.branch, version.num_blocks) == ("side", at)
        shared = [clipped(ONE, min(at, 1100))] if at < 1100 else [ONE]
        shared += [TWO] if at == 1160 else [clipped(TWO, at - 1100)] if at > 1100 else []
        holds(root, *[text for text in shared if text.num_blocks], branch="side")
        writer.switch("side")
        growing = writer.open_document()
        if growing is not None:
            writer.close_document(growing.key)
        write(writer, THREE)
        shared = [text for text in shared if text.num_blocks]
        holds(root, *shared, THREE, branch="side")
        writer.flush()
        holds(root, *shared, THREE, branch="side")
        writer.switch("main")
        write(writer, THREE)
        writer.flush()
    holds(root, *shared, THREE, branch="side")
    holds(root, ONE, TWO, THREE)
    is_sound(root)


def test_a_fork_costs_the_same_after_a_short_and_a_long_history(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        Branching(writer).fork("early")
        write(writer, *(Text(f"long{n}", 500 * K + n) for n in range(8)))
        Branching(writer).fork("late")
    own = {branch.name: branch.own_bytes for branch in history(root).branches()}
    group = K * (ENCODING.node_bytes + K * 4 + 9)
    assert own["early"] < group
    assert own["late"] < group + 2 * K * ENCODING.node_bytes


def test_an_open_document_goes_on_differently_on_each_branch(root: Path) -> None:
    with open_context(root) as writer:
        text = Text("talk", 100 * K)
        writer.append([text.span(ENCODING, 0, 40, ends=False)])
        writer.append_tail(text.meta, 40 * K, text.tokens(40 * K, 40 * K + 7))
        Branching(writer).fork("guess")
        writer.append([text.span(ENCODING, 40, 50)])
        writer.switch("guess")
        with writer.reader() as reader:
            tail = reader.tail()
        assert tail is not None
        np.testing.assert_array_equal(tail.tokens, text.tokens(40 * K, 40 * K + 7))
        writer.close_document("talk")
        write(writer, TWO)
        writer.switch("main")
        assert writer.document("talk").num_blocks == 50  # type: ignore[union-attr]
    holds(root, clipped(text, 50))
    holds(root, clipped(text, 40), TWO, branch="guess")
    is_sound(root)


def test_a_document_of_an_ancestor_is_known_and_not_stored_again(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, ONE, TWO)
        Branching(writer).fork("side", at_block=1100)
        writer.switch("side")
        ack = writer.append([ONE.span(ENCODING)])
        assert (ack.new_blocks, ack.skipped_blocks) == (0, 1100)
        assert writer.marks(["one", "two"]).keys() == {"one"}
        write(writer, TWO)
    holds(root, ONE, TWO, branch="side")


def test_forks_of_forks_share_with_the_right_ancestor(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write(writer, ONE)
        for name, at in [("a", 70), ("b", 64), ("c", 66), ("d", 10)]:
            Branching(writer).fork(name, at_block=at)
            writer.switch(name)
            end_what_is_open(writer)
            write(writer, Text(name, 50 * K))
            if name == "b":
                writer.flush()
        is_sound(root)
    holds(root, clipped(ONE, 70), Text("a", 50 * K), branch="a")
    holds(root, clipped(ONE, 64), Text("b", 50 * K), branch="b")
    # At block 66 of b lies the third block of its own document.
    holds(root, clipped(ONE, 64), clipped(Text("b", 50 * K), 2), Text("c", 50 * K), branch="c")
    holds(root, clipped(ONE, 10), Text("d", 50 * K), branch="d")
    assert next(c.branch for c in history(root).log("d")) == "d"
    assert {c.branch for c in history(root).log("d")} == {"main", "a", "b", "c", "d"}


def test_rolling_back_leaves_readers_tags_and_the_way_forward(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        before = Branching(writer).tag("before", message="all was well")
        write(writer, THREE)
        after = writer.version().seq
        pinned = writer.reader()
        Branching(writer).roll_back(before)
        holds(root, TWO)
        write(writer, ONE)
        holds(root, TWO, ONE)
        assert_holds(pinned, [TWO, THREE], ENCODING)
        pinned.close()
        assert history(root).resolve("before") == before
        holds(root, TWO, seq=before)
        Branching(writer).roll_back(after, "it was not")
        holds(root, TWO, THREE)
    log = history(root).log("main")
    assert (log[0].request_id, log[0].message) == ("roll_back", "it was not")
    assert next(c for c in log if c.seq == before).tags == ("before",)
    assert [b.name for b in history(root).branches()] == ["main"]
    assert len(history(root).branches(retired=True)) == 3
    assert [entry.action for entry in history(root).audit()] == ["roll_back", "roll_back", "tag"]
    is_sound(root)


def test_a_branch_is_fast_forwarded_while_its_parent_stands_still(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        Branching(writer).fork("draft")
        writer.switch("draft")
        write(writer, THREE)
        writer.switch("main")
        merged = Branching(writer).merge("draft")
        assert (merged.fast_forward, merged.documents, merged.blocks) == (True, 1, 45)
        holds(root, TWO, THREE)
        write(writer, ONE)
    holds(root, TWO, THREE, ONE)
    holds(root, TWO, THREE, branch="draft")
    is_sound(root)


def test_upper_nodes_that_came_since_do_not_hinder_a_fast_forward(root: Path) -> None:
    with open_context(root) as writer:
        writer.append([ONE.span(ENCODING)])
        Branching(writer).fork("draft")
        follow(writer, ENCODING)
        writer.switch("draft")
        write(writer, TWO)
        writer.switch("main")
        Branching(writer).fast_forward("draft")
    holds(root, ONE, TWO)
    is_sound(root)


def test_documents_of_a_branch_are_appended_where_the_parent_went_on(root: Path) -> None:
    four = Text("four", 5000 * K)
    with open_context(root) as writer:
        write(writer, TWO)
        Branching(writer).fork("side")
        writer.switch("side")
        write(writer, THREE)
        writer.append([Text("gone", 20 * K).span(ENCODING, 0, 3)])
        writer.close_document("gone")
        write(writer, four)
        writer.switch("main")
        write(writer, ONE)
        with pytest.raises(BranchConflictError, match="'main' has gone on since 'side' was forked from its block 60"):
            Branching(writer).fast_forward("side")
        merged = Branching(writer).merge("side")
        assert (merged.fast_forward, merged.documents, merged.blocks) == (False, 3, 45 + 3 + 5000)
        again = Branching(writer).merge("side")
        assert (again.documents, again.blocks, again.skipped_documents) == (0, 0, 3)
        follow(writer, ENCODING)
    holds(root, TWO, ONE, THREE, clipped(Text("gone", 20 * K), 3), four)
    is_sound(root)


def test_what_cannot_be_merged_is_said_before_anything_is_written(root: Path) -> None:
    text = Text("talk", 100 * K)
    with open_context(root) as writer:
        writer.append([text.span(ENCODING, 0, 40, ends=False)])
        branching = Branching(writer)
        branching.fork("side")
        writer.switch("side")
        writer.append([text.span(ENCODING, 40, 45)])
        writer.switch("main")
        writer.append([text.span(ENCODING, 40, 50)])
        before = writer.version()
        with pytest.raises(BranchConflictError, match="'talk' is still open on 'main'"):
            branching.merge("side")
        writer.close_document("talk")
        with pytest.raises(BranchConflictError, match="'talk' goes on across the fork at block 40"):
            branching.merge("side")
        branching.fork("other", at_block=50)
        writer.switch("other")
        end_what_is_open(writer)
        writer.append([THREE.span(ENCODING, 0, 4)])
        writer.switch("main")
        write(writer, TWO)
        with pytest.raises(BranchConflictError, match="'three' is still open on 'other'"):
            branching.merge("other")
        with pytest.raises(StorageError, match="into itself"):
            branching.merge("main")
        assert writer.version().num_blocks == before.num_blocks + 60
    is_sound(root)


def test_names_versions_and_blocks_that_there_are_not(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        branching = Branching(writer)
        branching.fork("side")
        for refused, match in [
            (lambda: branching.fork("side"), "has a branch 'side' already"),
            (lambda: branching.fork("a/b"), "names hold letters"),
            (lambda: branching.fork("x", at_block=61), "it cannot be forked at block 61"),
            (lambda: branching.fork("x", seq=99), "no version 99"),
            (lambda: branching.roll_back(99), "no version 99"),
            (lambda: branching.discard("main"), "what jobs read by default"),
            (lambda: branching.discard("nobody"), "no branch 'nobody'"),
            (lambda: branching.merge("nobody"), "no branch 'nobody'"),
            (lambda: branching.delete_tag("nothing"), "no tag 'nothing'"),
            (lambda: branching.tag("v 1"), "names hold letters"),
            (lambda: branching.tag("3"), "are not numbers"),
            (lambda: branching.tag("main"), "has a branch 'main'"),
            (lambda: writer.switch("nobody"), "no branch 'nobody'"),
            (lambda: history(root).resolve("nothing"), r"give a branch \(main, side\), a tag \(none\)"),
            (lambda: history(root).log("nobody"), "it has: main, side"),
        ]:
            with pytest.raises(StorageError, match=match):
                refused()
        branching.tag("v1")
        with pytest.raises(StorageError, match="is there already"):
            branching.tag("v1")
        with pytest.raises(StorageError, match="has a tag 'v1'"):
            branching.fork("v1")
        branching.delete_tag("v1")
        writer.switch("side")
        with pytest.raises(StorageError, match="is being written"):
            branching.discard("side")
        writer.switch("main")
        assert history(root).tags() == []
        branching.discard("side")
        assert [b.name for b in history(root).branches()] == ["main"]
        branching.fork("side")
        write(writer, THREE)
    holds(root, TWO, THREE)
    is_sound(root)


def test_what_is_retired_is_read_and_not_written(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        Branching(writer).roll_back(writer.version().seq)
        with pytest.raises(StorageError, match="is retired, so what is written to it would be collected"):
            writer.switch("main~1")
        assert writer.version().branch == "main"
    with pytest.raises(StorageError, match="is retired"):
        open_context(root, branch="main~1")
    holds(root, TWO, branch="main~1")


def test_a_cut_document_does_not_stop_a_merge_halfway(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        branching = Branching(writer)
        branching.fork("side")
        writer.switch("side")
        write(writer, Text("first", 40 * K))
        writer.append([THREE.span(ENCODING, 0, 4)])
        writer.close_document("three")
        writer.switch("main")
        write(writer, THREE)
        before = writer.version().seq
        with pytest.raises(BranchConflictError, match="document 'three' has 1440 tokens on 'main' and 128 on 'side'"):
            branching.merge("side")
        assert writer.version().seq == before
    is_sound(root)


def test_a_difference_names_what_each_side_has_alone(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TWO)
        Branching(writer).fork("side")
        write(writer, ONE)
        writer.switch("side")
        write(writer, THREE)
    found = history(root).diff("main", "side")
    assert found.shared_blocks == 60
    assert [d.meta.key for d in found.only_left] == ["one"]
    assert [d.meta.key for d in found.only_right] == ["three"]
    assert (found.left_blocks, found.right_blocks) == (1100, 45)
    assert (found.left_tokens, found.right_tokens) == (ONE.num_tokens, THREE.num_tokens)
    node = ENCODING.node_bytes
    assert found.right_bytes == 45 * (K * 4 + 9 + node) + 2 * node
    nothing = history(root).diff("main", "main")
    assert (nothing.left_blocks, nothing.right_blocks, nothing.only_left) == (0, 0, [])


def test_another_encoding_of_a_branch_leaves_its_parent_alone(root: Path) -> None:
    new = encoding_of("float32", width=6)
    with open_context(root, seal_in_background=False) as writer:
        write(writer, ONE)
        Branching(writer).fork("side", at_block=1090)
        writer.switch("side")
        writer.close_document("one")
        write(writer, TWO)
        builder = EncodingBuilder(writer, new)
        arrays = {spec.name: torch.cat([ONE.gists(0, 1090, spec), TWO.gists(0, 60, spec)]) for spec in new.arrays}
        builder.put_nodes(1, 0, arrays)
        assert builder.level_counts() == (1150,)
        with pytest.raises(OutOfOrderError, match="run the same rebuild again"):
            builder.activate()
        builder.put_nodes(2, 0, {"gists": torch.ones(35, 6)})
        builder.put_nodes(3, 0, {"gists": torch.ones(1, 6)})
        builder.activate()
        writer.flush()
        with writer.reader() as reader:
            assert_holds(reader, [clipped(ONE, 1090), TWO], new)
        Branching(writer).fork("grandchild")
        writer.switch("main")
        write(writer, THREE)
        with pytest.raises(BranchConflictError, match="rebuild one of them"):
            Branching(writer).merge("side")
    holds(root, ONE, THREE)
    with ContextReader(root / CONTEXT, CONTEXT, "grandchild") as reader:
        assert_holds(reader, [clipped(ONE, 1090), TWO], new)
    is_sound(root)


def test_the_audit_log_cannot_be_edited(root: Path) -> None:
    with open_context(root) as writer:
        Branching(writer).tag("v1")
        for statement in ("DELETE FROM audit", "UPDATE audit SET action = 'nothing'"):
            with pytest.raises(StorageError, match="append-only"):
                rows(writer, statement)


def test_a_commit_leaves_the_row_of_the_open_document_alone(root: Path) -> None:
    stored = "SELECT num_blocks, num_tokens, state FROM documents"
    with open_context(root, seal_in_background=False) as writer:
        writer.append([ONE.span(ENCODING, 0, 10)])
        before = rows(writer, stored)
        with writer.reader() as old:
            for first in range(10, 40, 10):
                writer.append([ONE.span(ENCODING, first, first + 10)])
            assert rows(writer, stored) == before
            assert [(d.num_blocks, d.num_tokens, d.state) for d in old.documents()] == [(10, 10 * K, "open")]
        with writer.reader() as new:
            assert [(d.num_blocks, d.num_tokens, d.state) for d in new.documents()] == [(40, 40 * K, "open")]
            assert new.document_at(39).num_blocks == 40
        Branching(writer).fork("side")
        writer.switch("side")
        assert writer.marks(["one"])["one"] == DocumentMark(40, 40 * K, 0, "open")
        writer.append([ONE.span(ENCODING, 40)])
        assert rows(writer, f"{stored} WHERE state != 'open'") == [(1100, 1100 * K, "complete")]
    with open_context(root, seal_in_background=False) as writer:
        assert writer.marks(["one"])["one"] == DocumentMark(40, 40 * K, 0, "open")
    holds(root, ONE, branch="side")
    is_sound(root)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE commits SET branch_id = 77 WHERE seq = (SELECT max(seq) FROM commits)",
        "UPDATE commits SET level_counts = '[4]' WHERE seq = (SELECT max(seq) FROM commits)",
        "UPDATE branches SET head_seq = 1000",
    ],
)
def test_a_damaged_tip_is_not_served(root: Path, damage: str) -> None:
    with open_context(root, seal_in_background=False) as writer:
        Branching(writer).fork("side")
        write(writer, TWO)
        writer.append([ONE.span(ENCODING, 0, 20)])
    with closing(sqlite3.connect(root / CONTEXT / catalogue.CATALOGUE_FILE, isolation_level=None)) as db:
        triggers = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE '%_crc_%'"
        found = db.execute(triggers).fetchall()
        for name, _ in found:
            db.execute(f"DROP TRIGGER {name}")
        db.execute(damage)
        for _, text in found:
            db.execute(text)
    with pytest.raises(CorruptTreeError, match="is damaged"):
        ContextReader(root / CONTEXT, CONTEXT)
    with pytest.raises(CorruptTreeError, match="is damaged"):
        open_context(root)
    assert not verify_context(root / CONTEXT, CONTEXT).ok
