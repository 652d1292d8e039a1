"""Every kind of tree, for the tests that hold all of them to the same contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.contract import TreeWriter
from storage.memory_tree import MemoryTree
from storage.schema import Encoding
from storage.tree.bulk_writer import BulkWriter
from tests.storage.support import encoding_of, new_store, open_context

MakeTree = Callable[..., TreeWriter]


def _context(folder: Path, encoding: Encoding, **options) -> TreeWriter:
    new_store(folder, encoding)
    return open_context(folder, **options)


def _journal_only(folder: Path, encoding: Encoding, **options) -> TreeWriter:
    return _context(folder, encoding, **{"seal_in_background": False, "segment_super_blocks": 1024, **options})


def _bulk(folder: Path, encoding: Encoding, **options) -> TreeWriter:
    new_store(folder, encoding)
    return BulkWriter(open_context(folder, **options))


def _gathering(folder: Path, encoding: Encoding, **options) -> TreeWriter:
    new_store(folder, encoding)
    return BulkWriter(open_context(folder, **options), gather_s=1e-6)


def _memory(folder: Path, encoding: Encoding, **options) -> TreeWriter:
    del folder, options
    return MemoryTree(encoding)


@pytest.fixture(
    params=[_context, _journal_only, _bulk, _gathering, _memory], ids=["disk", "journal", "bulk", "gathering", "memory"]
)
def make_tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeTree]:
    made: list[TreeWriter] = []

    def make(encoding: Encoding | None = None, **options) -> TreeWriter:
        made.append(request.param(tmp_path / str(len(made)), encoding or encoding_of(), **options))
        return made[-1]

    yield make
    for tree in made:
        tree.close()


@pytest.fixture
def tree(make_tree: MakeTree) -> TreeWriter:
    return make_tree()
