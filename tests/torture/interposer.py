"""Builds the preloaded library, starts processes under it and tells it what to do. What it does: `interposer.c`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
LOADED_BEFORE_FORKS = [f"tests.torture.{name}_drill" for name in ("kill", "power", "fault", "loop")]
FOR_EVER = 2**62


class Kind(IntFlag):
    """What an operation does. The numbers are those of `interposer.c`."""

    WRITE = 1
    TRUNCATE = 2
    SYNC = 4
    SYNC_FOLDER = 8
    OPEN = 16
    """For writing; made anew where it says so in the log."""
    MKDIR = 32
    RENAME = 64
    REMOVE = 128
    NOTE = 256
    UNSUPPORTED = 512


POINTS = Kind(255)
"""Everything that changes a disk or makes it durable."""


class Action(IntEnum):
    """What happens at the points of a plan."""

    COUNT = 0
    KILL = 1
    FAIL = 2


@dataclass(frozen=True)
class Plan:
    """What a process meets at its writes under `root`."""

    root: Path
    log: Path | None = None
    """Where operations are recorded, outside the root."""
    action: Action = Action.COUNT
    kinds: Kind = POINTS
    pattern: str = "*"
    """Of the points' paths below the root, with their slash; `*` matches slashes too."""
    first: int = 1
    """The action is taken from this point on, counted from 1."""
    last: int = FOR_EVER
    error: int = 0
    """Errno of FAIL."""
    unsynced: str = ""
    """Syncs of these paths are lost: the planted mistake."""


@functools.cache
def library() -> Path:
    """The compiled library; one a source text, kept between runs.

    Raises:
        RuntimeError: there is no C compiler, or it refused.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"the torture tests preload a library under Linux; this is {sys.platform}")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"megacontext-torture-{os.getuid()}" / f"interposer-{digest}.so"
    if built.exists():
        return built
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the torture tests need a C compiler (cc, gcc or clang) to build tests/torture/interposer.c")
    built.parent.mkdir(mode=0o700, exist_ok=True)
    fresh = built.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(fresh), str(SOURCE), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    fresh.rename(built)
    return built


@functools.cache
def processes() -> ForkServerContext:
    """Starts processes under the library, from a server that has everything loaded: a fresh interpreter would need
    seconds for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED_BEFORE_FORKS)
    # Python keeps one server a process. Another test may have started it, without the library.
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    with _environment(LD_PRELOAD=str(library()), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _loaded() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library()))
    if not loaded.torture_preloaded():
        raise RuntimeError("this process was not started by interposer.processes(); its writes cannot be seen")
    loaded.torture_seen.restype = ctypes.c_long
    loaded.torture_note.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    path, number = ctypes.c_char_p, ctypes.c_long
    loaded.torture_arm.argtypes = [path, path, ctypes.c_uint, path, ctypes.c_int, number, number, ctypes.c_int, path]
    return loaded


def arm(plan: Plan) -> None:
    """Put this process under a plan; inside a process of `processes()` only."""
    error = _loaded().torture_arm(
        os.fsencode(plan.root.resolve()),
        os.fsencode(plan.log.resolve()) if plan.log else b"",
        int(plan.kinds),
        plan.pattern.encode(),
        int(plan.action),
        plan.first,
        plan.last,
        plan.error,
        plan.unsynced.encode(),
    )
    if error:
        raise OSError(error, os.strerror(error), str(plan.log))


def heal() -> None:
    """The disk of this process does as it is told again."""
    _loaded().torture_heal()


def num_points() -> int:
    """Points of the plan this process has met."""
    return _loaded().torture_seen()


def note(data: bytes) -> None:
    """Put a word between the operations of the log."""
    _loaded().torture_note(data, len(data))
