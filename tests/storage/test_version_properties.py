"""Whatever is done with branches, tags, curation and garbage, every version that is kept reads as it was written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BranchConflictError, StorageError
from storage.check import check_context
from storage.contract import BlockState
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.states import PRUNED
from storage.versions.archive import Archives
from storage.versions.branching import Branching
from storage.versions.curation import expire_archives, prune, restore
from storage.versions.removal import erase_documents, remove_documents
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, follow, new_store, open_context

ENCODING = encoding_of("float16", width=3)


OVER, FAR_OFF = 0.0, 4e9
"""When tokens may be collected: at once, or in no test."""


def clipped(texts: tuple[Text, ...], num_blocks: int) -> tuple[Text, ...]:
    """The documents that lie in the first blocks of a timeline, the last one perhaps in part."""
    kept: list[Text] = []
    for text in texts:
        size = min(text.num_blocks, num_blocks - sum(t.num_blocks for t in kept))
        if size > 0:
            whole = size == text.num_blocks
            kept.append(text if whole else Text(text.key, size * K, text.size_bytes or text.num_tokens))
    return tuple(kept)


@dataclass(frozen=True)
class Block:
    """What curation did to a block."""

    state: BlockState = BlockState.WHOLE
    keep_until: float = OVER
    may_be_gone: bool = False
    """A collection may have taken its tokens."""

    @property
    def is_pruned(self) -> bool:
        return self.state in PRUNED


@dataclass(frozen=True)
class Shown:
    """A version: its documents, each whole or cut by a fork, and its blocks."""

    texts: tuple[Text, ...] = ()
    blocks: tuple[Block, ...] = ()
    removed: frozenset[str] = frozenset()
    """Keys of documents that were taken out in its history."""

    def clipped(self, num_blocks: int) -> Shown:
        """Its first blocks."""
        return replace(self, texts=clipped(self.texts, num_blocks), blocks=self.blocks[:num_blocks])

    def parts(self) -> Iterator[tuple[Text, tuple[Block, ...]]]:
        """Each document with its blocks."""
        start = 0
        for text in self.texts:
            yield text, self.blocks[start : start + text.num_blocks]
            start += text.num_blocks

    def places(self) -> list[tuple[str, int]]:
        """Of each block: its document, and the block's number there."""
        return [(text.key, number) for text in self.texts for number in range(text.num_blocks)]

    def with_documents(self, *more: tuple[Text, tuple[Block, ...]]) -> Shown:
        """Documents behind it."""
        texts = tuple(text for text, _ in more)
        blocks = tuple(block for _, blocks in more for block in blocks)
        return replace(self, texts=self.texts + texts, blocks=self.blocks + blocks)

    def without(self, key: str) -> Shown:
        """All but one document."""
        kept = ((text, blocks) for text, blocks in self.parts() if text.key != key)
        return Shown(removed=self.removed | {key}).with_documents(*kept)

    def changed(self, first: int, blocks: list[Block]) -> Shown:
        """With other blocks from the first on."""
        return replace(self, blocks=self.blocks[:first] + tuple(blocks) + self.blocks[first + len(blocks) :])

    def collected(self) -> Shown:
        """After a collection."""
        gone = (b.is_pruned and b.keep_until == OVER for b in self.blocks)
        return replace(
            self,
            blocks=tuple(replace(b, may_be_gone=b.may_be_gone or g) for b, g in zip(self.blocks, gone, strict=True)),
        )


def assert_shows(reader: ContextReader, shown: Shown) -> None:
    """The reader's timeline is these documents, with the tokens of those blocks that are not pruned, and all gists."""
    states = np.array([block.state for block in shown.blocks], np.int8)
    assert_holds(reader, shown.texts, ENCODING, states=states)


@dataclass
class Archived:
    """Blocks of one archive: `(document, block)`."""

    keep_until: float
    places: set[tuple[str, int]] = field(default_factory=set)


