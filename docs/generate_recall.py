"""Writes tables and pictures of `recall.md` from the packed samples: `python docs/generate_recall.py`.

A folder `recall/<text>/<group>` holds what a run of `evaluate tasks` measured. To add a run, or questions to one that
is there: `python docs/generate_recall.py <run's folder>=<text>/<group> …`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actors.evaluation.samples import files_of_run, read_samples
from actors.evaluation.task_evaluator import TaskMeasured
from actors.evaluation.task_places import TaskPlace
from actors.evaluation.task_results import Cell, TaskResults
from cluster.tables import Table
from pipelines.packed_runs import pack_named, with_tables
from pipelines.task_report import length_table, plot_depth_maps

PAGE = Path(__file__).with_name("recall.md")
FOLDER = Path(__file__).with_name("recall")
PROGRAM = "docs/generate_recall.py"
MAPPED = ("needles", "recency/raw", "bm25/raw", "dense/raw", "lensnet/raw")
"""Conditions that have a heat map."""


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


def render(runs: dict[str, TaskResults]) -> str:
    """The page, with its tables anew."""
    page = PAGE.read_text(encoding="utf-8")
    for group, results in runs.items():
        page = with_tables(page, PROGRAM, group, tables(results))
    return page


def main(arguments: list[str]) -> None:
    """Pack what is named, then write the page and its pictures."""
    pack_named(arguments, FOLDER)
    runs = read_runs()
    PAGE.write_text(render(runs), encoding="utf-8")
    for group, results in runs.items():
        for budget in results.budgets:
            mapped = [name for name in MAPPED if name in results.conditions(budget)]
            name = group if len(results.budgets) == 1 else f"{group}-{budget}"
            plot_depth_maps(results, mapped, budget, FOLDER / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
