"""Power cuts: a workload runs once under the log, and the power is cut at many points of it.

A point of the log and a seed make a disk. It is inspected as it is, then recovered and written to, then inspected
again. One such disk is where the next run begins, so recoveries are run and cut too. Everything follows from the seed
but for the order in which threads of one run take turns.
"""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.torture.children import DIED_BY_KILL, Child, go_on_and_inspect
from tests.torture.counts import Counts
from tests.torture.crash_image import Disk, Fate, read_log
from tests.torture.interposer import Action, Kind, Plan, arm, note
from tests.torture.oracle import Findings, Oracle
from tests.torture.workloads import WORKLOADS, Acknowledged, EventsKept

CUTS_A_RUN = 6
RUNS_A_STORE = 5
"""Not a divisor of the number of workloads, so that each has its turn at an empty disk."""
FATES: tuple[Fate, ...] = ("mixed", "mixed", "lost", "kept")


def _work(connection: Connection, plan: Plan, name: str, seed: int) -> None:
    connection.close()
    arm(plan)
    WORKLOADS[name](plan.root / "store", seed, lambda ack: note(pickle.dumps(ack)))


class Recording:
    """A run of a workload, from a disk to the point at which it died."""

    def __init__(self, folder: Path, name: str, seed: int, num_points: int, unsynced: str = "") -> None:
        """Run it.

        Args:
            folder: `live` in it is the disk; what is there is durable. The disk of the drill.
            name: the workload.
            seed: its own.
            num_points: operations until it dies.
            unsynced: see `Plan`.
        """
        self._live = folder / "live"
        self._base = Disk(self._live)
        log = folder / "operations.log"
        log.unlink(missing_ok=True)
        plan = Plan(self._live, log, Action.KILL, first=num_points, unsynced=unsynced)
        with Child(_work, plan, name, seed) as child:
            assert child.end() == DIED_BY_KILL, f"{name} ended by itself; its traceback is in the output"
        self.operations = read_log(log, self._live)

    def acknowledged(self, stop: int) -> list[Acknowledged | EventsKept]:
        """What was acknowledged before operation `stop`."""
        return [pickle.loads(each.data) for each in self.operations[:stop] if each.kind == Kind.NOTE]

    def first_word(self) -> int:
        """Operations before the first acknowledgement: opening and recovery."""
        notes = (number for number, each in enumerate(self.operations) if each.kind == Kind.NOTE)
        return next(notes, len(self.operations))

    def cut(self, stop: int, image: Path, chance: random.Random, fate: Fate) -> None:
        """Write into the new folder `image` what a cut before operation `stop` leaves."""
        disk = self._base.copy()
        disk.replay(self.operations[:stop])
        disk.cut(image, chance, fate)


def cut_and_inspect(
    recording: Recording, stop: int, image: Path, chance: random.Random, fate: Fate, oracle: Oracle
) -> Findings:
    """Cut the power, inspect the disk; recover a copy, go on there, inspect again. `oracle` hears what was before the
    cut."""
    shutil.rmtree(image, ignore_errors=True)
    recording.cut(stop, image, chance, fate)
    for ack in recording.acknowledged(stop):
        oracle.hear(ack)
    findings = oracle.inspect(image / "store")
    if findings.ok:
        recovered = image.with_name("recovered")
        shutil.rmtree(recovered, ignore_errors=True)
        shutil.copytree(image, recovered)
        findings = go_on_and_inspect(recovered / "store", 1, oracle.copy())
    return findings


class PowerDrill:
    """Runs, cuts, and what was promised."""

    def __init__(self, folder: Path, seed: int, counts: Counts) -> None:
        self._folder = folder
        self._seed = seed
        self._counts = counts
        self._oracle = Oracle()
        self._num_runs = 0
        self._is_new = True
        """Whether the next run begins on an empty disk."""

    def run(self, num_cuts: int) -> None:
        """Cut so many times."""
        left = num_cuts
        while left > 0:
            left -= self._run_once(min(left, CUTS_A_RUN))
            self._num_runs += 1
            self._is_new = self._is_new or self._num_runs % RUNS_A_STORE == 0

    def _run_once(self, num_cuts: int) -> int:
        number = self._num_runs
        chance = random.Random(f"{self._seed}/{number}")
        name = list(WORKLOADS)[number % len(WORKLOADS)]
        live, image = self._folder / "live", self._folder / "image"
        is_new = self._is_new
        self._is_new = False
        if is_new:
            shutil.rmtree(live, ignore_errors=True)
            live.mkdir(parents=True)
            self._oracle = Oracle()
        recording = Recording(self._folder, name, number, chance.randint(100, 700))
        stops = _stops(recording, num_cuts, chance)
        heard = self._oracle
        for stop in stops:
            fate = chance.choice(FATES)
            oracle = self._oracle.copy()
            findings = cut_and_inspect(recording, stop, image, chance, fate, oracle)
            self._counts.cuts[name] += 1
            self._counts.cuts_in_recovery += not is_new and stop <= recording.first_word()
            self._counts.add(findings, f"seed {self._seed}, run {number} ({name}) cut before operation {stop}, {fate}")
            if not findings.ok:
                self._is_new = True
                self._keep(image, number, stop)
            if stop == max(stops):
                self._counts.acknowledged += oracle.num_heard - self._oracle.num_heard
                heard = oracle
                shutil.rmtree(self._folder / "next", ignore_errors=True)
                shutil.copytree(image, self._folder / "next")
        self._oracle = heard
        shutil.rmtree(live)
        (self._folder / "next").rename(live)
        return len(stops)

    def _keep(self, image: Path, number: int, stop: int) -> None:
        """Failed disks stay, to be looked at."""
        shutil.copytree(image, self._folder / f"failed-run{number}-operation{stop}", dirs_exist_ok=True)


def _stops(recording: Recording, num_cuts: int, chance: random.Random) -> Sequence[int]:
    """Where to cut: a third while it opens and recovers, the others anywhere."""
    in_recovery = [chance.randint(0, recording.first_word()) for _ in range(num_cuts // 3)]
    anywhere = [chance.randint(0, len(recording.operations)) for _ in range(num_cuts - len(in_recovery))]
    return [*in_recovery, *anywhere]
