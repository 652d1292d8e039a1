"""How good an order of blocks is: on Working Contexts whose blocks were measured one by one.

Gains of blocks are added up, though together they may be worth less or more: what is compared are orders. What is
chosen on one half of a horizon and scored on the other (split-half) is the ceiling: who could look would win that much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float64

from actors.evaluation.statistics import Estimate, clustered_mean, ratio_of_means
from actors.training.lens_data import MeasuredSet

Scores = Callable[[MeasuredSet], np.ndarray]

RIVALS: Mapping[str, Scores] = MappingProxyType(
    {
        "newest": lambda found: -found.candidates.column("log_distance"),
        "words (BM25)": lambda found: found.candidates.column("lexical_score"),
        "keys": lambda found: found.candidates.column("key_match_32"),
        "words and keys": lambda found: found.candidates.column("lexical_rank") + found.candidates.column("key_rank"),
    }
)
"""Who else can order candidates, by name."""

CHOSEN = (1, 4)


@dataclass(frozen=True)
class Ranked:
    """One order on many sets."""

    gains: Mapping[int, Float64[np.ndarray, " sets"]]
    """By k: what the first k blocks are worth together, nats a token, each counted alone."""
    hits: Float64[np.ndarray, " sets"]
    """1 where the first block is the best of all that were measured."""
    correlations: Float64[np.ndarray, " sets"]
    """Of ranks with the measured order (Spearman 1904)."""
    agreements: Float64[np.ndarray, " sets"]
    """Of each two blocks, how often the one that was worth more has the higher score."""


def rank_sets(sets: Sequence[MeasuredSet], scores: Scores, *, above: float | None = None) -> Ranked:
    """Measure an order.

    Args:
        sets: with at least two blocks measured alone.
        scores: of a set's candidates.
        above: choose only blocks of a higher score; None: as many as are wanted, whatever their score.
    """
    gains: dict[int, list[float]] = {k: [] for k in CHOSEN}
    hits, correlations, agreements = [], [], []
    for found in sets:
        measured = found.measured
        given, worth = np.asarray(scores(found), np.float64)[measured], found.worth[measured].mean(axis=1)
        order = np.argsort(-given, kind="stable")
        if above is not None:
            order = order[given[order] > above]
        for k in CHOSEN:
            gains[k].append(float(worth[order[:k]].sum()))
        hits.append(float(len(order) > 0 and worth[order[0]] == worth.max()))
        correlations.append(_spearman(given, worth))
        agreements.append(_agreement(given, worth))
    return Ranked(
        {k: np.array(values) for k, values in gains.items()},
        np.array(hits),
        np.array(correlations),
        np.array(agreements),
    )


def split_half_gains(sets: Sequence[MeasuredSet], k: int) -> Float64[np.ndarray, " sets"]:
    """What the best k blocks by one half of the horizon are worth on the other, both ways, each that is worth it."""
    won = []
    for found in sets:
        worth = found.worth[found.measured]
        ways = ((worth[:, 0], worth[:, 1]), (worth[:, 1], worth[:, 0]))
        chosen = [(scored, np.argsort(-on, kind="stable")[:k], on) for on, scored in ways]
        won.append(float(np.mean([scored[best[on[best] > 0]].sum() for scored, best, on in chosen])))
    return np.array(won)


def share_of_gap(own: np.ndarray, rival: np.ndarray, ceiling: np.ndarray, documents: Sequence[str]) -> Estimate:
    """Of what the split-half oracle wins over a rival, what is won; NaN where it wins nothing."""
    return ratio_of_means(own - rival, ceiling - rival, documents)


def calibration(sets: Sequence[MeasuredSet], scores: Scores, num_bins: int = 8) -> list[tuple[float, Estimate, int]]:
    """By rising score: mean score, what such blocks were worth, how many there were."""
    given = np.concatenate([np.asarray(scores(found), np.float64)[found.measured] for found in sets])
    worth = np.concatenate([found.worth[found.measured].mean(axis=1) for found in sets])
    documents = [found.uri for found in sets for _ in range(int(found.measured.sum()))]
    bins = np.array_split(np.argsort(given, kind="stable"), min(num_bins, len(given)))
    return [
        (float(given[part].mean()), clustered_mean(worth[part], [documents[i] for i in part]), len(part))
        for part in bins
    ]


def usable(sets: Sequence[MeasuredSet]) -> list[MeasuredSet]:
    """Sets in which nothing is shown yet, and blocks were measured to be compared."""
    return [found for found in sets if found.shows_nothing and found.measured.sum() >= 2]


def _spearman(given: np.ndarray, worth: np.ndarray) -> float:
    a, b = _ranks(given), _ranks(worth)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share a rank, so that who says nothing agrees with nobody."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _agreement(given: np.ndarray, worth: np.ndarray) -> float:
    first, second = np.triu_indices(len(given), 1)
    differs = worth[first] != worth[second]
    if not differs.any():
        return 0.5
    asked, real = np.sign(given[first] - given[second])[differs], np.sign(worth[first] - worth[second])[differs]
    return float(((asked * real) / 2 + 0.5).mean())
