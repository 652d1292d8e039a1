"""kill -9, at random moments and at named write points, of every workload in turn.

The program's part of a failure is repeated by its seed, a random moment is not: a kill at a write point is exact.
"""

from __future__ import annotations

import random
from multiprocessing.connection import Connection
from pathlib import Path

from tests.torture.children import DIED_BY_KILL, PATIENCE_S, Child, go_on_and_inspect
from tests.torture.counts import Counts
from tests.torture.interposer import Action, Kind, Plan, arm
from tests.torture.oracle import Oracle
from tests.torture.workloads import WORKLOADS

LONGEST_LIFE_S = 0.3
KILLS_A_STORE = 20
"""Then a new one begins, lest inspections take ever longer."""

WRITE_POINTS: dict[str, tuple[Kind, str, int]] = {
    "log write": (Kind.WRITE, "*/catalogue.sqlite-wal", 60),
    "log sync": (Kind.SYNC, "*/catalogue.sqlite-wal", 20),
    "log folded in": (Kind.WRITE, "*/catalogue.sqlite", 8),
    "catalogue sync": (Kind.SYNC, "*/catalogue.sqlite", 2),
    "log removed": (Kind.REMOVE, "*/catalogue.sqlite-wal", 2),
    "segment folder": (Kind.MKDIR, "*/segments/*", 12),
    "segment write": (Kind.WRITE, "*/segments/*", 20),
    "segment sync": (Kind.SYNC, "*/segments/*", 20),
    "segment folder sync": (Kind.SYNC_FOLDER, "*/segments*", 12),
    "segment rename": (Kind.RENAME, "*/segments/*", 3),
    "orphan removed": (Kind.REMOVE, "*/segments/*", 6),
}
"""Name: what is done, to which files, and up to which of them a process is killed at, if it comes that far."""

ARCHIVE_POINTS: dict[str, tuple[Kind, str, int]] = {
    "archive folder": (Kind.MKDIR | Kind.SYNC_FOLDER, "*/archive", 6),
    "archive write": (Kind.WRITE, "*/archive/*", 4),
    "archive sync": (Kind.SYNC, "*/archive/*", 4),
    "archive rename": (Kind.RENAME | Kind.REMOVE, "*/archive/*", 4),
}
"""The same, of `curation` alone."""

ALL_POINTS = WRITE_POINTS | ARCHIVE_POINTS


def _work(connection: Connection, root: Path, name: str, seed: int, plan: Plan) -> None:
    arm(plan)
    WORKLOADS[name](root, seed, connection.send)


class KillDrill:
    """Stores, their killers, and what was promised."""

    def __init__(self, folder: Path, seed: int, counts: Counts) -> None:
        self._folder = folder
        self._seed = seed
        self._counts = counts
        self._num_kills = 0
        self._oracle = Oracle()
        self._root = folder

    def run(self, num_kills: int) -> None:
        """Kill so many times, then let the last store come to its end."""
        for _ in range(num_kills):
            if self._num_kills % KILLS_A_STORE == 0:
                self._finish()
                self._root = self._folder / f"store{self._num_kills}"
                self._oracle = Oracle()
            self._kill_once()
            self._num_kills += 1
        self._finish()

    def _finish(self) -> None:
        """Recover a store, go on, and read all of it once more."""
        if self._num_kills:
            findings = go_on_and_inspect(self._root, 2, self._oracle)
            self._counts.add(findings, f"seed {self._seed}, after kill {self._num_kills}")

    def _kill_once(self) -> None:
        number = self._num_kills
        chance = random.Random(f"{self._seed}/{number}")
        name = list(WORKLOADS)[number % len(WORKLOADS)]
        point, plan = "", Plan(self._root)
        # Two of three at a write point, of the others half while they open or soon after.
        if chance.random() < 2 / 3:
            points = chance.choice([WRITE_POINTS, ARCHIVE_POINTS]) if name == "curation" else WRITE_POINTS
            point = chance.choice(list(points))
            kinds, pattern, most = points[point]
            plan = Plan(self._root, action=Action.KILL, kinds=kinds, pattern=pattern, first=chance.randint(1, most))
        from_birth = chance.random() < 0.5
        where = f"seed {self._seed}, kill {number} ({name}{', ' + point if point else ''})"
        if not self._live(name, number, plan, chance.uniform(0, LONGEST_LIFE_S), from_birth, point):
            self._counts.failures.append(f"{where}: ended by itself; its traceback is in the output")
        self._counts.add(self._oracle.inspect(self._root), where)

    def _live(self, name: str, seed: int, plan: Plan, life_s: float, from_birth: bool, point: str) -> bool:
        """Let a workload live until its plan kills it, or we do: after a while from its start or its first word.

        Returns:
            Whether it was killed, as it should be.
        """
        with Child(_work, self._root, name, seed, plan) as child:
            if not (point or from_birth):
                child.wait_for_a_word()
            self._hear(child, 4 * LONGEST_LIFE_S if point else life_s)
            by_us = not child.has_ended
            child.kill()
            # What it said before it died counts, also when nobody had listened yet.
            self._hear(child)
            was_killed = child.end() == DIED_BY_KILL
        self._counts.kills[name] += 1
        if point and not by_us:
            self._counts.points[point] += 1
        return was_killed

    def _hear(self, child: Child, seconds: float = PATIENCE_S) -> None:
        for ack in child.words(seconds):
            self._oracle.hear(ack)
            self._counts.acknowledged += 1
