"""Tables and pictures of an evaluation of gists. `content_nats` comes first: without it a soft prompt looks like
memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.gist_evaluator import FULL, MEAN_GIST, NONE, OWN, RECENCY, SHUFFLED, Condition
from actors.evaluation.gist_results import Curve, GistResults, Setting
from actors.evaluation.gist_sources import TREE
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table

COLLAPSED_SPREAD = 0.05
"""Nets that had collapsed to a constant had 0.0005 to 0.015."""

KINDS = {OWN: "own gists", SHUFFLED: "shuffled", MEAN_GIST: "mean gist everywhere"}


def gist_tables(results: GistResults, horizon_tokens: int) -> list[Table]:
    """All tables of a report."""
    tables = [
        Table(_setting_rows(results, setting, horizon_tokens), _title(results, setting)) for setting in results.settings
    ]
    return [*tables, Table(_spread_rows(results), "How far gists differ from their mean (0: a constant)")]


def _title(results: GistResults, setting: Setting) -> str:
    tail = f"a raw tail of {setting.tail_tokens}" if setting.tail_tokens else "no raw tail"
    return (
        f"LOD{setting.lod}, {tail}: {len(results.samples)} places in {len(set(results.documents))} documents, nats a "
        "token ± standard error by document"
    )


def _setting_rows(results: GistResults, setting: Setting, horizon_tokens: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for condition in results.conditions_of(setting):
        source, _, kind = condition.name.rpartition("/")
        is_own = kind == OWN
        rows.append(
            {
                "before the horizon": _label(condition),
                "content_nats": str(results.content_nats(source, setting)) if is_own else "",
                "over best constant": str(results.gain_over_constant(source, setting)) if is_own else "",
                f"ΔNLL@{horizon_tokens}": "" if condition.name == FULL else str(results.delta_nll(condition)),
                "recovered": "" if condition.name in {FULL, NONE} else _percent(results.recovered_fraction(condition)),
                "NLL": _level(results.mean(condition)),
                "slots": results.slots(condition),
            }
        )
    return rows


def _label(condition: Condition) -> str:
    source, _, kind = condition.name.rpartition("/")
    if condition.name == FULL:
        return "full raw history"
    if condition.name == NONE:
        return "the raw tail alone" if condition.tail_tokens else "nothing"
    if RECENCY in {condition.name, source}:
        return f"recent raw tokens, equal slots{f' ({kind})' if source else ''}"
    return f"{source}: {KINDS[kind]}"


def _spread_rows(results: GistResults) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for source in results.sources:
        row: dict[str, object] = {"gists of": source}
        for lod in dict.fromkeys(setting.lod for setting in results.settings):
            spread = results.spread(source, lod)
            row[f"LOD{lod}"] = "" if spread is None else f"{spread.mean:.4f} ± {spread.standard_error:.4f}"
        rows.append(row)
    return rows


def collapsed(results: GistResults) -> list[str]:
    """A sentence for every source and level whose gists hardly differ from their mean."""
    warnings = []
    for source in results.sources:
        for lod in dict.fromkeys(setting.lod for setting in results.settings):
            spread = results.spread(source, lod)
            if spread is not None and spread.mean < COLLAPSED_SPREAD:
                warnings.append(
                    f"LOD{lod} gists of {source} have collapsed: {spread.mean:.4f} of their mean square tells them "
                    "from their mean; what they gain is what a constant gains"
                )
    return warnings


def _level(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"


def _percent(estimate: Estimate) -> str:
    return "" if math.isnan(estimate.mean) else f"{estimate.mean:.1%} ± {estimate.standard_error:.1%}"


def plot_curves(results: GistResults, setting: Setting, path: Path) -> None:
    """`draw_lost` as a picture."""
    with figure(path, f"LOD{setting.lod}, tail {setting.tail_tokens}: what is lost", size=(9.0, 4.5)) as axes:
        draw_lost(axes, results, setting)


def draw_lost(axes: Any, results: GistResults, setting: Setting) -> None:
    """NLL over that of the full history, by position in the horizon, of the tree's gists and their controls.

    Without the mean gist, which can lose so much that nothing else could be told apart.
    """
    lod, tail = setting.lod, setting.tail_tokens
    shown = [
        Condition(NONE, 0, tail),
        Condition(RECENCY, lod, tail),
        Condition(f"{TREE}/{OWN}", lod, tail),
        Condition(f"{TREE}/{SHUFFLED}", lod, tail),
    ]
    for condition in shown:
        _draw(axes, results.curve(condition, Condition(FULL)), _label(condition))
    axes.set(xlabel="position in the horizon, tokens", ylabel="ΔNLL, nats (two standard errors)")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend()


def plot_content(results: GistResults, setting: Setting, path: Path) -> None:
    """content_nats by position in the horizon, of every source."""
    with figure(path, f"LOD{setting.lod}, tail {setting.tail_tokens}: content", size=(9.0, 4.5)) as axes:
        for source in results.sources:
            _draw(axes, results.content_curve(source, setting), source)
        axes.set(xlabel="position in the horizon, tokens", ylabel="shuffled minus own, nats (two standard errors)")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.legend()


def _draw(axes: Any, curve: Curve, label: str) -> None:
    positions = np.arange(1, len(curve.mean) + 1)
    (line,) = axes.plot(positions, curve.mean, label=label)
    low, high = curve.mean - 2 * curve.standard_error, curve.mean + 2 * curve.standard_error
    axes.fill_between(positions, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
