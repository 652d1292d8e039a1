"""CPU time and memory of a process with all its descendants, watched from outside.

Rival and subject run in fresh processes of the same kind, so that what the measuring process does or holds is on
nobody's account, and Ray's servers and workers, descendants of their driver, are on the driver's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.harness import BenchmarkError

CPU_INTERVAL_S = 0.5
"""Between looks at the tree: a process that ends in between loses at most what it used since the last look."""

CALL_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Memory:
    """Bytes of a process tree, each shared page shared out among those who map it."""

    anonymous: int
    """Heaps and stacks."""
    shared: int
    """Shared memory: Ray's object store, and SQLite's index of its log."""
    files: int
    """Mapped files: libraries and segments. The kernel drops these pages when somebody else needs the room."""

    @property
    def needed(self) -> int:
        """What cannot be dropped."""
        return self.anonymous + self.shared


@dataclass(frozen=True)
class Usage:
    """What one call cost."""

    result: Any
    wall_s: float
    cpu_s: float
    """User and system time of the whole tree."""
    peak: Memory | None
    """Each part's largest value at a look; None when memory was not watched."""


class ProcessTree:
    """A process and its descendants."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._lock = threading.Lock()
        # Largest value seen of every process that ever was in the tree: the ended ones count too.
        self._cpu_s: dict[tuple[int, float], float] = {}

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        with self._lock:
            for process in self._members():
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self._cpu_s[process.pid, process.create_time()] = times.user + times.system
            return sum(self._cpu_s.values())

    def memory(self) -> Memory:
        """Memory now. Needs Linux's `smaps_rollup`."""
        found = [proportional_set(process.pid) for process in self._members()]
        return Memory(
            sum(memory.anonymous for memory in found),
            sum(memory.shared for memory in found),
            sum(memory.files for memory in found),
        )

    def _members(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def proportional_set(pid: int) -> Memory:
    """A process's share of memory by kind; zeros when it has ended."""
    kilobytes = {"Pss_Anon": 0, "Pss_Shmem": 0, "Pss_File": 0}
    # ESRCH (ProcessLookupError) is what a process that ends while its file is open gives.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            if name in kilobytes:
                kilobytes[name] = int(rest.split()[0])
    return Memory(kilobytes["Pss_Anon"] * 1024, kilobytes["Pss_Shmem"] * 1024, kilobytes["Pss_File"] * 1024)


class _Watch:
    """Looks at a tree now and then while a call runs."""

    def __init__(self, tree: ProcessTree, *, memory: bool) -> None:
        self._tree = tree
        self._memory = memory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._seen: list[Memory] = []

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(CPU_INTERVAL_S):
            self._tree.cpu_s()
            if self._memory:
                self._seen.append(self._tree.memory())

    @property
    def peak(self) -> Memory | None:
        if not self._memory:
            return None
        seen = self._seen or [self._tree.memory()]
        # The peak of the sum is what a machine must have; its parts are shown as they were at that moment.
        return max(seen, key=lambda memory: memory.needed)


class Child:
    """An object that lives in a fresh process and is called from here. Use as a context manager."""

    def __init__(self, make: Callable[..., AbstractContextManager[Any]], *arguments: object) -> None:
        """Start the process, and in it `make(*arguments)`, which is entered there; all must be picklable.

        Raises:
            BenchmarkError: it failed there, with its traceback.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may not have children, and Ray's driver has many.
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), name=make.__name__)
        started = time.perf_counter()
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self._tree = ProcessTree(self._process.pid)
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        self.start_s = time.perf_counter() - started
        """Seconds until it was ready."""

    def measure(self, method: str, *arguments: object, memory: bool = False) -> Usage:
        """Call a method there and say what it cost.

        Raises:
            BenchmarkError: the method raised, or the process died.
        """
        with _Watch(self._tree, memory=memory) as watch:
            cpu_before, started = self._tree.cpu_s(), time.perf_counter()
            self._pipe.send((method, arguments))
            result = self._answer()
            wall_s, cpu_s = time.perf_counter() - started, self._tree.cpu_s() - cpu_before
        return Usage(result, wall_s, cpu_s, watch.peak)

    @staticmethod
    def call_all(children: Sequence[Child], method: str, *arguments: object) -> list[Any]:
        """Call a method in several processes at once; their results, in order. Errors as `measure`."""
        for child in children:
            child._pipe.send((method, arguments))
        return [child._answer() for child in children]

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(CALL_TIMEOUT_S):
                raise BenchmarkError(f"{self._process.name} gave no answer within {CALL_TIMEOUT_S:g} s")
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(10.0)
            raise BenchmarkError(f"{self._process.name} died with exit code {self._process.exitcode}") from error
        if kind == "error":
            raise BenchmarkError(f"{self._process.name} failed:\n{value}")
        return value

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(60.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def _serve(pipe: Connection, make: Callable[..., AbstractContextManager[Any]], arguments: tuple[object, ...]) -> None:
    os.dup2(2, 1)  # standard output belongs to the table
    try:
        with make(*arguments) as target:
            pipe.send(("ok", None))
            while (request := pipe.recv()) is not None:
                method, call_arguments = request
                pipe.send(("ok", getattr(target, method)(*call_arguments)))
    except EOFError:
        return  # the measuring process is gone
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
