"""Tables and plot of what curation does to predictions and to recall."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from actors.curation.effect_places import WHERE, Sides
from actors.curation.effect_results import EffectResults, Paired
from actors.evaluation.places import Place
from actors.evaluation.statistics import Estimate
from cluster.plots import figure
from cluster.tables import Table

WHERE_TITLES = {"kept": "kept in detail", "pruned": "pruned"}


def effect_tables(results: EffectResults) -> list[Table]:
    """Predictions, then answers by where they stand."""
    num_documents = len({place.uri for place, _ in results.predicted})
    tables = [
        Table(
            [_prediction(results, name) for name in results.conditions],
            f"NLL of {len(results.predicted)} held positions in {num_documents} documents, nats a token, ± standard "
            "error by document",
        )
    ]
    for where in WHERE:
        num = sum(question.where == where for question, _ in results.answered)
        if not num:
            continue
        infeasible = results.num_infeasible(where)
        apart = f"; {infeasible} that no budget of this size could show are left out" if infeasible else ""
        tables.append(
            Table(
                [_answers(results, name, where) for name in results.conditions],
                f"{num} answers planted in what is {WHERE_TITLES[where]} (guessing: {results.chance:.0%}{apart})",
            )
        )
    return tables


def sides_numbers(sides: Sides, places: list[Place]) -> dict[str, Any]:
    """How much of the context, and of the histories before held positions, is pruned."""
    shares = [float(sides.pruned[place.first_block : place.stop_block].mean()) for place in places]
    return {
        "blocks": len(sides.pruned),
        "blocks_pruned": int(sides.pruned.sum()),
        "places_with_pruned_history": sum(share > 0 for share in shares),
        "share_of_history_pruned": float(np.mean(shares)) if shares else 0.0,
    }


def sides_table(numbers: dict[str, Any], num_places: int) -> Table:
    """The same for people."""
    rows = [
        {"what": "blocks both versions have", "now": f"{numbers['blocks']:,}"},
        {"what": "of them pruned in between", "now": f"{numbers['blocks_pruned']:,}"},
        {
            "what": "held positions with pruned blocks in their history",
            "now": f"{numbers['places_with_pruned_history']} of {num_places}",
        },
        {"what": "share of a history that is pruned, mean", "now": f"{numbers['share_of_history_pruned']:.0%}"},
    ]
    return Table(rows, f"Version {numbers['version_before']} against {numbers['version_after']}")


def _prediction(results: EffectResults, name: str) -> dict[str, Any]:
    nll, (before, after) = results.nll(name), results.picked(name)
    return {
        "shown": name,
        "before": f"{nll.before.mean:.3f}",
        "after": f"{nll.after.mean:.3f}",
        "change": _signed(nll.change, "{:+.4f} ± {:.4f}"),
        "positions that differ": nll.num_changed,
        "blocks chosen before": round(before, 1),
        "and after": round(after, 1),
    }


def _answers(results: EffectResults, name: str, where: Any) -> dict[str, Any]:
    correct, nll, shown = (results.answer(metric, name, where) for metric in ("correct", "answer_nll", "shown"))
    return {
        "shown": name,
        "right before": _share(correct.before),
        "right after": _share(correct.after),
        "change": _points(correct.change),
        "answer NLL before": _level(nll.before),
        "answer NLL after": _level(nll.after),
        "change of NLL": _signed(nll.change, "{:+.2f} ± {:.2f}"),
        "needed blocks shown before": _share(shown.before),
        "and after": _share(shown.after),
    }


def _signed(estimate: Estimate, form: str) -> str:
    if not estimate.num_samples:
        return ""
    if math.isnan(estimate.standard_error):
        return form.partition(" ±")[0].format(estimate.mean)
    return form.format(estimate.mean, estimate.standard_error)


def _points(estimate: Estimate) -> str:
    if not estimate.num_samples:
        return ""
    error = "" if math.isnan(estimate.standard_error) else f" ± {100 * estimate.standard_error:.0f}"
    return f"{100 * estimate.mean:+.0f}{error} points"


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.0%}" if estimate.num_samples else ""


def _level(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f}" if estimate.num_samples else ""


def plot_effect(results: EffectResults, path: Path) -> None:
    """Change of NLL by condition; accuracy before and after by condition and place."""
    names = results.conditions
    rows = np.arange(len(names))
    with figure(path, "What curation changes", num_columns=2, size=(11.0, 1.8 + 0.55 * len(names))) as (loss, recall):
        changes = [results.nll(name).change for name in names]
        errors = [0.0 if math.isnan(c.standard_error) else c.standard_error for c in changes]
        loss.barh(rows, [c.mean for c in changes], xerr=errors, height=0.6, color="#2b6cb0")
        loss.axvline(0, color="#4a5568", linewidth=0.8)
        loss.set_yticks(rows, names)
        loss.set(xlabel="nats a token, after − before (worse →)", title="NLL of held positions")
        loss.invert_yaxis()
        loss.locator_params(axis="x", nbins=5)
        bars: list[tuple[str, list[Paired]]] = [
            (where, [results.answer("correct", name, where) for name in names])
            for where in WHERE
            if any(question.where == where for question, _ in results.answered)
        ]
        height = 0.8 / max(2 * len(bars), 1)
        colours = {"kept": ("#9ae6b4", "#2f855a"), "pruned": ("#fbd38d", "#c05621")}
        for number, (where, paired) in enumerate(bars):
            for side in (0, 1):
                values = [(p.before, p.after)[side].mean for p in paired]
                offset = (2 * number + side) * height - 0.4 + height / 2
                label = f"{WHERE_TITLES[where]}, {('before', 'after')[side]}"
                recall.barh(
                    rows + offset, np.nan_to_num(values), height=height, color=colours[where][side], label=label
                )
        if results.answered:
            recall.axvline(results.chance, color="#4a5568", linewidth=0.8, linestyle="--")
        recall.set_yticks(rows, [""] * len(names))
        recall.set(xlabel="share of right answers (dashed: guessing)", xlim=(0, 1.02), title="Planted answers")
        recall.invert_yaxis()
        if bars:
            recall.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
