"""Checks all that a store holds of a context: its tree, what is derived from it, what sessions left, what was archived,
and its place in the store."""

from __future__ import annotations

from dataclasses import dataclass

from storage.focus.events import check_focus_events
from storage.lexical.check import check_index
from storage.store import Store
from storage.tree.verify import VerifyReport, verify_context
from storage.versions.archive import check_archives


@dataclass
class ContextReport:
    """What was looked at and what is wrong, by where it is."""

    tree: VerifyReport
    index: list[str]
    """Of the lexical index."""
    events: list[str]
    """Of focus events."""
    archives: list[str]
    """Of what curation archived."""
    store: list[str]
    """Of `store.sqlite`."""

    @property
    def problems(self) -> list[str]:
        """All of it, a line each."""
        return [*self.store, *self.tree.problems, *self.index, *self.events, *self.archives]


def check_context(store: Store, name: str) -> ContextReport:
    """Read everything of a context.

    Raises:
        ContextNotFoundError: no such context.
        CorruptTreeError: the store or the catalogue cannot be opened at all.
    """
    in_store = store.check()
    folder = store.folder(name)
    tree = verify_context(folder, name)
    index = check_index(folder, tree.branch_blocks)
    return ContextReport(tree, index, check_focus_events(folder), check_archives(folder), in_store)
