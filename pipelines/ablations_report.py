"""Tables and pictures of ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.statistics import Estimate, clustered_mean
from actors.training.measured_run import TERMS, MeasuredRun, Quantity
from cluster.ablations_config import DEFAULT
from cluster.plots import figure
from cluster.tables import Table
from pipelines.headroom_report import marked
from pipelines.training_report import NEWEST

BETTER: Mapping[Quantity, str] = {"content_nats": "more", "gap_to_full": "less"}

NOT_COMPARED = "the default failed, or was measured behind other raw tails"


@dataclass(frozen=True)
class Outcome:
    """What came of a variant with one seed."""

    group: str
    name: str
    seed: int
    changes: Mapping[str, Any]
    num_steps: int
    num_steps_before: int
    """Of the variants whose nets it began with."""
    measured: MeasuredRun | None
    """None where it failed."""
    failure: str
    """Why; empty where it did not."""

    @property
    def changed(self) -> str:
        """Keys in which it differs from the default."""
        return ", ".join(f"{key}={value}" for key, value in self.changes.items())


def ablation_tables(outcomes: Sequence[Outcome]) -> list[Table]:
    """What gists say, by raw tail; how that differs from the default; what it cost; what failed."""
    worth = [_head(o) | _content(o.measured) for o in outcomes if o.measured]
    defaults = {(o.name, o.seed): default for o, default in _with_default(outcomes)}
    over = [
        _head(o) | _differences(o.measured, defaults.get((o.name, o.seed)))
        for o in outcomes
        if o.measured and o.name != DEFAULT
    ]
    num_pairs = max((o.measured.num_pairs for o in outcomes if o.measured), default=0)
    legend = f"± standard error over {num_pairs} pairs of validation windows, * beyond 3 of them"
    tables = [
        Table(worth, "content_nats by raw tail, nats a token"),
        Table(
            over,
            f"Over the default of the same seed, nats a token: {legend}",
        ),
        Table(_over_seeds(outcomes), "Over the default, mean of all seeds ± standard error between them"),
        Table([_head(o) | _cost(o, o.measured) for o in outcomes if o.measured], "What was trained, and at what cost"),
        Table([_head(o) | {"reason": o.failure, "changes": o.changed} for o in outcomes if o.failure], "Failed"),
    ]
    return [table for table in tables if table.rows]


def _head(outcome: Outcome) -> dict[str, Any]:
    return {"question": outcome.group, "variant": outcome.name, "seed": str(outcome.seed)}


def _with_default(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, MeasuredRun]]:
    """All others that were measured as the default of their seed was, beside it."""
    defaults = {o.seed: o.measured for o in outcomes if o.name == DEFAULT}
    found = []
    for outcome in outcomes:
        default = defaults.get(outcome.seed)
        if outcome.name != DEFAULT and outcome.measured and default and outcome.measured.is_comparable(default):
            found.append((outcome, default))
    return found


def _content(measured: MeasuredRun) -> dict[str, Any]:
    by_tail = {tail: measured.estimate("content_nats", number).mean for number, tail in enumerate(measured.tails)}
    return {
        **by_tail,
        "all": str(measured.estimate("content_nats")),
        "gap to full": str(measured.estimate("gap_to_full")),
    }


def _differences(measured: MeasuredRun, default: MeasuredRun | None) -> dict[str, str]:
    if default is None:
        return {"all": NOT_COMPARED}
    tails = enumerate(measured.tails)
    return {
        **{tail: marked(measured.estimate("content_nats", number, default)) for number, tail in tails},
        "all": marked(measured.estimate("content_nats", None, default)),
        "gap to full": marked(measured.estimate("gap_to_full", None, default)),
    }


def _over_seeds(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each variant that has several."""
    by_name: dict[str, list[tuple[Outcome, MeasuredRun]]] = {}
    for outcome, default in _with_default(outcomes):
        by_name.setdefault(outcome.name, []).append((outcome, default))
    rows = []
    for name, pairs in by_name.items():
        if len(pairs) > 1:
            means = {what: marked(between_seeds(pairs, what)) for what in TERMS}
            rows.append({"question": pairs[0][0].group, "variant": name, "seeds": len(pairs), **means})
    return rows


def between_seeds(pairs: Sequence[tuple[Outcome, MeasuredRun]], quantity: Quantity) -> Estimate:
    """The difference to the default, seed by seed: each is one sample."""
    found = [o.measured.estimate(quantity, None, default).mean for o, default in pairs if o.measured]
    return clustered_mean(np.array(found), [str(number) for number in range(len(found))])


