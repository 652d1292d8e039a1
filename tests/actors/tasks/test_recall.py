"""Key-value recall and sessions that ask again."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.tasks import TASKS
from actors.tasks.paraphrases import CONCEPTS

FUNCTION_WORDS = (
    "a an and are at be been by can from has have in is it its may of on one or others over someone that the then to "
    "was were what when where which who whom whose with without under up"
)
SEEDS = st.integers(0, 2**63)


def content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", text.lower())) - set(FUNCTION_WORDS.split())


def codes_in(sample_needles: list[str]) -> dict[str, str]:
    found = (re.fullmatch(r"The registration code of the (.+) is (\d{5})\.", text) for text in sample_needles)
    return {match[1]: match[2] for match in found if match}


def test_descriptions_share_no_word_with_any_key() -> None:
    assert len(CONCEPTS) >= 60
    keys = [key for key, _ in CONCEPTS]
    assert len(set(keys)) == len({description for _, description in CONCEPTS}) == len(CONCEPTS)
    for _, description in CONCEPTS:
        assert description.startswith("the ")
        for word in content_words(description):
            for key in keys:
                # Forms of a word share its beginning; compounds hold it.
                assert word[:4] != key[:4], (word, key)
                assert len(word) < 4 or word not in key, (word, key)
                assert len(key) < 5 or key not in word, (word, key)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_the_code_is_that_of_the_key(seed: int) -> None:
    literal, paraphrased = (
        list(TASKS[name]().samples(seed, 3, num_needle_places=20)) for name in ("recall_literal", "recall_paraphrased")
    )
    for by_name, by_description in zip(literal, paraphrased, strict=True):
        codes = codes_in([needle.text for needle in by_name.needles])
        assert len(codes) == len(set(codes.values())) == 8
        (key,) = [key for key in codes if f" {key}?" in by_name.query]
        (described,) = [key for key, description in CONCEPTS if f" {description}?" in by_description.query]
        assert key == described
        assert by_name.answer == by_description.answer == codes[key]
        assert [n.text for n in by_name.needles if n.needed] == [f"The registration code of the {key} is {codes[key]}."]
        assert by_name.needles == by_description.needles
        assert by_name.candidates == by_description.candidates
        assert set(by_name.candidates) == set(codes.values())
        assert by_name.sample_id != by_description.sample_id
        for needle in by_description.needles:
            assert not content_words(by_description.query) & content_words(needle.text)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, num_spans=st.integers(2, 5))
def test_sessions_ask_the_first_again_at_the_end(seed: int, num_spans: int) -> None:
    samples = list(TASKS["ask_again"](num_spans=num_spans).samples(seed, 2 * (num_spans + 1), num_needle_places=20))
    sessions = [samples[: num_spans + 1], samples[num_spans + 1 :]]
    assert len({sample.meta["session"] for sample in samples}) == 2
    for session in sessions:
        assert len({sample.meta["session"] for sample in session}) == 1
        assert [sample.meta["turn"] for sample in session] == list(range(num_spans + 1))
        assert [sample.meta["repeats_turn"] for sample in session] == [-1] * num_spans + [0]
        codes = codes_in([needle.text for needle in session[0].needles])
        assert len(codes) == num_spans + 4
        for sample in session:
            assert codes_in([needle.text for needle in sample.needles]) == codes
            (asked,) = [key for key in codes if f" {key}?" in sample.query]
            assert codes[asked] == sample.answer
            assert [asked in needle.text for needle in sample.needles] == [n.needed for n in sample.needles]
        assert len({sample.query for sample in session[:-1]}) == num_spans
        first, last = session[0], session[-1]
        assert (first.query, first.answer, first.needles) == (last.query, last.answer, last.needles)
        assert first.sample_id != last.sample_id
