"""A simulated year of use: documents come in, are used unevenly and less predictably than one would like, and every
week the default policy curates and collects. Nothing is simulated but the users: tree, focus events, plans, archives
and collections are the real ones.

Who asks for a pruned span meets it as a session does: as a candidate.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from actors.curation.apply import apply_plan
from actors.curation.curator import Curator
from actors.curation.plan import SPAN_BYTES, make_plan
from actors.curation.usage import DAY_S, measure_usage
from actors.curation.work import collect
from benchmarks.curation_replay import replay
from benchmarks.curation_users import (
    EXPONENT,
    FLATTER,
    START,
    WEEK_S,
    Outcome,
    Record,
    Users,
    document_of,
    refocuses,
)
from benchmarks.harness import BenchmarkError, Result, Setting
from cluster.config import BLOCKS_PER_SUPER_BLOCK, TOKENS_PER_BLOCK, StoreConfig
from cluster.curation_config import CurationPace, CurationPolicy
from storage import row_checksums
from storage.contract import SpanWrite
from storage.focus.events import FocusEvent, FocusEventLog
from storage.schema import ArraySpec, Encoding, TreeIdentity
from storage.store import Store
from storage.tree.catalogue import CATALOGUE_FILE
from storage.tree.reader import ContextReader
from storage.tree.states import PRUNED, as_spans
from storage.tree.verify import verify_context
from storage.tree.writer import ContextWriter
from storage.versions.curation import restore

CONTEXT = "year"
K = TOKENS_PER_BLOCK
POLICY = CurationPolicy(protected_tags=["protected"])
"""The default one."""
FIRST_REPLAYED_SEED = 34
"""On seeds 10 to 33 the defaults were chosen."""
ENCODING = Encoding("gistnet", "sha256:year", "float32", (ArraySpec("gists", 4, 1, "float16"),))


def _content(number: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and gists that follow from the document's number."""
    rng = np.random.default_rng(number)
    tokens = np.minimum(rng.zipf(1.3, (num_blocks, K)), 49_151).astype(np.uint32)
    return tokens, rng.standard_normal((num_blocks, 4)).astype(np.float16)


def _append(writer: ContextWriter, number: int, num_spans: int) -> None:
    num_blocks = num_spans * BLOCKS_PER_SUPER_BLOCK
    tokens, gists = _content(number, num_blocks)
    counts = np.full(num_blocks, K, np.uint8)
    writer.append([SpanWrite(document_of(number), 0, tokens, counts, {"gists": gists}, last=True)])


def _date(folder: Path, since_seq: int, at: float) -> None:
    """Give versions the simulated time."""
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE_FILE)) as db, db:
        row_checksums.register(db)
        db.execute("UPDATE commits SET created_at = ? WHERE seq > ?", (at, since_seq))


def _write_events(folder: Path, used: list[tuple[int, int, int]], first: np.ndarray, week: int) -> None:
    """One refocus a use. What is pruned can only be a candidate."""
    with ContextReader(folder, CONTEXT) as reader:
        states = reader.block_states(0, reader.version.num_blocks)
        seq = reader.version.seq
    log = FocusEventLog(folder)
    number = 0
    for document, span, place, times in refocuses(used, week):
        block = int(first[document] + span * BLOCKS_PER_SUPER_BLOCK + place)
        shown = [] if states[block] in PRUNED else [(block, 0)]
        for at in times:
            log.add(
                FocusEvent(
                    f"week-{week:02d}",
                    number,
                    "question",
                    "{}",
                    [(CONTEXT, seq)],
                    0,
                    0,
                    0,
                    [],
                    {(block, 0): 1.0},
                    shown,
                    [],
                    shown,
                    [],
                    0,
                    time=START + week * WEEK_S + float(at),
                )
            )
            number += 1
    log.flush()


def _token_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "segments").glob("*/lod0/tokens/c.0"))


@dataclass(frozen=True)
class _Year:
    """What one simulated year came to."""

    bytes_left: int
    bytes_all: int
    archive_bytes: int
    outcome: Outcome
    seconds: float

    @property
    def bytes_share(self) -> float:
        """Of the raw tokens, those left."""
        return self.bytes_left / self.bytes_all

    @property
    def missed_share(self) -> float:
        """Of the spans in use, those that were not there."""
        return self.outcome.missed / max(1, self.outcome.in_use)


def _year(scratch: Path, num_documents: int, num_weeks: int, seed: int, exponent: float) -> _Year:
    began = time.monotonic()
    folder = scratch / f"seed-{seed}-{exponent}"
    store = Store(folder, create=True)
    store.create_context(CONTEXT, TreeIdentity("year", "sha256:lm", "sha256:tokenizer"), ENCODING)
    context = store.folder(CONTEXT)
    users = Users.of(num_documents, num_weeks, seed, exponent)
    sizes = users.sizes
    first = np.concatenate([[0], np.cumsum(sizes)]) * BLOCKS_PER_SUPER_BLOCK
    record = Record.of(users, num_weeks)
    for week in range(num_weeks):
        at = START + week * WEEK_S
        with ContextWriter(context, CONTEXT, seal_in_background=False) as writer:
            seq = writer.version().seq
            for number in np.flatnonzero(users.born == week).tolist():
                _append(writer, number, int(sizes[number]))
            writer.flush()
        _date(context, seq, at)
        _write_events(context, record.use(users, week), first, week)
        record.restored += _curate(store, POLICY, at + WEEK_S)
        with store.open_reader(CONTEXT) as reader:
            states = reader.block_states(0, reader.version.num_blocks).reshape(-1, BLOCKS_PER_SUPER_BLOCK)
        record.whole[week, : len(states)] = (states == 0).all(axis=1)
    bytes_left = _token_bytes(context)
    _check(store, users, first, record.whole[-1])
    outcome = record.outcome(POLICY)
    if replay(num_documents, num_weeks, seed, exponent, POLICY).outcome != outcome:
        raise BenchmarkError(f"the tree of seed {seed} did not come to what its replay says")
    return _Year(
        bytes_left,
        int(sizes.sum()) * SPAN_BYTES,
        sum(path.stat().st_size for path in (context / "archive").iterdir()),
        outcome,
        time.monotonic() - began,
    )


