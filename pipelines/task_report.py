"""Tables and heat maps of an evaluation on tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.statistics import Estimate
from actors.evaluation.task_results import Cell, Metric, TaskResults
from cluster.plots import figure
from cluster.tables import Table


def overview_tables(results: TaskResults) -> list[Table]:
    """Accuracy and recall over all tasks, and what it costs: a table a budget each."""
    tables: list[Table] = []
    for budget in results.budgets:
        where = f"Budget {budget} slots, all tasks, mean ± standard error over feasible samples"
        tables.append(Table(_by_length(results, budget, "correct"), f"{where}: accuracy among candidates"))
        tables.append(Table(_by_length(results, budget, "recall"), f"{where}: needed blocks shown raw"))
        tables.append(Table(_cost_rows(results, budget), f"Budget {budget}: what it costs (medians)"))
    return tables


def task_tables(results: TaskResults) -> list[Table]:
    """Everything of every task: a table a budget each."""
    return [
        Table(_task_rows(results, budget, task), f"{task}, budget {budget} slots (chance: {results.chance(task):.0%})")
        for budget in results.budgets
        for task in results.tasks
    ]


def _by_length(results: TaskResults, budget: int, metric: Metric) -> list[dict[str, str]]:
    return [
        {"shown": condition}
        | {
            f"{length:,} slots": _share(results.mean(metric, Cell(condition, budget, None, length)))
            for length in results.lengths
        }
        for condition in results.conditions(budget)
    ]


def _task_rows(results: TaskResults, budget: int, task: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for length in results.lengths:
        for condition in results.conditions(budget):
            cell = Cell(condition, budget, task, length)
            infeasible, num = results.num_infeasible(cell)
            if not num:
                continue
            rows.append(
                {
                    "history": f"{length:,}",
                    "shown": condition,
                    "slots": f"{results.median('slots', cell):,.0f}",
                    "accuracy": _share(results.mean("correct", cell)),
                    "exact match": _share(results.mean("exact", cell)),
                    "answer NLL, nats/token": _level(results.mean("answer_nll", cell)),
                    "needed blocks shown": _share(results.mean("recall", cell)),
                    "infeasible": f"{infeasible} of {num}" if infeasible else "",
                }
            )
    return rows


def _cost_rows(results: TaskResults, budget: int) -> list[dict[str, object]]:
    """Seconds as multiples of the first condition that has a budget: absolute times mean nothing elsewhere."""
    cells = [Cell(condition, budget) for condition in results.conditions(budget)]
    first = next((cell for cell in cells if cell.condition not in rivals.WITHOUT_FORM), cells[0])
    base = results.median("read_s", first) or math.nan
    return [
        {
            "shown": cell.condition,
            "slots": f"{results.median('slots', cell):,.0f}",
            f"to find and choose (reading {first.condition} = 1)": f"{results.median('decide_s', cell) / base:.2f}",
            "to read and answer": f"{results.median('read_s', cell) / base:.2f}",
        }
        for cell in cells
    ]


def _share(estimate: Estimate) -> str:
    if not estimate.num_samples:
        return ""
    error = "" if math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:.0%}"
    return f"{estimate.mean:.0%}{error}"


def _level(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.standard_error:.2f}" if estimate.num_samples else ""


def length_table(results: TaskResults, budget: int, metric: Metric, title: str) -> Table:
    """One metric over all tasks, by length of history."""
    return Table(_by_length(results, budget, metric), title)


def plot_depths(results: TaskResults, condition: str, budget: int, path: Path) -> None:
    """Accuracy over length and depth of one condition; white where nothing feasible was measured."""
    size = (2.0 + 1.1 * len(results.lengths), 1.4 + 0.5 * len(results.depths))
    with figure(path, f"{condition}, {budget} slots: accuracy", size=size) as axes:
        _draw_depths(axes, results, condition, budget)


def plot_depth_maps(results: TaskResults, conditions: Sequence[str], budget: int, path: Path) -> None:
    """As `plot_depths`, of several conditions side by side."""
    # A single length leaves less room than a title takes.
    width = max(1.2 + 0.9 * len(results.lengths), 0.4 + 0.12 * max(map(len, conditions)))
    size = (len(conditions) * width, 1.6 + 0.5 * len(results.depths))
    with figure(path, f"{budget} slots: accuracy", num_columns=len(conditions), size=size) as columns:
        for axes, condition in zip(columns, conditions, strict=True):
            _draw_depths(axes, results, condition, budget)
            axes.set_title(condition)


def _draw_depths(axes: Any, results: TaskResults, condition: str, budget: int) -> None:
    cells = [
        [results.mean("correct", Cell(condition, budget, None, length, depth)) for length in results.lengths]
        for depth in results.depths
    ]
    values = np.array([[cell.mean for cell in row] for row in cells])
    axes.grid(visible=False)
    axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, column in np.argwhere(np.isfinite(values)).tolist():
        shade = "black" if values[row, column] > 0.6 else "white"
        axes.text(column, row, f"{values[row, column]:.0%}", ha="center", va="center", color=shade)
    axes.set_xticks(range(len(results.lengths)), [f"{length:,}" for length in results.lengths])
    axes.set_yticks(range(len(results.depths)), [f"{depth:.0%}" for depth in results.depths])
    axes.set(xlabel="slots of history", ylabel="depth (0%: oldest)")
