"""A simulated year of use: documents come in, are used unevenly and less predictably than one would like, and every
week the default policy curates and collects. Nothing is simulated but the users: tree, focus events, plans, archives
and collections are the real ones.

Uses of documents follow Zipf's law, of exponent 1.2 and, in the detail, the flatter 1.0. A document's rate drifts (an
Ornstein-Uhlenbeck process in its logarithm, 0.7 wide, 17 weeks long) and fades with age (26 weeks); of its parts, too,
some are used much more than others. Who asks for a pruned span meets it as a session does: as a candidate.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.curation.apply import apply_plan
from actors.curation.plan import make_plan
from actors.curation.usage import DAY_S, measure_usage
from benchmarks.harness import BenchmarkError, Result, Setting
from cluster.config import BLOCKS_PER_SUPER_BLOCK, TOKENS_PER_BLOCK
from cluster.curation_config import CurationPace, CurationPolicy
from storage import row_checksums
from storage.contract import DocumentMeta, SpanWrite
from storage.focus.events import FocusEvent, FocusEventLog
from storage.schema import ArraySpec, Encoding, TreeIdentity
from storage.store import Store
from storage.tree.catalogue import CATALOGUE_FILE
from storage.tree.reader import ContextReader
from storage.tree.states import PRUNED, as_spans
from storage.tree.verify import verify_context
from storage.tree.writer import ContextWriter
from storage.versions.curation import expire_archives, restore

CONTEXT = "year"
WEEK_S = 7 * DAY_S
K = TOKENS_PER_BLOCK
WEEKS_AHEAD = 4
"""A span is in use when it is used in each of so many weeks to come."""
PROTECTED_SHARE = 0.02
MOST_USES = 20.0
"""A span and week, of the most popular document."""
DRIFT = 0.7
FLATTER = 1.0
EXPONENT = 1.2

ENCODING = Encoding("gistnet", "sha256:year", "float32", (ArraySpec("gists", 4, 1, "float16"),))


@dataclass
class Users:
    """Who uses what, by seed."""

    rng: np.random.Generator
    spans_of: list[np.ndarray]
    """Weights of a document's spans, summing to their number."""
    born: np.ndarray
    """Week a document comes in."""
    base: np.ndarray
    """Logarithm of a document's uses a span and week."""
    drift: np.ndarray

    @classmethod
    def of(cls, num_documents: int, num_weeks: int, seed: int, exponent: float) -> Users:
        """Make up documents and their popularity."""
        rng = np.random.default_rng(seed)
        sizes = np.clip(np.round(rng.lognormal(0.8, 0.8, num_documents)), 1, 16).astype(int)
        weights = []
        for size in sizes:
            parts = rng.permutation(1.0 / np.arange(1, size + 1))
            weights.append(parts / parts.sum() * size)
        born = np.sort(rng.integers(0, num_weeks, num_documents))
        base = np.log(MOST_USES) - exponent * np.log(rng.permutation(num_documents) + 1)
        return cls(rng, weights, born, base, rng.normal(0.0, DRIFT, num_documents))

    def week(self, number: int) -> list[tuple[int, int, int]]:
        """`(document, span in it, uses)` of one week, then the week passes."""
        age = number - self.born
        rate = np.exp(self.base + self.drift - np.maximum(age, 0) / 26.0) * (age >= 0)
        used = []
        for document in np.flatnonzero(rate):
            counts = self.rng.poisson(np.minimum(rate[document] * self.spans_of[document], 50.0))
            used += [(int(document), int(span), int(counts[span])) for span in np.flatnonzero(counts)]
        keep = np.exp(-1 / 17.0)
        self.drift = self.drift * keep + self.rng.normal(0.0, DRIFT * np.sqrt(1 - keep**2), len(self.drift))
        return used


def _document(number: int) -> DocumentMeta:
    key = f"document-{number:05d}"
    tags = ("protected",) if number % round(1 / PROTECTED_SHARE) == 0 else ()
    return DocumentMeta(key, f"file:///{key}", f"sha256:{number:064x}", 1, tags=tags)


