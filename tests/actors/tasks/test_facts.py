"""The world's answers against a reader of the sentences that knows nothing of the simulator."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.tasks import TASKS, TaskSample
from actors.tasks.sample import Draws
from actors.tasks.world import PLACES, tell_story

TASK_OF = {1: "one_fact", 2: "two_facts", 3: "three_facts"}
UNKNOWN = "?"


class Reader:
    """Follows a text sentence by sentence: where people are, who has what, and every place each object was at."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self.person_at: dict[str, str] = {}
        self.carries: dict[str, set[str]] = {}
        self.trail: dict[str, list[str]] = {}
        for sentence in sentences:
            self.read(sentence)

    def read(self, sentence: str) -> None:
        if match := re.fullmatch(r"(\w+) went to the (.+)\.", sentence):
            person, place = match.groups()
            self.person_at[person] = place
            for thing in self.carries.get(person, ()):
                self.see(thing, place)
        elif match := re.fullmatch(r"(\w+) picked up the (.+)\.", sentence):
            person, thing = match.groups()
            self.carries.setdefault(person, set()).add(thing)
            self.see(thing, self.person_at.get(person, UNKNOWN))
        elif match := re.fullmatch(r"(\w+) put down the (.+)\.", sentence):
            person, thing = match.groups()
            self.carries.setdefault(person, set()).discard(thing)
            self.see(thing, self.person_at.get(person, UNKNOWN))
        elif match := re.fullmatch(r"(\w+) handed the (.+) to (\w+)\.", sentence):
            giver, thing, receiver = match.groups()
            self.carries.setdefault(giver, set()).discard(thing)
            self.carries.setdefault(receiver, set()).add(thing)
            self.see(thing, self.person_at.get(receiver, UNKNOWN))
        else:
            raise AssertionError(f"not understood: {sentence}")

    def see(self, thing: str, place: str) -> None:
        trail = self.trail.setdefault(thing, [])
        if not trail or trail[-1] != place:
            trail.append(place)

    def answer(self, query: str) -> str:
        if match := re.search(r"Where was the (.+) before it came to the (.+)\?", query):
            thing, place = match.groups()
            trail = self.trail.get(thing, [])
            assert trail.count(place) <= 1
            return trail[trail.index(place) - 1] if place in trail[1:] else UNKNOWN
        match = re.search(r"Where is (the )?(.+)\?", query)
        assert match
        if match[1]:
            return self.trail.get(match[2], [UNKNOWN])[-1]
        return self.person_at.get(match[2], UNKNOWN)


def texts(sample: TaskSample) -> list[str]:
    return [needle.text for needle in sample.needles]


@pytest.mark.parametrize("num_facts", [1, 2, 3])
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**63), num_events=st.integers(4, 25))
def test_answers_follow_from_the_sentences(num_facts: int, seed: int, num_events: int) -> None:
    (sample,) = TASKS[TASK_OF[num_facts]](num_events=num_events).samples(seed, 1, num_needle_places=30)
    assert len(sample.needles) == num_events
    assert Reader(texts(sample)).answer(sample.query) == sample.answer
    assert set(sample.candidates) == set(PLACES)


@pytest.mark.parametrize("num_facts", [1, 2, 3])
@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**63))
def test_the_supporting_facts_are_enough_and_none_is_one_too_many(num_facts: int, seed: int) -> None:
    (sample,) = TASKS[TASK_OF[num_facts]]().samples(seed, 1, num_needle_places=30)
    support = [needle.text for needle in sample.needles if needle.needed]
    assert len(support) == num_facts
    assert Reader(support).answer(sample.query) == sample.answer
    for left_out in range(num_facts):
        assert Reader([*support[:left_out], *support[left_out + 1 :]]).answer(sample.query) != sample.answer


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**63))
def test_stories_are_possible(seed: int) -> None:
    at: dict[str, str] = {}
    has: dict[str, str] = {}
    lies: dict[str, str] = {}
    for event in tell_story(Draws(seed), 30):
        if event.action == "move":
            assert at.get(event.person) != event.thing
            at[event.person] = event.thing
            continue
        here = at[event.person]
        if event.action == "take":
            assert event.thing not in has
            assert lies.pop(event.thing, here) == here
            has[event.thing] = event.person
        else:
            assert has.pop(event.thing) == event.person
            if event.action == "drop":
                lies[event.thing] = here
            else:
                assert at[event.receiver] == here
                assert event.receiver != event.person
                has[event.thing] = event.receiver


def test_all_actions_happen_and_answers_are_spread() -> None:
    samples = [s for name in TASK_OF.values() for s in TASKS[name]().samples(3, 200, num_needle_places=30)]
    everything = " ".join(text for sample in samples for text in texts(sample))
    for verb in ("went to", "picked up", "put down", "handed"):
        assert everything.count(verb) > 100
    for place in PLACES:
        assert sum(sample.answer == place for sample in samples) > 600 / len(PLACES) / 2
