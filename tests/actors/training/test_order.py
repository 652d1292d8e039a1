"""The reading order: every window once an epoch, the same for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.training.order import ReadingOrder, num_passes
from cluster.errors import ConfigError


def of_step(order: ReadingOrder, step: int, num_workers: int, per_pass: int) -> list[tuple[int, int]]:
    """(sample, window) pairs of all workers."""
    return [
        pair
        for rank in range(num_workers)
        for batch in order.micro_batches(step, rank, num_workers, per_pass)
        for pair in zip(batch.samples.tolist(), batch.windows.tolist(), strict=True)
    ]


@given(
    num_windows=st.integers(4, 40),
    seed=st.integers(0, 9),
    shape=st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]),
)
def test_every_window_is_read_once_an_epoch(num_windows: int, seed: int, shape: tuple[int, int]) -> None:
    order = ReadingOrder(num_windows, 4, seed)
    read = [pair for step in range(num_windows) for pair in of_step(order, step, *shape)]
    by_sample = dict(read)
    assert sorted(by_sample) == list(range(4 * num_windows))
    for epoch in range(4):
        windows = [by_sample[sample] for sample in range(epoch * num_windows, (epoch + 1) * num_windows)]
        assert sorted(windows) == list(range(num_windows))


def test_a_step_reads_the_same_whoever_shares_it() -> None:
    order = ReadingOrder(30, 8, 3)
    for step in range(6):
        alone = sorted(of_step(order, step, 1, 8))
        for shape in ((1, 2), (2, 2), (4, 1), (8, 1)):
            assert sorted(of_step(order, step, *shape)) == alone
            assert len(order.micro_batches(step, 0, *shape)) == num_passes(8, *shape) == 8 // (shape[0] * shape[1])


def test_seeds_and_epochs_are_other_orders() -> None:
    first, other = (ReadingOrder(100, 100, seed).micro_batches(0, 0, 1, 100)[0].windows for seed in (0, 1))
    second = ReadingOrder(100, 100, 0).micro_batches(1, 0, 1, 100)[0].windows
    assert (first != other).any()
    assert (first != second).any()
    np.testing.assert_array_equal(first, ReadingOrder(100, 100, 0).micro_batches(0, 0, 1, 100)[0].windows)


def test_what_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a multiple of num_workers \* windows_per_pass = 2 \* 3"):
        ReadingOrder(10, 8, 0).micro_batches(0, 0, 2, 3)
    with pytest.raises(ConfigError, match="has 3 windows and a step takes 4"):
        ReadingOrder(3, 4, 0)