def _cost(outcome: Outcome, measured: MeasuredRun) -> dict[str, Any]:
    return {
        "spread": _spread(measured),
        "seconds a step": measured.report["speed"]["step_s"],
        "parameters": measured.report["num_parameters"],
        "steps": outcome.num_steps,
        "steps before": outcome.num_steps_before or None,
        "changes": outcome.changed,
    }


def _spread(measured: MeasuredRun) -> float:
    return float(np.mean([line["spread"] for line in measured.losses[-NEWEST:]]))


def ablation_numbers(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For `report.json`."""
    defaults = {(o.name, o.seed): default for o, default in _with_default(outcomes)}
    return {"variants": [_entry(o, defaults.get((o.name, o.seed))) for o in outcomes]}


def _entry(outcome: Outcome, default: MeasuredRun | None) -> dict[str, Any]:
    measured = outcome.measured
    entry: dict[str, Any] = {
        "group": outcome.group,
        "variant": outcome.name,
        "seed": outcome.seed,
        "changes": outcome.changes,
        "failure": outcome.failure,
        "num_steps": outcome.num_steps,
        "num_steps_before": outcome.num_steps_before,
    }
    if measured is None:
        return entry
    entry |= {
        "spread": _spread(measured),
        "step_s": measured.report["speed"]["step_s"],
        "num_parameters": measured.report["num_parameters"],
        "git_revision": measured.report["git_revision"],
        "num_pairs": measured.num_pairs,
    }
    for quantity in TERMS:
        tails = {"all": None, **{tail: number for number, tail in enumerate(measured.tails)}}
        entry[quantity] = {name: _numbers(measured.estimate(quantity, tail)) for name, tail in tails.items()}
        if default:
            over = {name: _numbers(measured.estimate(quantity, tail, default)) for name, tail in tails.items()}
            entry[f"{quantity}_over_default"] = over
    return entry


def _numbers(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "standard_error": estimate.standard_error}


def plot_curves(group: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """What gists came to over training, of one group and the default; a line a seed.

    What was measured otherwise than the default is left out. Steps of the net that a variant began with count, too.
    """
    compared = {(o.name, o.seed) for o, _ in _with_default(outcomes)}
    shown = [o for o in outcomes if o.measured and (o.name == DEFAULT or (o.name, o.seed) in compared)]
    shown = [o for o in shown if o.group in {"", group}]
    names = list(dict.fromkeys(o.name for o in shown if o.name != DEFAULT))
    title = f"{group}: on validation windows, all tails"
    with figure(path, title, num_columns=2, size=(12.0, 4.0)) as both:
        for axes, quantity in zip(both, TERMS, strict=True):
            labelled = set()
            for outcome in shown:
                assert outcome.measured is not None
                colour = "black" if outcome.name == DEFAULT else f"C{names.index(outcome.name)}"
                label = None if outcome.name in labelled else outcome.name
                labelled.add(outcome.name)
                steps, values = outcome.measured.curve(quantity)
                steps = [outcome.num_steps_before + step for step in steps]
                axes.plot(steps, values, marker="o", color=colour, label=label)
            axes.set(xlabel="step", ylabel=f"{quantity}, nats a token")
        both[0].legend()


def plot_differences(outcomes: Sequence[Outcome], path: Path) -> None:
    """Every variant beside the default of its seed; no picture where there is none."""
    rows = _with_default(outcomes)
    if not rows:
        return
    with figure(
        path, "Over the default, two standard errors", num_columns=2, size=(12.0, 1.5 + 0.3 * len(rows))
    ) as both:
        for axes, (quantity, better) in zip(both, BETTER.items(), strict=True):
            for row, (outcome, default) in enumerate(rows):
                assert outcome.measured is not None
                found = outcome.measured.estimate(quantity, None, default)
                error = 0.0 if math.isnan(found.standard_error) else 2 * found.standard_error
                axes.errorbar(found.mean, row, xerr=error, fmt="o", color="C0")
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_yticks(range(len(rows)), [f"{o.name}, seed {o.seed}" for o, _ in rows])
            axes.invert_yaxis()
            axes.set(xlabel=f"{quantity}, nats a token ({better} is better)")
        both[1].set_yticklabels([])
