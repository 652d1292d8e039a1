"""kill -9 of the processes of an ingest, one after the other, through both feeds.

Drivers are the command line as people type it, each with an embedded cluster of its own. Where the driver died, the
same command is run again at once. In the end the context must equal one that nobody disturbed, byte for byte.

How far the ingest is when a process dies and how long it lives from then on is repeated by the seed; what it does in
that moment is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import psutil
import pyarrow.parquet as pq

from cluster.cli import main
from cluster.environment import PROJECT_ROOT
from cluster.errors import MegaContextError
from ray_job import JOBS
from storage.tree import catalogue
from storage.tree.verify import verify_context
from tests.actors.helpers import make_text
from tests.torture.contents import Contents, difference, read_contents

Feed = Literal["actors", "ray_data"]
Victim = Literal["tokeniser", "compactor", "store", "follower", "indexer", "driver"]

FEEDS: tuple[Feed, ...] = get_args(Feed)
VICTIMS: tuple[Victim, ...] = get_args(Victim)

TITLES: dict[Victim, tuple[str, ...]] = {
    "tokeniser": ("ray::MapBatches(PackShard)",),
    "compactor": ("ray::CompactorActor", "ray::MapWorker(MapBatches(EncodeWindows))"),
    "store": ("ray::TreeStore",),
    "follower": ("ray::FollowerActor",),
    "indexer": ("ray::LexicalIndexerActor",),
}
"""What Ray calls their processes. Of the plain actors' feed the driver is the tokeniser."""

MATRIX: dict[Feed, tuple[Victim, ...]] = {
    "actors": ("compactor", "store", "follower", "indexer", "driver"),
    "ray_data": VICTIMS,
}
"""Who can die in a feed."""

LAST_DEATH = 0.9
"""Of the blocks that may be stored when a process is doomed."""
LAST_TOKENISER = 0.5
"""The same for tokenisers, which are ahead of the store."""
LONGEST_REST_S = 0.5
"""That a doomed process goes on living for."""
TOKENISER_REST_S = 0.05
"""The same for tokenisers, whose tasks take no longer."""

INGEST_TIMEOUT_S = 400.0
"""For one ingest with all its deaths, on a busy machine."""


@dataclass(frozen=True)
class Kill:
    """One death."""

    victim: Victim
    progress: float
    """Share of the blocks that are stored before."""
    rest_s: float


def plan_kills(chance: random.Random, victims: Sequence[Victim]) -> list[Kill]:
    """A death for each of `victims`, at random moments, in the order of these."""
    kills = []
    for victim in victims:
        latest, rest_s = (LAST_TOKENISER, TOKENISER_REST_S) if victim == "tokeniser" else (LAST_DEATH, LONGEST_REST_S)
        kills.append(Kill(victim, chance.uniform(0, latest), chance.uniform(0, rest_s)))
    return sorted(kills, key=lambda kill: kill.progress)


def make_corpus(folder: Path, num_documents: int) -> None:
    """Write documents of 30 to 9,000 tokens each, the same for the same number, and two files that are none."""
    folder.mkdir(parents=True)
    lengths = random.Random(num_documents)
    for number in range(num_documents):
        text = make_text(number, lengths.choice((5, 40, 300, 900, 1500)))
        (folder / f"{number:03}.txt").write_text(text)
    (folder / "003-empty.txt").write_text(" \n")
    (folder / "030-binary.txt").write_bytes(b"\x00\x01\x02binary")


@dataclass
class IngestCounts:
    """Sums over ingests."""

    ingests: Counter[Feed] = field(default_factory=Counter)
    deaths: Counter[tuple[Feed, Victim]] = field(default_factory=Counter)
    survivors: Counter[tuple[Feed, Victim]] = field(default_factory=Counter)
    """Those who were done before their turn came."""
    acknowledged_blocks: int = 0
    compared_bytes: int = 0
    lost: int = 0
    """Blocks that were committed, or should have been, and are not there."""
    doubled: int = 0
    torn: int = 0
    differing_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    """A line for each ingest that is not as it should be, with what repeats it."""

    @property
    def ok(self) -> bool:
        """Every ingest came to its end, and made the same bytes."""
        return not self.failures

    def table(self) -> str:
        """Deaths by feed and victim, then one line a count."""
        lines = [f"{'deaths in ingests':<26}" + "".join(f"{victim:>11}" for victim in VICTIMS)]
        for feed in FEEDS:
            cells = [f"{self.deaths[feed, v]:>11}" if v in MATRIX[feed] else f"{'-':>11}" for v in VICTIMS]
            lines.append(f"  {feed:<24}" + "".join(cells))
        rows = [
            ("ingests", self.ingests.total()),
            ("  ended before a death", self.survivors.total()),
            ("acknowledged blocks", self.acknowledged_blocks),
            ("compared bytes", self.compared_bytes),
            ("lost blocks", self.lost),
            ("doubled blocks", self.doubled),
            ("torn", self.torn),
            ("differing bytes", self.differing_bytes),
        ]
        return "\n".join([*lines, *(f"{name:<26}{count:>11,}" for name, count in rows)])