def _content(number: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and gists that follow from the document's number."""
    rng = np.random.default_rng(number)
    tokens = np.minimum(rng.zipf(1.3, (num_blocks, K)), 49_151).astype(np.uint32)
    return tokens, rng.standard_normal((num_blocks, 4)).astype(np.float16)


def _append(writer: ContextWriter, number: int, num_spans: int) -> None:
    num_blocks = num_spans * BLOCKS_PER_SUPER_BLOCK
    tokens, gists = _content(number, num_blocks)
    counts = np.full(num_blocks, K, np.uint8)
    writer.append([SpanWrite(_document(number), 0, tokens, counts, {"gists": gists}, last=True)])


def _date(folder: Path, since_seq: int, at: float) -> None:
    """Give versions the simulated time."""
    with contextlib.closing(sqlite3.connect(folder / CATALOGUE_FILE)) as db, db:
        row_checksums.register(db)
        db.execute("UPDATE commits SET created_at = ? WHERE seq > ?", (at, since_seq))


def _write_events(folder: Path, used: list[tuple[int, int, int]], first: np.ndarray, week: int, start: float) -> None:
    """One refocus a use. What is pruned can only be a candidate."""
    rng = np.random.default_rng(week)
    with ContextReader(folder, CONTEXT) as reader:
        states = reader.block_states(0, reader.version.num_blocks)
        seq = reader.version.seq
    log = FocusEventLog(folder)
    number = 0
    for document, span, count in used:
        block = int(first[document] + span * BLOCKS_PER_SUPER_BLOCK + rng.integers(BLOCKS_PER_SUPER_BLOCK))
        shown = [] if states[block] in PRUNED else [(block, 0)]
        for at in np.sort(rng.uniform(0.0, WEEK_S, count)):
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
                    time=start + float(at),
                )
            )
            number += 1
    log.flush()


def _token_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "segments").glob("*/lod0/tokens/c/0"))


@dataclass
class _Year:
    """What one simulated year came to."""

    bytes_left: int
    bytes_all: int
    archive_bytes: int
    in_use: int
    """Spans in use, summed over the weeks that have so many to come."""
    missed: int
    """Of them, not there in detail after that week's curation."""
    missed_unforeseen: int
    """Of those, without a use in the weeks before, as many as are looked ahead."""
    restored: int
    seconds: float