def _curate(store: Store, policy: CurationPolicy, now: float) -> int:
    """A week's plan, its execution and the collection behind it; returns the spans that came back."""
    with store.open_reader(CONTEXT) as reader:
        documents = reader.documents()
        usage = measure_usage(reader, documents, policy, now=now)
        plan = make_plan(reader.version, documents, usage, policy, now=now)
    protected = {document.meta.key for document in documents if document.meta.tags}
    if any(span.document in protected for span in plan.spans):
        raise BenchmarkError("a protected span was planned for")
    curator = Curator(StoreConfig(root=store.root, context=CONTEXT), "year", wait_s=0.0)
    applied = apply_plan(plan, curator, CurationPace(pause_s=0.0), now=now)
    if applied.stale or applied.lost:
        raise BenchmarkError(f"{len(applied.stale)} spans were stale, {len(applied.lost)} lost")
    curator.run(collect, 7 * DAY_S, now)
    return applied.done["restore"]


def _check(store: Store, users: Users, first: np.ndarray, whole: np.ndarray) -> None:
    """Protected documents are whole, everything is sound, and all that was pruned comes back as it was written.

    Raises:
        BenchmarkError: it is not so.
    """
    for number, weights in enumerate(users.spans_of):
        if document_of(number).tags:
            spans = first[number] // BLOCKS_PER_SUPER_BLOCK + np.arange(len(weights))
            if not whole[spans].all():
                raise BenchmarkError(f"protected document {number} was pruned")
    for _ in range(2):
        problems = verify_context(store.folder(CONTEXT), CONTEXT).problems
        if problems:
            raise BenchmarkError(f"the context is damaged: {problems[0]}")
        with store.open_maintenance(CONTEXT) as writer:
            restore(writer, as_spans(np.repeat(~whole, BLOCKS_PER_SUPER_BLOCK)))
    with store.open_reader(CONTEXT) as reader:
        for number, weights in enumerate(users.spans_of):
            size = len(weights) * BLOCKS_PER_SUPER_BLOCK
            if not np.array_equal(reader.tokens(int(first[number]), size)[0], _content(number, size)[0]):
                raise BenchmarkError(f"document {number} is not what was written")


@functools.cache
def _years(setting: Setting) -> tuple[list[_Year], dict[str, object]]:
    """The years of all seeds, simulated once a process: two benchmarks look at them."""
    num_documents, num_weeks, seeds, others = setting.size((1200, 52, 3, 24), (40, 10, 1, 2))
    with setting.scratch() as scratch:
        years = [_year(scratch, num_documents, num_weeks, seed, EXPONENT) for seed in range(seeds)]
        flatter = _year(scratch, num_documents, num_weeks, 0, FLATTER)
    replays = [
        replay(num_documents, num_weeks, seed, EXPONENT, POLICY)
        for seed in range(FIRST_REPLAYED_SEED, FIRST_REPLAYED_SEED + others)
    ]
    detail: dict[str, object] = {
        "documents": num_documents,
        "weeks": num_weeks,
        "token_bytes_all": [year.bytes_all for year in years],
        "token_bytes_left": [year.bytes_left for year in years],
        "archive_bytes": [year.archive_bytes for year in years],
        "outcomes": [asdict(year.outcome) for year in years],
        "protected_touched": 0,
        "restored_differing": 0,
        "flatter": {
            "bytes": round(flatter.bytes_share, 4),
            "missed": round(flatter.missed_share, 4),
            "outcome": asdict(flatter.outcome),
        },
        "replayed": {
            "first_seed": FIRST_REPLAYED_SEED,
            "bytes": [round(one.bytes_share, 4) for one in replays],
            "missed": [one.outcome.missed for one in replays],
            "in_use": [one.outcome.in_use for one in replays],
        },
        "seconds": [round(year.seconds, 1) for year in years],
    }
    return years, detail


def curation_bytes(setting: Setting) -> Result:
    """Bytes of raw tokens that a year of curation leaves."""
    years, detail = _years(setting)
    return _worst([year.bytes_share for year in years], detail)


def curation_missed(setting: Setting) -> Result:
    """Share of the spans in use that are not there in detail."""
    years, detail = _years(setting)
    return _worst([year.missed_share for year in years], detail)


def _worst(ratios: list[float], detail: dict[str, object]) -> Result:
    """Every seed is to hold."""
    return Result(max(ratios), (min(ratios), max(ratios)), f"{len(ratios)} years", detail)
