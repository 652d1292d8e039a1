"""Key-value recall: a question that names the key, or describes it without any word the needle has.

Both tasks plant the same needles for a seed and number, so what a paraphrase costs is a paired difference. Lexical
search cannot find the paraphrased one but by chance: question and needles have no content word in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.tasks.paraphrases import CONCEPTS
from actors.tasks.sample import NUM_CANDIDATES, Draws, Needle, NumberedTask, TaskSample, fit_places, sample_id
from cluster.errors import ConfigError


def recall_sentence(key: str, code: str) -> str:
    """What is planted."""
    return f"The registration code of the {key} is {code}."


def recall_query(key: str, description: str = "") -> str:
    """What is asked: by name, or by description where there is one."""
    if description:
        return f"\n\nQuestion: Which number belongs to {description}?\nAnswer: The number that belongs to it is"
    return f"\n\nQuestion: What is the registration code of the {key}?\nAnswer: The registration code of the {key} is"


def draw_codes(draws: Draws, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(code) for code in draws.numbers(count, 10_000, 100_000)]


@dataclass(frozen=True)
class KeyValueRecall(NumberedTask):
    """Ask for the code of one key of `num_keys`.

    Raises:
        ConfigError: a number of keys there are no concepts for.
    """

    name: str
    paraphrased: bool
    num_keys: int = NUM_CANDIDATES

    def __post_init__(self) -> None:
        if not 2 <= self.num_keys <= len(CONCEPTS):
            raise ConfigError(f"task {self.name}: num_keys={self.num_keys} must be from 2 to {len(CONCEPTS)}")

    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """See `Task.samples`."""
        # Not of the task's name: both tasks are to have the same needles.
        draws = Draws("recall", self.num_keys, seed, number)
        concepts = draws.sample(CONCEPTS, self.num_keys)
        codes = draw_codes(draws, self.num_keys)
        depths = [draws.depth_of(number), *(draws.unit() for _ in concepts[1:])]
        needles = [
            Needle(recall_sentence(key, code), depth, index == 0)
            for index, ((key, _), code, depth) in enumerate(zip(concepts, codes, depths, strict=True))
        ]
        key, description = concepts[0]
        return TaskSample(
            self.name,
            sample_id(self.name, seed, number),
            fit_places(needles, num_needle_places),
            recall_query(key, description if self.paraphrased else ""),
            codes[0],
            tuple(draws.shuffled(codes[:NUM_CANDIDATES])),
            {"seed": seed, "number": number, "depth": depths[0], "key": key},
        )
