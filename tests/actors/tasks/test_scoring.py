from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.tasks import Needle, TaskSample, choose_candidate, exact_match, infeasible, items_found, normalise
from cluster.errors import ModelError


@pytest.mark.parametrize(
    ("generated", "answer", "matches"),
    [
        (" 48213.", "48213", True),
        (" 48213\nQuestion: what", "48213", True),
        (" 482134", "48213", False),
        (" the 48213", "48213", False),
        (" Kitchen, where", "kitchen", True),
        (" kitchenette", "kitchen", False),
        ("VOFANU,  sogino , and", "VOFANU, SOGINO", True),
        ("SOGINO, VOFANU", "VOFANU, SOGINO", False),
        (" b77057f2-d5c8-4c49-ad1c-bf81ee9d72c0.", "b77057f2-d5c8-4c49-ad1c-bf81ee9d72c0", True),
        (" b77057f2 d5c8 4c49 ad1c bf81ee9d72c0.", "b77057f2-d5c8-4c49-ad1c-bf81ee9d72c0", False),
        (" “Cotton”!", "cotton", True),
        ("", "cotton", False),
        ("１２３", "123", True),
    ],
)
def test_exact_match(generated: str, answer: str, matches: bool) -> None:
    assert exact_match(generated, answer) is matches


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_items_found() -> None:
    assert items_found("They are 12, 34 and 56.", "12, 34, 56") == 1
    assert items_found("12 345", "12, 34") == 0.5
    assert items_found("", "12, 34") == 0


def test_the_most_likely_candidate_is_chosen() -> None:
    log_probs = np.array([-6.0, -5.0, -9.0, -5.0])
    assert choose_candidate(log_probs) == 1
    assert choose_candidate(log_probs, np.array([3, 2, 9, 2]), length_normalised=True) == 2
    assert choose_candidate(np.array([-np.inf, -3.0])) == 1
    with pytest.raises(ModelError, match="NaN"):
        choose_candidate(np.array([-1.0, np.nan]))
    with pytest.raises(ModelError, match="number of tokens"):
        choose_candidate(log_probs, length_normalised=True)


def test_more_needles_than_the_budget_shows_are_infeasible() -> None:
    needles = tuple(Needle(str(i), i / 4, i < 3) for i in range(4))
    sample = TaskSample("t", "id", needles, "?", "a", ("a", "b"))
    assert not infeasible(sample, 3, 3)
    assert infeasible(sample, 4, 3)
    # Three needles never fit two blocks, whatever was counted.
    assert infeasible(sample, 2, 2)
