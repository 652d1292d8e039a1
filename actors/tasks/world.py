"""A small world of people, places and objects: its events, told in sentences, and what follows from them.

Questions are those of bAbI (Weston et al. 2015), as BABILong (Kuratov et al. 2024) hides them in long texts: where a
person is, where an object is, where an object was before. Each needs one, two or three events and says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.tasks.sample import Draws

PEOPLE = ("Agatha", "Bertram", "Cordelia", "Desmond", "Eudora", "Ferdinand")
OBJECTS = ("accordion", "barometer", "chessboard", "microscope", "saxophone", "suitcase")
PLACES = ("attic", "bakery", "cellar", "garden", "hallway", "kitchen", "library", "workshop")

NUM_PEOPLE, NUM_OBJECTS, NUM_PLACES = 3, 3, 5
"""Of a story: few, so that they meet."""

Action = Literal["move", "take", "drop", "give"]

WEIGHTS: dict[Action, int] = {"move": 4, "take": 4, "drop": 2, "give": 8}
"""How often an action is chosen, where it is possible."""


@dataclass(frozen=True)
class Event:
    """Something a person does."""

    action: Action
    person: str
    thing: str
    """The place of a move, else the object."""
    receiver: str = ""
    """Of a gift."""

    @property
    def text(self) -> str:
        """The event as a sentence."""
        if self.action == "move":
            return f"{self.person} went to the {self.thing}."
        if self.action == "take":
            return f"{self.person} picked up the {self.thing}."
        if self.action == "drop":
            return f"{self.person} put down the {self.thing}."
        return f"{self.person} handed the {self.thing} to {self.receiver}."


@dataclass(frozen=True)
class Question:
    """A question that a story answers."""

    text: str
    lead: str
    """How the answer begins; the answer is its next words."""
    answer: str
    support: frozenset[int]
    """The events it follows from, by index: these and no fewer."""


@dataclass
class World:
    """Where everybody and everything is. Nobody acts before their first move, so every place that matters is told."""

    place_of: dict[str, str] = field(default_factory=dict)
    """Of people who moved, and of objects that lie somewhere. An object nobody touched may be found anywhere."""
    holder_of: dict[str, str] = field(default_factory=dict)

    def possible(self, person: str, people: Sequence[str], objects: Sequence[str]) -> dict[Action, list[Event]]:
        """What a person can do beside moving."""
        here = self.place_of.get(person)
        if here is None:
            return {}
        held = [thing for thing in objects if self.holder_of.get(thing) == person]
        free = [t for t in objects if t not in self.holder_of and self.place_of.get(t, here) == here]
        others = [other for other in people if other != person and self.place_of.get(other) == here]
        events: dict[Action, list[Event]] = {
            "take": [Event("take", person, thing) for thing in free],
            "drop": [Event("drop", person, thing) for thing in held],
            "give": [Event("give", person, thing, other) for thing in held for other in others],
        }
        return {action: choices for action, choices in events.items() if choices}

    def apply(self, event: Event) -> None:
        """Let an event happen."""
        if event.action == "move":
            self.place_of[event.person] = event.thing
        elif event.action == "take":
            self.holder_of[event.thing] = event.person
        elif event.action == "give":
            self.holder_of[event.thing] = event.receiver
        else:
            del self.holder_of[event.thing]
            self.place_of[event.thing] = self.place_of[event.person]


def tell_story(draws: Draws, num_events: int) -> list[Event]:
    """A random course of events."""
    people, objects = draws.sample(PEOPLE, NUM_PEOPLE), draws.sample(OBJECTS, NUM_OBJECTS)
    places = draws.sample(PLACES, NUM_PLACES)
    world = World()
    events = []
    for _ in range(num_events):
        person = draws.pick(people)
        choices = world.possible(person, people, objects)
        choices["move"] = [Event("move", person, place) for place in places if place != world.place_of.get(person)]
        weighted: list[Action] = [action for action in WEIGHTS if action in choices for _ in range(WEIGHTS[action])]
        action = draws.pick(weighted)
        events.append(draws.pick(choices[action]))
        world.apply(events[-1])
    return events


def questions(events: Sequence[Event], num_facts: int) -> list[Question]:
    """All questions of a story that need exactly 1, 2 or 3 of its events."""
    return list({1: _where_people_are, 2: _where_objects_are, 3: _where_objects_were}[num_facts](events))


def _where_people_are(events: Sequence[Event]) -> Iterator[Question]:
    for person, move in _last_moves(events).items():
        yield Question(f"Where is {person}?", f"{person} is in the", events[move].thing, frozenset({move}))


def _where_objects_are(events: Sequence[Event]) -> Iterator[Question]:
    """The last time it changed hands, and the last move of who had it then."""
    handled = {event.thing: index for index, event in enumerate(events) if event.action != "move"}
    for thing, index in handled.items():
        event = events[index]
        # Whoever put it down may have gone on; whoever has it took it along.
        until = index if event.action == "drop" else len(events)
        move = _last_moves(events[:until])[event.receiver or event.person]
        yield Question(f"Where is the {thing}?", f"The {thing} is in the", events[move].thing, frozenset({index, move}))


def _where_objects_were(events: Sequence[Event]) -> Iterator[Question]:
    """Before its last change of place: its carrier's move there and the one before, and how it came to the carrier."""
    for thing in dict.fromkeys(event.thing for event in events if event.action != "move"):
        places: list[str] = []
        support: frozenset[int] = frozenset()
        carrier, since = "", -1
        for index, event in enumerate(events):
            if event.action == "move" and event.person == carrier:
                support = frozenset({_last_moves(events[:index])[carrier], since, index})
                places.append(event.thing)
            elif event.thing == thing and event.action != "move":
                carrier, since = ("", -1) if event.action == "drop" else (event.receiver or event.person, index)
                places = places or [events[_last_moves(events[:index])[carrier]].thing]
        # A place it came to twice would have two places before it.
        if support and places.count(places[-1]) == 1:
            yield Question(
                f"Where was the {thing} before it came to the {places[-1]}?",
                f"Before that, the {thing} was in the",
                places[-2],
                support,
            )


def _last_moves(events: Sequence[Event]) -> dict[str, int]:
    """Index of each person's last move."""
    return {event.person: index for index, event in enumerate(events) if event.action == "move"}
