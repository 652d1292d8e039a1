"""Facts in real text after BABILong (Kuratov et al. 2024): the events of a small world, spread over the history.

Every event is a needle, in the order in which they happened. Those that the answer does not need are distractors: they
speak of the same people, places and objects. (So, unlike in retrieval, a distractor may name the answer's place.)
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.tasks.sample import Draws, Needle, NumberedTask, TaskSample, fit_places, sample_id
from actors.tasks.world import PLACES, questions, tell_story
from cluster.errors import ConfigError


@dataclass(frozen=True)
class SupportingFacts(NumberedTask):
    """Ask what follows from `num_facts` events of `num_events`.

    Raises:
        ConfigError: no such question, or too few events for one.
    """

    name: str
    num_facts: int
    """1: where a person is. 2: where an object is. 3: where an object was before."""
    num_events: int = 10

    def __post_init__(self) -> None:
        if self.num_facts not in {1, 2, 3} or self.num_events < 4:
            raise ConfigError(f"task {self.name}: num_facts must be 1, 2 or 3, and num_events at least 4")

    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """See `Task.samples`."""
        draws = Draws("facts", self.name, seed, number)
        # Some stories leave no such question: four in ten at ten events and three facts.
        while not (askable := questions(events := tell_story(draws, self.num_events), self.num_facts)):
            pass
        question = draws.pick(askable)
        depths = draws.depths(len(events))
        needles = [
            Needle(event.text, depth, index in question.support)
            for index, (event, depth) in enumerate(zip(events, depths, strict=True))
        ]
        return TaskSample(
            self.name,
            sample_id(self.name, seed, number),
            fit_places(needles, num_needle_places),
            f"\n\nQuestion: {question.text}\nAnswer: {question.lead}",
            question.answer,
            tuple(draws.shuffled(PLACES)),
            {"seed": seed, "number": number, "num_facts": self.num_facts, "num_events": self.num_events},
        )
