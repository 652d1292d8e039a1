"""What holds for every task: reproducible, paired, legal, and without its answer given away."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.tasks import TASKS, Needle, TaskSample
from actors.tasks.sample import Draws, fit_places, near_misses, sample_id
from cluster.errors import ConfigError

ALL = sorted(TASKS)
SEEDS = st.integers(0, 2**63)
PLACES = 40
FACTS = ("one_fact", "two_facts", "three_facts")
LISTS = ("common_words", "frequent_words")
"""Whose number of needles is a share of the places."""

# Whoever changes a table, a sentence or the order of draws changes every result measured so far: say so, and pin anew.
PINNED = {
    "ask_again": "35ec8bb7ab1f6949",
    "common_words": "af5988e5cd71d2ff",
    "frequent_words": "65a3a6545d2877ef",
    "multi_key_numbers": "2da8a5f2186912b6",
    "multi_key_uuids": "d9d9ee9ec3b985d7",
    "multi_key_words": "8477e75120412ac1",
    "multi_query_numbers": "d70d65d3d1a7232e",
    "multi_query_uuids": "ba8ff8aca2badcb6",
    "multi_query_words": "0221a5e5f1a2e89b",
    "multi_value_numbers": "612ef44afca07167",
    "multi_value_uuids": "f2808aa733ff8bb6",
    "multi_value_words": "5eae72a4c3c737ef",
    "one_fact": "9d73aee137dbc4b0",
    "recall_literal": "400b8616a7d1c167",
    "recall_paraphrased": "471b437ceb7fded8",
    "single_numbers": "b82a0e49cfd97a3d",
    "single_uuids": "d9dacc718160d76c",
    "single_words": "e64806a7494f34b3",
    "three_facts": "b1d6ecbaa5fabbf5",
    "two_facts": "517a33923988be68",
    "variable_tracking": "936c57f2b76ec2cb",
}


def samples_of(name: str, seed: int, count: int, places: int = PLACES) -> list[TaskSample]:
    return list(TASKS[name]().samples(seed, count, num_needle_places=places))


def digest(samples: list[TaskSample]) -> str:
    return hashlib.sha256(json.dumps([asdict(s) for s in samples], sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ALL)
def test_samples_are_those_of_every_other_machine(name: str) -> None:
    assert digest(samples_of(name, 7, 12)) == PINNED[name]


def test_samples_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "from tests.actors.tasks.test_sample import ALL, digest, samples_of\n"
        "print(' '.join(digest(samples_of(name, 7, 3)) for name in ALL))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin"},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {" ".join(digest(samples_of(name, 7, 3)) for name in ALL) + "\n"}


@pytest.mark.parametrize("name", ALL)
def test_a_larger_count_adds_samples_behind(name: str) -> None:
    longer = samples_of(name, 3, 9)
    assert samples_of(name, 3, 4) == longer[:4]
    assert len({sample.sample_id for sample in longer}) == 9
    assert not {sample.sample_id for sample in samples_of(name, 4, 9)} & {sample.sample_id for sample in longer}


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_samples_are_legal(name: str, seed: int) -> None:
    for number, sample in enumerate(samples_of(name, seed, 3)):
        assert sample.task == name
        assert sample.sample_id == sample_id(name, seed, number)
        assert sample.answer in sample.candidates
        assert len(set(sample.candidates)) == len(sample.candidates) == 8
        depths = [needle.depth for needle in sample.needles]
        assert depths == sorted(depths)
        assert all(0 <= depth <= 1 for depth in depths)
        assert 1 <= sample.num_needed <= len(sample.needles) <= PLACES
        assert not sample.query.endswith(" ")
        assert sample.answer == sample.answer.strip()
        assert all(isinstance(value, str | int | float) for value in sample.meta.values())
        assert pickle.loads(pickle.dumps(sample)) == sample


@pytest.mark.parametrize("name", [name for name in ALL if name not in FACTS])
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_nothing_but_needed_needles_names_the_answer(name: str, seed: int) -> None:
    for sample in samples_of(name, seed, 2):
        for item in sample.answer.split(", "):
            assert item not in sample.query
            assert all(needle.needed or item not in needle.text for needle in sample.needles)
            assert any(needle.needed and item in needle.text for needle in sample.needles)


@pytest.mark.parametrize("name", FACTS)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_a_question_about_the_world_does_not_name_its_answer(name: str, seed: int) -> None:
    for sample in samples_of(name, seed, 2):
        assert sample.answer not in sample.query


@pytest.mark.parametrize("name", [name for name in ALL if name not in LISTS])
def test_every_length_that_has_the_places_asks_the_same(name: str) -> None:
    assert samples_of(name, 5, 4, places=12) == samples_of(name, 5, 4, places=9765)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("places", [1, 3])
def test_short_histories_hold_the_same_texts_in_fewer_places(name: str, places: int) -> None:
    for short, long in zip(samples_of(name, 5, 3, places), samples_of(name, 5, 3), strict=True):
        assert 1 <= len(short.needles) <= places
        if name not in LISTS:
            assert " ".join(n.text for n in short.needles) == " ".join(n.text for n in long.needles)
            assert (short.query, short.answer, short.candidates) == (long.query, long.answer, long.candidates)


@pytest.mark.parametrize("name", ALL)
def test_no_place_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no full super-block"):
        samples_of(name, 1, 1, places=0)


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no task 'nedle'") as caught:
        TASKS["nedle"]
    assert all(name in str(caught.value) for name in ALL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("single_words", {"values": "colours"}),
        ("single_words", {"num_needed": 0}),
        ("multi_key_words", {"num_distractors": 1000}),
        ("variable_tracking", {"num_hops": 0}),
        ("common_words", {"words_per_list": 30}),
        ("frequent_words", {"share_percent": 101}),
        ("two_facts", {"num_events": 2}),
        ("one_fact", {"num_facts": 4}),
        ("recall_literal", {"num_keys": 1}),
        ("ask_again", {"num_spans": 1}),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"task {name}"):
        TASKS[name](**options)


def test_needed_depths_visit_every_tenth() -> None:
    for name in ("single_numbers", "multi_key_words", "recall_literal"):
        depths = [float(sample.meta["depth"]) for sample in samples_of(name, 11, 20)]
        assert Counter(int(depth * 10) for depth in depths) == dict.fromkeys(range(10), 2)


@given(st.integers(1, 2**64), st.integers(0, 100))
def test_whole_numbers_are_below_their_bound(bound: int, seed: int) -> None:
    assert 0 <= Draws("t", seed).below(bound) < bound


def test_draws_are_uniform_and_independent_of_numpys_generator() -> None:
    draws = Draws("t", 1)
    stream = Draws("t", 1)
    raw = np.random.PCG64(int.from_bytes(hashlib.sha256(b'["t", 1]').digest()[:16], "big")).random_raw(3)
    assert [stream.bits() for _ in range(3)] == raw.tolist()
    counts = np.bincount([draws.below(5) for _ in range(20_000)], minlength=5)
    # Five equal shares of 20,000: standard deviation 57.
    assert np.abs(counts - 4000).max() < 5 * 57
    units = [draws.unit() for _ in range(20_000)]
    assert abs(np.mean(units) - 0.5) < 5 * 12**-0.5 / 20_000**0.5
    first = Counter(tuple(draws.sample("abc", 2)) for _ in range(12_000))
    assert len(first) == 6
    assert max(abs(n - 2000) for n in first.values()) < 5 * 41


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 15))
def test_neighbours_share_a_place_when_there_are_too_few(depths: list[float], num_places: int) -> None:
    needles = [Needle(f"<{i}>", depth, i == 0) for i, depth in enumerate(depths)]
    fitted = fit_places(needles, num_places)
    assert len(fitted) == min(num_places, len(needles))
    assert sum(needle.needed for needle in fitted) == 1
    assert "<0>" in next(needle.text for needle in fitted if needle.needed)
    ordered = sorted(needles, key=lambda needle: needle.depth)
    assert " ".join(n.text for n in fitted).split() == [n.text for n in ordered]
    sizes = [len(needle.text.split()) for needle in fitted]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 1000))
def test_near_misses_differ_in_one_item(seed: int) -> None:
    for lure, wrong in zip("xyz", near_misses(Draws(seed), list("abc"), list("xyz")), strict=True):
        assert [w for w in wrong if w not in "abc"] == [lure]
        assert sum(w != a for w, a in zip(wrong, "abc", strict=True)) == 1