@functools.cache
def _year(scratch: Path, num_documents: int, num_weeks: int, seed: int, exponent: float) -> _Year:
    began = time.monotonic()
    folder = scratch / f"seed-{seed}-{exponent}"
    store = Store(folder, create=True)
    store.create_context(CONTEXT, TreeIdentity("year", "sha256:lm", "sha256:tokenizer"), ENCODING)
    context = store.folder(CONTEXT)
    users = Users.of(num_documents, num_weeks, seed, exponent)
    sizes = np.array([len(weights) for weights in users.spans_of])
    first = np.concatenate([[0], np.cumsum(sizes)]) * BLOCKS_PER_SUPER_BLOCK
    policy = CurationPolicy(protected_tags=["protected"])
    # Not a date of this machine's clock, so that nothing depends on it.
    start = 1_700_000_000.0
    uses = np.zeros((num_weeks, int(sizes.sum())), np.int32)
    whole = np.zeros((num_weeks, int(sizes.sum())), bool)
    restored = 0
    for week in range(num_weeks):
        at = start + week * WEEK_S
        with ContextWriter(context, CONTEXT, seal_in_background=False) as writer:
            seq = writer.version().seq
            for number in np.flatnonzero(users.born == week).tolist():
                _append(writer, number, int(sizes[number]))
            writer.flush()
        _date(context, seq, at)
        used = users.week(week)
        for document, span, count in used:
            uses[week, first[document] // BLOCKS_PER_SUPER_BLOCK + span] = count
        _write_events(context, used, first, week, at)
        now = at + WEEK_S
        restored += _curate(store, policy, now)
        with store.open_reader(CONTEXT) as reader:
            states = reader.block_states(0, reader.version.num_blocks).reshape(-1, BLOCKS_PER_SUPER_BLOCK)
        whole[week, : len(states)] = (states == 0).all(axis=1)
    in_use, missed, unforeseen = _missed(uses, whole)
    bytes_left = _token_bytes(context)
    bytes_all = int(sizes.sum()) * BLOCKS_PER_SUPER_BLOCK * K * 4
    _check(store, users, first, whole[-1])
    return _Year(
        bytes_left,
        bytes_all,
        sum(path.stat().st_size for path in (context / "archive").iterdir()),
        in_use,
        missed,
        unforeseen,
        restored,
        time.monotonic() - began,
    )


def _curate(store: Store, policy: CurationPolicy, now: float) -> int:
    """A week's plan, its execution and the collection behind it; returns the spans that came back."""
    with store.open_reader(CONTEXT) as reader:
        documents = reader.documents()
        usage = measure_usage(reader, documents, now=now, half_life_days=policy.half_life_days)
        plan = make_plan(reader.version, documents, usage, policy, now=now)
    protected = {document.meta.key for document in documents if document.meta.tags}
    if any(span.document in protected for span in plan.spans):
        raise BenchmarkError("a protected span was planned for")
    applied = apply_plan(plan, store, CurationPace(pause_s=0.0), "year", now=now)
    if applied.stale or applied.lost:
        raise BenchmarkError(f"{len(applied.stale)} spans were stale, {len(applied.lost)} lost")
    with store.open_maintenance(CONTEXT) as writer:
        store.collect(writer, keep_s=7 * DAY_S, now=now)
        expire_archives(writer, now)
    return applied.done["restore"]


def _missed(uses: np.ndarray, whole: np.ndarray) -> tuple[int, int, int]:
    """`(in use, missed, missed without a use before)`, over all weeks that are followed by enough others."""
    totals = np.zeros(3, np.int64)
    for week in range(WEEKS_AHEAD - 1, len(uses) - WEEKS_AHEAD):
        in_use = (uses[week + 1 : week + 1 + WEEKS_AHEAD] > 0).all(axis=0)
        # What is not stored yet is nobody's fault.
        in_use &= np.arange(uses.shape[1]) <= np.max(np.flatnonzero(whole[week]), initial=-1)
        missed = in_use & ~whole[week]
        unforeseen = missed & (uses[week + 1 - WEEKS_AHEAD : week + 1] == 0).all(axis=0)
        totals += (in_use.sum(), missed.sum(), unforeseen.sum())
    return int(totals[0]), int(totals[1]), int(totals[2])


def _check(store: Store, users: Users, first: np.ndarray, whole: np.ndarray) -> None:
    """Protected documents are whole, everything is sound, and all that was pruned comes back as it was written.

    Raises:
        BenchmarkError: it is not so.
    """
    for number, weights in enumerate(users.spans_of):
        if _document(number).tags:
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


def _years(setting: Setting) -> tuple[list[_Year], dict[str, object]]:
    num_documents, num_weeks, seeds = setting.size((1200, 52, 3), (40, 10, 1))
    with setting.scratch() as scratch:
        years = [_year(scratch, num_documents, num_weeks, seed, EXPONENT) for seed in range(seeds)]
        flatter = _year(scratch, num_documents, num_weeks, 0, FLATTER)
    detail: dict[str, object] = {
        "documents": num_documents,
        "weeks": num_weeks,
        "token_bytes_all": [year.bytes_all for year in years],
        "token_bytes_left": [year.bytes_left for year in years],
        "archive_bytes": [year.archive_bytes for year in years],
        "spans_in_use_summed": [year.in_use for year in years],
        "missed": [year.missed for year in years],
        "missed_unforeseen": [year.missed_unforeseen for year in years],
        "restored_on_demand": [year.restored for year in years],
        "protected_touched": 0,
        "restored_differing": 0,
        "flatter": {
            "bytes": round(flatter.bytes_left / flatter.bytes_all, 4),
            "missed": round(flatter.missed / max(1, flatter.in_use), 4),
        },
        "seconds": [round(year.seconds, 1) for year in years],
    }
    return years, detail


def curation_bytes(setting: Setting) -> Result:
    """Bytes of raw tokens that a year of curation leaves."""
    years, detail = _years(setting)
    return Result.of_repeats([year.bytes_left / year.bytes_all for year in years], f"{len(years)} years", detail)


def curation_missed(setting: Setting) -> Result:
    """Share of the spans in use that are not there in detail."""
    years, detail = _years(setting)
    return Result.of_repeats([year.missed / max(1, year.in_use) for year in years], f"{len(years)} years", detail)
