"""Tables and pictures of how much focus can win."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.headroom import ALL_KINDS, Cell
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table
from models.focus.layout import POLICIES
from pipelines.focus_report import LONG_CONTEXT_NATS

CLAIM_PLACES = 400
"""Below this many places a number is no claim."""

CLAIM_ERRORS = 3.0
"""A difference of so many standard errors is marked."""


def headroom_tables(cells: Sequence[Cell], base: str, oracle: str) -> list[Table]:
    """All tables; a cell stands in those for which it measured what is needed."""
    choosers = [
        f"{name}/raw" for name in (rivals.RANDOM, *rivals.SEARCHERS, rivals.FUSION, rivals.RERANK, rivals.LENSNET)
    ]
    ceilings = [f"{rivals.ORACLE_GREEDY}/raw", oracle, f"{rivals.EXHAUSTIVE}/raw", rivals.FULL]
    legend = "nats a token on the half no oracle chose on, ± standard error by document, * beyond 3 of them"
    return [
        table
        for table in (
            _table(
                cells, f"Gain over {base}: {legend}", lambda cell: _gains(cell, [*choosers, *ceilings], base, oracle)
            ),
            _table(cells, f"What is left to {oracle}: {legend}", lambda cell: _left(cell, [base, *choosers], oracle)),
            _table(cells, f"Forms, gain over the same choice in raw blocks: {legend}", _forms),
            _table(cells, f"What gists add: {legend}", _gists),
            _policies(cells, f"Position policies, gain over {POLICIES[0]}: {legend}"),
            _table(cells, f"What {oracle} shows", lambda cell: _chosen(cell, oracle)),
            *(
                _table(
                    cells,
                    f"{name} by readings besides those of the rivals, gain over {base} (blocks): {legend}",
                    lambda cell, name=name: _by_readings(cell, name, base),
                )
                for name in (oracle, f"{rivals.EXHAUSTIVE}/raw")
            ),
            _table(
                cells,
                f"Gain over {base} where long context matters (full gains at least {LONG_CONTEXT_NATS} nats on the "
                f"other half): {legend}",
                lambda cell: _where_long(cell, [*choosers, *ceilings], base),
            ),
        )
        if table.rows
    ]


def _table(cells: Sequence[Cell], title: str, row: Any) -> Table:
    rows = []
    for cell in cells:
        values = row(cell)
        if values:
            rows.append({"text, history / budget": cell.name, "places": cell.num_places, **values})
    return Table(rows, title)


def _gains(cell: Cell, conditions: Sequence[str], base: str, oracle: str) -> dict[str, str]:
    if not cell.has(base):
        return {}
    gains = {_short(c): marked(cell.gain(c, base)) for c in conditions if c != base and cell.has(c)}
    if cell.has(oracle):
        gains[f"{_short(oracle)}, where it chose"] = marked(cell.optimistic_gain(oracle, base))
    return gains


def _left(cell: Cell, conditions: Sequence[str], oracle: str) -> dict[str, str]:
    if not cell.has(oracle):
        return {}
    return {_short(c): marked(cell.gain(oracle, c)) for c in conditions if cell.has(c)}


def _forms(cell: Cell) -> dict[str, str]:
    found = {}
    for chooser in (rivals.RECENCY, rivals.FUSION, rivals.ORACLE):
        for form in ("overlay", "strict"):
            if cell.has(f"{chooser}/raw", f"{chooser}/{form}"):
                found[f"{chooser}/{form}"] = marked(cell.gain(f"{chooser}/{form}", f"{chooser}/raw"))
    if cell.has("oracle/overlay", "oracle/strict"):
        found["oracle: overlay over strict"] = marked(cell.gain("oracle/overlay", "oracle/strict"))
    return found


def _gists(cell: Cell) -> dict[str, str]:
    pairs = {
        "tree's gists over a constant": ("recency/overlay", "recency/constant"),
        "constant over as many raw tokens": ("recency/constant", "recency/raw"),
        "tree's gists over as many raw tokens": ("recency/overlay", "recency/raw"),
        "uniform detail over recency": ("uniform/overlay", "recency/raw"),
    }
    return {what: marked(cell.gain(*pair)) for what, pair in pairs.items() if cell.has(*pair)}


def _policies(cells: Sequence[Cell], title: str) -> Table:
    """The same rows at other places, a line a condition."""
    rows = []
    for cell in cells:
        for name in dict.fromkeys(c.partition("@")[0] for c in cell.conditions if "@" in c):
            first, *others = (f"{name}@{policy}" for policy in POLICIES)
            if cell.has(first):
                gains = {c.partition("@")[2]: marked(cell.gain(c, first)) for c in others if cell.has(c)}
                rows.append({"text, history / budget": cell.name, "places": cell.num_places, "shown": name, **gains})
    return Table(rows, title)


def _chosen(cell: Cell, oracle: str) -> dict[str, str]:
    if not cell.has(oracle) or not len(cell.ages(oracle)):
        return {}
    counts, ages = cell.num_chosen(oracle), cell.ages(oracle)
    row = {
        "blocks a place": f"{counts.mean():.1f} ± {counts.std():.1f}",
        "none": f"{(counts == 0).mean():.0%}",
        "age in blocks, quartiles": " / ".join(f"{q:,.0f}" for q in np.percentile(ages, [25, 50, 75])),
    }
    for what, name in (("same document", "num_same_document"), ("a shared name", "num_shared_names")):
        row[what] = percent(cell.picked_share(oracle, name))
        row[f"{what}, by chance"] = percent(cell.chance(oracle, name))
    return row


def _by_readings(cell: Cell, oracle: str, base: str) -> dict[str, str]:
    found = {}
    for num_readings in cell.readings(oracle) if cell.has(base) else ():
        gain, num_blocks = cell.after(num_readings, oracle, base)
        found[str(num_readings)] = f"{marked(gain)} ({num_blocks:.1f})"
    return found


def _where_long(cell: Cell, conditions: Sequence[str], base: str) -> dict[str, str]:
    if not cell.has(base, rivals.FULL):
        return {}
    where = cell.where_full_wins(base, LONG_CONTEXT_NATS)
    if where.sum() < 2:
        return {}
    gains = {_short(c): marked(cell.gain(c, base, where)) for c in conditions if c != base and cell.has(c)}
    return {"of them": f"{int(where.sum())} ({where.mean():.0%})", **gains}


def _short(condition: str) -> str:
    return condition.removesuffix("/raw")


def marked(estimate: Estimate) -> str:
    """With a star where it is a claim: more than three standard errors from zero."""
    if math.isnan(estimate.standard_error):
        return f"{estimate.mean:+.3f}"
    clear = abs(estimate.mean) > CLAIM_ERRORS * estimate.standard_error
    return f"{estimate.mean:+.3f} ± {estimate.standard_error:.3f}{'*' if clear else ''}"


def percent(estimate: Estimate) -> str:
    """A share with its standard error."""
    if math.isnan(estimate.mean):
        return ""
    return f"{estimate.mean:.0%} ± {estimate.standard_error:.0%}"


def cells_as_report(cells: Sequence[Cell], base: str, oracle: str) -> list[dict[str, Any]]:
    """For `report.json`: every condition's gain over the base and, where there is an oracle, its distance to it."""
    entries = []
    for cell in cells:
        gains: dict[str, dict[str, float]] = {}
        for condition in cell.conditions:
            if cell.has(base):
                gain = cell.gain(condition, base)
                gains[condition] = {"gain": gain.mean, "gain_se": gain.standard_error}
            if cell.has(oracle):
                left = cell.gain(oracle, condition)
                gains.setdefault(condition, {}).update(to_oracle=left.mean, to_oracle_se=left.standard_error)
        entries.append(
            {
                "kind": cell.kind,
                "history_tokens": cell.history_tokens,
                "budget": cell.budget,
                "num_places": cell.num_places,
                "num_documents": len(set(cell.results.documents)),
                "is_claim": cell.num_places >= CLAIM_PLACES,
                "conditions": gains,
            }
        )
    return entries


