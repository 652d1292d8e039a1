from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from matplotlib.image import imread

from cluster.plots import figure


def test_a_figure_is_saved_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    with figure(tmp_path / "one.png", "A title", size=(4, 2)) as axes:
        axes.plot([0, 1], [1, 3], label="x")
        axes.legend()
    with figure(tmp_path / "two.png", num_columns=2) as (left, right):
        left.plot([0, 1])
        right.plot([1, 0])
    assert imread(tmp_path / "one.png").shape == (240, 480, 4)
    assert imread(tmp_path / "one.png").min() < 0.5, "something is drawn"
    assert (tmp_path / "two.png").exists()
    assert dict(matplotlib.rcParams) == before


def test_nothing_is_saved_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), figure(tmp_path / "one.png"):
        raise ValueError("x")
    assert not (tmp_path / "one.png").exists()
