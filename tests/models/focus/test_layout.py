"""Position policies: true where they promise it, ordered everywhere, within the trained range if they promise that."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import FocusError
from models.focus.layout import NEAR_TOKENS, POLICIES, compressed_distance, lay_out, policy_for


@pytest.mark.parametrize("policy", POLICIES)
def test_raw_contiguous_tokens_stand_one_after_the_other(policy) -> None:
    layout = lay_out(policy, 2 * np.arange(1000, dtype=np.int64), 1000)
    np.testing.assert_array_equal(np.diff(layout.half_tokens), 2)
    assert layout.next_half_token - layout.half_tokens[-1] == 2


def test_compact_gives_every_row_one_place() -> None:
    layout = lay_out("compact", np.array([31, 95, 2000, 2002], np.int64), 1002)
    assert layout.half_tokens.tolist() == [0, 2, 4, 6]
    assert layout.next_half_token == 8


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 64)), min_size=1, max_size=30), st.integers(0, 100))
def test_anchored_keeps_runs_whole_and_in_order_within_the_trained_range(runs, beyond: int) -> None:
    tokens = np.unique(np.concatenate([start + np.arange(length) for start, length in runs]))
    half = 2 * tokens.astype(np.int64)
    num_tokens = int(tokens[-1]) + 1 + beyond
    layout = lay_out("anchored", half, num_tokens)
    inside = np.diff(half) == 2
    np.testing.assert_array_equal(np.diff(layout.half_tokens)[inside], 2)
    newest = layout.half_tokens[np.append(~inside, True)]
    assert (np.diff(newest) >= 0).all()
    assert (layout.next_half_token - layout.half_tokens.min()) / 2 < 8192 - 1024 + len(tokens)
    near = half / 2 >= num_tokens - NEAR_TOKENS
    np.testing.assert_allclose(layout.next_half_token - layout.half_tokens[near], 2 * num_tokens - half[near], atol=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_raw_window_stands_as_the_stock_model_has_it(policy) -> None:
    layout = lay_out(policy, 2 * np.arange(6000, dtype=np.int64), 6000)
    np.testing.assert_array_equal(np.diff(layout.half_tokens), 2)
    assert layout.next_half_token - layout.half_tokens[-1] == 2


def test_an_anchor_stays_while_tokens_come() -> None:
    half = 2 * np.concatenate([np.arange(0, 4900, 7), np.arange(4950, 5000)]).astype(np.int64)
    before = lay_out("anchored", half, 5000)
    grown = np.concatenate([half, 2 * np.arange(5000, 5040)])
    after = lay_out("anchored", grown, 5040, anchor=5000)
    np.testing.assert_array_equal(after.half_tokens[: len(half)], before.half_tokens)
    assert after.half_tokens[len(half)] == before.next_half_token
    np.testing.assert_array_equal(np.diff(after.half_tokens[len(half) :]), 2)


def test_compression_is_smooth_where_it_begins() -> None:
    distance = compressed_distance(np.array([NEAR_TOKENS - 1.0, NEAR_TOKENS, NEAR_TOKENS + 1.0]))
    np.testing.assert_allclose(np.diff(distance), 1.0, rtol=2e-3)


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, "global"), (2048, "global"), (2049, "compact")])
def test_the_policy_of_a_length_is_global_as_far_as_the_model_was_trained(num_tokens: int, expected: str) -> None:
    assert policy_for(num_tokens, 2048) == expected


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(FocusError, match="global, compact, anchored"):
        lay_out("gaussian", np.zeros(1, np.int64), 1)  # type: ignore[arg-type]
