"""Writes tables and pictures of `recall.md` from the packed samples: `python docs/generate_recall.py`.

A folder `recall/<text>/<group>` holds what a run of `evaluate tasks` measured. To add a run, or questions to one that
is there: `python docs/generate_recall.py <run's folder>=<text>/<group> …`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from actors.evaluation.samples import files_of_run, read_samples
from actors.evaluation.statistics import clustered_mean
from actors.evaluation.task_evaluator import TaskMeasured
from actors.evaluation.task_places import TaskPlace
from actors.evaluation.task_results import Cell, TaskResults
from cluster.tables import Table
from pipelines.packed_runs import pack_named, with_tables
from pipelines.task_report import length_table, plot_depth_maps

PAGE = Path(__file__).with_name("recall.md")
FOLDER = Path(__file__).with_name("recall")
PROGRAM = "docs/generate_recall.py"
MAPPED = ("needles", "recency", "bm25", "dense", "fusion", "lensnet")
"""Who has a heat map."""
TIMELINE = {"late": "grid", "10m-late": "10m"}
"""By group in which the best block stands last, the one that asks the same with blocks in their place."""


def read_runs() -> dict[str, TaskResults]:
    """All packed runs, by group."""
    runs = {}
    for folder in sorted(path.parent for path in FOLDER.glob("*/*/config.yaml")):
        _, samples = files_of_run(folder, "evaluate tasks")
        runs[folder.name] = TaskResults.of(read_samples(samples, TaskPlace, TaskMeasured))
    return runs


def tables(results: TaskResults) -> list[Table]:
    """Of one run, a budget after the other: accuracy and recall by length; of a single budget accuracy by task, too."""
    found = []
    for budget in results.budgets:
        where = f"{len(results.samples)} questions, {budget} slots"
        found.append(length_table(results, budget, "correct", f"Right of eight candidates: {where}"))
        found.append(length_table(results, budget, "recall", f"Needed blocks shown: {where}"))
    if len(results.budgets) == 1:
        (budget,) = results.budgets
        where = f"{len(results.samples)} questions, {budget} slots"
        found.append(Table(_by_task(results, budget), f"Right, by task, all lengths: {where}"))
    return found


def _by_task(results: TaskResults, budget: int) -> list[dict[str, str]]:
    return [
        {"shown": condition}
        | {task: _share(results, Cell(condition, budget, task)) for task in results.tasks}
        | {"all": _share(results, Cell(condition, budget))}
        for condition in results.conditions(budget)
    ]


def _share(results: TaskResults, cell: Cell) -> str:
    found = results.mean("correct", cell)
    return f"{found.mean:.0%} ± {found.standard_error:.0%}"


def in_another_order(timeline: TaskResults, late: TaskResults) -> Table:
    """Of the same questions and the same choice, what the best block last is worth, and what is left to the needles."""
    budget = late.budgets[0]
    rows = []
    for condition in late.conditions(budget):
        chooser, _, form = condition.partition("/")
        if not form or chooser == "recency":
            continue
        row = {"chosen by": chooser}
        if f"{chooser}/raw" in timeline.conditions(budget):
            row["over their place in the timeline"] = _paired(late, condition, timeline, f"{chooser}/raw")
        rows.append(row | {"behind the needles alone": _paired(late, "needles", late, condition)})
    return Table(rows, f"Right, the best block last: points, paired, {len(late.samples)} questions, {budget} slots")


def _paired(results: TaskResults, condition: str, others: TaskResults, other: str) -> str:
    """Points by which one condition is right more often than another, of questions in both runs."""
    found = [
        {(place.task, place.sample, place.history_tokens, place.depth_percent): _named(measured, name)
         for place, measured in run.samples}
        for run, name in ((results, condition), (others, other))
    ]  # fmt: skip
    shared = [key for key in found[0] if key in found[1]]
    differences = [100.0 * (found[0][key].correct - found[1][key].correct) for key in shared]
    estimate = clustered_mean(np.array(differences), [found[0][key].cluster for key in shared])
    return f"{estimate.mean:+.1f} ± {estimate.standard_error:.1f}"


def _named(measured: list[TaskMeasured], condition: str) -> TaskMeasured:
    return next(m for m in measured if m.condition == condition)


def render(runs: dict[str, TaskResults]) -> str:
    """The page, with its tables anew."""
    page = PAGE.read_text(encoding="utf-8")
    for group, results in runs.items():
        found = tables(results)
        if group.endswith("late"):
            found.append(in_another_order(runs[TIMELINE[group]], results))
        page = with_tables(page, PROGRAM, group, found)
    return page


def main(arguments: list[str]) -> None:
    """Pack what is named, then write the page and its pictures."""
    pack_named(arguments, FOLDER)
    runs = read_runs()
    PAGE.write_text(render(runs), encoding="utf-8")
    for group, results in runs.items():
        for budget in results.budgets:
            mapped = [name for name in results.conditions(budget) if name.partition("/")[0] in MAPPED]
            name = group if len(results.budgets) == 1 else f"{group}-{budget}"
            plot_depth_maps(results, mapped, budget, FOLDER / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
