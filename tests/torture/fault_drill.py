"""A disk that is full or broken, at every write point of a short story that does everything once.

The n-th operation fails, once or from then on. The caller is refused with our errors or never learns of it; another
process reads the tree meanwhile; when the disk is sound again the same program goes on and comes to its end.
"""

from __future__ import annotations

import errno
import random
import shutil
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.errors import StorageError
from storage.contract import BlockState
from storage.focus.events import FocusEventLog, read_focus_events
from storage.store import Store
from storage.tree.bulk_writer import BulkWriter
from storage.tree.writer import ContextWriter
from tests.torture.children import Child
from tests.torture.counts import Counts
from tests.torture.interposer import FOR_EVER, Action, Plan, arm, heal, num_points
from tests.torture.kill_drill import ALL_POINTS
from tests.torture.oracle import Oracle
from tests.torture.workloads import (
    ENCODINGS,
    Curating,
    Say,
    curate,
    derive,
    event_number,
    first_unfinished,
    open_or_create,
    put_all,
    restore_all,
    text_number,
    write_document,
)

ERRORS = (errno.ENOSPC, errno.EIO)
NUM_STREAMED, NUM_DOCUMENTS = 3, 4
NUM_BLOCKS = sum(text_number(number).num_blocks for number in range(NUM_DOCUMENTS))


@dataclass(frozen=True)
class Outcome:
    """How a telling of the story ended."""

    num_points: int
    refusal: str = ""
    """Name of our error; empty when the end was reached."""
    bug: str = ""
    """Traceback of an error that is not ours."""


DEAD = Outcome(0, bug="the process died or hangs")


class Story:
    """A context is made, streamed to, sealed, written in bulk, curated, given another encoding and an event. Told
    again, it goes on."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._writer: ContextWriter | None = None

    def tell(self, say: Say) -> None:
        """From wherever it is to its end. A writer that was refused something is used again."""
        if self._writer is None:
            self._writer = open_or_create(self._root)
        writer = self._writer
        if writer.encoding != ENCODINGS[1]:
            for number in range(first_unfinished(writer), NUM_STREAMED):
                write_document(writer, writer.encoding, number, random.Random(number), say, tails=True)
            put_all(writer, writer.encoding, NUM_STREAMED - 1, say)
            bulk = BulkWriter(writer)
            for number in range(first_unfinished(bulk), NUM_DOCUMENTS):
                write_document(bulk, writer.encoding, number, random.Random(number), say, tails=False)
            put_all(bulk, writer.encoding, NUM_DOCUMENTS - 1, say)
            curate(
                writer, Curating(((0, 70),), BlockState.GIST_ONLY, keeps=False, archives=True), say, archive_until=0.0
            )
            Store(self._root).collect(writer, keep_s=0.0)
            restore_all(writer, say)
        derive(writer, ENCODINGS[1], say)
        writer.flush()
        log = FocusEventLog(writer.folder)
        log.add(event_number(read_focus_events(writer.folder).num_rows))
        log.flush()
        writer.close()
        self._writer = None


def _work(connection: Connection, plan: Plan) -> None:
    arm(plan)
    story = Story(plan.root / "store")
    for is_sound in (False, True):
        if is_sound:
            heal()
        try:
            story.tell(connection.send)
            outcome = Outcome(num_points())
        except StorageError as error:
            outcome = Outcome(num_points(), type(error).__name__)
        except BaseException:
            outcome = Outcome(num_points(), bug=traceback.format_exc())
        connection.send(outcome)
        # Held open, while somebody else reads.
        connection.recv()


class FaultDrill:
    """Tells the story on disks that fail."""

    def __init__(self, folder: Path, counts: Counts) -> None:
        self._root = folder
        self._counts = counts

    def count_points(self) -> int:
        """Operations of an undisturbed telling; threads make it vary by a few."""
        num_points, _ = self._tell("undisturbed", Plan(self._root))
        return num_points

    def run(self, points: Iterable[int]) -> None:
        """Fail each of these operations, in every way."""
        for point in points:
            for error in ERRORS:
                self._fail(Plan(self._root, first=point, last=point), error, f"operation {point}")
                self._fail(Plan(self._root, first=point), error, f"operation {point} and all that follow")

    def run_at_write_points(self, chance: random.Random, num_faults: int) -> None:
        """Fail the named write points, which are few among all operations; a broken sync is the worst of them."""
        for _ in range(num_faults):
            name = chance.choice(list(ALL_POINTS))
            kinds, pattern, most = ALL_POINTS[name]
            point = chance.randint(1, most)
            last = chance.choice([point, point + 2, FOR_EVER])
            plan = Plan(self._root, kinds=kinds, pattern=pattern, first=point, last=last)
            self._fail(plan, chance.choice(ERRORS), f"{name} {point} to {last}")

    def _fail(self, plan: Plan, error: int, where: str) -> None:
        plan = replace(plan, action=Action.FAIL, error=error)
        _, refusal = self._tell(f"{where}: {errno.errorcode[error]}", plan)
        once = plan.first == plan.last
        self._counts.faults[f"{errno.errorcode[error]} {'once' if once else 'for longer'}"] += 1
        if refusal:
            self._counts.refused[refusal] += 1

    def _tell(self, what: str, plan: Plan) -> tuple[int, str]:
        """Tell it under a plan and once more when the disk is sound; `(points, refusal)` of the first time."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(parents=True)
        oracle = Oracle()
        with Child(_work, plan) as child:
            first = self._hear(child, oracle)
            self._judge(f"{what}, meanwhile", plan, oracle, first)
            if first is DEAD:
                return 0, ""
            child.answer("go on")
            second = self._hear(child, oracle)
            if second is not DEAD:
                child.answer("that is all")
        if second.refusal:
            second = Outcome(second.num_points, bug=f"the writer was refused on a sound disk: {second.refusal}")
        elif oracle.num_blocks != NUM_BLOCKS:
            second = Outcome(second.num_points, bug=f"{oracle.num_blocks} of {NUM_BLOCKS} blocks at the end")
        self._judge(f"{what}, at the end", plan, oracle, second)
        self._counts.acknowledged += oracle.num_heard
        return first.num_points, first.refusal

    def _hear(self, child: Child, oracle: Oracle) -> Outcome:
        for word in child.words():
            if isinstance(word, Outcome):
                return word
            oracle.hear(word)
        return DEAD

    def _judge(self, where: str, plan: Plan, oracle: Oracle, outcome: Outcome) -> None:
        if outcome.bug:
            self._counts.failures.append(f"{where}: {outcome.bug}")
        self._counts.add(oracle.inspect(plan.root / "store"), where)
