"""Tables and pictures of a training of routing keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.statistics import Estimate, clustered_mean
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.plots import figure
from cluster.tables import Table
from models.gistnet import GistNet

FIRST = (1, 4, 8)
"""Recall is counted among so many first blocks."""

Ranks = Mapping[str, list[int]]


def recall(ranks: Sequence[int], first: int) -> Estimate:
    """Share of questions whose answer is among the first blocks found."""
    found = np.asarray(ranks) < first
    return clustered_mean(found, [str(number) for number in range(len(found))])


def keys_tables(measured: Sequence[Mapping[str, Any]], rival: Ranks) -> list[Table]:
    """Recall before and after, beside the rival's, one table a kind of question."""
    tables = []
    for kind in measured[-1]["ranks"]:
        who = {
            "keys before training": measured[0]["ranks"][kind],
            "keys after it": measured[-1]["ranks"][kind],
            **({"all-MiniLM-L6-v2, of the blocks' text": rival[kind]} if kind in rival else {}),
        }
        rows = [{"found by": name, **_shares(ranks)} for name, ranks in who.items()]
        count = len(measured[-1]["ranks"][kind])
        tables.append(Table(rows, f"Recall, questions of kind '{kind}': {count}, on text that was not trained on"))
    return tables


def _shares(ranks: Sequence[int]) -> dict[str, str]:
    estimates = {f"among the first {k}": recall(ranks, k) for k in FIRST}
    return {name: f"{e.mean:.1%} ± {e.standard_error:.1%}" for name, e in estimates.items()}


def keys_card(net: GistNet, lm_id: str, recipe: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """What whoever finds the net should know: Markdown."""
    made_of = f"the states after {net.key_layer} layers" if net.key_layer else "token embeddings"
    parts = [
        f"# GistNet {net.net_id} for {lm_id}, with trained routing keys",
        f"Its gists are those of the net it was made from. Its routing keys, {net.key_dim} numbers for every {K} "
        f"tokens, are made of {made_of} and compared by cosine. sha256 {net.digest()}.",
        "Load it with `--gistnet.path <this folder>`.",
        *(table.markdown() for table in tables),
        Table([{"key": key, "value": str(value)} for key, value in recipe.items()], "Keys made with").markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def plot_training(
    losses: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, Any]], rival: Ranks, path: Path
) -> None:
    """Losses by step, and recall by epoch with the rival's as a line."""
    with figure(path, "Routing keys", num_columns=2, size=(12.0, 4.0)) as (left, right):
        for name in losses[0]:
            if name not in {"step", "loss"}:
                points = [(line["step"], line[name]) for line in losses if name in line]
                left.plot(*zip(*points, strict=True), label=name, alpha=0.8)
        left.set(xlabel="step", ylabel="NLL of the answer among all blocks, nats", yscale="log")
        left.legend()
        epochs = [line["epoch"] for line in measured]
        for kind in measured[-1]["ranks"]:
            found = [recall(line["ranks"][kind], 1) for line in measured]
            means, errors = np.array([e.mean for e in found]), np.array([e.standard_error for e in found])
            (drawn,) = right.plot(epochs, means, marker="o", label=kind)
            right.fill_between(
                epochs, means - 2 * errors, means + 2 * errors, alpha=0.15, color=drawn.get_color(), linewidth=0
            )
            if kind in rival:
                right.axhline(
                    recall(rival[kind], 1).mean, color=drawn.get_color(), linestyle=":", label=f"{kind}, MiniLM"
                )
        right.set(xlabel="epoch", ylabel="found first (two standard errors)", ylim=(0, 1))
        right.legend()
