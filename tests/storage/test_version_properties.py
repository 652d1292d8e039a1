"""Whatever is done with branches, tags and garbage, every version that is kept reads as it was written."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BranchConflictError
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.verify import verify_context
from storage.versions.branching import Branching
from storage.versions.removal import remove_documents
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, follow, new_store, open_context

ENCODING = encoding_of("float16", width=3)


def clipped(texts: tuple[Text, ...], num_blocks: int) -> tuple[Text, ...]:
    """The documents that lie in the first blocks of a timeline, the last one perhaps in part."""
    kept: list[Text] = []
    for text in texts:
        size = min(text.num_blocks, num_blocks - sum(t.num_blocks for t in kept))
        if size > 0:
            whole = size == text.num_blocks
            kept.append(text if whole else Text(text.key, size * K, text.size_bytes or text.num_tokens))
    return tuple(kept)


class Versions(RuleBasedStateMachine):
    """The model: for every branch, tag and reader the documents it shows. A document is whole, or cut by a fork."""

    @initialize(background=st.booleans())
    def begin(self, background: bool) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.background = background
        new_store(self.root, ENCODING)
        self.store = Store(self.root)
        self.writer = open_context(self.root, seal_in_background=background)
        self.branch = "main"
        self.shown: dict[str, tuple[Text, ...]] = {"main": ()}
        # Of each branch: from which one it was forked, and what that showed then.
        self.forked: dict[str, tuple[str, tuple[Text, ...], int]] = {}
        self.tags: dict[str, tuple[int, tuple[Text, ...]]] = {}
        self.pinned: list[tuple[ContextReader, tuple[Text, ...]]] = []
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
            report = verify_context(self.root / CONTEXT, CONTEXT)
            assert report.ok, report.problems
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
            self.moves[self.branch] = self.moves.get(self.branch, 0) + 1

    @rule(num_tokens=st.one_of(st.integers(1, 200), st.integers(1000, 2200)), upper=st.booleans())
    def append(self, num_tokens: int, upper: bool) -> None:
        self.end_what_is_open()
        text = Text(self.new_name(), num_tokens)
        self.writer.append([text.span(ENCODING)])
        if upper:
            follow(self.writer, ENCODING)
        self.shown[self.branch] += (text,)
        self.moves[self.branch] = self.moves.get(self.branch, 0) + 1

    @rule()
    def seal(self) -> None:
        self.writer.sealer.seal()

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        num_blocks = self.writer.version().num_blocks
        at = data.draw(st.one_of(st.just(num_blocks), st.integers(0, num_blocks)))
        name = self.new_name()
        Branching(self.writer).fork(name, at_block=at)
        self.shown[name] = clipped(self.shown[self.branch], at)
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
        seq, texts = self.tags[data.draw(st.sampled_from(sorted(self.tags)))]
        Branching(self.writer).roll_back(seq)
        self.shown[self.branch] = texts
        self.moved()

    def moved(self) -> None:
        """The name stands on another branch now: what was forked from it before has another parent."""
        self.moves[self.branch] = self.moves.get(self.branch, 0) + 1
        self.forked = {name: entry for name, entry in self.forked.items() if entry[0] != self.branch}

    @precondition(lambda self: len(self.shown) > 1)
    @rule(data=st.data())
    def fast_forward(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.shown.keys() - {self.branch})))
        parent, then, moves = self.forked.get(name, ("", (), -1))
        whole = sum(t.num_blocks for t in self.shown[self.branch])
        possible = parent == self.branch and moves == self.moves.get(self.branch, 0) and then == self.shown[self.branch]
        if possible and sum(t.num_blocks for t in clipped(self.shown[name], whole)) == whole:
            if clipped(self.shown[name], whole) != self.shown[self.branch]:
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

    @precondition(lambda self: bool(self.shown[self.branch]))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.end_what_is_open()
        text = data.draw(st.sampled_from(self.shown[self.branch]))
        remove_documents(self.writer, [text.key])
        self.shown[self.branch] = tuple(t for t in self.shown[self.branch] if t.key != text.key)
        self.moved()

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

    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.writer = open_context(self.root, seal_in_background=self.background, branch=self.branch)

    @invariant()
    def the_writer_stands_where_the_model_does(self) -> None:
        if hasattr(self, "writer"):
            assert self.writer.version().branch == self.branch
            assert self.writer.version().num_tokens == sum(t.num_tokens for t in self.shown[self.branch])

    def all_is_as_written(self) -> None:
        folder = self.root / CONTEXT
        for name, texts in self.shown.items():
            with ContextReader(folder, CONTEXT, name) as reader:
                assert_holds(reader, texts, ENCODING)
        for seq, texts in self.tags.values():
            with ContextReader(folder, CONTEXT, seq=seq) as reader:
                assert_holds(reader, texts, ENCODING)
        for reader, texts in self.pinned:
            assert_holds(reader, texts, ENCODING)


TestVersions = Versions.TestCase
TestVersions.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
