"""A tree store that outlives the actor it belongs to: its process is no child of Ray's, so nothing ends it.

    actor `OrphanedStore`  --calls-->  this process, the writer of the context

It answers like the store itself until it holds a batch to append with enough stored before. That call it keeps. Once
its actor is gone, it lets go of the file lock, as a file system does whose client was cut off, waits until somebody
else has the writer's place, and then makes the call, and others, again and again. Only the epoch can refuse them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import storage.store
from actors.rows import spans_from
from actors.tree_store import TreeStore, TreeStoreSpec
from cluster.environment import PROJECT_ROOT
from cluster.errors import MegaContextError, StaleWriterError
from storage.contract import Ack, DocumentMeta, SpanWrite
from storage.tree import catalogue
from storage.tree.writer import ContextWriter

HELD_AT_BLOCKS = 600
"""Stored blocks from which on a batch is kept."""

PATIENCE_S = 120.0
PAUSE_S = 0.05
"""Between two rounds of an orphan's calls."""

HELD_FILE, STOP_FILE, DONE_FILE = "held", "stop", "orphan.json"
UNCHECKED_FILE = "unchecked"


class UncheckedWriter(ContextWriter):
    """What a writer would be if its transactions did not look at the epoch."""

    @contextlib.contextmanager
    def commit(self) -> Iterator[sqlite3.Connection]:
        """A transaction under the lock alone."""
        with self.lock, catalogue.translated(self.folder), catalogue.transaction(self._connection) as db:
            yield db


class OrphanedStore:
    """The actor: hands every call to the process that has the store. The first one of a folder is to be orphaned."""

    def __init__(self, spec: TreeStoreSpec) -> None:
        self._connection = start_store(spec, spec.store.root.parent)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return ask(self._connection, method, *args, **kwargs)


def _forwarded(method: str) -> Callable[..., Any]:
    def call(self: OrphanedStore, *args: Any, **kwargs: Any) -> Any:
        return self._ask(method, *args, **kwargs)

    return call


for _name in (name for name in vars(TreeStore) if not name.startswith("_")):
    setattr(OrphanedStore, _name, _forwarded(_name))


def ask(connection: Connection, method: str, *args: Any, **kwargs: Any) -> Any:
    """One call to the process at the other end."""
    connection.send((method, args, kwargs))
    error, result = connection.recv()
    if error is not None:
        raise error
    return result


def start_store(spec: TreeStoreSpec, folder: Path) -> Connection:
    """Start a process that has the store, by way of a shell, whose end makes it nobody's child."""
    # Of the abstract namespace: paths of sockets may have no more than 107 bytes.
    address = f"orphan-{os.getpid()}-{time.time_ns()}"
    with Listener("\0" + address, family="AF_UNIX") as listener:
        command = f'"{sys.executable}" -m tests.torture.orphan {address} "{folder}" >> "{folder}/orphan.log" 2>&1 &'
        subprocess.run(["sh", "-c", command], cwd=PROJECT_ROOT, check=True, start_new_session=True)
        connection = listener.accept()
    connection.send(spec)
    return connection


