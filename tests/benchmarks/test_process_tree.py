"""CPU time and memory of a process tree, against work whose cost is known."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time

import pytest

from benchmarks.harness import BenchmarkError
from benchmarks.process_tree import Child

BURN = "import time\nwhile time.process_time() < {seconds}: pass"


class Worker:
    """Lives in the child."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def burn(self, seconds: float) -> int:
        stop = time.process_time() + seconds
        while time.process_time() < stop:
            pass
        return 42

    def burn_in_a_process(self, seconds: float) -> None:
        """In a grandchild that is gone before this returns."""
        subprocess.run([sys.executable, "-c", BURN.format(seconds=seconds)], check=True)

    def hold(self, num_bytes: int) -> None:
        """Anonymous memory, touched, for longer than two looks."""
        with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            for page in range(0, num_bytes, mmap.PAGESIZE):
                held[page] = 1
            time.sleep(1.5)

    def fail(self) -> None:
        raise ValueError("the reason")


class Broken(Worker):
    def __enter__(self) -> Worker:
        raise ValueError("cannot begin")


def test_cpu_time_is_that_of_the_call() -> None:
    with Child(Worker) as child:
        usage = child.measure("burn", 0.5)
        assert usage.result == 42
        assert 0.4 <= usage.cpu_s <= 0.8
        assert usage.wall_s >= usage.cpu_s * 0.9
        idle = child.measure("burn", 0.0)
        assert idle.cpu_s < 0.1


def test_cpu_time_of_ended_descendants_counts() -> None:
    with Child(Worker) as child:
        usage = child.measure("burn_in_a_process", 2.0)
        # What it used after the last look is lost.
        assert 1.0 <= usage.cpu_s <= 2.6


def test_peak_memory_is_seen() -> None:
    with Child(Worker) as child:
        before = child.measure("burn", 1.2, memory=True).peak
        during = child.measure("hold", 64 * 2**20, memory=True).peak
        assert before is not None
        assert during is not None
        assert 60 * 2**20 < during.needed - before.needed < 80 * 2**20


def test_an_error_in_the_child_arrives_with_its_reason() -> None:
    with Child(Worker) as child, pytest.raises(BenchmarkError, match="the reason"):
        child.measure("fail")
    with pytest.raises(BenchmarkError, match="cannot begin"):
        Child(Broken)
