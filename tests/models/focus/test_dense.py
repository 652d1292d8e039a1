"""Dense scores against a plain loop, and keys of real nets that are found by the states of their own text."""

from __future__ import annotations

import argparse
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistNetConfig
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.focus import dense
from models.focus.dense import KeyIndex, KeySpace, Match, dense_scores, query_states
from models.gistnet import GistNet, build_gistnet
from models.model_files import resolve_model
from models.tokenizer import Tokenizer
from models.training.key_contrast import with_key_head
from models.window_encoder import WindowEncoder
from storage.contract import DocumentMeta, SpanWrite, TreeReader
from storage.memory_tree import MemoryTree
from storage.schema import KEYS, ArraySpec, Encoding
from tests.models.gistnet.nets import KINDS, perturb

MATCHES: tuple[Match, ...] = ("pooled", "max_sim")


def unit(vector: np.ndarray) -> np.ndarray:
    length = math.sqrt(float(np.dot(vector, vector)))
    return vector / length if length > 0 else vector


def looped(
    keys: np.ndarray, query: np.ndarray, match: Match, centre: np.ndarray | None, whitening: np.ndarray | None
) -> list[float]:
    """The definition, one pair of vectors at a time, in float64."""

    def placed(vector: np.ndarray) -> np.ndarray:
        moved = vector if centre is None else vector - centre.astype(np.float64)
        return moved if whitening is None else moved @ whitening.astype(np.float64)

    tokens = query.astype(np.float64)
    rows = [tokens.mean(axis=0)] if match == "pooled" else list(tokens)
    scores = []
    for key in keys.astype(np.float64):
        cosines = [float(np.dot(unit(placed(key)), unit(placed(unit(row))))) for row in rows]
        scores.append(max(cosines))
    return scores


