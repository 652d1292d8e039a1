"""Ask again: a session of questions about one history, each needing another span, the first once more at the end.

A memory that gave a span up for the next question must find it again. Every query stands behind the history by itself:
earlier turns are not repeated in it, for the first answer would give the last one away.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.tasks.paraphrases import CONCEPTS
from actors.tasks.recall import draw_codes, recall_query, recall_sentence
from actors.tasks.sample import NUM_CANDIDATES, Draws, Needle, NumberedTask, TaskSample, fit_places, sample_id
from cluster.errors import ConfigError


@dataclass(frozen=True)
class AskAgain(NumberedTask):
    """Sessions of `num_spans` + 1 samples, one after the other; those of a session have the same needles.

    `meta` names the session, the turn (0 first) and which turn it repeats (-1: none).

    Raises:
        ConfigError: a session without a second span, or more keys than there are concepts.
    """

    name: str = "ask_again"
    num_spans: int = 4
    num_distractors: int = 4

    def __post_init__(self) -> None:
        num_keys = self.num_spans + self.num_distractors
        if self.num_spans < 2 or self.num_distractors < 0 or num_keys > len(CONCEPTS):
            raise ConfigError(
                f"task {self.name}: needs at least 2 spans, and at most {len(CONCEPTS)} spans and distractors together"
            )

    @property
    def num_turns(self) -> int:
        """Samples of a session."""
        return self.num_spans + 1

    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """See `Task.samples`."""
        session, turn = divmod(number, self.num_turns)
        asked = turn % self.num_spans
        draws = Draws("ask again", self.name, seed, session)
        keys = [key for key, _ in draws.sample(CONCEPTS, self.num_spans + self.num_distractors)]
        codes = draw_codes(draws, len(keys))
        needles = [
            Needle(recall_sentence(key, code), draws.unit(), index == asked)
            for index, (key, code) in enumerate(zip(keys, codes, strict=True))
        ]
        # Codes of the whole session: what was asked before is the best lure.
        lures = [code for code in codes if code != codes[asked]][: NUM_CANDIDATES - 1]
        return TaskSample(
            self.name,
            sample_id(self.name, seed, number),
            fit_places(needles, num_needle_places),
            recall_query(keys[asked]),
            codes[asked],
            tuple(draws.shuffled([codes[asked], *lures])),
            {
                "seed": seed,
                "number": number,
                "session": sample_id(f"{self.name} session", seed, session),
                "turn": turn,
                "num_turns": self.num_turns,
                "repeats_turn": asked if asked != turn else -1,
                "depth": needles[asked].depth,
            },
        )