def main() -> None:
    """Be the store, and perhaps its orphan."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    with Client("\0" + options.address, family="AF_UNIX") as connection:
        spec = connection.recv()
        is_first = not (folder / HELD_FILE).exists()
        if is_first and (folder / UNCHECKED_FILE).exists():
            storage.store.ContextWriter = UncheckedWriter
        store = TreeStore(spec)
        held = _serve(connection, store, folder if is_first else None)
    if held is None:
        store.close()
    else:
        outcome = Orphan(store, held, folder).run()
        temporary = folder / f"{DONE_FILE}.tmp"
        temporary.write_text(json.dumps(outcome))
        temporary.rename(folder / DONE_FILE)


def _serve(connection: Connection, store: TreeStore, folder: Path | None) -> list[SpanWrite] | None:
    """Answer until the caller is gone; the spans of the call that was kept."""
    held: list[SpanWrite] | None = None
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            method, args, kwargs = connection.recv()
            if folder and method in {"append", "append_table"} and _num_blocks(store) >= HELD_AT_BLOCKS:
                held = _spans(store, method, args)
                (folder / HELD_FILE).write_text(str(os.getpid()))
                folder = None
                continue
            try:
                answer = (None, getattr(store, method)(*args, **kwargs))
            except MegaContextError as error:
                answer = (error, None)
            connection.send(answer)
    return held


def _num_blocks(store: TreeStore) -> int:
    if store._bulk is not None:
        # What is being written counts when it is stored.
        store._bulk._landed(wait=True)
    return store.open()[0].num_blocks


def _spans(store: TreeStore, method: str, args: Sequence[Any]) -> list[SpanWrite]:
    if method == "append":
        return [span for batch in args[1:] for span in batch]
    return list(spans_from(args[1], store._opened().encoding.arrays))


class Orphan:
    """A store whose context somebody else has taken over, and which does not know."""

    def __init__(self, store: TreeStore, held: list[SpanWrite], folder: Path) -> None:
        self._store = store
        self._writer = store._opened()
        self._held = held
        self._folder = folder
        self._outcomes: Counter[str] = Counter()
        self._num_rounds = 0

    def run(self) -> dict[str, Any]:
        """Call until told to stop; what came of it, by what was called."""
        fcntl.flock(self._writer._lock_file, fcntl.LOCK_UN)
        _wait_until(self._was_replaced, "nobody took the writer's place")
        epoch = self._writer.epoch
        # Of the bulk feed a batch may only be gathered; then its flush is the first to write.
        first = self._call("append", lambda: self._store.append(epoch, self._held))
        if first == "gathered":
            first = self._call("flush", lambda: self._store.flush(epoch))
        while not (self._folder / STOP_FILE).exists():
            self._call("append", self._append_next)
            self._call("append_tail", self._append_tail)
            self._call("put_nodes", self._put_nodes)
            self._call("close_document", self._close_document)
            self._num_rounds += 1
            time.sleep(PAUSE_S)
        return {"first": first, "rounds": self._num_rounds, "outcomes": dict(self._outcomes)}

    def _was_replaced(self) -> bool:
        with self._writer.reading() as db:
            return db.execute("SELECT epoch FROM writer").fetchone()[0] > self._writer.epoch

    def _append_next(self) -> Ack:
        """A block that would fit: of the open document, or of a document of its own."""
        meta = self._writer.open_document() or DocumentMeta(f"orphan-{self._num_rounds}", "orphan")
        document = self._writer.document(meta.key)
        span = next(span for span in self._held if span.num_tokens[0] == 32).part(0, 1)
        first_block = document.num_blocks if document else 0
        return self._writer.append([dataclasses.replace(span, document=meta, first_block=first_block)])

    def _append_tail(self) -> Ack:
        meta = self._writer.open_document() or DocumentMeta(f"orphan-{self._num_rounds}", "orphan")
        document = self._writer.document(meta.key)
        offset = document.num_tokens + len(document.tail) if document else 0
        return self._writer.append_tail(meta, offset, self._held[0].tokens[0, :1])

    def _put_nodes(self) -> Ack:
        """The gists of a block, as the next node of LOD2."""
        span = self._held[0].part(0, 1)
        return self._writer.put_nodes(2, self._writer.version().num_nodes(2), span.arrays)

    def _close_document(self) -> Ack:
        meta = self._writer.open_document() or DocumentMeta("none", "none")
        return self._writer.close_document(meta.key)

    def _call(self, what: str, call: Callable[[], Any]) -> str:
        try:
            ack = call()
            fruitless = isinstance(ack, Ack) and not ack.new_blocks and what == "append"
            outcome = ("gathered" if ack.pending_blocks else "skipped") if fruitless else "accepted"
        except MegaContextError as error:
            outcome = type(error).__name__
        self._outcomes[f"{what}: {outcome}"] += 1
        return outcome


def refused(outcomes: dict[str, int]) -> int:
    """Calls that the epoch refused."""
    return sum(count for name, count in outcomes.items() if name.endswith(StaleWriterError.__name__))


def accepted(outcomes: dict[str, int]) -> int:
    """Calls that wrote."""
    return sum(count for name, count in outcomes.items() if name.endswith("accepted"))


def _wait_until(is_true: Callable[[], bool], otherwise: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.01)


if __name__ == "__main__":
    main()
