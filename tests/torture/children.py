"""Processes under the interposer, and what they say."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self

from tests.torture.interposer import Plan, arm, processes
from tests.torture.oracle import Findings, Oracle
from tests.torture.workloads import go_on

P = ParamSpec("P")
PATIENCE_S = 120.0
"""For what takes a second on an idle machine."""

DIED_BY_KILL = -9


class Child:
    """Runs `function(connection, ...)` in a process of its own; killed at the end of the `with`, if it still lives."""

    def __init__(self, function: Callable[Concatenate[Connection, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        ours, theirs = processes().Pipe()
        self._connection = ours
        self._process = processes().Process(target=_quietly, args=(function, theirs, *args), kwargs=kwargs)
        self._process.start()
        self.has_ended = False
        """Whether all it ever said was heard."""
        theirs.close()

    def wait_for_a_word(self) -> None:
        """Returns as soon as there is something to hear."""
        assert self._connection.poll(PATIENCE_S), f"the process said nothing for {PATIENCE_S:.0f} s"

    def words(self, seconds: float = PATIENCE_S) -> Iterator[Any]:
        """What it says until its end, or for so long."""
        deadline = time.monotonic() + seconds
        try:
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                yield self._connection.recv()
                if time.monotonic() > deadline:
                    return
        except (EOFError, ConnectionResetError):
            self.has_ended = True

    def answer(self, word: Any) -> None:
        """Say something to it."""
        self._connection.send(word)

    def kill(self) -> None:
        """Kill it now; what it said before can still be heard."""
        self._process.kill()

    def end(self) -> int | None:
        """Wait for its end; returns the exit code."""
        self._process.join(PATIENCE_S)
        return self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def _quietly(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    # What recoveries remove and why sealing waits is said in every life.
    logging.getLogger("megacontext.storage").setLevel(logging.CRITICAL)
    function(*args, **kwargs)


def go_on_and_inspect(root: Path, num_documents: int, oracle: Oracle) -> Findings:
    """Recover a store and bring so many documents to their end, by a process of its own; then read all of it."""
    with Child(_go_on, root, num_documents) as child:
        for ack in child.words():
            oracle.hear(ack)
        if child.end() != 0:
            return Findings(torn=["it cannot be written to any more; the traceback is in the output"])
    return oracle.inspect(root)


def _go_on(connection: Connection, root: Path, num_documents: int) -> None:
    # Under an empty plan nothing happens but that syncs cost nothing.
    arm(Plan(root.parent))
    go_on(root, num_documents, connection.send)
