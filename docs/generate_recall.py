"""Writes tables and pictures of `recall.md` from the packed samples: `python docs/generate_recall.py`.

A folder `recall/<text>/<group>` holds what a run of `evaluate tasks` measured. To add a run, or questions to one that
is there: `python docs/generate_recall.py <run's folder>=<text>/<group> …`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from actors.evaluation.rivals import NEEDLES, RECENCY
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
        if len(results.lengths) > 1:
            found += [Table(_by_task(results, budget, n), f"Right, by task, {n:,} slots") for n in results.lengths]
    return found


def _by_task(results: TaskResults, budget: int, length: int | None = None) -> list[dict[str, str]]:
    return [
        {"shown": condition}
        | {task: _share(results, Cell(condition, budget, task, length)) for task in results.tasks}
        | {"all": _share(results, Cell(condition, budget, None, length))}
        for condition in results.conditions(budget)
    ]


def _share(results: TaskResults, cell: Cell) -> str:
    found = results.mean("correct", cell)
    return f"{found.mean:.0%} ± {found.standard_error:.0%}"


def in_another_order(timeline: TaskResults, late: TaskResults) -> Table:
    """What the best block last is worth, and what is left to the needles: of the same questions, and of choosers that
    chose the same. Questions whose needles alone were read at other positions are left out: within the model's trained
    range rows in timeline order stand at their true places, and late ones one after the other."""
    there, here = _by_question(timeline), _by_question(late)
    keys = [key for key in here if key in there and _same(here[key], there[key], NEEDLES)]
    clusters = [here[key][NEEDLES].cluster for key in keys]

    def points(ahead: list[TaskMeasured], behind: list[TaskMeasured]) -> str:
        differences = [100.0 * (one.correct - other.correct) for one, other in zip(ahead, behind, strict=True)]
        estimate = clustered_mean(np.array(differences), clusters)
        return f"{estimate.mean:+.1f} ± {estimate.standard_error:.1f}"

    needles = [here[key][NEEDLES] for key in keys]
    rows = []
    for condition in late.conditions(late.budgets[0]):
        chooser, _, form = condition.partition("/")
        if not form or chooser == RECENCY:
            continue
        now = [here[key][condition] for key in keys]
        row = {"chosen by": chooser, "behind the needles alone": points(needles, now)}
        before = [there[key].get(f"{chooser}/raw") for key in keys]
        same = [one for one, other in zip(before, now, strict=True) if one and set(one.picked) == set(other.picked)]
        if len(same) == len(now):
            row["in their place in the timeline"] = points(needles, same)
            row["won"] = points(now, same)
        rows.append(row)
    return Table(rows, f"Points, paired, the best block last: {len(keys)} questions, {late.budgets[0]} slots")


def _by_question(results: TaskResults) -> dict[tuple[str, int, int, int], dict[str, TaskMeasured]]:
    return {
        (place.task, place.sample, place.history_tokens, place.depth_percent): {one.condition: one for one in measured}
        for place, measured in results.samples
    }


def _same(here: dict[str, TaskMeasured], there: dict[str, TaskMeasured], condition: str) -> bool:
    return here[condition].answer_nll == there[condition].answer_nll


def render(runs: dict[str, TaskResults]) -> str:
    """The page, with its tables anew."""
    page = PAGE.read_text(encoding="utf-8")
    for group, results in runs.items():
        found = tables(results)
        if group in TIMELINE:
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
