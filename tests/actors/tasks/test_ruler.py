"""Retrieval, tracking and aggregation: answers follow from what is planted, by programs that read only that."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.tasks import TASKS, TaskSample
from actors.tasks.words import ADJECTIVES, NOUNS, VALUES

SEEDS = st.integers(0, 2**63)
FORMS = {
    "words": r"[a-z]+",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


def read_values(sample: TaskSample, needed: bool | None = None) -> dict[str, list[str]]:
    """Values by key, in the order of the text."""
    found: dict[str, list[str]] = {}
    for needle in sample.needles:
        if needed is None or needle.needed is needed:
            match = re.search(r"special (?:word|number|UUID)s? for (.+) is (.+)\.$", needle.text)
            assert match
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.parametrize("values", FORMS)
@pytest.mark.parametrize("kind", ["single", "multi_key", "multi_value", "multi_query"])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_values_are_those_of_the_keys_asked_for(kind: str, values: str, seed: int) -> None:
    for sample in TASKS[f"{kind}_{values}"]().samples(seed, 2, num_needle_places=20):
        stored = read_values(sample)
        question = sample.query.split("?")[0]
        asked = sorted((key for key in stored if key in question), key=question.index)
        assert ", ".join(value for key in asked for value in stored[key]) == sample.answer
        assert set(read_values(sample, needed=True)) == set(asked)
        assert not set(read_values(sample, needed=False)) & set(asked)
        everything = [value for found in stored.values() for value in found]
        assert len(set(everything)) == len(everything)
        items = sample.answer.split(", ")
        for candidate in sample.candidates:
            assert all(re.fullmatch(FORMS[values], item) for item in candidate.split(", "))
            assert sum(a != b for a, b in zip(candidate.split(", "), items, strict=True)) == (
                candidate != sample.answer
            )


def test_the_number_of_needles_is_an_option() -> None:
    (sample,) = TASKS["multi_query_words"](num_needed=4, num_distractors=20).samples(1, 1, num_needle_places=99)
    assert (sample.num_needed, len(sample.needles), sample.answer.count(",")) == (4, 24, 3)


def test_no_word_of_the_tables_is_part_of_another() -> None:
    words = ADJECTIVES + NOUNS + VALUES
    assert len(set(words)) == len(words)
    assert not [(a, b) for a in words for b in words if a != b and a in b]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, num_hops=st.integers(1, 5), num_chains=st.integers(1, 5))
def test_variables_hold_what_was_assigned(seed: int, num_hops: int, num_chains: int) -> None:
    task = TASKS["variable_tracking"](num_hops=num_hops, num_chains=num_chains)
    for sample in task.samples(seed, 2, num_needle_places=100):
        assert len(sample.needles) == num_chains * (num_hops + 1)
        held: dict[str, str] = {}
        for needle in sample.needles:
            match = re.fullmatch(
                r"The variable ([A-Z]{6}) is set to (?:the value of ([A-Z]{6})|(\d{5}))\.", needle.text
            )
            assert match
            assert match[1] not in held
            held[match[1]] = held[match[2]] if match[2] else match[3]
        asked = re.findall(r"\d{5}", sample.query)
        assert len(asked) == 1
        assert ", ".join(name for name, value in held.items() if value == asked[0]) == sample.answer
        assert len(sample.answer.split(", ")) == sample.num_needed == num_hops + 1


@pytest.mark.parametrize("places", [1, 4, 40, 9765])
@pytest.mark.parametrize("name", ["common_words", "frequent_words"])
def test_the_words_asked_for_are_the_most_frequent(name: str, places: int) -> None:
    task = TASKS[name]()
    for seed in range(3):
        for sample in task.samples(seed, 2, num_needle_places=places):
            assert len(sample.needles) == max(1, min(64, places // 4))
            words = [w for n in sample.needles for w in re.findall(r"[a-z]+", n.text.split(":")[1])]
            assert len(words) == sample.meta["num_words"]
            ranked = Counter(words).most_common(4)
            # A clear cut: the fourth is rarer than the third.
            assert ranked[3][1] < ranked[2][1]
            top = [word for word, _ in ranked[:3]]
            assert sample.answer == ", ".join(top if name == "frequent_words" else sorted(top))
            assert {w for c in sample.candidates for w in c.split(", ")} <= set(words)
            assert all(needle.needed for needle in sample.needles)


@pytest.mark.parametrize("name", ["common_words", "frequent_words"])
@pytest.mark.parametrize("num_asked", [1, 2, 3, 4, 5])
def test_the_shortest_lists_have_a_clear_cut_too(name: str, num_asked: int) -> None:
    task = TASKS[name](num_asked=num_asked, words_per_list=60 + 40 * num_asked)
    for sample in task.samples(num_asked, 5, num_needle_places=1):
        words = re.findall(r"[a-z]+", sample.needles[0].text.split(":")[1])
        counts = [count for _, count in Counter(words).most_common()]
        assert counts[num_asked] < counts[num_asked - 1]
        assert len(sample.candidates) == len(set(sample.candidates)) == 8
        if name == "frequent_words":
            assert len(set(counts[: num_asked + 1])) == num_asked + 1
        else:
            assert min(counts) >= 3
