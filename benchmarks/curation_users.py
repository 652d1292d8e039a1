"""The users of a simulated year: which documents come in when, who uses what, and what of that was there in detail.

Uses of documents follow Zipf's law, of exponent 1.2 and, in the detail, the flatter 1.0. A document's rate drifts (an
Ornstein-Uhlenbeck process in its logarithm, 0.7 wide, 17 weeks long) and fades with age (26 weeks); of its parts, too,
some are used much more than others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actors.curation.usage import DAY_S
from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.curation_config import CurationPolicy
from storage.contract import DocumentMeta

WEEK_S = 7 * DAY_S
WEEKS_AHEAD = 4
"""A span is in use when it is used in each of so many weeks to come."""
PROTECTED_SHARE = 0.02
MOST_USES = 20.0
"""A span and week, of the most popular document."""
DRIFT = 0.7
FLATTER = 1.0
EXPONENT = 1.2
START = 1_700_000_000.0
"""Unix seconds. Not a date of this machine's clock, so that nothing depends on it."""


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

    @property
    def sizes(self) -> np.ndarray:
        """Spans of each document."""
        return np.array([len(weights) for weights in self.spans_of])

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

    def rates(self, number: int) -> np.ndarray:
        """Uses of each document's average span in this week, before chance has its part in them."""
        age = number - self.born
        return np.exp(self.base + self.drift - np.maximum(age, 0) / 26.0) * (age >= 0)

    def week(self, number: int) -> list[tuple[int, int, int]]:
        """`(document, span in it, uses)` of one week, then the week passes."""
        rate = self.rates(number)
        used = []
        for document in np.flatnonzero(rate):
            counts = self.rng.poisson(np.minimum(rate[document] * self.spans_of[document], 50.0))
            used += [(int(document), int(span), int(counts[span])) for span in np.flatnonzero(counts)]
        keep = np.exp(-1 / 17.0)
        self.drift = self.drift * keep + self.rng.normal(0.0, DRIFT * np.sqrt(1 - keep**2), len(self.drift))
        return used


def refocuses(used: list[tuple[int, int, int]], week: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """`(document, span in it, block in that, seconds into the week)` of what a week's users ask for."""
    rng = np.random.default_rng(week)
    for document, span, count in used:
        block = int(rng.integers(BLOCKS_PER_SUPER_BLOCK))
        yield document, span, block, np.sort(rng.uniform(0.0, WEEK_S, count))


def document_of(number: int) -> DocumentMeta:
    """What the store is told of a document: every fiftieth is protected."""
    key = f"document-{number:05d}"
    tags = ("protected",) if number % round(1 / PROTECTED_SHARE) == 0 else ()
    return DocumentMeta(key, f"file:///{key}", f"sha256:{number:064x}", 1, tags=tags)


@dataclass(frozen=True)
class Outcome:
    """What of a year's uses met detail."""

    spans: int
    spans_left: int
    """In detail at its end."""
    in_use: int
    """Spans in use, summed over the weeks that have so many to come."""
    missed: int
    """Of them, not there in detail after that week's curation."""
    missed_unforeseen: int
    """Of those, without a use in the weeks before, as many as are looked ahead."""
    missed_by_rates: int
    """What would be missed if each week as many spans were kept, but by the true rates of the users."""
    restored: int


@dataclass
class Record:
    """What happens in a year, by week and span."""

    born: np.ndarray
    """Week a span comes in."""
    fixed: np.ndarray
    """Whether it is protected."""
    uses: np.ndarray
    rates: np.ndarray
    whole: np.ndarray
    """There in detail after the week's curation."""
    restored: int = 0

    @classmethod
    def of(cls, users: Users, num_weeks: int) -> Record:
        """An empty one."""
        sizes = users.sizes
        shape = (num_weeks, int(sizes.sum()))
        fixed = np.array([bool(document_of(number).tags) for number in range(len(sizes))])
        born = np.repeat(users.born, sizes)
        tables = np.zeros(shape, np.int32), np.zeros(shape), np.zeros(shape, bool)
        return cls(born, np.repeat(fixed, sizes), *tables)

    def use(self, users: Users, week: int) -> list[tuple[int, int, int]]:
        """Let users have their week, and note what they do."""
        sizes = users.sizes
        first = np.concatenate([[0], np.cumsum(sizes)])
        self.rates[week] = np.repeat(users.rates(week), sizes) * np.concatenate(users.spans_of)
        used = users.week(week)
        for document, span, count in used:
            self.uses[week, first[document] + span] = count
        return used

    def outcome(self, policy: CurationPolicy) -> Outcome:
        """What came of it."""
        by_rates = self._by_rates(policy.min_age_days / 7)
        return Outcome(
            self.whole.shape[1],
            int(self.whole[-1].sum()),
            *self._missed(self.whole),
            self._missed(by_rates)[1],
            self.restored,
        )

    def _by_rates(self, min_age_weeks: float) -> np.ndarray:
        """As many spans in detail each week as there were, but those of the highest rates.

        Nobody can know a rate, only count uses: no policy of the same bytes can be expected to do better than this.
        Protected and new spans stay with it, too.
        """
        kept = np.zeros_like(self.whole)
        for week in range(len(self.whole)):
            there = self.born <= week
            stays = there & (self.fixed | (week + 1 - self.born < min_age_weeks))
            order = np.argsort(-(self.rates[week] + 1e9 * stays) * there, kind="stable")
            kept[week, order[: int(self.whole[week].sum())]] = True
        return kept

    def _missed(self, whole: np.ndarray) -> tuple[int, int, int]:
        """`(in use, missed, missed without a use before)`, over all weeks that are followed by enough others."""
        totals = np.zeros(3, np.int64)
        for week in range(WEEKS_AHEAD - 1, len(self.uses) - WEEKS_AHEAD):
            in_use = (self.uses[week + 1 : week + 1 + WEEKS_AHEAD] > 0).all(axis=0)
            # What is not stored yet is nobody's fault.
            in_use &= self.born <= week
            missed = in_use & ~whole[week]
            unforeseen = missed & (self.uses[week + 1 - WEEKS_AHEAD : week + 1] == 0).all(axis=0)
            totals += (in_use.sum(), missed.sum(), unforeseen.sum())
        return int(totals[0]), int(totals[1]), int(totals[2])
