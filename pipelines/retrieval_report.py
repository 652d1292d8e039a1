"""Tables and pictures of a tuning of the searchers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.evaluation.retrieval_settings import FusionSetting, SearchSetting, Setting, default_of
from actors.evaluation.retrieval_tuning import CHANCE, NEWEST, REFERENCES, SPLIT_HALF, TuningResults
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table

SHOWN_SETTINGS = 12
"""Best settings in a table; below them the default and the worst."""

COLORS = 6
"""Of the style's cycle; further curves are told apart by their dashes."""


def retrieval_tables(results: TuningResults) -> list[Table]:
    """What settings are compared with, then a table a searcher."""
    references = [{"shown": _words(name), **_numbers(results, name)} for name in REFERENCES]
    tables = [Table(references, _title(results))]
    for searcher in results.searchers:
        settings = results.settings(searcher)
        rows = [_row(results, setting, settings.index(setting) + 1) for setting in _shown(settings)]
        tables.append(Table(rows, f"{searcher}: {len(settings)} settings, the best by gain@{results.picks} first"))
    return tables


def _title(results: TuningResults) -> str:
    return (
        f"What single blocks gain at {len(results.gains)} places in {len(set(results.documents))} documents, nats a "
        "token, ± standard error by document"
    )


def _shown(settings: Sequence[Setting]) -> list[Setting]:
    kept = {*settings[:SHOWN_SETTINGS], settings[-1], default_of(settings[0].searcher)}
    return [setting for setting in settings if setting in kept]


def _row(results: TuningResults, setting: Setting, place: int) -> dict[str, object]:
    over = results.over_default(setting, "gain_at_k")
    is_default = setting == default_of(setting.searcher)
    numbers = _numbers(results, setting)
    gain = f"gain@{results.picks}"
    return {
        "#": place,
        **setting.columns,
        gain: numbers.pop(gain),
        "over the default": "the default" if is_default else "" if over is None else _signed(over),
        **numbers,
    }


def _numbers(results: TuningResults, key: Setting | str) -> dict[str, object]:
    hit, rank = results.mean(key, "hit_at_1"), results.mean(key, "best_rank")
    return {
        f"gain@{results.picks}": _signed(results.mean(key, "gain_at_k")),
        "blocks": f"{results.mean(key, 'num_picked').mean:.1f}",
        "gain@1": _signed(results.mean(key, "gain_at_1")),
        "hit@1": "" if math.isnan(hit.mean) else f"{hit.mean:.0%} ± {hit.standard_error:.0%}",
        "rank of the best": "" if math.isnan(rank.mean) else f"{rank.mean:.1f} ± {rank.standard_error:.1f}",
    }


def _words(reference: str) -> str:
    return reference.replace("_", " ")


def _signed(estimate: Estimate) -> str:
    """With a digit more than `Estimate` shows: single blocks gain little."""
    return f"{estimate.mean:+.4f} ± {estimate.standard_error:.4f}"


def plot_searcher(results: TuningResults, searcher: str, path: Path) -> None:
    """gain@k of every setting, against the query's length where there is one."""
    settings = results.settings(searcher)
    title = f"{searcher}: gain of the first {results.picks} blocks"
    fused = [setting for setting in settings if isinstance(setting, FusionSetting)]
    height = 4.5 if not fused else 1.5 + 0.28 * len(fused)
    with figure(path, title, size=(8.0, height)) as axes:
        if fused:
            gains = [results.mean(setting, "gain_at_k") for setting in fused]
            names = [f"{setting.name}, {setting.constant:g}" for setting in fused]
            axes.barh(names, [g.mean for g in gains], xerr=[g.standard_error for g in gains], capsize=3)
            axes.invert_yaxis()
            axes.set(xlabel="nats a token, one standard error (more is better)")
            return
        _plot_curves(results, [s for s in settings if not isinstance(s, FusionSetting)], axes)


def _plot_curves(results: TuningResults, settings: Sequence[SearchSetting], axes: Any) -> None:
    """One curve for settings that differ in query tokens; all bars of error, one above the other, would hide them."""
    curves: dict[str, list[SearchSetting]] = {}
    for setting in sorted(settings, key=lambda s: (s.curve, s.query_tokens)):
        curves.setdefault(setting.curve, []).append(setting)
    for number, (name, members) in enumerate(curves.items()):
        gains = [results.mean(setting, "gain_at_k") for setting in members]
        axes.errorbar(
            [setting.query_tokens for setting in members],
            [gain.mean for gain in gains],
            yerr=[gain.standard_error for gain in gains] if settings[0] in members else None,
            label=name,
            linestyle=("-", "--", ":")[number // COLORS % 3],
            marker="o",
            markersize=3,
            elinewidth=0.8,
            capsize=3,
        )
    for name, dashes in ((CHANCE, ":"), (NEWEST, "--"), (SPLIT_HALF, "-")):
        level = results.mean(name, "gain_at_k").mean
        axes.axhline(level, color="grey", linestyle=dashes, linewidth=0.8, label=_words(name))
    tokens = sorted({setting.query_tokens for setting in settings})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.set(xlabel="query tokens", ylabel="nats a token; best curve ± one standard error")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
