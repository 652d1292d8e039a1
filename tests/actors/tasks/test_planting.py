from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.tasks import TASKS, choose_places, is_plantable, plant, plantable_super_blocks
from cluster.config import BaseLMConfig
from cluster.errors import ConfigError, InvalidWriteError
from models.tokenizer import Tokenizer
from storage.geometry import NO_TOKEN

FULL = np.full(32, 32, np.uint8)
PROSE = (
    "It was late. Nobody knew, e.g. the cook, why!\n\nThe “bell” rang twice (or thrice). Then it stopped.\nSo\tdid he. "
)


@pytest.fixture(scope="module")
def tiny(tiny_lm_config: BaseLMConfig) -> Tokenizer:
    return Tokenizer.load(tiny_lm_config)


def super_block(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The first 1,024 tokens of a text that is repeated as often as it takes."""
    ids = tokenizer.encode(text * (1024 // len(text) + 1))
    assert len(ids) >= 1024
    return ids[:1024].reshape(32, 32)


def check(tokenizer: Tokenizer, tokens: np.ndarray, needle: str, seed: int) -> tuple[str, str]:
    """Plant and compare with the original token by token; returns the text before and behind the needle."""
    before, counts = tokens.copy(), FULL.copy()
    planted = plant(tokens, counts, needle, tokenizer, seed)
    np.testing.assert_array_equal(tokens, before)
    assert planted.tokens.shape == (32, 32)
    assert planted.tokens.dtype == np.uint32
    assert (planted.tokens != NO_TOKEN).all()
    np.testing.assert_array_equal(planted.counts, FULL)
    assert planted.counts.dtype == np.uint8

    old, new = tokens.reshape(-1), planted.tokens.reshape(-1)
    # Text and needle may begin alike, so that they differ first somewhere behind the needle's start: try every start.
    for start in range(int(np.argmax(np.append(old != new, True))), 0, -1):
        for lead in (" ", "\n"):
            inserted = tokenizer.encode(lead + needle)
            rest = old[start : 1024 - len(inserted)]
            if np.array_equal(new, np.concatenate([old[:start], inserted, rest])):
                blocks = planted.tokens[planted.first_block : planted.stop_block]
                assert needle in tokenizer.decode(blocks.reshape(-1))
                assert len(blocks) <= (len(inserted) + 62) // 32
                return tokenizer.decode(new[:start]), tokenizer.decode(new[start + len(inserted) :])
    raise AssertionError("the rest is not the original text, moved and cut")


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(
        st.just(PROSE), st.text(min_size=1, max_size=200), st.sampled_from(["x", "x\n", "a b ", "é", "a\r\n"])
    ),
    needle=st.text(min_size=1, max_size=60).filter(lambda text: text.strip() == text),
    seed=st.integers(0, 2**32),
)
def test_only_the_needle_is_new(tiny: Tokenizer, text: str, needle: str, seed: int) -> None:
    check(tiny, super_block(tiny, text), needle, seed)


def test_needles_stand_between_sentences_where_there_are_some(tiny: Tokenizer) -> None:
    tokens = super_block(tiny, PROSE)
    breaks = set()
    for seed in range(80):
        before, behind = check(tiny, tokens, "The code is 123.", seed)
        breaks.add((before[-6:], behind[:4]))
        planted = plant(tokens, FULL, "The code is 123.", tiny, seed)
        first = (len(tiny.encode(before)) + 1) // 32  # the space before the needle is not the needle
        last = (len(tiny.encode(before)) + len("The code is 123.")) // 32
        assert (planted.first_block, planted.stop_block) == (first, last + 1)
    assert breaks == {
        (" late.", " Nob"),
        (", why!", "\n\nTh"),
        ("rice).", " The"),
        ("opped.", "\nSo\t"),
        ("id he.", " It "),
    }


@pytest.mark.parametrize(
    ("text", "ends", "begins"),
    [
        ("x = 1\n\ny = 2\nz = 3\n", "x = 1", "\n\ny"),
        ("x = 1\ny = 2\r\n", "", ("\n", "\r\n")),
        ("lorem ipsum dolor ", ("lorem", "ipsum", "dolor"), " "),
        ("日本語", ("日", "本", "語"), ("日", "本", "語")),
    ],
)
def test_the_best_break_there_is(
    tiny: Tokenizer, text: str, ends: str | tuple[str, ...], begins: str | tuple[str, ...]
) -> None:
    for seed in range(20):
        before, behind = check(tiny, super_block(tiny, text), "The code is 123.", seed)
        assert before.endswith(ends)
        assert behind.startswith(begins)


def test_a_needle_may_nearly_fill_the_super_block(tiny: Tokenizer) -> None:
    before, behind = check(tiny, super_block(tiny, PROSE), "n" * 1022, 3)
    assert (before, behind) == ("I", "")
    with pytest.raises(ConfigError, match="has 1024 tokens and a super-block 1024"):
        plant(super_block(tiny, PROSE), FULL, "n" * 1023, tiny, 3)


def test_every_seed_plants_the_same_again_and_seeds_differ(tiny: Tokenizer) -> None:
    tokens = super_block(tiny, PROSE)
    planted = [plant(tokens, FULL, "The code is 123.", tiny, seed).tokens.tobytes() for seed in range(12)]
    assert len(set(planted)) > 6
    assert hashlib.sha256(b"".join(planted)).hexdigest()[:16] == "8ba9e7fc3eb38631"


def test_what_cannot_be_planted_is_refused(tiny: Tokenizer) -> None:
    tokens, short = super_block(tiny, PROSE), FULL.copy()
    short[31] = 7
    with pytest.raises(InvalidWriteError, match="32 full blocks"):
        plant(tokens, short, "x", tiny, 1)
    with pytest.raises(InvalidWriteError, match=r"\(31, 32\)"):
        plant(tokens[:31], FULL[:31], "x", tiny, 1)
    holed = tokens.copy()
    holed[31, 31] = NO_TOKEN
    with pytest.raises(InvalidWriteError):
        plant(holed, FULL, "x", tiny, 1)
    with pytest.raises(ConfigError, match="empty"):
        plant(tokens, FULL, " \n", tiny, 1)


def test_only_full_super_blocks_are_plantable() -> None:
    counts = np.full(4 * 32 + 5, 32, np.uint8)
    counts[40] = 3
    counts[127] = 31
    assert plantable_super_blocks(counts).tolist() == [0, 2]
    assert [is_plantable(counts[i * 32 : (i + 1) * 32]) for i in range(5)] == [True, False, True, False, False]
    assert plantable_super_blocks(counts[:31]).tolist() == []


@given(st.data())
def test_places_are_distinct_ordered_by_depth_and_before_the_tail(data: st.DataObject) -> None:
    available = data.draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=50, unique=True))
    tail = data.draw(st.integers(min(available) + 1, 10_001)) * 32 + data.draw(st.integers(0, 31))
    allowed = sorted(place for place in available if (place + 1) * 32 <= tail)
    depths = data.draw(st.lists(st.floats(0, 1), max_size=len(allowed)))
    places = choose_places(available, depths, first_tail_block=tail).tolist()
    assert len(set(places)) == len(places) == len(depths)
    assert set(places) <= set(allowed)
    pairs = sorted(zip(depths, range(len(depths)), places, strict=True))
    assert [place for *_, place in pairs] == sorted(places)
    if len(depths) == 1:
        assert places == [allowed[min(int(depths[0] * len(allowed)), len(allowed) - 1)]]


def test_places_follow_depths_in_a_long_history() -> None:
    depths = np.linspace(0, 1, 50)
    places = choose_places(np.arange(9765), list(depths))
    assert np.abs(places / 9765 - depths).max() < 0.001
    assert (places[0], places[-1]) == (0, 9764)


def test_needles_that_crowd_move_aside() -> None:
    assert choose_places([5, 6, 7, 8], [1.0, 1.0, 0.99]).tolist() == [7, 8, 6]
    assert choose_places([5, 6, 7, 8], [0.0, 0.0, 0.0, 0.0]).tolist() == [5, 6, 7, 8]
    with pytest.raises(ConfigError, match="2 needles need a super-block each and 1 before"):
        choose_places([0, 1], [0.1, 0.2], first_tail_block=63)


def test_short_word_lists_fit_a_tokenizer_of_bytes(tiny: Tokenizer) -> None:
    for name, length in (("common_words", 100), ("frequent_words", 100)):
        (sample,) = TASKS[name](words_per_list=length, num_asked=1).samples(1, 1, num_needle_places=4)
        for needle in sample.needles:
            check(tiny, super_block(tiny, PROSE), needle.text, 1)


@pytest.mark.real_model
def test_every_task_can_be_planted_in_code_with_the_real_tokenizer() -> None:
    tokenizer = Tokenizer.load(BaseLMConfig(source="smollm2-135m"))
    ids = tokenizer.encode(Path(argparse.__file__).read_text())[: 12 * 1024].reshape(12, 32, 32)
    for name, task in TASKS.items():
        for sample in task().samples(5, 2, num_needle_places=12):
            places = choose_places(range(12), [needle.depth for needle in sample.needles])
            for needle, place in zip(sample.needles, places, strict=True):
                planted = plant(ids[place], FULL, needle.text, tokenizer, sample.sample_id)
                blocks = planted.tokens[planted.first_block : planted.stop_block]
                assert needle.text in tokenizer.decode(blocks.reshape(-1)), name
                if not name.endswith("_words") or name.count("_") > 1:
                    assert len(blocks) <= 4
