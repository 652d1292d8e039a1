"""After any sequence of edits and decoded tokens the next token is predicted as by one full pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FocusError
from models.base_lm import BaseLM
from models.decoding import focused_cache
from models.decoding.focused_cache import FocusedCache, Reuse
from models.positions import Positions

Rows = tuple[torch.Tensor, np.ndarray]


def full_logits(lm: BaseLM, rows: Rows) -> torch.Tensor:
    """Behind rows, in one pass without a cache."""
    with torch.inference_mode():
        at = Positions(torch.from_numpy(rows[1])[None])
        return lm.logits(rows[0][None], positions=at, last_only=True)[0, -1].float()


def assert_as_full(cache: FocusedCache, lm: BaseLM, rows: Rows, atol: float = 1e-3) -> None:
    expected = full_logits(lm, rows)
    found = cache.logits().float()
    assert torch.allclose(found, expected, atol=atol, rtol=0)
    token = int(expected.argmax())
    nll = float(expected.double().logsumexp(-1) - expected[token])
    assert cache.nll_of_next(token) == pytest.approx(nll, abs=1e-5)


def rows_of(lm: BaseLM, ids: list[int], places: np.ndarray | None = None) -> Rows:
    with torch.inference_mode():
        embeds = lm.embed(torch.tensor([ids], dtype=torch.int64, device=lm.device))[0]
    return embeds, 2 * np.arange(len(ids)) if places is None else places


def next_place(rows: Rows) -> int:
    return int(rows[1][-1]) + 2 if len(rows[1]) else 0


def refocus(cache: FocusedCache, rows: Rows) -> Reuse:
    return cache.refocus(*rows, next_place(rows))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), st.integers(1, 6)),
        st.tuples(st.sampled_from(["change", "insert", "remove", "move"]), st.floats(0, 1)),
    ),
    min_size=1,
    max_size=8,
)


@given(STEPS, st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_any_edits_give_what_a_full_pass_gives(tiny_lm: BaseLM, steps, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tiny_lm.vocab_size, size).tolist()
    places = 2 * np.arange(size)
    cache = FocusedCache(tiny_lm)
    refocus(cache, rows_of(tiny_lm, ids, places))
    for kind, how in steps:
        if kind == "decode":
            new = rng.integers(0, tiny_lm.vocab_size, how)
            cache.append(new)
            ids += new.tolist()
            places = np.append(places, places[-1] + 2 + 2 * np.arange(how))
        else:
            at = min(int(how * len(ids)), len(ids) - 1)
            if kind == "change":
                ids[at] = int(rng.integers(0, tiny_lm.vocab_size))
            elif kind == "insert":
                ids.insert(at, int(rng.integers(0, tiny_lm.vocab_size)))
                places = np.append(places, places[-1] + 2)
            elif kind == "remove" and len(ids) > 1:
                del ids[at]
                places = places[:-1]
            elif kind == "move":
                places = places.copy()
                places[at:] += 2
            refocus(cache, rows_of(tiny_lm, ids, places))
        assert cache.num_rows == len(ids)
        assert_as_full(cache, tiny_lm, rows_of(tiny_lm, ids, places))


@pytest.fixture
def ids() -> list[int]:
    return np.random.default_rng(1).integers(0, 250, 24).tolist()


def test_an_edit_invalidates_what_stands_behind_it_and_nothing_before(tiny_lm: BaseLM, ids: list[int]) -> None:
    cache = FocusedCache(tiny_lm)
    assert refocus(cache, rows_of(tiny_lm, ids)) == Reuse(0, 24)
    edited = [*ids[:17], (ids[17] + 1) % 250, *ids[18:]]
    assert refocus(cache, rows_of(tiny_lm, edited)) == Reuse(17, 7)
    assert refocus(cache, rows_of(tiny_lm, edited)) == Reuse(24, 0)


def test_decoded_tokens_that_stay_are_not_read_again(tiny_lm: BaseLM, ids: list[int]) -> None:
    cache = FocusedCache(tiny_lm)
    refocus(cache, rows_of(tiny_lm, ids[:10]))
    cache.append(np.array(ids[10:20]))
    assert refocus(cache, rows_of(tiny_lm, ids)) == Reuse(20, 4)


def test_fewer_rows_end_with_what_follows_the_last_of_them(tiny_lm: BaseLM, ids: list[int]) -> None:
    cache = FocusedCache(tiny_lm)
    refocus(cache, rows_of(tiny_lm, ids))
    assert refocus(cache, rows_of(tiny_lm, ids[:9])) == Reuse(8, 1)
    assert_as_full(cache, tiny_lm, rows_of(tiny_lm, ids[:9]))


def test_long_contexts_are_read_in_pieces(tiny_lm: BaseLM, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(focused_cache, "PIECE_ROWS", 7)
    cache = FocusedCache(tiny_lm)
    refocus(cache, rows_of(tiny_lm, ids))
    assert_as_full(cache, tiny_lm, rows_of(tiny_lm, ids))


def test_nothing_to_read_is_refused(tiny_lm: BaseLM, ids: list[int]) -> None:
    cache = FocusedCache(tiny_lm)
    with pytest.raises(FocusError, match="nothing has been read"):
        cache.logits()
    with pytest.raises(FocusError, match="at least one"):
        refocus(cache, rows_of(tiny_lm, []))
    with pytest.raises(FocusError, match="3 rows at 2 places"):
        cache.refocus(rows_of(tiny_lm, ids[:3])[0], np.array([0, 2]), 4)
    with pytest.raises(FocusError, match="at least one token"):
        cache.append(np.empty(0, np.int64))


@pytest.mark.real_model
def test_the_real_model_after_edits(real_lm: BaseLM) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, real_lm.vocab_size, 96).tolist()
    cache = FocusedCache(real_lm)
    refocus(cache, rows_of(real_lm, ids))
    for at in (90, 40, 64):
        ids[at] = int(rng.integers(0, real_lm.vocab_size))
        assert refocus(cache, rows_of(real_lm, ids)) == Reuse(at, len(ids) - at)
        new = rng.integers(0, real_lm.vocab_size, 5)
        for token in new:
            cache.append(np.array([token]))
        ids += new.tolist()
        assert_as_full(cache, real_lm, rows_of(real_lm, ids))
