"""What a finished run of `train gistnet` came to, and how two of them differ on the same validation windows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from actors.evaluation.statistics import Estimate, ratio_of_means
from actors.training.checkpoints import LossLog
from actors.training.worker import FIDELITY, LOSS_LOG, PAIRS
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError

Quantity = Literal["content_nats", "gap_to_full"]
"""`content_nats`: NLL behind another window's gists minus behind the window's own; more is better. `gap_to_full`: NLL
behind the own gists minus behind the text itself; less is better."""

TERMS: Mapping[Quantity, tuple[str, str]] = {"content_nats": ("shuffled", "own"), "gap_to_full": ("own", "full")}

SAME_FULL_NATS = 0.01
"""By so much the NLL behind the full text of a pair of windows may differ between two runs: a frozen model's, it is the
same but for rounding."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run's own files, read."""

    report: Mapping[str, Any]
    losses: list[dict[str, float]]
    """A line a step."""
    fidelity: list[dict[str, Any]]
    """A line a validation, oldest first."""
    pairs: Mapping[str, Any]
    """The last validation pair by pair of windows."""

    @classmethod
    def read(cls, folder: Path) -> MeasuredRun:
        """From the run's folder.

        Raises:
            ConfigError: nothing was validated in it, or nothing that can be compared pair by pair.
        """
        fidelity, pairs = LossLog(folder / FIDELITY).read(), LossLog(folder / PAIRS).read()
        if not fidelity or not pairs or pairs[-1]["step"] != fidelity[-1]["step"]:
            raise ConfigError(f"{folder} holds no validation pair by pair of windows; remove it to train it anew")
        report = json.loads((folder / "report.json").read_text())
        return cls(report, LossLog(folder / LOSS_LOG).read(), fidelity, pairs[-1])

    @property
    def tails(self) -> list[str]:
        """Lengths of raw tail by which it was measured."""
        return [f"{K * group} to {K * group + K - 1}" for group in range(len(self.fidelity[-1]["num_tokens"]))]

    @property
    def num_pairs(self) -> int:
        """Of validation windows."""
        return len(self.pairs["windows"])

    def is_comparable(self, other: MeasuredRun) -> bool:
        """Whether both were measured on the same tokens, behind as long raw tails, of the same text and model."""
        same = all(self.pairs[name] == other.pairs[name] for name in ("windows", "num_tokens"))
        return same and np.allclose(self.pairs["full"], other.pairs["full"], rtol=0, atol=SAME_FULL_NATS)

    def estimate(self, quantity: Quantity, tail: int | None = None, over: MeasuredRun | None = None) -> Estimate:
        """A mean over the tokens of all validation windows; its error is one of pairs of windows, whose shuffled gists
        are each other's.

        Args:
            quantity: what of.
            tail: of the tokens behind so many blocks of raw tail; None: of all.
            over: a comparable run; the difference to it, pair by pair.
        """
        values, counts = self._values(quantity), np.array(self.pairs["num_tokens"])
        if over is not None:
            values = values - over._values(quantity)
        chosen = slice(None) if tail is None else slice(tail, tail + 1)
        sums, weights = (values * counts)[:, chosen].sum(axis=1), counts[:, chosen].sum(axis=1)
        return ratio_of_means(sums, weights, [str(pair) for pair in range(len(counts))])

    def curve(self, quantity: Quantity) -> tuple[list[int], list[float]]:
        """Steps, and what the validation after each came to, over all tails."""
        more, less = TERMS[quantity]
        means = [
            float(np.average(np.subtract(line[more], line[less]), weights=line["num_tokens"])) for line in self.fidelity
        ]
        return [line["step"] for line in self.fidelity], means

    def _values(self, quantity: Quantity) -> Float64[np.ndarray, "pairs tails"]:
        more, less = TERMS[quantity]
        return np.array(self.pairs[more]) - np.array(self.pairs[less])
