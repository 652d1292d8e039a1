"""Vectors of blocks: those of their text, each made once, shared between trees that differ in some blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.errors import FocusError
from models.focus import block_embeddings
from models.focus.block_embeddings import BlockEmbeddings, TextEncoder
from models.sentence_encoder import VECTOR_DIM, SentenceEncoder
from models.tokenizer import Tokenizer
from storage.contract import DocumentMeta, SpanWrite, TreeReader
from storage.geometry import NO_TOKEN
from storage.memory_tree import MemoryTree
from storage.schema import GISTS, ArraySpec, Encoding

SENTENCES = [
    "The cat sat on the mat.",
    "Interest rates rose again.",
    "Bread needs flour and yeast.",
    "The sun is a star.",
    "He plays chess every Sunday.",
    "Trains to Rome leave at noon.",
]
TOLERANCE = 1e-5

Decode = Callable[[Sequence[np.ndarray]], list[str]]


def tree_of(blocks: Sequence[str]) -> TreeReader:
    """A block a text, each a document of its own: at most 32 ASCII characters, a byte a token."""
    tree = MemoryTree(Encoding("net", "digest", "float32", (ArraySpec(GISTS, 1, 1, "float32"),)))
    for number, text in enumerate(blocks):
        slots = np.full((1, K), NO_TOKEN, np.uint32)
        slots[0, : len(text)] = np.frombuffer(text.encode("ascii"), np.uint8)
        counts = np.array([len(text)], np.uint8)
        meta = DocumentMeta(f"doc{number}", f"file:///doc{number}")
        tree.append([SpanWrite(meta, 0, slots, counts, {GISTS: np.zeros((1, 1), np.float32)}, last=True)])
    return tree.reader()


class CountingEncoder:
    """Remembers the texts it hands on."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.texts: list[str] = []
        self._encoder = encoder

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return self._encoder.encode(texts)


class NumberEncoder:
    """Vectors that say which text they are of, where the meaning does not matter."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([np.full(VECTOR_DIM, float(text), np.float32) for text in texts]).reshape(-1, VECTOR_DIM)


@pytest.fixture(scope="module")
def decode(tiny_config: BaseLMConfig) -> Decode:
    return Tokenizer.load(tiny_config).decode_batch


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_embeddings, "CHUNK_BLOCKS", 2)


@pytest.mark.real_model
@pytest.mark.usefixtures("small_chunks")
def test_blocks_are_encoded_once_from_their_own_text(sentence_encoder: SentenceEncoder, decode: Decode) -> None:
    encoder = CountingEncoder(sentence_encoder)
    embeddings = BlockEmbeddings(encoder, decode, tree_of(SENTENCES))
    assert encoder.texts == []
    expected = sentence_encoder.encode(SENTENCES)
    for first, stop in ((1, 4), (0, 6), (2, 2), (3, 6)):
        np.testing.assert_allclose(embeddings.vectors(first, stop), expected[first:stop], atol=TOLERANCE)
    assert sorted(encoder.texts) == sorted(SENTENCES)


@pytest.mark.real_model
@pytest.mark.usefixtures("small_chunks")
def test_scores_are_cosines_and_find_the_meaning(sentence_encoder: SentenceEncoder, decode: Decode) -> None:
    embeddings = BlockEmbeddings(sentence_encoder, decode, tree_of(SENTENCES))
    query = "When can I travel to Italy by rail?"
    scores = embeddings.scores(query, 1, 6)
    assert scores.dtype == np.float32
    assert 1 + scores.argmax() == 5
    expected = sentence_encoder.encode(SENTENCES[1:]) @ sentence_encoder.encode([query])[0]
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)
    assert embeddings.scores(query, 3, 3).shape == (0,)


@pytest.mark.real_model
def test_over_encodes_the_changed_blocks_only(sentence_encoder: SentenceEncoder, decode: Decode) -> None:
    encoder = CountingEncoder(sentence_encoder)
    embeddings = BlockEmbeddings(encoder, decode, tree_of(SENTENCES))
    before = embeddings.vectors(0, 3)
    changed = SENTENCES.copy()
    changed[1], changed[4] = "A dog barks at night.", "Rivers run to the sea."
    other = embeddings.over(tree_of(changed), np.array([4, 1]))
    encoder.texts.clear()
    np.testing.assert_allclose(other.vectors(0, 6), sentence_encoder.encode(changed), atol=TOLERANCE)
    assert sorted(encoder.texts) == sorted([changed[1], *changed[3:]])
    encoder.texts.clear()
    after = embeddings.vectors(0, 6)
    assert encoder.texts == [SENTENCES[4]], "what the other made of unchanged blocks is shared"
    assert np.array_equal(after[:3], before)


@pytest.mark.usefixtures("small_chunks")
def test_any_chain_of_changes_reads_as_its_own_tree_and_makes_nothing_twice(decode: Decode) -> None:
    @settings(max_examples=50, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        encoder = CountingEncoder(NumberEncoder())
        texts = [str(number) for number in range(9)]
        made = [(texts, BlockEmbeddings(encoder, decode, tree_of(texts)))]
        for layer in range(1, data.draw(st.integers(1, 3)) + 1):
            below, embeddings = data.draw(st.sampled_from(made))
            changed = data.draw(st.sets(st.integers(0, 8)))
            texts = [str(100 * layer + n) if n in changed else text for n, text in enumerate(below)]
            made.append((texts, embeddings.over(tree_of(texts), np.array(sorted(changed)))))
        for _ in range(6):
            texts, embeddings = data.draw(st.sampled_from(made))
            first = data.draw(st.integers(0, 9))
            stop = data.draw(st.integers(first, 9))
            assert [str(int(vector[0])) for vector in embeddings.vectors(first, stop)] == texts[first:stop]
        assert max(Counter(encoder.texts).values(), default=1) == 1

    check()


def test_blocks_outside_and_other_trees_are_refused(decode: Decode) -> None:
    embeddings = BlockEmbeddings(NumberEncoder(), decode, tree_of(["1", "2"]))
    with pytest.raises(FocusError, match="blocks 1-3 are outside a version of 2 blocks"):
        embeddings.vectors(1, 3)
    with pytest.raises(FocusError, match="outside"):
        embeddings.scores("1", -1, 1)
    with pytest.raises(FocusError, match="2 blocks do not fit a tree of 1"):
        embeddings.over(tree_of(["1"]), np.array([0]))
