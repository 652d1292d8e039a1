"""Tables and pictures of an evaluation of focus."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.results import FocusResults
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table

BASE = f"{rivals.RECENCY}/raw"
"""What every gain is over, where it was measured: the recency window without gists."""

LONG_CONTEXT_NATS = 0.1
"""Long context matters where the full history gains this much over recency, on the half that is not reported."""


def focus_tables(results: FocusResults) -> list[Table]:
    """All tables of a report."""
    tables: list[Table] = []
    for budget in results.budgets:
        base = _base(results, budget)
        tables.append(Table(_condition_rows(results, budget, base), _title(results, budget, base)))
        tables.append(
            Table(_half_rows(results, budget, base), f"Budget {budget}: the half of the tokens no oracle chose on")
        )
        if results.has(rivals.FULL) and (rows := _long_context_rows(results, budget, base)):
            tables.append(Table(rows, _long_context_title(results, budget, base)))
        if rows := _pick_rows(results, budget):
            tables.append(Table(rows, f"Budget {budget}: what was chosen"))
        tables.append(Table(_cost_rows(results, budget), f"Budget {budget}: what it costs (medians)"))
    return tables


def _base(results: FocusResults, budget: int) -> str:
    wanted = (BASE, "recency/overlay", "recency/strict", rivals.NONE)
    return next((c for c in wanted if results.has(c, budget)), results.conditions(budget)[0])


def _title(results: FocusResults, budget: int, base: str) -> str:
    return (
        f"Budget {budget} slots: NLL of the horizon at {len(results.samples)} places in "
        f"{len(set(results.documents))} documents; gains over {base}, ± standard error by document"
    )


def _condition_rows(results: FocusResults, budget: int, base: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for condition in results.conditions(budget):
        recovered = results.recovered_fraction(condition, budget)
        rows.append(
            {
                "before the horizon": condition,
                "slots": f"{results.median(condition, budget, 'slots'):,.0f}",
                "NLL, nats/token": _level(results.mean(condition, budget)),
                "gain": _gain(results, condition, base, budget),
                "recovered": "" if recovered is None else _percent(recovered),
            }
        )
    return rows


def _half_rows(results: FocusResults, budget: int, base: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for condition in results.conditions(budget):
        if condition == rivals.NONE:
            continue
        row: dict[str, object] = {
            "before the horizon": condition,
            "NLL, nats/token": _level(results.mean(condition, budget, "scoring")),
            "gain": "" if condition == base else str(results.gain(condition, base, budget, "scoring")),
        }
        ceiling = f"{rivals.ORACLE}/{condition.partition('/')[2]}"
        if results.has(ceiling, budget) and "/" in condition:
            share = results.share_of(condition, ceiling, base, budget, "scoring")
            row["share of the oracle's gain"] = _percent(share)
        rows.append(row)
    return rows


def _long_context_title(results: FocusResults, budget: int, base: str) -> str:
    where = results.where_full_wins(base, budget, LONG_CONTEXT_NATS)
    return (
        f"Budget {budget}: where long context matters, {int(where.sum())} of {len(where)} places (full gains at least "
        f"{LONG_CONTEXT_NATS} nats over {base} on one half of the tokens; shown is the other)"
    )


def _long_context_rows(results: FocusResults, budget: int, base: str) -> list[dict[str, object]]:
    where = results.where_full_wins(base, budget, LONG_CONTEXT_NATS)
    if where.sum() < 2:
        return []
    return [
        {
            "before the horizon": condition,
            "NLL, nats/token": _level(results.mean(condition, budget, "scoring", where)),
            "gain": "" if condition == base else str(results.gain(condition, base, budget, "scoring", where)),
        }
        for condition in results.conditions(budget)
        if condition != rivals.NONE
    ]


def _pick_rows(results: FocusResults, budget: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for condition in results.conditions(budget):
        picks = results.picks(condition, budget)
        ages = np.array([place.stop_block - block for place, blocks in picks for block in blocks])
        if len(ages) == 0:
            continue
        quartiles = np.percentile(ages, [25, 50, 75])
        rows.append(
            {
                "chosen by": condition,
                "blocks a place": f"{np.mean([len(blocks) for _, blocks in picks]):.1f}",
                "age in blocks, quartiles": " / ".join(f"{q:.0f}" for q in quartiles),
            }
        )
    return rows


def _cost_rows(results: FocusResults, budget: int) -> list[dict[str, object]]:
    """Seconds as multiples of reading one recency window: absolute times mean nothing elsewhere."""
    base = results.median(_base(results, budget), budget, "read_s") or math.nan
    return [
        {
            "before the horizon": condition,
            "to find and choose": f"{results.median(condition, budget, 'decide_s') / base:.2f}",
            "to read": f"{results.median(condition, budget, 'read_s') / base:.2f}",
        }
        for condition in results.conditions(budget)
    ]


def _gain(results: FocusResults, condition: str, base: str, budget: int) -> str:
    return "" if condition == base else str(results.gain(condition, base, budget))


def _level(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"


def _percent(estimate: Estimate) -> str:
    return "" if math.isnan(estimate.mean) else f"{estimate.mean:.0%} ± {estimate.standard_error:.0%}"


def plot_gains(results: FocusResults, budget: int, path: Path) -> None:
    """Gain of every condition over the base on the half no oracle chose on, with error bars."""
    base = _base(results, budget)
    names = [c for c in results.conditions(budget) if c not in {base, rivals.NONE}]
    gains = [results.gain(name, base, budget, "scoring") for name in names]
    with figure(path, f"Gain over {base}, {budget} slots", size=(8.0, 1.5 + 0.28 * len(names))) as axes:
        axes.barh(names, [g.mean for g in gains], xerr=[2 * g.standard_error for g in gains], capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(xlabel="nats a token, two standard errors (more is better)")


def plot_ages(results: FocusResults, budget: int, path: Path) -> None:
    """How old the blocks are that the oracle and the rivals choose."""
    shown = [c for c in results.conditions(budget) if c.endswith("/overlay") and any(_ages(results, c, budget))]
    shown = shown or [c for c in results.conditions(budget) if any(_ages(results, c, budget))]
    with figure(path, f"Age of the chosen blocks, {budget} slots", size=(8.0, 4.0)) as axes:
        for condition in shown:
            ages = np.sort(np.fromiter(_ages(results, condition, budget), float))
            # More curves than the style has colours: the floor and the ceiling have looks of their own.
            look = {rivals.RANDOM: ("grey", ":"), rivals.ORACLE: ("black", "-"), rivals.ORACLE_GREEDY: ("black", "--")}
            color, line = look.get(condition.partition("/")[0], (None, "-"))
            shares = np.arange(1, len(ages) + 1) / len(ages)
            axes.plot(ages, shares, label=condition, color=color, linestyle=line)
        axes.set(xlabel="age in blocks of 32 tokens", ylabel="share of chosen blocks that are younger")
        axes.legend()


def _ages(results: FocusResults, condition: str, budget: int) -> Iterable[float]:
    return [float(place.stop_block - block) for place, blocks in results.picks(condition, budget) for block in blocks]
