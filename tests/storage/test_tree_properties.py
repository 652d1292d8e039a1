"""Whatever is written, in whatever pieces and with whatever retries, the tree on disk equals the one in memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config import TOKENS_PER_BLOCK as K
from storage.memory_tree import MemoryTree
from storage.tree.verify import verify_context
from tests.storage.support import (
    CONTEXT,
    Text,
    encoding_of,
    follow,
    mean_cosine_loss,
    new_store,
    open_context,
)


class TreesAgree(RuleBasedStateMachine):
    """Writes to a tree on disk and one in memory; now and then the disk's is sealed, reopened or read."""

    @initialize(
        dtype=st.sampled_from(["float16", "bfloat16", "float32", "int8"]),
        rows=st.sampled_from([1, 2, 4]),
        keys=st.sampled_from([0, 3]),
        background=st.booleans(),
    )
    def begin(self, dtype, rows: int, keys: int, background: bool) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.encoding = encoding_of(dtype, 66 if dtype == "int8" else 5, rows, key_width=keys)
        self.background = background
        new_store(self.root, self.encoding)
        self.disk = open_context(self.root, seal_in_background=background)
        self.memory = MemoryTree(self.encoding)
        self.num_texts = 0
        self.text: Text | None = None
        self.finished: list[Text] = []
        self.pinned = []

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        try:
            self.agree()
            self.disk.close()
            report = verify_context(self.root / CONTEXT, CONTEXT)
            assert report.ok, report.problems
        finally:
            for on_disk, _ in self.pinned:
                on_disk.close()
            self.disk.close()
            shutil.rmtree(self.root)

    def both(self, method: str, *arguments, **options):
        on_disk = getattr(self.disk, method)(*arguments, **options)
        in_memory = getattr(self.memory, method)(*arguments, **options)
        assert on_disk.new_blocks == in_memory.new_blocks
        assert on_disk.skipped_blocks == in_memory.skipped_blocks
        assert on_disk.new_nodes == in_memory.new_nodes
        assert on_disk.version.level_counts == in_memory.version.level_counts
        assert on_disk.version.num_tokens == in_memory.version.num_tokens

    def stored_blocks(self) -> int:
        assert self.text is not None
        mark = self.disk.marks([self.text.key]).get(self.text.key)
        return mark.num_blocks if mark else 0

    def follows(self) -> None:
        follow(self.disk, self.encoding)
        follow(self.memory, self.encoding)

    @precondition(lambda self: self.text is None)
    @rule(num_tokens=st.one_of(st.integers(1, 200), st.integers(1000, 1400)))
    def start_document(self, num_tokens: int) -> None:
        self.num_texts += 1
        self.text = Text(f"doc{self.num_texts}", num_tokens)

    @precondition(lambda self: self.text is not None)
    @rule(back=st.integers(0, 5), size=st.integers(1, 50), repeat=st.booleans())
    def append(self, back: int, size: int, repeat: bool) -> None:
        text = self.text
        assert text is not None
        stored = self.stored_blocks()
        spans = [text.span(self.encoding, max(0, stored - back), min(text.num_blocks, stored + size))]
        self.both("append", spans * 2 if repeat else spans)
        if spans[0].last:
            self.finished.append(text)
            self.text = None

    @precondition(lambda self: self.text is not None)
    @rule(back=st.integers(0, 40), size=st.integers(1, 90))
    def append_tail(self, back: int, size: int) -> None:
        text = self.text
        assert text is not None
        mark = self.disk.marks([text.key]).get(text.key)
        stored = mark.num_tokens + mark.tail_tokens if mark else 0
        start = max(0, stored - back)
        stop = min(text.num_tokens, stored + size)
        self.both("append_tail", text.meta, start, text.tokens(start, stop))

    @precondition(lambda self: self.text is not None and self.disk.open_document() is not None)
    @rule()
    def cut(self) -> None:
        assert self.text is not None
        self.both("close_document", self.text.key)
        self.text = None

    @precondition(lambda self: bool(self.finished))
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self.finished))
        first = data.draw(st.integers(0, text.num_blocks - 1))
        self.both("append", [text.span(self.encoding, first)])

    @rule()
    def put_upper_nodes(self) -> None:
        self.follows()

    @rule()
    def seal(self) -> None:
        self.disk.sealer.seal()

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.disk = open_context(self.root, seal_in_background=self.background)

    @precondition(lambda self: len(self.pinned) < 3)
    @rule()
    def pin(self) -> None:
        self.pinned.append((self.disk.reader(), self.memory.reader()))

    @invariant()
    def marks_agree(self) -> None:
        if hasattr(self, "disk"):
            keys = [f"doc{n}" for n in range(1, self.num_texts + 1)]
            assert self.disk.marks(keys) == self.memory.marks(keys)
            assert self.disk.open_document() == self.memory.open_document()

    def agree(self) -> None:
        now = (self.disk.reader(), self.memory.reader())
        with now[0]:
            assert now[0].documents() == now[1].documents()
            on_disk, in_memory = now[0].tail(), now[1].tail()
            assert (on_disk is None) == (in_memory is None)
            if on_disk is not None and in_memory is not None:
                assert on_disk.document == in_memory.document
                np.testing.assert_array_equal(on_disk.tokens, in_memory.tokens)
            for disk, memory in [*self.pinned, now]:
                self.contents_agree(disk, memory)

    def contents_agree(self, disk, memory) -> None:
        version = disk.version
        assert version.level_counts == memory.version.level_counts
        assert version.num_tokens == memory.version.num_tokens
        for one, other in zip(disk.tokens(0, version.num_blocks), memory.tokens(0, version.num_blocks), strict=True):
            np.testing.assert_array_equal(one, other)
        blocks = np.arange(version.num_blocks + 1)
        np.testing.assert_array_equal(disk.tokens_before(blocks), memory.tokens_before(blocks))
        for lod in range(1, version.max_lod + 1):
            nodes = np.arange(version.num_nodes(lod))[::-1]
            for spec in self.encoding.arrays:
                read, wanted = disk.read(spec.name, lod, nodes), memory.read(spec.name, lod, nodes)
                groups = [disk.read_group(spec.name, lod, group) for group in range(-(-len(nodes) // K))]
                assert torch.equal(torch.cat(groups).flip(0), read)
                if spec.dtype == "int8":
                    assert float(mean_cosine_loss(read, wanted)) < 1e-3
                else:
                    # The values fit every float dtype, so nothing may be lost.
                    assert torch.equal(read.float(), wanted.float())


TestTreesAgree = TreesAgree.TestCase
TestTreesAgree.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
