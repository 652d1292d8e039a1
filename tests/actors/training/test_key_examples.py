"""Facts stand where it is said that they stand, and pairs share what it is said that they share."""

from __future__ import annotations

import numpy as np
import pytest

from actors.tasks.paraphrases import CONCEPTS
from actors.training.key_examples import (
    DESCRIBED,
    LITERAL,
    QUESTION_TOKENS,
    RARE_NATS,
    KeyExamples,
    make_examples,
    token_surprisal,
)
from actors.training.key_facts import excluded_words, training_facts, validation_facts
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from models.tokenizer import Tokenizer
from storage.corpus.wordnet import Entry

WINDOW_TOKENS = 512


@pytest.fixture(scope="module")
def tokenizer(tiny_lm_config: BaseLMConfig) -> Tokenizer:
    return Tokenizer.load(tiny_lm_config)


ENTRIES = [Entry(f"{a}{b}ness", f"the quality of being {a} and {b}", (), 1) for a in "bcdf" for b in ("aro", "ilo")]


def examples_of(tokenizer: Tokenizer, num_facts: int = 8, seed: int = 0) -> tuple[KeyExamples, np.ndarray, list]:
    windows = np.random.default_rng(7).integers(10, tokenizer.vocab_size, (4, WINDOW_TOKENS))
    facts = training_facts(ENTRIES, tokenizer, num_facts, seed=3)
    surprisal = np.zeros(tokenizer.vocab_size, np.float32)
    made = make_examples(windows, facts, list(range(len(facts))), tokenizer, surprisal, (seed, 0))
    return made, windows, facts


def test_every_fact_stands_in_its_span_and_its_answer_holds_what_a_reader_needs(tokenizer: Tokenizer) -> None:
    made, _, facts = examples_of(tokenizer)
    blocks = made.windows.reshape(-1, K)

    def text(first: int, last: int) -> str:
        return tokenizer.decode(blocks[first : last + 1].reshape(-1))

    several = 0
    for number, fact in enumerate(facts):
        (first, last), (begin, end) = made.spans[2 * number], made.answers[2 * number]
        assert first <= begin <= end <= last
        assert fact.statement in text(first, last)
        assert fact.value in text(begin, end)
        assert fact.word in text(first, end)
        assert fact.word not in text(first, begin - 1)  # its last token is not before the answer
        both = [fact.value in text(first, middle) and fact.word in text(first, middle) for middle in range(begin, end)]
        assert not any(both)  # no block too many
        several += begin < end
    assert 0 < several < len(facts)


def test_windows_keep_their_length_and_their_text_around_facts(tokenizer: Tokenizer) -> None:
    made, windows, _ = examples_of(tokenizer)
    assert made.windows.shape == windows.shape
    for planted, before in zip(made.windows, windows, strict=True):
        kept = iter(planted.tolist())
        num_kept = WINDOW_TOKENS - 2 * QUESTION_TOKENS
        assert all(token in kept for token in before[:num_kept].tolist())  # in their order


def test_every_fact_is_asked_for_in_both_ways(tokenizer: Tokenizer) -> None:
    made, _, facts = examples_of(tokenizer)
    assert made.kinds.tolist() == [LITERAL, DESCRIBED] * len(facts)
    assert made.words.tolist() == [number for number in range(len(facts)) for _ in range(2)]
    for number, fact in enumerate(facts):
        literal, described = (tokenizer.decode(made.questions[2 * number + kind]) for kind in (LITERAL, DESCRIBED))
        assert fact.word in literal
        assert fact.word not in described
    assert all(len(question) <= QUESTION_TOKENS for question in made.questions)


def test_the_seed_decides(tokenizer: Tokenizer) -> None:
    first, again, other = (examples_of(tokenizer, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first.windows, again.windows)
    assert not np.array_equal(first.windows, other.windows)


def test_too_many_facts_for_a_window_are_refused(tokenizer: Tokenizer) -> None:
    facts = training_facts(ENTRIES, tokenizer, 8, seed=0)
    windows = np.full((1, 128), 20)
    with pytest.raises(ModelError, match="facts_per_window"):
        make_examples(windows, facts, range(8), tokenizer, np.zeros(tokenizer.vocab_size, np.float32), (0, 0))


def test_pairs_share_rare_tokens_and_are_no_neighbours(tokenizer: Tokenizer) -> None:
    counts = np.full(tokenizer.vocab_size, 10)
    counts[10:20] = 100_000
    windows = np.random.default_rng(0).integers(10, 20, (1, WINDOW_TOKENS))
    rare = [100, 101, 102]
    for block in (2, 3, 9):  # 3 is right behind 2
        windows[0, block * K + 5 : block * K + 8] = rare
    surprisal = token_surprisal(counts)
    assert surprisal[100] > RARE_NATS > surprisal[10]
    made = make_examples(windows, [], [], tokenizer, surprisal, (0, 0))
    assert made.pairs.tolist() == [[9, 2]]
    assert set(made.windows[0, 9 * K : 10 * K][~made.pair_own[0]]) >= set(rare)
    assert not set(made.windows[0, 9 * K : 10 * K][made.pair_own[0]]) & set(windows[0, 2 * K : 3 * K])


def test_what_is_measured_is_not_trained_on() -> None:
    validation = validation_facts(seed=0)
    assert [fact.word for fact in validation] == [word for word, _ in CONCEPTS] == excluded_words()
    for fact, (word, description) in zip(validation, CONCEPTS, strict=True):
        assert word in fact.statement
        assert word in fact.literal
        assert description in fact.described
        assert word not in fact.described