def plot_gaps(cells: Sequence[Cell], base: str, path: Path) -> None:
    """Gain over the base of who chooses, a row of bars a cell."""
    shown = [f"{c}/raw" for c in (*rivals.SEARCHERS, rivals.FUSION, rivals.RERANK, rivals.LENSNET, rivals.ORACLE)]
    shown.append(rivals.FULL)
    cells = [cell for cell in cells if cell.has(base)]
    names = [c for c in shown if any(cell.has(c) for cell in cells)]
    height = 0.8 / max(len(names), 1)
    with figure(path, f"Gain over {base}, two standard errors", size=(8.0, 1.5 + 0.9 * len(cells))) as axes:
        for number, condition in enumerate(names):
            rows = [i for i, cell in enumerate(cells) if cell.has(condition)]
            gains = [cells[i].gain(condition, base) for i in rows]
            places = [i + (number - len(names) / 2 + 0.5) * height for i in rows]
            errors = [0.0 if math.isnan(g.standard_error) else 2 * g.standard_error for g in gains]
            look = {rivals.FULL: "#a0aec0", "oracle/raw": "black"}.get(condition)
            axes.barh(places, [g.mean for g in gains], height, xerr=errors, label=_short(condition), color=look)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(cells)), [f"{cell.name}\n{cell.num_places} places" for cell in cells])
        axes.invert_yaxis()
        axes.set(xlabel="nats a token on the half no oracle chose on (more is better)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def plot_chosen(cells: Sequence[Cell], oracle: str, path: Path) -> None:
    """How many blocks the oracle shows, and how old they are."""
    cells = [cell for cell in cells if cell.kind != ALL_KINDS and cell.has(oracle)]
    with figure(path, f"What {oracle} shows", num_columns=2, size=(11.0, 4.0)) as (left, right):
        for cell in cells:
            counts, ages = cell.num_chosen(oracle), np.sort(cell.ages(oracle))
            bins = np.arange(counts.max() + 2)
            left.plot(bins[:-1], np.histogram(counts, bins)[0] / len(counts), marker="o", label=cell.name)
            right.plot(ages, np.arange(1, len(ages) + 1) / max(len(ages), 1), label=cell.name)
        left.set(xlabel="blocks a place", ylabel="share of places")
        right.set(xlabel="age in blocks of 32 tokens", ylabel="share of chosen blocks that are younger", xscale="log")
        left.legend()


def plot_long_context(cells: Sequence[Cell], base: str, path: Path) -> None:
    """Where the gain of the full history lies: in a few places or in all of them. No picture where it was not read."""
    cells = [cell for cell in cells if cell.kind != ALL_KINDS and cell.has(base, rivals.FULL)]
    if not cells:
        return
    with figure(path, f"What the full history gains over {base}", size=(8.0, 4.0)) as axes:
        for cell in cells:
            gains = np.sort(cell.results.nll(base, cell.budget) - cell.results.nll(rivals.FULL, cell.budget))[::-1]
            axes.plot(np.arange(1, len(gains) + 1) / len(gains), np.cumsum(gains) / len(gains), label=cell.name)
        axes.set(xlabel="share of places, those that gain most first", ylabel="nats a token gained so far")
        axes.legend()
