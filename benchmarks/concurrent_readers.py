"""Random reads of a sealed context by 1, 2 and 4 processes at once: what one process reads, times their number."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.harness import Result, Setting
from benchmarks.process_tree import Child
from benchmarks.synthetic import build_context, encoding
from cluster.config import SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from storage.store import Store

NUM_PROCESSES = (1, 2, 4)
KINDS = ("node", "group")
READS_AT_A_TIME = 200
"""Between two looks at the clock."""

START_S = 0.3
"""From asking the processes to the moment they all begin at."""


class Reading:
    """One reader process."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._rng = np.random.default_rng(seed)

    def __enter__(self) -> Reading:
        self._reader = Store(self._root).open_reader("shared")
        # What is verified and mapped at first touch is not read again.
        self._reader.read("gists", 1, np.arange(self._reader.version.num_blocks))
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def rate(self, kind: str, starts_at: float, seconds: float) -> float:
        """Reads a second over `seconds`, from a moment of the machine's monotonic clock on."""
        reader, num_nodes = self._reader, self._reader.version.num_blocks
        read, count = {
            "node": (lambda index: reader.read_node("gists", 1, index), num_nodes),
            "group": (lambda index: reader.read_group("gists", 1, index), num_nodes // K),
        }[kind]
        places = self._rng.integers(count, size=(64, READS_AT_A_TIME)).tolist()
        time.sleep(max(0.0, starts_at - time.monotonic()))
        num_reads, started = 0, time.monotonic()
        while time.monotonic() < starts_at + seconds or not num_reads:
            for place in places[num_reads // READS_AT_A_TIME % len(places)]:
                read(place)
            num_reads += READS_AT_A_TIME
        return num_reads / (time.monotonic() - started)


def concurrent_readers(setting: Setting) -> Result:
    """Nodes and groups; the value is the worse kind's with two processes, each on a processor of its own."""
    rounds = setting.size(7, 2)
    seconds = setting.size(1.5, 0.2)
    num_super_blocks = setting.size(1024, 64)
    rates: dict[tuple[str, int], list[float]] = {(kind, count): [] for kind in KINDS for count in NUM_PROCESSES}
    with setting.scratch() as root, ExitStack() as stack:
        writer, _ = build_context(root, "shared", encoding(keys=False), num_super_blocks)
        writer.close()
        children = [stack.enter_context(Child(Reading, root, seed)) for seed in range(max(NUM_PROCESSES))]
        for number in range(rounds):
            for kind in KINDS:
                turn = number % len(NUM_PROCESSES)
                for count in NUM_PROCESSES[turn:] + NUM_PROCESSES[:turn]:
                    rates[kind, count].append(_total_rate(children[:count], kind, seconds))
    ratios = {
        (kind, count): [count * one / all_ for one, all_ in zip(rates[kind, 1], rates[kind, count], strict=True)]
        for kind in KINDS
        for count in NUM_PROCESSES
    }
    worse = max(KINDS, key=lambda kind: np.median(ratios[kind, 2]))
    detail = {
        "tokens": num_super_blocks * SLOTS_PER_SUPER_BLOCK,
        "processors": len(os.sched_getaffinity(0)),
        "worse": worse,
        **{
            f"{kind}s_by_{count}": {
                "reads_per_s": round(float(np.median(rates[kind, count]))),
                "efficiency": round(float(1 / np.median(ratios[kind, count])), 3),
            }
            for kind in KINDS
            for count in NUM_PROCESSES
        },
    }
    return Result.of_repeats(ratios[worse, 2], f"{rounds} rounds of {seconds:g} s, in turns", detail)


def _total_rate(children: Sequence[Child], kind: str, seconds: float) -> float:
    starts_at = time.monotonic() + START_S
    return sum(Child.call_all(children, "rate", kind, starts_at, seconds))
