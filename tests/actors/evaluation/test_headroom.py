"""Several runs as one answer: cells, pooling, what is a claim."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.headroom import ALL_KINDS, Cell, FocusRun, cells_of
from actors.evaluation.places import Place
from actors.evaluation.results import SampleFile
from actors.evaluation.statistics import clustered_mean
from cluster.errors import ConfigError

CONDITIONS = ("full", "recency/raw", "bm25/raw", "oracle/raw")


def measured(rng: np.random.Generator, budgets: tuple[int, ...] = (512,)) -> list[Measured]:
    """Random numbers for every condition; the oracle shows two blocks, one of the horizon's document."""
    found = []
    for condition in CONDITIONS:
        for budget in (0,) if condition == "full" else budgets:
            choosing, scoring = rng.normal(2.0, 0.3, 2)
            is_oracle = condition == "oracle/raw"
            picked = [3, 40] if is_oracle else []
            half_way = (float(choosing) + 0.4, float(scoring) + 0.1)
            found.append(
                Measured(
                    condition,
                    budget,
                    budget,
                    float(choosing),
                    float(scoring),
                    picked,
                    num_same_document=len(picked) // 2,
                    num_shared_names=len(picked),
                    share_same_document=0.25,
                    share_shared_names=0.125,
                    steps=[(0, 1, *half_way), (3, 2, float(choosing), float(scoring))] if is_oracle else [],
                )
            )
    return found


