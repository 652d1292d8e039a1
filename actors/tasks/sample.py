"""What a task asks of a memory, and the random draws it is made from.

A sample is text only: needles to be planted in a haystack of real text, and a query to be appended behind it. It
depends on nothing but the task's options, the seed and its number, so it is the same on every machine, and samples of
one number are paired across lengths, depths, budgets and rivals.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from cluster.errors import ConfigError

T = TypeVar("T")

NUM_CANDIDATES = 8
"""Answers to choose from, where the task itself does not bound them: chance is 1/8."""

NUM_DEPTH_BINS = 10
"""Samples in a row that together visit every tenth of the history once."""


@dataclass(frozen=True)
class Needle:
    """Text to be planted in one super-block of the history."""

    text: str
    depth: float
    """Place in the history, from 0 (oldest) to 1 (newest)."""
    needed: bool
    """The answer depends on it; False for a distractor."""


@dataclass(frozen=True)
class TaskSample:
    """One question about a history.

    The query ends where the answer is to begin: what is scored or generated behind it is one space and the answer.
    """

    task: str
    sample_id: str
    """16 hexadecimal digits, the same wherever task, seed and number are."""
    needles: tuple[Needle, ...]
    """Oldest first; each in a super-block of its own."""
    query: str
    answer: str
    candidates: tuple[str, ...]
    """Different texts in an order drawn by the seed, the answer among them."""
    meta: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def num_needed(self) -> int:
        """Needles the answer depends on."""
        return sum(needle.needed for needle in self.needles)


class Task(Protocol):
    """A family of questions with its options fixed."""

    @property
    def name(self) -> str:
        """Name in the registry and in reports."""
        ...

    def samples(self, seed: int, count: int, *, num_needle_places: int) -> Iterator[TaskSample]:
        """The first `count` samples of a seed; a larger count only adds more behind them.

        Args:
            num_needle_places: super-blocks of the history that can take a needle. With fewer than a sample has
                needles, neighbours share one.

        Raises:
            ConfigError: no place at all.
        """
        ...


class NumberedTask(ABC):
    """A task whose samples can be made one by one, in any order, by any worker."""

    def samples(self, seed: int, count: int, *, num_needle_places: int) -> Iterator[TaskSample]:
        """See `Task`."""
        for number in range(count):
            yield self.sample(seed, number, num_needle_places=num_needle_places)

    @abstractmethod
    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """Sample `number` of a seed."""


class Draws:
    """A stream of random draws that is the same in every version of numpy and Python.

    numpy promises that of a bit generator's raw output and of its seeding, not of `Generator`'s methods; so these
    few are made here from raw 64-bit words.
    """

    def __init__(self, *key: str | int) -> None:
        """The stream of a key; different keys give independent streams."""
        self._bits = np.random.PCG64(int.from_bytes(_digest(*key)[:16], "big"))

    def bits(self) -> int:
        """64 random bits."""
        return int(self._bits.random_raw())

    def below(self, bound: int) -> int:
        """A whole number in `[0, bound)`, every one equally likely."""
        limit = 2**64 - 2**64 % bound
        while (word := self.bits()) >= limit:
            pass
        return word % bound

    def unit(self) -> float:
        """A multiple of 2^-53 in `[0, 1)`."""
        return (self.bits() >> 11) * 2.0**-53

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Different items in random order."""
        rest = list(items)
        for position in range(count):
            other = position + self.below(len(rest) - position)
            rest[position], rest[other] = rest[other], rest[position]
        return rest[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))

    def numbers(self, count: int, first: int, stop: int) -> list[int]:
        """Different whole numbers in `[first, stop)`, in random order; for counts far below what there is."""
        numbers: dict[int, None] = {}
        while len(numbers) < count:
            numbers[first + self.below(stop - first)] = None
        return list(numbers)

    def depths(self, count: int) -> list[float]:
        """Random places, oldest first."""
        return sorted(self.unit() for _ in range(count))

    def depth_of(self, number: int) -> float:
        """A random place in the tenth of the history that is this sample's turn."""
        return (number % NUM_DEPTH_BINS + self.unit()) / NUM_DEPTH_BINS


def _digest(*key: str | int) -> bytes:
    return hashlib.sha256(json.dumps(key, ensure_ascii=True).encode()).digest()


def sample_id(task: str, seed: int, number: int) -> str:
    """Name of a sample."""
    return _digest("sample", task, seed, number).hex()[:16]


def fit_places(needles: Sequence[Needle], num_places: int) -> tuple[Needle, ...]:
    """Needles oldest first, at most `num_places` of them: where they are more, neighbours become one text.

    Short histories (4,096 tokens are four super-blocks) hold the same facts and distractors as long ones that way.
    A shared place is needed when any of its texts is, and stands where the first of them would.

    Raises:
        ConfigError: there is no place.
    """
    if num_places < 1:
        raise ConfigError("the history has no full super-block that could take a needle; choose a longer one")
    ordered = sorted(needles, key=lambda needle: needle.depth)
    num_groups = min(num_places, len(ordered))
    bounds = [len(ordered) * group // num_groups for group in range(num_groups + 1)]
    groups = [ordered[start:stop] for start, stop in pairwise(bounds)]
    return tuple(
        Needle(" ".join(needle.text for needle in group), group[0].depth, any(needle.needed for needle in group))
        for group in groups
    )


def near_misses(draws: Draws, items: Sequence[str], others: Sequence[str]) -> list[list[str]]:
    """Wrong answers that are right but for one item: the items with each of the others in a random one's stead."""
    wrong = []
    for other in others:
        changed = list(items)
        changed[draws.below(len(items))] = other
        wrong.append(changed)
    return wrong
