"""Orders of blocks are worth what was measured: by hand, and between chance and the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from actors.training.lens_data import MeasuredSet, measured_sets
from actors.training.lens_metrics import calibration, rank_sets, share_of_gap, split_half_gains, usable
from models.lensnet.features import FEATURES, CandidateSet
from tests.actors.training.lens_support import labelled_context


def one_set(worth: list[list[float]]) -> MeasuredSet:
    n = len(worth)
    zeros = np.zeros((n, len(FEATURES)), np.float32)
    candidates = CandidateSet(np.arange(n), zeros, np.zeros((n, 1), np.float32), np.zeros(1, np.float32))
    return MeasuredSet("doc", candidates, np.array(worth, np.float32), ())


def test_an_order_by_hand() -> None:
    found = one_set([[0.1, 0.3], [-0.2, -0.2], [0.5, 0.1], [float("nan")] * 2, [0.0, 0.0], [0.1, 0.1]])
    ranked = rank_sets([found], lambda _: np.array([3.0, 2.0, 1.0, 9.0, -1.0, -2.0]))
    assert ranked.gains[1].tolist() == pytest.approx([0.2])
    assert ranked.gains[4].tolist() == pytest.approx([0.2 - 0.2 + 0.3 + 0.0])
    assert ranked.hits.tolist() == [0.0]
    # Five blocks, ten pairs: of those with the third the order is wrong twice, of those with the last once more.
    order = [0.2, -0.2, 0.3, 0.0, 0.1]
    right = sum(order[i] > order[j] for i in range(5) for j in range(i + 1, 5))
    assert ranked.agreements.tolist() == pytest.approx([right / 10])
    above = rank_sets([found], lambda _: np.array([3.0, -2.0, 1.0, 9.0, -1.0, -2.0]), above=0.0)
    assert above.gains[4].tolist() == pytest.approx([0.5])


def test_who_says_nothing_agrees_with_nobody() -> None:
    sets = usable(measured_sets([labelled_context(n) for n in range(6)]))
    flat = rank_sets(sets, lambda found: np.zeros(len(found.candidates)))
    assert not flat.correlations.any()
    assert flat.agreements.tolist() == [0.5] * len(sets)
    best = rank_sets(sets, lambda found: np.nan_to_num(found.worth.mean(axis=1)))
    assert best.agreements.tolist() == [1.0] * len(sets)
    assert best.correlations.tolist() == pytest.approx([1.0] * len(sets))
    assert best.hits.all()


def test_what_is_chosen_on_one_half_is_scored_on_the_other() -> None:
    found = one_set([[0.4, -0.1], [-0.3, 0.2], [-0.1, -0.1]])
    # By the first half the first block, -0.1 on the other; by the second half the second, -0.3 on the first.
    assert split_half_gains([found], 2).tolist() == pytest.approx([(-0.1 - 0.3) / 2])
    same = one_set([[0.4, 0.4], [0.1, 0.1], [-0.2, -0.2]])
    assert split_half_gains([same], 4).tolist() == pytest.approx([0.5]), "what is worth nothing is not chosen"


def test_the_share_of_a_gap() -> None:
    rival, ceiling = np.array([0.0, 0.1, 0.0, 0.1]), np.array([0.4, 0.5, 0.4, 0.5])
    share = share_of_gap(np.array([0.2, 0.3, 0.2, 0.3]), rival, ceiling, list("abcd"))
    assert share.mean == pytest.approx(0.5)


def test_calibration_goes_by_rising_score() -> None:
    sets = usable(measured_sets([labelled_context(n) for n in range(8)]))
    bins = calibration(sets, lambda found: found.candidates.column("lexical_score"), num_bins=4)
    assert [score for score, _, _ in bins] == sorted(score for score, _, _ in bins)
    assert sum(count for _, _, count in bins) == sum(int(found.measured.sum()) for found in sets)
    assert bins[-1][1].mean > bins[0][1].mean
