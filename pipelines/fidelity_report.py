"""Tables and pictures of what gists are worth, beside what they should be worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from actors.evaluation.fidelity import ALL_KINDS, BARS, CASES, CLAIM_PLACES, FidelityRun, Measure, measured
from actors.evaluation.gist_evaluator import OWN, Condition
from actors.evaluation.gist_sources import TREE
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table
from pipelines.gist_report import draw_lost

Runs = Mapping[str, Sequence[FidelityRun]]
"""By the name of their case: each kind of text, and all of them."""


def bars_table(runs: Runs) -> Table:
    """What is demanded, what was measured on all kinds of text together, and whether it suffices."""
    rows: list[dict[str, object]] = []
    cases = {case.name: case for case in CASES}
    for bar in BARS:
        case = cases[bar.case]
        row: dict[str, object] = {"case": case.shown, "measure": bar.measure, "demanded": bar.demanded}
        if not (of_case := runs.get(bar.case, ())):
            rows.append({**row, "measured": "", "places": 0, "": "not measured"})
            continue
        last = of_case[-1]
        estimate = measured(last.results, case.setting, bar.measure)
        verdict = "reached" if bar.holds(estimate) else "missed"
        places = len(last.results.samples)
        if places < CLAIM_PLACES or (len(of_case) > 1) != (last.kind == ALL_KINDS):
            verdict += ", a look"
        rows.append({**row, "measured": _show(bar.measure, estimate), "places": places, "": verdict})
    return Table(rows, "What gists should reach, and what they do")


def case_tables(runs: Runs) -> list[Table]:
    """Every measure of every case, by kind of text."""
    tables = []
    for case in CASES:
        rows: list[dict[str, object]] = []
        for run in runs.get(case.name, ()):
            estimates = {m: measured(run.results, case.setting, m) for m in get_args(Measure)}
            spread = run.results.spread(TREE, case.setting.lod)
            rows.append(
                {
                    "text": run.kind,
                    "places": len(run.results.samples),
                    "documents": len(set(run.results.documents)),
                    **{name: _show(name, estimate) for name, estimate in estimates.items()},
                    "over best constant": str(run.results.gain_over_constant(TREE, case.setting)),
                    "variance share": "" if spread is None else f"{spread.mean:.3f}",
                    "slots": run.results.slots(Condition(f"{TREE}/{OWN}", case.setting.lod, case.setting.tail_tokens)),
                }
            )
        if rows:
            tables.append(Table(rows, f"{case.name}: {case.shown}"))
    return tables


def _show(measure: str, estimate: Estimate) -> str:
    if measure == "recovered":
        return f"{estimate.mean:.1%} ± {estimate.standard_error:.1%}"
    return str(estimate)


def plot_cases(runs: Runs, path: Path) -> None:
    """What is lost by position in the horizon, a panel a case, all kinds of text together."""
    cases = [case for case in CASES if runs.get(case.name)]
    with figure(path, "What is lost", num_columns=len(cases), size=(4.5 * len(cases), 4.0)) as axes:
        for panel, case in zip(np.atleast_1d(np.asarray(axes)), cases, strict=True):
            draw_lost(panel, runs[case.name][-1].results, case.setting)
            panel.set_title(case.name)