def sticky_keys(num_keys: int, dim: int, seed: int) -> np.ndarray:
    """Keys of length 1 around a large common direction, as an LM's states are."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((num_keys, dim)) * np.linspace(0.2, 2, dim) + 6 * np.eye(dim)[0]
    return (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)


def tree_of(keys: np.ndarray) -> TreeReader:
    """A tree of empty-worded blocks that hold these keys."""
    tree = MemoryTree(Encoding("net", "digest", "float32", (ArraySpec(KEYS, keys.shape[1], 1, "float32"),)))
    slots, counts = np.zeros((len(keys), K), np.uint32), np.full(len(keys), K, np.uint8)
    tree.append([SpanWrite(DocumentMeta("a", "a"), 0, slots, counts, {KEYS: torch.from_numpy(keys)}, last=True)])
    return tree.reader()


@given(
    num_keys=st.integers(0, 40),
    num_query=st.integers(1, 9),
    dim=st.integers(2, 12),
    match=st.sampled_from(MATCHES),
    space=st.sampled_from(["plain", "centre", "whitening", "both"]),
    chunk=st.sampled_from([1, 3, 7, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_scores_are_the_cosines_of_the_definition(
    num_keys: int, num_query: int, dim: int, match: Match, space: str, chunk: int, seed: int
) -> None:
    keys = sticky_keys(num_keys, dim, seed)
    rng = np.random.default_rng(seed + 1)
    query = (3 * rng.standard_normal((num_query, dim))).astype(np.float32)
    centre = keys.mean(axis=0) if space in {"centre", "both"} and num_keys else None
    whitening = rng.standard_normal((dim, dim)).astype(np.float32) if space in {"whitening", "both"} else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "CHUNK_KEYS", chunk)
        found = dense_scores(keys, torch.from_numpy(query), match, centre, whitening)
    assert found.dtype == np.float32
    assert found.shape == (num_keys,)
    # With one key the centre is the key itself, and what is left of it is rounding.
    if num_keys != 1 or centre is None:
        np.testing.assert_allclose(found, looped(keys, query, match, centre, whitening), atol=2e-4)


def test_a_key_at_the_centre_scores_nothing() -> None:
    keys = sticky_keys(3, 8, 0)
    scores = dense_scores(keys, sticky_keys(2, 8, 1), "pooled", keys[1])
    assert scores[1] == 0
    assert np.abs(scores[[0, 2]]).min() > 0


@pytest.mark.parametrize("match", MATCHES)
def test_chunks_and_the_stored_dtype_change_nothing(match: Match, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query = sticky_keys(1000, 48, 0), sticky_keys(20, 48, 1)
    space = KeySpace.of(keys)
    whole = dense_scores(keys, query, match, space.centre, space.whitening)
    half = torch.from_numpy(keys).half()
    rounded = dense_scores(half.float(), query, match, space.centre, space.whitening)
    for chunk in (1, 333, 999, 4096):
        monkeypatch.setattr(dense, "CHUNK_KEYS", chunk)
        # A product of another shape may round differently in its last bit.
        np.testing.assert_allclose(dense_scores(keys, query, match, space.centre, space.whitening), whole, atol=2e-6)
        np.testing.assert_allclose(dense_scores(half, query, match, space.centre, space.whitening), rounded, atol=2e-6)


def test_a_whitened_space_is_round() -> None:
    keys = sticky_keys(4000, 12, 0)
    placed = KeySpace.of(keys, ridge=0.0).place(torch.from_numpy(keys)).double()
    np.testing.assert_allclose(placed.mean(dim=0), np.zeros(12), atol=1e-4)
    np.testing.assert_allclose(placed.T @ placed / len(keys), np.eye(12), atol=1e-3)
    centred = KeySpace.of(keys, whiten=False)
    assert centred.whitening is None
    np.testing.assert_allclose(centred.centre, keys.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("num_keys", [0, 1, 5])
def test_keys_that_do_not_differ_make_a_space_too(num_keys: int) -> None:
    keys = np.repeat(sticky_keys(1, 6, 0), num_keys, axis=0)
    space = KeySpace.of(keys)
    assert space.whitening is None
    np.testing.assert_allclose(space.centre, keys[0] if num_keys else np.zeros(6), atol=1e-7)
    scores = dense_scores(keys, sticky_keys(2, 6, 1), "pooled", space.centre, space.whitening)
    np.testing.assert_array_equal(scores, np.zeros(num_keys))


def test_whitening_finds_what_a_common_direction_hides() -> None:
    """A query that shares a small component with one key, under large ones that all share."""
    rng = np.random.default_rng(0)
    found = {"plain": 0, "whitened": 0}
    keys = sticky_keys(500, 64, 3)
    space = KeySpace.of(keys)
    loud = rng.standard_normal((50, 4))
    for place in range(50):
        query = keys[place].copy()
        query[60:] += 0.6 * loud[place]  # the dimensions that vary most say nothing here
        query[0] += 0.5
        found["plain"] += int(dense_scores(keys, query[None], "pooled").argmax() == place)
        whitened = dense_scores(keys, query[None], "pooled", space.centre, space.whitening)
        found["whitened"] += int(whitened.argmax() == place)
    assert found["whitened"] > found["plain"]
    assert found["whitened"] >= 45


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("whiten", [False, True])
def test_an_index_scores_as_the_function_does(match: Match, whiten: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CHUNK_KEYS", 64)
    keys, query = sticky_keys(300, 16, 0), sticky_keys(5, 16, 1)
    reader = tree_of(keys)
    space = KeySpace.of_tree(reader, array=KEYS, whiten=whiten)
    index = KeyIndex(reader, space, array=KEYS)
    np.testing.assert_allclose(
        index.scores(query, match), dense_scores(keys, query, match, space.centre, space.whitening), atol=2e-6
    )
    part = KeyIndex(reader, space, 50, 200, array=KEYS)
    np.testing.assert_allclose(part.scores(query, match), index.scores(query, match)[50:200], atol=2e-6)
    early = KeyIndex(reader, space, 0, 100, array=KEYS).grown(reader)
    np.testing.assert_array_equal(early.scores(query, match), index.scores(query, match))
    empty = KeyIndex(reader, space, 7, 7, array=KEYS)
    assert empty.scores(query, match).shape == (0,)

    changed = keys.copy()
    changed[[10, 60, 250]] = sticky_keys(3, 16, 2)
    over = part.over(tree_of(changed), np.array([10, 60, 250]))
    wanted = dense_scores(changed, query, match, space.centre, space.whitening)[50:200]
    np.testing.assert_allclose(over.scores(query, match), wanted, atol=2e-6)
    # The index it came from still stands for its own reader.
    np.testing.assert_allclose(part.scores(query, match), index.scores(query, match)[50:200], atol=2e-6)


def test_a_space_of_a_long_history_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = sticky_keys(2000, 8, 0)
    reader = tree_of(keys)
    whole = KeySpace.of_tree(reader, array=KEYS)
    monkeypatch.setattr(dense, "SAMPLE_KEYS", 500)
    sampled, again = (KeySpace.of_tree(reader, array=KEYS) for _ in range(2))
    assert torch.equal(sampled.centre, again.centre)
    assert not torch.equal(sampled.centre, whole.centre)
    np.testing.assert_allclose(sampled.centre, whole.centre, atol=0.05)
    part = KeySpace.of_tree(reader, 100, 300, array=KEYS)
    np.testing.assert_allclose(part.centre, keys[100:300].mean(axis=0), atol=1e-6)


def net_of(kind: str, lm: BaseLMConfig, key_layer: int = 2, key_dim: int = 0) -> GistNet:
    """An untrained net with its means moved, so that leaving them out would show."""
    config = GistNetConfig(kind=kind, lm_layers=2, key_layer=key_layer, key_dim=key_dim)  # type: ignore[arg-type]
    net = perturb(build_gistnet(config, resolve_model(lm)), 0.05)
    if net.key_head is not None:  # trained, the two differ
        net.key_head.question.data.copy_(net.key_head.query)
    return net


def test_the_net_says_where_its_keys_are_compared(tiny_lm_config: BaseLMConfig) -> None:
    net = net_of("windowed", tiny_lm_config, key_dim=16)
    keys = sticky_keys(300, 16, 0)
    reader = tree_of(keys)
    whitened = KeySpace.of_net(net, reader, array=KEYS)
    assert torch.equal(whitened.place(torch.eye(16)), KeySpace.of_tree(reader, array=KEYS).place(torch.eye(16)))
    trained = KeySpace.of_net(with_key_head(net, 16, None), reader, array=KEYS)
    assert torch.equal(trained.place(torch.eye(16)), torch.eye(16))


@pytest.fixture(scope="module")
def lm(tiny_lm_config: BaseLMConfig) -> BaseLM:
    return BaseLM.load(tiny_lm_config, num_layers=2)


def words(num_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_tokens).astype(np.uint32)


@pytest.mark.parametrize(
    ("kind", "key_layer", "key_dim"),
    [*((kind, 2, 0) for kind in KINDS), ("windowed", 1, 0), ("windowed", 1, 16), ("block", 2, 16)],
)
def test_states_are_what_keys_are_means_of(
    kind: str, key_layer: int, key_dim: int, tiny_lm_config: BaseLMConfig, lm: BaseLM
) -> None:
    net = net_of(kind, tiny_lm_config, key_layer, key_dim)
    assert net.key_layer == (key_layer if kind == "windowed" else None)
    text = words(150, 0)
    keys = WindowEncoder(lm, net).encode_windows([text])[0].keys
    states = query_states(lm, net, text)
    assert states.shape == (150, key_dim or lm.hidden_size)
    assert states.dtype == torch.float32
    for block, key in enumerate(keys):
        # What tokens weigh is relative to the others that are asked for; a block's key is of that block's alone.
        upto = text[: (block + 1) * K]
        mine = query_states(lm, net, upto, len(upto) - block * K).mean(dim=0).numpy()
        np.testing.assert_allclose(unit(mine), key, atol=1e-5)
    # The last tokens of a longer text keep what they know of those before.
    last = query_states(lm, net, text, 20)
    assert torch.allclose(normalize(last, dim=-1), normalize(states[-20:], dim=-1), atol=1e-5)
    if not key_dim:
        assert torch.equal(last, states[-20:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_passage_that_is_read_again_is_found(kind: str, tiny_lm_config: BaseLMConfig, lm: BaseLM) -> None:
    net = net_of(kind, tiny_lm_config)
    text = words(1024, 0)
    keys = WindowEncoder(lm, net).encode_windows([text])[0].keys
    space = KeySpace.of(keys)
    for block in (0, 3, 17, 31):
        query = query_states(lm, net, text[: (block + 1) * K], K)
        scores = dense_scores(keys, query, "pooled", space.centre, space.whitening)
        assert int(scores.argmax()) == block
        assert scores[block] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"windowed"}))
def test_a_planted_pair_is_found(kind: str, match: Match, tiny_lm_config: BaseLMConfig, lm: BaseLM) -> None:
    """Blocks of a vocabulary each; a query in other company, of other words of one vocabulary.

    Not for the windowed net: a state of the random model says where a token stands more than which it is.
    """
    net = net_of(kind, tiny_lm_config)
    rng = np.random.default_rng(0)
    vocabularies = rng.permutation(256).reshape(32, 8)
    text = np.concatenate([rng.choice(vocabulary, K) for vocabulary in vocabularies]).astype(np.uint32)
    keys = WindowEncoder(lm, net).encode_windows([text])[0].keys
    space = KeySpace.of(keys)
    for block in (3, 17, 30):
        tail = np.concatenate([words(64, block), rng.choice(vocabularies[block], 16)]).astype(np.uint32)
        query = query_states(lm, net, tail, 16)
        scores = dense_scores(keys, query, match, space.centre, space.whitening)
        assert int(scores.argmax()) == block


@pytest.mark.real_model
def test_facts_are_found_in_real_text() -> None:
    """Eight lookalike facts in 4,096 tokens of source code, asked for in other words, out of 128 blocks."""
    config = BaseLMConfig(source="smollm2-135m", dtype="float32", device="cpu")
    net = build_gistnet(GistNetConfig(kind="windowed", lm_layers=4), resolve_model(config))
    real_lm, tokenizer = BaseLM.load(config, num_layers=4), Tokenizer.load(config)
    code = tokenizer.encode(inspect.getsource(argparse))
    names = ["red harbour", "old engine", "quiet garden", "broken bridge"]
    names += ["golden tower", "hidden market", "tall lantern", "iron clock"]
    history = code[: 4 * 1024].copy()
    blocks = [5, 20, 37, 54, 70, 86, 103, 121]
    for number, (name, block) in enumerate(zip(names, blocks, strict=True)):
        fact = tokenizer.encode(f"\n# Note: the access code of the {name} is {40_417 + 1_229 * number}.\n")
        history[block * K : block * K + len(fact)] = fact
        assert len(fact) <= K
    keys = np.concatenate([e.keys for e in WindowEncoder(real_lm, net).encode_windows(history.reshape(4, -1))])  # type: ignore[arg-type]
    spaces = {"plain": KeySpace(torch.zeros(net.dim)), "whitened": KeySpace.of(keys)}
    ranks = {name: [] for name in spaces}
    for name, block in zip(names, blocks, strict=True):
        question = tokenizer.encode(f"\n# What is the code of the {name}? The code of the {name} is")
        query = query_states(real_lm, net, np.concatenate([code[-100:], question]), 16)
        for kind, space in spaces.items():
            scores = dense_scores(keys, query, "pooled", space.centre, space.whitening)
            ranks[kind].append(int((scores > scores[block]).sum()))
    first = {kind: sum(rank == 0 for rank in found) for kind, found in ranks.items()}
    assert first["whitened"] >= 6, ranks
    assert first["whitened"] > first["plain"], ranks


def test_what_cannot_be_compared_is_refused(tiny_lm_config: BaseLMConfig, lm: BaseLM) -> None:
    keys, query = sticky_keys(4, 8, 0), sticky_keys(2, 8, 1)
    with pytest.raises(ModelError, match="5 dimensions cannot be compared with others of 8"):
        dense_scores(keys, query[:, :5], "pooled")
    with pytest.raises(ModelError, match="dimensions"):
        dense_scores(keys, query, "pooled", np.zeros(6, np.float32))
    with pytest.raises(ModelError, match="dimensions"):
        KeyIndex(tree_of(keys), KeySpace(torch.zeros(6)), array=KEYS)
    with pytest.raises(ModelError, match="at least one token"):
        dense_scores(keys, query[:0], "max_sim")
    with pytest.raises(ModelError, match="no match 'sum'"):
        dense_scores(keys, query, "sum")  # type: ignore[arg-type]
    net = net_of("windowed", tiny_lm_config)
    for size in (0, 1025):
        with pytest.raises(ModelError, match="1 to 1024"):
            query_states(lm, net, words(size, 0))
    for num_query in (0, 11):
        with pytest.raises(ModelError, match="cannot be the query"):
            query_states(lm, net, words(10, 0), num_query)