class IngestDrill:
    """A corpus, the context an undisturbed run makes of it, and those that disturbed runs make."""

    def __init__(
        self, folder: Path, seed: int, counts: IngestCounts, *, num_documents: int = 60, own_cluster: bool = True
    ) -> None:
        """Write the corpus (`make_corpus`).

        Args:
            folder: for stores, runs and logs.
            seed: of the moments of death.
            counts: what is added to.
            num_documents: of the corpus, 3,600 tokens each on average.
            own_cluster: False runs the undisturbed ingest in this process, on the cluster it has: sooner done.
        """
        self._own_cluster = own_cluster
        self._folder = folder
        self._seed = seed
        self.counts = counts
        self._num_ingests = 0
        self._wanted: Contents | None = None
        self._quarantined: list[tuple[str, str]] = []
        # Short: paths of sockets may have no more than 107 bytes.
        self._ray_folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
        make_corpus(folder / "corpus", num_documents)

    def close(self) -> None:
        """Remove what killed clusters left in the temporary folder."""
        shutil.rmtree(self._ray_folder, ignore_errors=True)

    def wanted(self) -> Contents:
        """What an undisturbed run of the plain actors makes; run once."""
        if self._wanted is None:
            if self._own_cluster:
                with self._driver("actors", "undisturbed") as driver:
                    assert driver.wait(INGEST_TIMEOUT_S) == 0, _last_words(self._log("undisturbed"))
            else:
                assert main(JOBS, self._words("actors", "undisturbed")) == 0
            self._wanted = read_contents(self._context("undisturbed"), "undisturbed")
            self._quarantined = self._quarantine("undisturbed")
            assert len(self._quarantined) == 2
        return self._wanted

    def run_all(self, num_ingests: int) -> None:
        """Both feeds in turn; in every ingest each kind of process dies once, and one of them twice."""
        for number in range(num_ingests):
            feed = FEEDS[number % len(FEEDS)]
            again = random.Random(f"{self._seed}/{number}/again").choice(MATRIX[feed])
            self.run(feed, (*MATRIX[feed], again))

    def run(self, feed: Feed, victims: Sequence[Victim]) -> None:
        """Ingest the corpus while each of `victims` dies once, then compare."""
        wanted = self.wanted()
        number = self._num_ingests
        self._num_ingests += 1
        name = f"{feed}{number}"
        kills = plan_kills(random.Random(f"{self._seed}/{number}"), victims)
        findings = self._ingest(feed, name, kills)
        self.counts.ingests[feed] += 1
        if not findings:
            findings = self._compare(name, wanted)
        if findings:
            plan = ", ".join(f"{kill.victim} at {kill.progress:.2f}" for kill in kills)
            self.counts.failures.append(f"seed {self._seed}, ingest {number} ({feed}; {plan}): {'; '.join(findings)}")
        else:
            shutil.rmtree(self._context(name))

    def _ingest(self, feed: Feed, name: str, kills: Sequence[Kill]) -> list[str]:
        """Run the command until it ends by itself; returns what went wrong."""
        pending = list(kills)
        most_blocks, findings = 0, []
        give_up = time.monotonic() + INGEST_TIMEOUT_S
        while True:
            with self._driver(feed, name) as driver:
                while driver.poll() is None:
                    if time.monotonic() > give_up:
                        return [*findings, f"did not end; its last words: {_last_words(self._log(name))}"]
                    time.sleep(0.02)
                    num_blocks = _stored_blocks(self._context(name))
                    if num_blocks < most_blocks:
                        self.counts.lost += most_blocks - num_blocks
                        findings.append(f"{most_blocks} blocks were committed, then {num_blocks}")
                    most_blocks = max(most_blocks, num_blocks)
                    if pending and most_blocks >= pending[0].progress * self._num_blocks():
                        kill = pending[0]
                        if self._kill(driver, kill):
                            self.counts.deaths[feed, kill.victim] += 1
                            pending.pop(0)
                died = driver.wait() == -signal.SIGKILL
            if not died:
                break
        self.counts.survivors.update((feed, kill.victim) for kill in pending)
        self.counts.acknowledged_blocks += _stored_blocks(self._context(name))
        if driver.returncode != 0:
            findings.append(f"exit code {driver.returncode}; its last words: {_last_words(self._log(name))}")
        return findings

    def _num_blocks(self) -> int:
        return self.wanted().blocks.total()

    def _kill(self, driver: subprocess.Popen[bytes], kill: Kill) -> bool:
        """Whether there was somebody to kill."""
        if kill.victim == "driver":
            time.sleep(kill.rest_s)
            driver.kill()
            return True
        titles = TITLES[kill.victim]
        found = [process for process in _descendants(driver.pid) if _title(process).startswith(titles)]
        if not found:
            return False
        time.sleep(kill.rest_s)
        process = random.Random(len(found)).choice(found)
        # A worker that has done its task waits for another one; that is not a tokeniser's death.
        if not _title(process).startswith(titles):
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            return True
        return False

    def _compare(self, name: str, wanted: Contents) -> list[str]:
        try:
            torn = verify_context(self._context(name), name).problems
            found = read_contents(self._context(name), name)
        except MegaContextError as error:
            self.counts.torn += 1
            return [f"{type(error).__name__}: {error}"]
        apart = difference(found, wanted)
        self.counts.compared_bytes += wanted.num_bytes
        self.counts.torn += len(torn)
        self.counts.lost += apart.lost_blocks
        self.counts.doubled += apart.doubled_blocks
        self.counts.differing_bytes += apart.num_bytes
        findings = list(torn)
        if apart.num_bytes:
            findings.append(f"{apart.lost_blocks} blocks lost, {apart.doubled_blocks} doubled; {apart.differing_bytes}")
        quarantined = self._quarantine(name)
        if quarantined != self._quarantined:
            findings.append(f"quarantined: {quarantined}, expected {self._quarantined}")
        return findings

    def _quarantine(self, name: str) -> list[tuple[str, str]]:
        table = pq.read_table(self._folder / "runs" / name / "quarantine.parquet").to_pylist()
        return [(row["uri"], row["reason"]) for row in table]

    def _context(self, name: str) -> Path:
        return self._folder / "store" / name

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _words(self, feed: Feed, name: str) -> list[str]:
        """The command, without the program."""
        options = {
            "--config": str(PROJECT_ROOT / "configs/tiny.yaml"),
            "--ray.object_store_memory_mb": "80",
            "--corpus.paths": json.dumps([str(self._folder / "corpus")]),
            "--base_lm.cache_dir": str(self._folder / "models"),
            "--store.root": str(self._folder / "store"),
            "--store.context": name,
            "--run.name": name,
            "--run.dir": str(self._folder / "runs"),
            "--tracking.enabled": "false",
            "--compaction.feed": feed,
            "--compaction.num_packers": "1",
            "--compaction.num_compactors": "2" if feed == "actors" else "1",
        }
        return ["compact", *(word for pair in options.items() for word in pair)]

    @contextlib.contextmanager
    def _driver(self, feed: Feed, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """The command line as a process; it is dead afterwards, and what it started as well."""
        words = [sys.executable, "-m", "tests.torture.small_blocks", *self._words(feed, name)]
        environment = os.environ | {"RAY_TMPDIR": str(self._ray_folder), "OMP_NUM_THREADS": "1"}
        with self._log(name).open("ab") as log:
            driver = subprocess.Popen(words, cwd=PROJECT_ROOT, env=environment, stdout=log, stderr=log)
        try:
            yield driver
        finally:
            if driver.poll() is None:
                for process in _descendants(driver.pid):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                driver.kill()
                driver.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _stored_blocks(folder: Path) -> int:
    """Blocks of the newest commit; 0 before the first."""
    if not (folder / catalogue.CATALOGUE_FILE).exists():
        return 0
    with contextlib.closing(catalogue.connect(folder, read_only=True)) as db:
        row = db.execute(
            "SELECT level_counts FROM commits JOIN branches ON head_seq = seq WHERE branches.name = 'main'"
        ).fetchone()
    return int((json.loads(row[0]) or [0])[0])


def _last_words(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-12:])
