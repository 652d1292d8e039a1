"""Needle retrieval after RULER (Hsieh et al. 2024): what was said to belong to a key, anywhere in the history.

One question among a single needle, needles with other keys, several values of one key, and several keys at once, with
words, numbers or UUIDs as values. The tasks are the paper's, the sentences our own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from actors.tasks.sample import (
    NUM_CANDIDATES,
    Draws,
    Needle,
    NumberedTask,
    TaskSample,
    fit_places,
    near_misses,
    sample_id,
)
from actors.tasks.words import ADJECTIVES, NOUNS, VALUES
from cluster.errors import ConfigError


def _words(draws: Draws, count: int) -> list[str]:
    return draws.sample(VALUES, count)


def _numbers(draws: Draws, count: int) -> list[str]:
    return [str(number) for number in draws.numbers(count, 1_000_000, 10_000_000)]


def _uuids(draws: Draws, count: int) -> list[str]:
    return [str(uuid.UUID(int=draws.bits() << 64 | draws.bits(), version=4)) for _ in range(count)]


VALUE_KINDS: dict[str, tuple[str, Callable[[Draws, int], list[str]]]] = {
    "words": ("word", _words),
    "numbers": ("number", _numbers),
    "uuids": ("UUID", _uuids),
}


@dataclass(frozen=True)
class NeedleRetrieval(NumberedTask):
    """Ask for the values of `num_needed` needles among `num_distractors` of the same form.

    Raises:
        ConfigError: an unknown kind of value, or more needles than there are words for.
    """

    name: str
    values: str = "numbers"
    """`words`, `numbers` (of seven digits) or `uuids`."""
    num_needed: int = 1
    num_distractors: int = 0
    one_key: bool = False
    """All needed values belong to one key; otherwise each to its own, and all keys are asked for."""

    def __post_init__(self) -> None:
        if self.values not in VALUE_KINDS:
            raise ConfigError(f"task {self.name}: values={self.values!r} must be one of {', '.join(VALUE_KINDS)}")
        most = min(len(ADJECTIVES), len(VALUES) - NUM_CANDIDATES)
        if self.num_needed < 1 or self.num_distractors < 0 or self.num_needed + self.num_distractors > most:
            raise ConfigError(f"task {self.name}: needs at least one needed needle, and at most {most} needles in all")

    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """See `Task.samples`."""
        draws = Draws("retrieval", self.name, seed, number)
        num_needles = self.num_needed + self.num_distractors
        noun, draw_values = VALUE_KINDS[self.values]
        # Keys differ in both of their words.
        keys = [
            f"{adjective} {thing}"
            for adjective, thing in zip(
                draws.sample(ADJECTIVES, num_needles), draws.sample(NOUNS, num_needles), strict=True
            )
        ]
        if self.one_key:
            keys[: self.num_needed] = keys[:1] * self.num_needed
        values = draw_values(draws, num_needles + NUM_CANDIDATES)
        sentence = "One of the special {noun}s for {key} is {value}." if self.one_key else _SENTENCE
        needles = [
            Needle(
                sentence.format(noun=noun, key=keys[i], value=values[i]),
                draws.unit() if i else draws.depth_of(number),
                i < self.num_needed,
            )
            for i in range(num_needles)
        ]
        # Several values of one key are asked for in the order of the text, several keys in that of the question.
        order = sorted(range(self.num_needed), key=lambda i: needles[i].depth if self.one_key else i)
        items = [values[i] for i in order]
        # Values that do stand in the history are the better lures.
        lures = values[self.num_needed :][: NUM_CANDIDATES - 1]
        candidates = draws.shuffled([items, *near_misses(draws, items, lures)])
        return TaskSample(
            self.name,
            sample_id(self.name, seed, number),
            fit_places(needles, num_needle_places),
            self._query(noun, keys),
            ", ".join(items),
            tuple(", ".join(candidate) for candidate in candidates),
            {"seed": seed, "number": number, "depth": needles[0].depth, "values": self.values},
        )

    def _query(self, noun: str, keys: list[str]) -> str:
        if self.one_key:
            return (
                f"\n\nQuestion: What are all the special {noun}s for {keys[0]}, in the order of the text?\n"
                f"Answer: The special {noun}s for {keys[0]} are"
            )
        if self.num_needed == 1:
            return (
                f"\n\nQuestion: What is the special {noun} for {keys[0]}?\nAnswer: The special {noun} for {keys[0]} is"
            )
        listed = ", ".join(keys[: self.num_needed - 1]) + " and " + keys[self.num_needed - 1]
        return f"\n\nQuestion: What are the special {noun}s for {listed}, in this order?\nAnswer: They are"


_SENTENCE = "The special {noun} for {key} is {value}."
