"""What every block of a history is worth alone, as `exhaustive` measured it, and what an order of blocks is worth.

Gains of blocks are added up, though together blocks may be worth less (they say the same) or more: what is compared
here are orders of blocks, not contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.rivals import EXHAUSTIVE
from actors.evaluation.samples import read_samples
from cluster.errors import ConfigError
from storage.contract import TreeReader

Sample = tuple[Place, list[Measured]]


@dataclass(frozen=True)
class PickScore:
    """What the first blocks of an order are worth at one place."""

    gain_at_1: float
    """Of the first, nats a token."""
    gain_at_k: float
    """Sum over the first k."""
    hit_at_1: float
    """1.0 where the first is the best of all."""
    best_rank: float
    """Rank of the best of all, from 1."""
    num_picked: float
    """Blocks among the first k: fewer where no more were found."""


@dataclass(frozen=True, eq=False)
class PlaceGains:
    """Gains of the blocks of one history before its raw tail."""

    place: Place
    choosing: np.ndarray
    """`(n,)` nats a token on one half of the horizon, of blocks `[place.first_block, shown_from)`."""
    scoring: np.ndarray
    """On the other half."""

    @classmethod
    def of(cls, place: Place, measured: Measured) -> Self:
        """As `exhaustive` left them.

        Raises:
            ConfigError: they are not those of consecutive blocks from the history's first.
        """
        blocks, choosing, scoring = np.array(measured.single_gains, np.float64).reshape(-1, 3).T
        expected = np.arange(place.first_block, place.first_block + len(blocks))
        if len(blocks) > place.stop_block - place.first_block or not np.array_equal(blocks, expected):
            raise ConfigError(
                f"place {place.number} holds gains of other blocks than the first ones of its history, from "
                f"{place.first_block}; measure it again with `evaluate focus`"
            )
        return cls(place, choosing, scoring)

    @property
    def both(self) -> np.ndarray:
        """Mean of both halves."""
        return (self.choosing + self.scoring) / 2

    @property
    def shown_from(self) -> int:
        """First block of the raw tail."""
        return self.place.first_block + len(self.choosing)

    @property
    def blocks(self) -> np.ndarray:
        """All that could be chosen, int64, ascending."""
        return np.arange(self.place.first_block, self.shown_from)

    def score(self, blocks: np.ndarray, k: int) -> PickScore:
        """Of blocks in an order, the best first; it may leave some out.

        What is left out gains nothing, and its rank is the mean over all orders it may follow in.
        """
        gains = self.both
        found = blocks - self.place.first_block
        is_best = gains[found] == gains.max()
        rank = (
            np.flatnonzero(is_best)[0] + 1 if is_best.any() else len(found) + self._best_rank(len(gains) - len(found))
        )
        at_1, at_k = (float(gains[found[:n]].sum()) for n in (1, k))
        return PickScore(at_1, at_k, float(is_best[:1].any()), float(rank), len(found[:k]))

    def _best_rank(self, num_blocks: int) -> float:
        """Of the best among so many in any order; of several that are equally good the first counts."""
        return (num_blocks + 1) / (int((self.both == self.both.max()).sum()) + 1)

    def chance(self, k: int) -> PickScore:
        """The mean over all orders."""
        gains, n = self.both, len(self.choosing)
        hit = float((gains == gains.max()).mean())
        mean = float(gains.mean())
        return PickScore(mean, mean * min(k, n), hit, self._best_rank(n), min(k, n))

    def newest(self) -> np.ndarray:
        """The newest first."""
        return self.blocks[::-1]

    def best(self) -> np.ndarray:
        """By what was measured on both halves."""
        return self.blocks[np.argsort(-self.both, kind="stable")]

    def split_half(self, k: int) -> PickScore:
        """Chosen on one half and scored on the other, the mean of both ways: no noise is chosen that is scored.

        Which block is the best is known from both halves only, so there is neither hit nor rank.
        """
        ways = ((self.choosing, self.scoring), (self.scoring, self.choosing))
        won = [scored[np.argsort(-chosen_on, kind="stable")[:k]] for chosen_on, scored in ways]
        at_1, at_k = (float(np.mean([gains[:n].sum() for gains in won])) for n in (1, k))
        return PickScore(at_1, at_k, float("nan"), float("nan"), len(won[0]))


def samples_file(path: Path) -> Path:
    """The file of samples at a path, which may be a run's folder.

    Raises:
        ConfigError: it is not there, or a folder holds none or several.
    """
    if path.is_dir():
        files = sorted([*path.glob("samples-*.jsonl"), *path.glob("samples-*.jsonl.gz")])
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise ConfigError(f"{path} must hold one file of samples, not {found}; name a file with tuning.samples")
        return files[0]
    if not path.is_file():
        raise ConfigError(
            f"there are no samples at {path}; set tuning.samples to the run of an `evaluate focus` that has "
            f"{EXHAUSTIVE!r} among its rivals"
        )
    return path


def read_gains(file: Path, budget: int) -> tuple[int, list[PlaceGains]]:
    """Measured gains of every place, in the order of their numbers, and the budget they were measured within.

    Args:
        file: of `samples_file`. A run may be writing it: only whole lines are read, and nothing is changed.
        budget: whose gains; 0 for the only one.

    Raises:
        ConfigError: no samples of `evaluate focus`, or none of `exhaustive` within that budget.
    """
    gains: dict[int, list[PlaceGains]] = {}
    for place, measured in _samples(file):
        for m in {
            m.budget: m for m in measured if m.condition.startswith(f"{EXHAUSTIVE}/") and m.single_gains
        }.values():
            gains.setdefault(m.budget, []).append(PlaceGains.of(place, m))
    if not gains:
        raise ConfigError(
            f"{file} holds no gains of single blocks; run `evaluate focus` with {EXHAUSTIVE!r} among evaluation.rivals"
        )
    budgets = ", ".join(map(str, sorted(gains)))
    if budget == 0 and len(gains) > 1:
        raise ConfigError(f"{file} holds gains within the budgets {budgets}; choose one with tuning.budget")
    chosen = budget or next(iter(gains))
    if chosen not in gains:
        raise ConfigError(f"{file} holds no gains within tuning.budget={budget}; there are: {budgets}")
    return chosen, sorted(gains[chosen], key=lambda found: found.place.number)


def _samples(file: Path) -> Iterable[Sample]:
    try:
        yield from read_samples(file, Place, Measured)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} holds no samples of `evaluate focus` ({type(error).__name__}: {error}); set tuning.samples to one "
            "that does"
        ) from error


def check_places(places: Sequence[Place], reader: TreeReader, file: Path) -> None:
    """Refuse samples that were measured on another context.

    Raises:
        ConfigError: a horizon's document stands elsewhere in this one, or nowhere.
    """
    num_blocks = reader.version.num_blocks
    for place in places:
        fits = 0 <= place.first_block < place.stop_block < num_blocks
        found = reader.document_at(place.stop_block).meta.uri if fits else f"one of {num_blocks} blocks"
        if found != place.uri:
            raise ConfigError(
                f"{file} was measured on another context than {reader.version.context!r}: place {place.number} stands "
                f"before block {place.stop_block} of {place.uri}, here that is {found}; set store.context to the one "
                "it was measured on"
            )