class Versions(RuleBasedStateMachine):
    """The model: for every branch, tag and reader what it shows."""

    @initialize(background=st.booleans())
    def begin(self, background: bool) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.background = background
        new_store(self.root, ENCODING)
        self.store = Store(self.root)
        self.writer = open_context(self.root, seal_in_background=background)
        self.branch = "main"
        self.shown: dict[str, Shown] = {"main": Shown()}
        # Of each branch: from which one it was forked, and what that showed then.
        self.forked: dict[str, tuple[str, Shown, int]] = {}
        self.tags: dict[str, tuple[int, Shown]] = {}
        self.pinned: list[tuple[ContextReader, Shown]] = []
        self.archives: list[Archived] = []
        self.moves: dict[str, int] = {}
        self.number = 0

    def teardown(self) -> None:
        if not hasattr(self, "writer"):
            return
        try:
            self.all_is_as_written()
            for reader, _ in self.pinned:
                reader.close()
            self.writer.close()
            assert check_context(self.store, CONTEXT).problems == []
        finally:
            self.writer.close()
            shutil.rmtree(self.root)

    def new_name(self) -> str:
        self.number += 1
        return f"n{self.number}"

    def end_what_is_open(self) -> None:
        growing = self.writer.open_document()
        if growing is not None:
            self.writer.close_document(growing.key)
            self.goes_on()

    def goes_on(self) -> None:
        """The branch is not what it was when others were forked from it."""
        self.moves[self.branch] = self.moves.get(self.branch, 0) + 1

    @rule(num_tokens=st.one_of(st.integers(1, 200), st.integers(1000, 2200)), upper=st.booleans())
    def append(self, num_tokens: int, upper: bool) -> None:
        self.end_what_is_open()
        text = Text(self.new_name(), num_tokens)
        self.writer.append([text.span(ENCODING)])
        if upper:
            follow(self.writer, ENCODING)
        self.shown[self.branch] = self.shown[self.branch].with_documents((text, (Block(),) * text.num_blocks))
        self.goes_on()

    @rule()
    def seal(self) -> None:
        self.writer.sealer.seal()

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        num_blocks = self.writer.version().num_blocks
        at = data.draw(st.one_of(st.just(num_blocks), st.integers(0, num_blocks)))
        name = self.new_name()
        Branching(self.writer).fork(name, at_block=at)
        self.shown[name] = self.shown[self.branch].clipped(at)
        self.forked[name] = (self.branch, self.shown[self.branch], self.moves.get(self.branch, 0))

    @precondition(lambda self: len(self.shown) > 1)
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self.branch = data.draw(st.sampled_from(sorted(self.shown)))
        self.writer.switch(self.branch)

    @precondition(lambda self: bool(self.shown.keys() - {self.branch, "main"}))
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.shown.keys() - {self.branch, "main"})))
        Branching(self.writer).discard(name)
        del self.shown[name]

    @rule()
    def tag(self) -> None:
        name = self.new_name()
        seq = Branching(self.writer).tag(name)
        self.tags[name] = (seq, self.shown[self.branch])

    @precondition(lambda self: bool(self.tags))
    @rule(data=st.data())
    def delete_tag(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tags)))
        Branching(self.writer).delete_tag(name)
        del self.tags[name]

    @precondition(lambda self: bool(self.tags))
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        seq, shown = self.tags[data.draw(st.sampled_from(sorted(self.tags)))]
        Branching(self.writer).roll_back(seq)
        self.shown[self.branch] = shown
        self.moved()

    def moved(self) -> None:
        """The name stands on another branch now: what was forked from it before has another parent."""
        self.moves[self.branch] = self.moves.get(self.branch, 0) + 1
        self.forked = {name: entry for name, entry in self.forked.items() if entry[0] != self.branch}

    @precondition(lambda self: len(self.shown) > 1)
    @rule(data=st.data())
    def fast_forward(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.shown.keys() - {self.branch})))
        parent, then, moves = self.forked.get(name, ("", Shown(), -1))
        texts, whole = self.shown[self.branch].texts, len(self.shown[self.branch].blocks)
        possible = parent == self.branch and moves == self.moves.get(self.branch, 0) and then.texts == texts
        if possible and len(self.shown[name].clipped(whole).blocks) == whole:
            if self.shown[name].clipped(whole).texts != texts:
                return
            Branching(self.writer).fast_forward(name)
            self.shown[self.branch] = self.shown[name]
            self.moved()
        elif parent == self.branch:
            try:
                Branching(self.writer).fast_forward(name)
            except BranchConflictError:
                return
            raise AssertionError("a branch that had gone on was fast-forwarded")

    @precondition(lambda self: len(self.shown) > 1)
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.shown.keys() - {self.branch})))
        mine, theirs = self.shown[self.branch], self.shown[name]
        with ContextReader(self.root / CONTEXT, CONTEXT, name) as reader:
            both = len(mine.blocks), len(theirs.blocks)
            shared = min(reader.lineage.shared_blocks(self.writer.lineage), *both)
        assert mine.clipped(shared).texts == theirs.clipped(shared).texts
        try:
            merged = Branching(self.writer).merge(name)
        except BranchConflictError:
            # Its reasons are in test_branching.py; nothing has changed.
            return
        if merged.fast_forward:
            self.shown[self.branch] = theirs
            self.moved()
            return
        inside = len(theirs.clipped(shared).texts)
        behind = [(text, blocks) for text, blocks in list(theirs.parts())[inside:] if text not in mine.texts]
        new = [(text, blocks) for text, blocks in behind if text.key not in mine.removed]
        assert (merged.documents, merged.removed_documents) == (len(new), len(behind) - len(new))
        if new:
            self.shown[self.branch] = mine.with_documents(*new)
            self.goes_on()

    @precondition(lambda self: bool(self.shown[self.branch].texts))
    @rule(data=st.data(), update=st.booleans())
    def remove(self, data: st.DataObject, update: bool) -> None:
        """With `update` the document comes again, as another text."""
        self.end_what_is_open()
        text = data.draw(st.sampled_from(self.shown[self.branch].texts))
        remove_documents(self.writer, [text.key])
        self.shown[self.branch] = self.shown[self.branch].without(text.key)
        self.moved()
        if update:
            self.append(max(1, text.num_tokens - 5), upper=True)

    @precondition(lambda self: bool(self.shown[self.branch].texts))
    @rule(data=st.data())
    def erase(self, data: st.DataObject) -> None:
        self.end_what_is_open()
        key = data.draw(st.sampled_from(self.shown[self.branch].texts)).key
        others = [shown for name, shown in self.shown.items() if name != self.branch]
        others += [shown for _, shown in (*self.tags.values(), *self.pinned)]
        if any(text.key == key for shown in others for text in shown.texts):
            with pytest.raises(BranchConflictError, match="still show"):
                erase_documents(self.store, self.writer, [key], keep_s=0.0)
            return
        erase_documents(self.store, self.writer, [key], keep_s=0.0)
        self.shown[self.branch] = self.shown[self.branch].without(key)
        self.moved()
        self.everything_is_collected()
        for archived in self.archives:
            archived.places = {place for place in archived.places if place[0] != key}
        folder = self.root / CONTEXT / "archive"
        names = [
            row for file in Archives(self.root / CONTEXT).files() for row in file.table().column("key").to_pylist()
        ]
        assert key not in names
        assert not list(folder.glob(".*"))

    def a_span(self, data: st.DataObject) -> tuple[int, int]:
        """Some of the branch's blocks, whole groups more often than not."""
        num_blocks = len(self.shown[self.branch].blocks)
        if data.draw(st.booleans()):
            return 0, num_blocks
        first = data.draw(st.integers(0, num_blocks - 1))
        return first, data.draw(st.integers(1, num_blocks - first))

    @precondition(lambda self: bool(self.shown[self.branch].blocks))
    @rule(
        data=st.data(),
        keep_until=st.sampled_from([OVER, FAR_OFF]),
        archive_until=st.sampled_from([None, 0.0, 1.0]),
        state=st.sampled_from(PRUNED),
    )
    def prune(self, data: st.DataObject, keep_until: float, archive_until: float | None, state: BlockState) -> None:
        first, count = self.a_span(data)
        growing = self.writer.open_document()
        shown = self.shown[self.branch]
        if growing is not None and shown.places()[first + count - 1][0] == growing.key == shown.texts[-1].key:
            with pytest.raises(StorageError, match="still growing"):
                prune(self.writer, [(first, count)], keep_until=keep_until, state=state, archive_until=archive_until)
            return
        prune(self.writer, [(first, count)], keep_until=keep_until, state=state, archive_until=archive_until)
        span = slice(first, first + count)
        if archive_until is not None:
            there = zip(shown.places()[span], shown.blocks[span], strict=True)
            self.archives.append(Archived(archive_until, {place for place, block in there if not block.may_be_gone}))
        self.shown[self.branch] = shown.changed(
            first, [Block(state, keep_until, block.may_be_gone) for block in shown.blocks[span]]
        )
        self.goes_on()

    @precondition(lambda self: bool(self.shown[self.branch].blocks))
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        first, count = self.a_span(data)
        span = slice(first, first + count)
        shown = self.shown[self.branch]
        blocks = shown.blocks[span]
        archived = {place for archive in self.archives for place in archive.places}
        kept = all(
            not b.is_pruned or not b.may_be_gone or place in archived
            for place, b in zip(shown.places()[span], blocks, strict=True)
        )
        try:
            restored = restore(self.writer, [(first, count)])
        except StorageError:
            # What is wanted of a refusal; more may be there than the model promises.
            assert not kept
            return
        assert restored.blocks == sum(block.is_pruned for block in blocks)
        if restored.blocks:
            self.shown[self.branch] = shown.changed(first, [Block() if block.is_pruned else block for block in blocks])
            self.goes_on()

    @rule()
    def expire_archives(self) -> None:
        expire_archives(self.writer)
        self.archives = [archive for archive in self.archives if archive.keep_until != 1.0]

    @precondition(lambda self: len(self.pinned) < 3)
    @rule()
    def pin(self) -> None:
        self.pinned.append((self.store.open_reader(CONTEXT, self.branch), self.shown[self.branch]))

    @precondition(lambda self: bool(self.pinned))
    @rule()
    def unpin(self) -> None:
        self.pinned.pop()[0].close()

    @rule()
    def collect(self) -> None:
        self.store.collect(self.writer, keep_s=0.0)
        self.everything_is_collected()

    def everything_is_collected(self) -> None:
        """Where nobody wants the tokens of pruned blocks, they may be gone."""
        self.shown = {name: shown.collected() for name, shown in self.shown.items()}
        self.tags = {name: (seq, shown.collected()) for name, (seq, shown) in self.tags.items()}
        self.pinned = [(reader, shown.collected()) for reader, shown in self.pinned]

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.writer = open_context(self.root, seal_in_background=self.background, branch=self.branch)

    @invariant()
    def the_writer_stands_where_the_model_does(self) -> None:
        if hasattr(self, "writer"):
            assert self.writer.version().branch == self.branch
            assert self.writer.version().num_tokens == sum(t.num_tokens for t in self.shown[self.branch].texts)

    def all_is_as_written(self) -> None:
        folder = self.root / CONTEXT
        for name, shown in self.shown.items():
            with ContextReader(folder, CONTEXT, name) as reader:
                assert_shows(reader, shown)
        for seq, shown in self.tags.values():
            with ContextReader(folder, CONTEXT, seq=seq) as reader:
                assert_shows(reader, shown)
        for reader, shown in self.pinned:
            assert_shows(reader, shown)


TestVersions = Versions.TestCase
TestVersions.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