def write_run(folder: Path, seed: int, num_places: int = 6, budgets: tuple[int, ...] = (512,)) -> Path:
    """A run's folder: two places a document."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("evaluation:\n  history_tokens: 4096\n")
    rng = np.random.default_rng(seed)
    with SampleFile(folder / "samples-0123456789ab.jsonl") as samples:
        for number in range(num_places):
            samples.append(Place(number, f"doc{number // 2}", 64 * number, 64 * number + 64), measured(rng, budgets))
    return folder


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    runs = [FocusRun.read(kind, write_run(tmp_path / kind, seed)) for seed, kind in enumerate(("code", "prose"))]
    return cells_of(runs)


def test_cells_are_kinds_and_all_of_them_together(cells: list[Cell]) -> None:
    assert [(cell.kind, cell.history_tokens, cell.budget, cell.num_places) for cell in cells] == [
        ("code", 4096, 512, 6),
        ("prose", 4096, 512, 6),
        (ALL_KINDS, 4096, 512, 12),
    ]
    # Documents of the two kinds have the same names and are not the same.
    assert [len(set(cell.results.documents)) for cell in cells] == [3, 3, 6]


def test_gains_are_paired_means_over_the_half_no_oracle_chose_on(cells: list[Cell]) -> None:
    for cell in cells:
        gains = [
            {m.condition: m.nll_scoring for m in found}["recency/raw"]
            - {m.condition: m.nll_scoring for m in found}["oracle/raw"]
            for _, found in cell.results.samples
        ]
        documents = [place.uri for place, _ in cell.results.samples]
        expected = clustered_mean(np.array(gains), documents)
        assert cell.gain("oracle/raw", "recency/raw") == expected
        assert cell.gain("oracle/raw", "recency/raw").mean == pytest.approx(np.mean(gains))


def test_what_is_chosen_and_what_chance_would_choose(cells: list[Cell]) -> None:
    cell = cells[0]
    assert cell.num_chosen("oracle/raw").tolist() == [2] * 6
    assert cell.num_chosen("bm25/raw").tolist() == [0] * 6
    stops = [place.stop_block for place, _ in cell.results.samples]
    assert cell.ages("oracle/raw").tolist() == [stop - block for stop in stops for block in (3, 40)]
    assert cell.picked_share("oracle/raw", "num_same_document").mean == 0.5
    assert cell.picked_share("oracle/raw", "num_shared_names").mean == 1.0
    assert cell.chance("oracle/raw", "num_same_document").mean == 0.25
    assert cell.chance("oracle/raw", "num_shared_names").mean == 0.125


def test_an_oracle_that_had_stopped_earlier(cells: list[Cell]) -> None:
    for cell in cells:
        assert cell.readings("oracle/raw") == [0, 2, 4]
        whole = cell.gain("oracle/raw", "recency/raw")
        for num_readings, less, num_blocks in ((0, 0.1, 1), (2, 0.1, 1), (3, 0.0, 2), (64, 0.0, 2)):
            gain, blocks = cell.after(num_readings, "oracle/raw", "recency/raw")
            assert gain.mean == pytest.approx(whole.mean - less)
            assert gain.standard_error == pytest.approx(whole.standard_error)
            assert blocks == num_blocks
        assert cell.readings("bm25/raw") == cell.readings("exhaustive/raw") == []


def test_readings_are_looked_at_until_nothing_more_was_found(tmp_path: Path) -> None:
    run = FocusRun.read("code", write_run(tmp_path / "code", 1))
    for last, looks in ((0, [0]), (1, [0, 2]), (8, [0, 2, 4, 8]), (9, [0, 2, 4, 8, 16])):
        samples = [
            (place, [replace(m, steps=[(0, 1, 2.0, 2.0), (last, 2, 1.0, 1.0)] if m.steps else []) for m in measured])
            for place, measured in run.samples
        ]
        (cell,) = cells_of([replace(run, samples=samples)])
        assert cell.readings("oracle/raw") == looks
    samples[2] = (samples[2][0], [replace(m, steps=[]) for m in samples[2][1]])
    (cell,) = cells_of([replace(run, samples=samples)])
    assert cell.readings("oracle/raw") == []


def test_packed_samples_and_a_line_that_is_not_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 3)
    (file,) = folder.glob("*.jsonl")
    plain = FocusRun.read("code", folder)
    content = file.read_bytes()
    file.write_bytes(content + b'{"place": {"num')
    assert FocusRun.read("code", folder) == plain
    (folder / f"{file.name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ConfigError, match="2 files of samples"):
        FocusRun.read("code", folder)
    file.unlink()
    assert FocusRun.read("code", folder) == plain


def test_what_two_runs_measured_at_a_place_stands_side_by_side(tmp_path: Path) -> None:
    first = FocusRun.read("code", write_run(tmp_path / "first", 1))
    again = FocusRun.read("code", write_run(tmp_path / "again", 2, num_places=8, budgets=(256, 512)))
    without = [(place, [m for m in found if m.condition not in {"bm25/raw", "full"}]) for place, found in again.samples]
    small, large = cells_of([first, replace(again, samples=without)])
    # At 256 two of the eight places have no full history, at 512 they have no bm25 either.
    assert (small.budget, small.num_places) == (256, 8)
    assert (large.budget, large.num_places) == (512, 8)
    assert small.conditions == large.conditions == ["recency/raw", "oracle/raw"]
    (small, large) = cells_of([first, replace(again, samples=without[:6])])
    assert small.conditions == ["full", "recency/raw", "oracle/raw"]
    assert large.conditions == ["full", "recency/raw", "bm25/raw", "oracle/raw"]
    # What was measured twice counts as it was measured first.
    (alone,) = cells_of([first])
    assert large.gain("oracle/raw", "recency/raw") == alone.gain("oracle/raw", "recency/raw")


def test_runs_that_were_measured_in_different_ways_are_no_single_kind(tmp_path: Path) -> None:
    first = FocusRun.read("code", write_run(tmp_path / "first", 1))
    free = replace(first.evaluation, num_places=9, budgets=[256], rivals=["full"], first_place=3, num_workers=2)
    assert cells_of([first, replace(first, evaluation=free)])
    other = replace(first, evaluation=replace(first.evaluation, oracle_readings=32, seed=1))
    with pytest.raises(ConfigError, match="'code' at 4,096 .* evaluation.oracle_readings, evaluation.seed; give them"):
        cells_of([first, other])
    assert {cell.kind for cell in cells_of([first, replace(other, kind="code, 32 readings")])} >= {"code"}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config.yaml"):
        FocusRun.read("code", tmp_path)
    (tmp_path / "config.yaml").write_text("evaluation:\n  history_tokens: 4096\n")
    with pytest.raises(ConfigError, match="0 files of samples"):
        FocusRun.read("code", tmp_path)
    (tmp_path / "samples-0.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("evaluation:\n  history: 4096\n")
    with pytest.raises(ConfigError, match="no recipe of `evaluate focus`: .*history"):
        FocusRun.read("code", tmp_path)
