"""Summaries of hand-made samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation.task_evaluator import TaskMeasured
from actors.evaluation.task_places import TASK_DEPTH, TaskPlace
from actors.evaluation.task_results import Cell, TaskResults, TaskSampleFile
from pipelines.task_report import overview_tables, plot_depths, task_tables


def measured(condition: str, budget: int, cluster: str, **fields: Any) -> TaskMeasured:
    given: dict[str, Any] = {
        "slots": budget,
        "feasible": True,
        "correct": True,
        "exact": None,
        "answer_nll": 1.0,
        "recall": 1.0,
        "num_needed": 2,
        "depth": 0.5,
        "num_candidates": 8,
    }
    return TaskMeasured(condition, budget, cluster=cluster, **{**given, **fields})


def place(number: int, length: int = 4096, depth: int = TASK_DEPTH, task: str = "t") -> TaskPlace:
    return TaskPlace(number, task, number, length, depth, 0, length // 32)


@pytest.fixture
def samples() -> list[tuple[TaskPlace, list[TaskMeasured]]]:
    return [
        (place(0), [measured("none", 0, "a", correct=False), measured("bm25/raw", 512, "a", depth=0.05)]),
        (place(1), [measured("none", 0, "b"), measured("bm25/raw", 512, "b", correct=False, depth=0.95)]),
        (place(2), [measured("none", 0, "b"), measured("bm25/raw", 512, "b", feasible=False, correct=False)]),
        (place(3, 8192), [measured("none", 0, "c"), measured("bm25/raw", 512, "c", answer_nll=3.0)]),
    ]


def test_infeasible_samples_count_as_neither_right_nor_wrong(samples: list) -> None:
    results = TaskResults.of(samples)
    short = Cell("bm25/raw", 512, "t", 4096)
    assert results.mean("correct", short).mean == 0.5
    assert results.mean("correct", short).num_samples == 2
    assert results.num_infeasible(short) == (1, 3)
    assert results.mean("correct", Cell("bm25/raw", 512)).mean == pytest.approx(2 / 3)
    # What has no budget is looked up under any; what was not measured is NaN of none.
    assert results.mean("correct", Cell("none", 512, "t", 4096)).mean == pytest.approx(2 / 3)
    assert results.mean("exact", short).num_samples == 0
    assert math.isnan(results.mean("answer_nll", Cell("full", 512)).mean)
    # Standard errors by cluster: -2/3 of one, 1/3 + 1/3 of the other; G / (G - 1) = 2.
    error = results.mean("correct", Cell("none", 0, "t", 4096)).standard_error
    assert error == pytest.approx(math.sqrt(2 * ((2 / 3) ** 2 + (2 / 3) ** 2) / 9))
    assert results.chance("t") == 1 / 8


def test_the_order_of_samples_does_not_matter(samples: list) -> None:
    forwards, backwards = (TaskResults.of(order).as_report() for order in (samples, samples[::-1]))
    # As text: a standard error of one cluster is NaN, which equals nothing.
    assert str(forwards) == str(backwards)


def test_depths_are_parts_of_the_history_or_those_that_were_set(samples: list) -> None:
    results = TaskResults.of(samples)
    assert results.depths == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert results.mean("correct", Cell("bm25/raw", 512, None, 4096, 0.1)).mean == 1
    assert results.mean("correct", Cell("bm25/raw", 512, None, 4096, 0.9)).mean == 0
    given = TaskResults.of([(place(0, depth=25), samples[0][1]), (place(1, depth=75), samples[1][1])])
    assert given.depths == [0.25, 0.75]
    assert given.mean("correct", Cell("bm25/raw", 512, None, None, 0.75)).mean == 0


def test_reports_say_what_was_infeasible_and_draw_what_there_is(samples: list, tmp_path: Path) -> None:
    results = TaskResults.of(samples)
    text = "\n".join(table.markdown() for table in [*overview_tables(results), *task_tables(results)])
    assert "1 of 3" in text
    assert "chance: 12%" in text
    plot_depths(results, "bm25/raw", 512, tmp_path / "depths.png")
    assert (tmp_path / "depths.png").stat().st_size > 1000


def test_samples_come_back_from_disk(samples: list, tmp_path: Path) -> None:
    with TaskSampleFile(tmp_path / "s.jsonl") as file:
        for where, found in samples[:2]:
            file.append(where, found)
    with TaskSampleFile(tmp_path / "s.jsonl") as file:
        assert file.samples == samples[:2]
        assert file.missing([where for where, _ in samples]) == [where for where, _ in samples[2:]]
