"""Opening a large context against a small one, after its writer was killed in the middle of a write."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager, closing
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.harness import NUM_SPREAD_BLOCKS, BenchmarkError, Result, Setting, percentiles, say
from benchmarks.process_tree import Child
from benchmarks.synthetic import SuperBlocks, build_context, encoding
from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.writer import ContextWriter

SIDES = ("writer", "reader", "first_read")
"""What is timed; the last in the detail only."""

KEYS = False
UNSEALED_SUPER_BLOCKS = 16
"""What the killed writer leaves in the journal of every context, so that their logs are as long."""


def open_time(setting: Setting) -> Result:
    """Both contexts in turns; after each kill a `ContextReader`, then a `ContextWriter`, both with a log to replay."""
    sizes = setting.size((64, 9792), (32, 96))
    rounds = setting.size(20, 5)
    seconds: dict[tuple[int, str], list[float]] = {(size, side): [] for size in sizes for side in SIDES}
    with setting.scratch() as root:
        for size in sizes:
            writer, _ = build_context(root, _name(size), encoding(keys=KEYS), size)
            say(f"  built a context of {writer.version().num_tokens:,} tokens")
            writer.close()
        stored = {size: size * BLOCKS_PER_SUPER_BLOCK for size in sizes}
        for number in range(rounds):
            for size in sizes if number % 2 else sizes[::-1]:
                _write_and_die(root, _name(size), number)
                stored[size] += UNSEALED_SUPER_BLOCKS * BLOCKS_PER_SUPER_BLOCK
                # The writer comes last: when it closes it folds the log in.
                for side in ("reader", "writer"):
                    opened, read = _seconds_to_open(Store(root).folder(_name(size)), _name(size), side, stored[size])
                    seconds[size, side].append(opened)
                    if side == "reader":
                        seconds[size, "first_read"].append(read)
    small, large = sizes
    ratios = {side: _ratios(seconds[large, side], seconds[small, side]) for side in SIDES}
    worse = max(SIDES[:2], key=lambda side: np.median(ratios[side]))
    detail = {
        "worse": worse,
        **{f"{side}_ratio": round(float(np.median(found)), 3) for side, found in ratios.items()},
        **{
            f"{side}_at_{size * SLOTS_PER_SUPER_BLOCK}_tokens": percentiles(np.array(taken), 1e3, "ms")
            for (size, side), taken in seconds.items()
        },
    }
    return Result.of_repeats(ratios[worse], f"{NUM_SPREAD_BLOCKS} parts of {rounds} kills, in turns", detail)


def _name(size: int) -> str:
    return f"super-blocks-{size}"


def _ratios(large: list[float], small: list[float]) -> list[float]:
    parts = zip(np.array_split(large, NUM_SPREAD_BLOCKS), np.array_split(small, NUM_SPREAD_BLOCKS), strict=True)
    return [float(np.median(mine) / np.median(theirs)) for mine, theirs in parts]


def _seconds_to_open(folder: Path, name: str, side: str, num_blocks: int) -> tuple[float, float]:
    """Until the newest version is known and, by the writer, what was left half-made is gone; and from there until a
    reader has its first block, for which it lists the level's segments."""
    started = time.perf_counter()
    if side == "writer":
        opened: AbstractContextManager[ContextWriter | ContextReader] = closing(
            ContextWriter(folder, name, seal_in_background=False)
        )
    else:
        opened = closing(ContextReader(folder, name))
    with opened as target:
        version = target.version() if isinstance(target, ContextWriter) else target.version
        opened_at = time.perf_counter()
        if isinstance(target, ContextReader):
            target.tokens(version.num_blocks - 1, 1)
        read_at = time.perf_counter()
    if version.num_blocks != num_blocks or (side == "writer" and list((folder / SEGMENT_FOLDER).glob(".*"))):
        raise BenchmarkError(f"{name} has {version.num_blocks} blocks of {num_blocks}, or what was half-made is left")
    return opened_at - started, read_at - opened_at


class Victim:
    """A writer in a process of its own that commits until it is killed."""

    def __init__(self, root: Path, name: str, number: int) -> None:
        self._root, self._name = root, name
        self._stream = SuperBlocks(encoding(keys=KEYS), seed=1000 + number)

    def __enter__(self) -> Victim:
        self._writer = ContextWriter(Store(self._root).folder(self._name), self._name, seal_in_background=False)
        if (growing := self._writer.open_document()) is not None:
            self._writer.close_document(growing.key)
        self._writer.sealer.seal()
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def commit_and_die(self) -> None:
        """Some commits, files of a segment that no row names, and kill -9 inside a transaction."""
        for span in islice(self._stream, UNSEALED_SUPER_BLOCKS):
            self._writer.append([span])
        left = self._writer.folder / SEGMENT_FOLDER / f".lod0-1_half.zarr.tmp-{os.getpid()}"
        left.mkdir()
        (left / "zarr.json").write_bytes(b"{")
        with self._writer.commit() as db:
            db.execute("UPDATE writer SET owner = 'half a transaction'")
            os.kill(os.getpid(), signal.SIGKILL)


def _write_and_die(root: Path, name: str, number: int) -> None:
    try:
        with Child(Victim, root, name, number) as victim:
            victim.measure("commit_and_die")
    except BenchmarkError as error:
        if f"exit code {-signal.SIGKILL.value}" not in str(error):
            raise
    else:
        raise BenchmarkError("the writer should have been killed")
