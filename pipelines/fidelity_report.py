"""Tables and pictures of what gists are worth, beside what they should be worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from actors.evaluation.fidelity import ALL_KINDS, BARS, CASES, CLAIM_PLACES, FidelityRun, Measure, measured
from actors.evaluation.gist_evaluator import FULL, NONE, OWN, RECENCY, SHUFFLED, Condition
from actors.evaluation.gist_sources import TREE
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table

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
            results, (lod, tail) = runs[case.name][-1].results, (case.setting.lod, case.setting.tail_tokens)
            shown = {
                Condition(NONE, 0, tail): "the raw tail alone" if tail else "nothing",
                Condition(RECENCY, lod, tail): "recent raw tokens",
                Condition(f"{TREE}/{OWN}", lod, tail): "own gists",
                Condition(f"{TREE}/{SHUFFLED}", lod, tail): "shuffled gists",
            }
            for condition, label in shown.items():
                curve = results.curve(condition, Condition(FULL))
                positions = np.arange(1, len(curve.mean) + 1)
                (line,) = panel.plot(positions, curve.mean, label=label)
                low, high = (curve.mean + sign * 2 * curve.standard_error for sign in (-1, 1))
                panel.fill_between(positions, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            panel.set(title=case.name, xlabel="position in the horizon, tokens", ylabel="ΔNLL, nats")
            panel.axhline(0, color="black", linewidth=0.8)
            panel.legend()
