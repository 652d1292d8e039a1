"""Tables, picture and card of a trained LensNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.statistics import clustered_mean
from actors.training.lens_data import MeasuredSet
from actors.training.lens_folds import EVERYTHING, FoldedRanks
from actors.training.lens_metrics import (
    CHOSEN,
    RIVALS,
    Ranked,
    calibration,
    rank_sets,
    share_of_gap,
    split_half_gains,
    usable,
)
from cluster.plots import figure
from cluster.tables import Table
from models.lensnet.net import LensNet

LENSNET, THRESHOLD = "LensNet", "LensNet, above 0"


def _ranked(net: LensNet, sets: Sequence[MeasuredSet]) -> dict[str, Ranked]:
    def scores(found: MeasuredSet) -> np.ndarray:
        return net.scores(found.candidates)

    ranked = {LENSNET: rank_sets(sets, scores), THRESHOLD: rank_sets(sets, scores, above=0.0)}
    return ranked | {name: rank_sets(sets, rival) for name, rival in RIVALS.items()}


def lens_tables(net: LensNet, held_back: Sequence[MeasuredSet]) -> list[Table]:
    """Who orders blocks best, and what scores come to."""
    sets = usable(held_back)
    documents = [found.uri for found in sets]
    ranked = _ranked(net, sets)
    rows: list[dict[str, Any]] = []
    for name, found in ranked.items():
        rows.append(
            {
                "by": name,
                **{f"first {k}, nats a token": str(clustered_mean(found.gains[k], documents)) for k in CHOSEN},
                "the best first": _share(found.hits, documents),
                "rank correlation": str(clustered_mean(found.correlations, documents)),
                "pairs in order": _share(found.agreements, documents),
            }
        )
    ceiling = {k: split_half_gains(sets, k) for k in CHOSEN}
    rows.append(
        {
            "by": "split-half oracle",
            **{f"first {k}, nats a token": str(clustered_mean(ceiling[k], documents)) for k in CHOSEN},
        }
    )
    title = f"{len(sets)} Working Contexts of {len(set(documents))} documents that were not trained on"
    bins = [
        {"mean score": score, "measured": str(worth), "blocks": count}
        for score, worth, count in calibration(sets, lambda found: net.scores(found.candidates))
    ]
    return [Table(rows, title), Table(bins, "What scores come to, nats a token")]


def lens_numbers(net: LensNet, held_back: Sequence[MeasuredSet]) -> dict[str, Any]:
    """For programs."""
    sets = usable(held_back)
    documents = [found.uri for found in sets]
    ranked = _ranked(net, sets)
    numbers: dict[str, Any] = {"num_sets": len(sets), "num_documents": len(set(documents)), "by": {}}
    for name, found in ranked.items():
        numbers["by"][name] = {
            **{f"gain@{k}": clustered_mean(found.gains[k], documents).mean for k in CHOSEN},
            **{f"gain@{k}_error": clustered_mean(found.gains[k], documents).standard_error for k in CHOSEN},
            "hit@1": float(found.hits.mean()),
            "rank_correlation": float(found.correlations.mean()),
            "preference_agreement": float(found.agreements.mean()),
        }
    for k in CHOSEN:
        ceiling = split_half_gains(sets, k)
        best = max(RIVALS, key=lambda name: ranked[name].gains[k].mean())
        share = share_of_gap(ranked[THRESHOLD].gains[k], ranked[best].gains[k], ceiling, documents)
        numbers[f"oracle_gain@{k}"] = float(ceiling.mean())
        numbers[f"best_rival@{k}"] = best
        numbers[f"share_of_gap@{k}"] = share.mean
        numbers[f"share_of_gap@{k}_error"] = share.standard_error
    return numbers


def folds_tables(folded: Mapping[str, FoldedRanks], sets: Sequence[MeasuredSet]) -> list[Table]:
    """What nets do on documents they have not seen, beside their rivals; and what leaving something out costs.

    Args:
        folded: by what was left out, `EVERYTHING` among them.
        sets: those that were ordered, in the order of `FoldedRanks.documents`.
    """
    whole = folded[EVERYTHING]
    documents = whole.documents
    ranked = {LENSNET: whole.ordered, THRESHOLD: whole.above_zero}
    ranked |= {name: rank_sets(sets, rival) for name, rival in RIVALS.items()}
    ceiling = {k: split_half_gains(sets, k) for k in CHOSEN}
    rows: list[dict[str, Any]] = [
        {
            "by": name,
            **{f"first {k}, nats a token": str(clustered_mean(found.gains[k], documents)) for k in CHOSEN},
            "rank correlation": str(clustered_mean(found.correlations, documents)),
            "pairs in order": _share(found.agreements, documents),
        }
        for name, found in ranked.items()
    ]
    rows.append(
        {
            "by": "split-half oracle",
            **{f"first {k}, nats a token": str(clustered_mean(ceiling[k], documents)) for k in CHOSEN},
        }
    )
    title = (
        f"Every document by a net that has not seen it: {len(sets)} Working Contexts, {len(set(documents))} documents"
    )
    tables = [Table(rows, title)]
    if len(folded) > 1:
        last = CHOSEN[-1]
        without = []
        for name, found in folded.items():
            pairs = {
                f"first {last} above 0": (found.above_zero.gains[last], whole.above_zero.gains[last]),
                "rank correlation": (found.ordered.correlations, whole.ordered.correlations),
                "pairs in order": (found.ordered.agreements, whole.ordered.agreements),
            }
            if name != EVERYTHING:
                costs = {what: str(clustered_mean(own - base, documents)) for what, (own, base) in pairs.items()}
                without.append({"without": name, **costs})
        tables.append(
            Table(
                without,
                "What leaving out does, less the whole net (worse is negative; one training each, ± by document)",
            )
        )
    return tables


def folds_numbers(folded: Mapping[str, FoldedRanks], sets: Sequence[MeasuredSet]) -> dict[str, Any]:
    """For programs."""
    numbers: dict[str, Any] = {}
    for name, found in folded.items():
        numbers[name] = {}
        for k in CHOSEN:
            gain = clustered_mean(found.above_zero.gains[k], found.documents)
            numbers[name] |= {f"gain@{k}": gain.mean, f"gain@{k}_error": gain.standard_error}
        correlation = clustered_mean(found.ordered.correlations, found.documents)
        numbers[name] |= {"rank_correlation": correlation.mean, "rank_correlation_error": correlation.standard_error}
    return {"num_sets": len(sets), "without": numbers}


def lens_card(net: LensNet, recipe: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """What whoever finds the net should know: Markdown."""
    told = ", ".join(net.spec.features)
    count = sum(parameter.numel() for parameter in net.parameters())
    parts = [
        "# LensNet",
        f"Scores blocks that a Working Context could show: {count:,} weights, {net.spec.num_layers} layers of "
        f"attention among the candidates. Told: {told}. sha256 {net.digest()}.",
        *(table.markdown() for table in tables),
        Table([{"key": key, "value": str(value)} for key, value in recipe.items()], "Trained with").markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def plot_lens(
    losses: Sequence[Mapping[str, float]], net: LensNet, held_back: Sequence[MeasuredSet], path: Path
) -> None:
    """Losses by step; what scores come to; what the first blocks of every order are worth."""
    sets = usable(held_back)
    documents = [found.uri for found in sets]
    with figure(path, "LensNet", num_columns=3, size=(17.0, 4.5)) as (left, middle, right):
        steps = [line["step"] for line in losses]
        for name in ("regression", "preference", "balance"):
            left.plot(steps, [line[name] for line in losses], label=name, alpha=0.8)
        left.set(xlabel="step", ylabel="loss", yscale="log")
        left.legend()
        bins = calibration(sets, lambda found: net.scores(found.candidates))
        given = [score for score, _, _ in bins]
        middle.errorbar(
            given, [worth.mean for _, worth, _ in bins], yerr=[2 * worth.standard_error for _, worth, _ in bins],
            marker="o", linestyle="none",
        )  # fmt: skip
        edge = max(map(abs, given), default=0.1)
        middle.plot([-edge, edge], [-edge, edge], color="grey", linestyle=":", label="as said")
        middle.set(xlabel="score, nats a token", ylabel="measured (two standard errors)")
        middle.legend()
        names = [*_ranked(net, sets).items()]
        for row, k in enumerate(CHOSEN):
            found = [clustered_mean(ranked.gains[k], documents) for _, ranked in names]
            found.append(clustered_mean(split_half_gains(sets, k), documents))
            places = np.arange(len(found)) + 0.2 * (row - 0.5)
            right.errorbar(
                [e.mean for e in found], places, xerr=[2 * e.standard_error for e in found], marker="o",
                linestyle="none", label=f"first {k}",
            )  # fmt: skip
        right.set_yticks(range(len(names) + 1), [*(name for name, _ in names), "split-half oracle"])
        right.axvline(0, color="grey", linewidth=0.8)
        right.set(xlabel="worth, nats a token (two standard errors)")
        right.legend()


def _share(values: np.ndarray, documents: Sequence[str]) -> str:
    estimate = clustered_mean(values, documents)
    return f"{estimate.mean:.0%} ± {estimate.standard_error:.0%}"
