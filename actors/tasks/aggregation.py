"""Word extraction after RULER (Hsieh et al. 2024): which words stand most often in lists spread over the history.

Lists take up most of a share of the super-blocks. No single one of them gives the answer, which is what sets these
tasks apart: a memory that shows a few spans in detail cannot count, one whose summaries count can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.tasks.sample import NUM_CANDIDATES, Draws, Needle, NumberedTask, TaskSample, near_misses, sample_id
from actors.tasks.words import NOUNS, VALUES, made_up_words
from cluster.errors import ConfigError

COMMON_TO_RARE = 10
"""`common_words`: a common word stands this many times as often as any other."""

NUM_CODED_WORDS = 256
"""`frequent_words`: different words, at most."""

COMMON_LIST_WORDS, ZIPF_LIST_WORDS = 320, 200
"""Words of a list by default."""


@dataclass(frozen=True)
class WordExtraction(NumberedTask):
    """Name the most frequent words.

    `zipf` False: real words, a few of them common and all others equally rare. True: made-up words, the r-th as
    often as 1/r² of the first.

    Raises:
        ConfigError: numbers that leave nothing to count.
    """

    name: str
    zipf: bool
    words_per_list: int = 0
    """0: as many as surely fit into a super-block with a large vocabulary (see the constants)."""
    share_percent: int = 25
    """Part of the history's super-blocks that take a list."""
    max_lists: int = 64
    """However long the history is."""
    num_asked: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.share_percent <= 100 or self.max_lists < 1 or not 1 <= self.num_asked <= 5:
            raise ConfigError(
                f"task {self.name}: needs share_percent in 1 … 100, max_lists of at least 1, num_asked in 1 … 5"
            )
        # Fewer leave no seven rare words as lures, or a tie where the most frequent words end.
        smallest = 60 + 40 * self.num_asked
        if 0 != self.words_per_list < smallest:
            raise ConfigError(f"task {self.name}: words_per_list={self.words_per_list} must be at least {smallest}")

    @property
    def list_length(self) -> int:
        """Words of a list."""
        return self.words_per_list or (ZIPF_LIST_WORDS if self.zipf else COMMON_LIST_WORDS)

    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """See `Task.samples`; how many lists there are depends on the places.

        Raises:
            ConfigError: no place at all.
        """
        if num_needle_places < 1:
            raise ConfigError("the history has no full super-block that could take a word list; choose a longer one")
        draws = Draws("words", self.name, seed, number)
        num_lists = max(1, min(self.max_lists, num_needle_places * self.share_percent // 100))
        num_words = num_lists * self.list_length
        counts = _zipf_counts(draws, num_words) if self.zipf else _common_counts(draws, num_words, self.num_asked)
        ranked = list(counts)
        words = draws.shuffled([word for word, count in counts.items() for _ in range(count)])
        # The counts may come out a few words short of the lists: the last one is then shorter.
        lists = [words[start : start + self.list_length] for start in range(0, len(words), self.list_length)]
        needles = tuple(
            Needle(self._text(part), depth, needed=True)
            for part, depth in zip(lists, draws.depths(len(lists)), strict=True)
        )
        asked = ranked[: self.num_asked]
        lures = ranked[self.num_asked : self.num_asked + NUM_CANDIDATES - 1]
        candidates = draws.shuffled([asked, *near_misses(draws, asked, lures)])
        which = "coded words" if self.zipf else "words"
        order = "most frequent first" if self.zipf else "in alphabetical order"
        return TaskSample(
            self.name,
            sample_id(self.name, seed, number),
            needles,
            f"\n\nQuestion: Which {self.num_asked} {which} stand most often in the lists above, {order}?\n"
            "Answer: They are",
            self._answer(asked),
            tuple(self._answer(candidate) for candidate in candidates),
            {"seed": seed, "number": number, "num_lists": len(lists), "num_words": len(words)},
        )

    def _text(self, words: Sequence[str]) -> str:
        return f"List of coded words: {' '.join(words)}." if self.zipf else f"List of words: {', '.join(words)}."

    def _answer(self, words: Sequence[str]) -> str:
        return ", ".join(words if self.zipf else sorted(words))


def _common_counts(draws: Draws, num_words: int, num_common: int) -> dict[str, int]:
    """How often each word stands, the common ones first. At least three times each, so that rare is not unique."""
    pool = NOUNS + VALUES
    num_rare = min(len(pool) - num_common, num_words // 3 - num_common * COMMON_TO_RARE)
    rare_count = num_words // (num_common * COMMON_TO_RARE + num_rare)
    words = draws.sample(pool, num_common + num_rare)
    return {word: rare_count * (COMMON_TO_RARE if i < num_common else 1) for i, word in enumerate(words)}


def _zipf_counts(draws: Draws, num_words: int) -> dict[str, int]:
    """How often each word stands, the most frequent first, until the words are used up."""
    counts: dict[str, int] = {}
    rest = num_words
    for rank, word in enumerate(made_up_words(draws, NUM_CODED_WORDS), start=1):
        # 1 + 1/4 + 1/9 + … = 1.645
        counts[word] = min(rest, max(1, num_words * 1000 // (1645 * rank * rank)))
        rest -= counts[word]
        if rest == 0:
            break
    return counts
