"""Samples survive a torn write; summaries are those computed by hand, whatever the order samples came in."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.results import FocusResults, SampleFile

Sample = tuple[Place, list[Measured]]

NLL = {
    # condition: nats on the choosing and on the scoring half at four places of documents a, a, b, c.
    "none": ([5, 5, 5, 5], [5, 5, 5, 5]),
    "full": ([1, 2, 3, 4], [2, 2, 2, 2]),
    "recency/raw": ([3, 3, 3, 4], [4, 4, 4, 2]),
    "bm25/raw": ([2, 3, 3, 3], [3, 4, 4, 2]),
    "oracle/raw": ([1, 1, 1, 1], [2, 2, 4, 2]),
}
URIS = ["a", "a", "b", "c"]


def samples(budget: int = 256) -> list[Sample]:
    found: list[Sample] = []
    for number, uri in enumerate(URIS):
        measured = [
            Measured(
                name, budget if "/" in name else 0, 100 + number, choosing[number], scoring[number], [number], 0.5, 0.25
            )
            for name, (choosing, scoring) in NLL.items()
        ]
        found.append((Place(number, uri, 10 * number, 10 * number + 8), measured))
    return found


@pytest.fixture
def results() -> FocusResults:
    return FocusResults.of(samples())


# -- the file ------------------------------------------------------------------------------------------------------


def test_samples_are_read_again_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    place, measured = samples()[0]
    odd = Place(7, "file:///ö\u2028\x0c\n.txt", 0, 3)
    with SampleFile(path) as file:
        file.append(place, measured)
        file.append(odd, [])
    with SampleFile(path) as file:
        assert file.samples == [(place, measured), (odd, [])]


@pytest.mark.parametrize("left", [1, 30, -1])
def test_a_torn_line_is_dropped_and_the_rest_goes_on(tmp_path: Path, left: int) -> None:
    path = tmp_path / "samples.jsonl"
    first, second, third, _ = samples()
    with SampleFile(path) as file:
        file.append(*first)
        size = path.stat().st_size
        file.append(*second)
    whole = path.read_bytes()
    path.write_bytes(whole[: size + left] if left > 0 else whole[:left])
    with SampleFile(path) as file:
        assert file.samples == [first]
        file.append(*third)
    with SampleFile(path) as file:
        assert file.samples == [first, third]


def test_a_file_of_one_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"place": {"num')
    with SampleFile(path) as file:
        assert file.samples == []
    assert path.read_text() == ""


# -- the numbers ---------------------------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_the_order_of_samples(results: FocusResults) -> None:
    for seed in range(5):
        shuffled = samples()
        random.Random(seed).shuffle(shuffled)
        other = FocusResults.of(shuffled)
        assert other.as_report() == results.as_report()
        assert other.documents == results.documents == URIS
        assert other.recovered_fraction("bm25/raw", 256) == results.recovered_fraction("bm25/raw", 256)


def test_means_gains_and_errors_by_hand(results: FocusResults) -> None:
    np.testing.assert_array_equal(results.nll("recency/raw", 256), [3.5, 3.5, 3.5, 3.0])
    np.testing.assert_array_equal(results.nll("full", 256, "scoring"), [2, 2, 2, 2])
    assert results.mean("recency/raw", 256).mean == 3.375
    gain = results.gain("bm25/raw", "recency/raw", 256)
    # Paired: 1, 0, 0, 0.5; document sums of deviations 0.25, -0.375, 0.125.
    assert gain.mean == pytest.approx(0.375)
    assert gain.standard_error == pytest.approx(np.sqrt((0.25**2 + 0.375**2 + 0.125**2) / 16 * 3 / 2))
    assert gain.num_samples == 4
    backwards = results.gain("recency/raw", "bm25/raw", 256)
    assert backwards.mean == -gain.mean


def test_recovered_fraction_by_hand(results: FocusResults) -> None:
    # none - full: 3.5, 3, 2.5, 2; none - bm25: 2.5, 1.5, 1.5, 2.5.
    recovered = results.recovered_fraction("bm25/raw", 256)
    assert recovered is not None
    assert recovered.mean == pytest.approx(8 / 11)
    full, none = results.recovered_fraction("full", 256), results.recovered_fraction("none", 256)
    assert full is not None
    assert none is not None
    assert (full.mean, full.standard_error) == (1, 0)
    assert (none.mean, none.standard_error) == (0, 0)
    without = FocusResults.of([(place, measured[1:]) for place, measured in samples()])
    assert without.recovered_fraction("bm25/raw", 256) is None


def test_share_of_the_oracle_by_hand(results: FocusResults) -> None:
    # On the scoring half bm25 wins 1, 0, 0, 0 over recency and the oracle 2, 2, 0, 0.
    share = results.share_of("bm25/raw", "oracle/raw", "recency/raw", 256, "scoring")
    assert share.mean == pytest.approx(1 / 4)
    assert results.share_of("oracle/raw", "oracle/raw", "recency/raw", 256, "scoring").mean == 1
    # A ceiling that wins nothing has no shares.
    assert np.isnan(results.share_of("bm25/raw", "recency/raw", "recency/raw", 256, "scoring").mean)


def test_where_long_context_matters_is_chosen_on_one_half_and_reported_on_the_other(results: FocusResults) -> None:
    where = results.where_full_wins("recency/raw", 256, 1.0)
    assert where.tolist() == [True, True, False, False]
    gain = results.gain("bm25/raw", "recency/raw", 256, "scoring", where)
    assert (gain.mean, gain.num_samples) == (0.5, 2)
    assert np.isnan(gain.standard_error)  # both are of one document


def test_conditions_without_a_budget_stand_beside_every_budget() -> None:
    joined = [
        (place, [*measured, *(m for m in more if m.budget)])
        for (place, measured), (_, more) in zip(samples(256), samples(512), strict=True)
    ]
    results = FocusResults.of(joined)
    assert results.budgets == [256, 512]
    for budget in results.budgets:
        assert results.conditions(budget) == list(NLL)
        assert results.mean("none", budget).mean == 5
    assert [(e["condition"], e["budget"]) for e in results.as_report()] == [
        *((name, 0 if "/" not in name else 256) for name in NLL),
        *((name, 512) for name in NLL if "/" in name),
    ]
    assert results.has("oracle/raw", 512)
    assert not results.has("oracle/raw", 128)
    assert results.has("full", 128)


def test_picks_and_medians(results: FocusResults) -> None:
    assert [(place.number, blocks) for place, blocks in results.picks("bm25/raw", 256)] == [
        (number, [number]) for number in range(4)
    ]
    assert results.median("bm25/raw", 256, "slots") == 101.5
    (entry,) = [e for e in results.as_report() if e["condition"] == "bm25/raw"]
    assert entry["nll_scoring"] == 3.25
    assert entry["nll_choosing"] == 2.75
    assert (entry["slots"], entry["decide_s"], entry["read_s"]) == (101.5, 0.5, 0.25)
