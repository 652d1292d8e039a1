"""Checks all that a store holds of a context: its tree, what is derived from it, what sessions left, and its place in
the store."""

from __future__ import annotations

from dataclasses import dataclass

from storage.focus.events import check_focus_events
from storage.lexical.check import check_index
from storage.store import Store
from storage.tree.verify import VerifyReport, verify_context


@dataclass
class ContextReport:
    """What was looked at and what is wrong, by where it is."""

    tree: VerifyReport
    index: list[str]
    """Of the lexical index."""
    events: list[str]
    """Of focus events."""
    store: list[str]
    """Of `store.sqlite`."""

    @property
    def problems(self) -> list[str]:
        """All of it, a line each."""
        return [*self.store, *self.tree.problems, *self.index, *self.events]


def check_context(store: Store, name: str) -> ContextReport:
    """Read everything of a context.

    Raises:
        ContextNotFoundError: no such context.
        CorruptTreeError: the store or the catalogue cannot be opened at all.
    """
    in_store = store.check()
    folder = store.folder(name)
    tree = verify_context(folder, name)
    return ContextReport(tree, check_index(folder, tree.branch_blocks), check_focus_events(folder), in_store)
