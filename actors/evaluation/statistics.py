"""Means with standard errors that know which samples belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; NaN where one sample, or one cluster, leaves it unknown."""

    mean: float
    standard_error: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}"

    @property
    def significant(self) -> bool:
        """Whether zero is more than two standard errors away."""
        return not math.isnan(self.standard_error) and abs(self.mean) > 2 * self.standard_error


def clustered_mean(values: np.ndarray, clusters: Sequence[str]) -> Estimate:
    """Mean of samples that are independent between clusters (documents) only.

    The standard error is the cluster-robust one of a mean (Liang and Zeger 1986) with the usual factor G / (G - 1).
    """
    values = np.asarray(values, np.float64)
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values of {len(clusters)} clusters")
    if len(values) == 0:
        return Estimate(float("nan"), float("nan"), 0)
    mean = float(values.mean())
    _, owner = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(owner, weights=values - mean)
    if len(sums) < 2:
        return Estimate(mean, float("nan"), len(values))
    variance = float((sums**2).sum()) / len(values) ** 2 * len(sums) / (len(sums) - 1)
    return Estimate(mean, math.sqrt(variance), len(values))


def ratio_of_means(numerator: np.ndarray, denominator: np.ndarray, clusters: Sequence[str]) -> Estimate:
    """mean(numerator) / mean(denominator), paired; the standard error by the delta method, clustered.

    NaN when the denominator's mean is not positive: there is nothing to take a share of.
    """
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    bottom = float(denominator.mean()) if len(denominator) else 0.0
    if bottom <= 0:
        return Estimate(float("nan"), float("nan"), len(numerator))
    ratio = float(numerator.mean()) / bottom
    error = clustered_mean((numerator - ratio * denominator) / bottom, clusters).standard_error
    return Estimate(ratio, error, len(numerator))
