"""Standard errors against their definitions, and against many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from actors.evaluation.statistics import clustered_mean, ratio_of_means


def test_clusters_of_one_give_the_plain_standard_error() -> None:
    values = np.array([1.0, 4.0, 2.0, 9.0])
    estimate = clustered_mean(values, ["a", "b", "c", "d"])
    assert estimate.mean == 4.0
    assert estimate.standard_error == pytest.approx(values.std(ddof=1) / 2)


def test_samples_that_repeat_add_no_certainty() -> None:
    values = np.array([1.0, 4.0, 2.0])
    repeated = clustered_mean(np.repeat(values, 10), list("a" * 10 + "b" * 10 + "c" * 10))
    assert repeated.standard_error == pytest.approx(clustered_mean(values, list("abc")).standard_error)


def test_the_error_is_the_spread_of_the_mean_over_many_draws() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    draws = [np.repeat(rng.normal(size=40), 5) + rng.normal(size=200) for _ in range(400)]
    estimates = [clustered_mean(draw, clusters.astype(str).tolist()) for draw in draws]
    spread = np.std([estimate.mean for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.1)


def test_a_ratio_has_the_spread_of_ratios() -> None:
    rng = np.random.default_rng(1)
    names = [str(i) for i in range(100)]
    found = []
    for _ in range(300):
        bottom = 1 + rng.normal(size=100) * 0.3
        found.append(ratio_of_means(0.5 * bottom + rng.normal(size=100) * 0.2, bottom, names))
    assert np.mean([e.standard_error for e in found]) == pytest.approx(np.std([e.mean for e in found]), rel=0.15)


def test_what_cannot_be_known_is_nan() -> None:
    assert math.isnan(clustered_mean(np.array([1.0, 2.0]), ["a", "a"]).standard_error)
    assert not clustered_mean(np.array([1.0, 2.0]), ["a", "a"]).significant
    assert math.isnan(clustered_mean(np.array([]), []).mean)
    assert math.isnan(ratio_of_means(np.array([1.0]), np.array([0.0]), ["a"]).mean)
    with pytest.raises(ValueError, match="clusters"):
        clustered_mean(np.array([1.0]), [])
