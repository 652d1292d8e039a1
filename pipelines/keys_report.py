"""Tables and pictures of a training of routing keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.evaluation.statistics import Estimate, clustered_mean
from actors.training.key_trainer import Placed
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.plots import figure
from cluster.tables import Table
from models.gistnet import GistNet

FIRST = (1, 4, 8)
"""Recall is counted among so many first blocks."""

MADE_FROM = "# The net it was made from"

Found = Mapping[str, Placed]
"""By kind of question."""


WHOLE = (4, 8)
"""And among so many whether all of an answer is, which often runs over two blocks."""


def recall(placed: Placed, first: int) -> Estimate:
    """Share of questions a block of whose answer is among the first found; the error by thing asked for."""
    return clustered_mean(np.asarray(placed.ranks) < first, placed.things)


def recall_of_all(placed: Placed, first: int) -> Estimate:
    """Share of questions all of whose answer is among the first blocks found."""
    return clustered_mean(np.asarray(placed.last_ranks) < first, placed.things)


def keys_tables(measured: Sequence[Mapping[str, Any]], rival: Found) -> list[Table]:
    """Recall before and after, beside the rival's, one table a kind of question."""
    tables = []
    for kind in measured[-1]["found"]:
        who = {
            "keys before training": measured[0]["found"][kind],
            "keys after it": measured[-1]["found"][kind],
            "all-MiniLM-L6-v2, of the blocks' text": rival[kind],
        }
        rows = [{"found by": name, **_shares(placed)} for name, placed in who.items()]
        count = len(measured[-1]["found"][kind].ranks)
        tables.append(Table(rows, f"Recall, questions of kind '{kind}': {count}, on text that was not trained on"))
    return tables


def _shares(placed: Placed) -> dict[str, str]:
    estimates = {
        **{f"among the first {k}": recall(placed, k) for k in FIRST},
        **{f"all of it among {k}": recall_of_all(placed, k) for k in WHOLE},
    }
    return {name: f"{e.mean:.1%} ± {e.standard_error:.1%}" for name, e in estimates.items()}


def keys_card(net: GistNet, lm_id: str, recipe: Mapping[str, Any], tables: Sequence[Table], begun_card: str) -> str:
    """What whoever finds the net should know: Markdown. `begun_card` is that of the net it was made from, or empty."""
    made_of = f"the states after {net.key_layer} layers" if net.key_layer else "token embeddings"
    if net.spec.key_reach:
        made_of += f" of the block and of the {net.spec.key_reach} tokens before it"
    parts = [
        f"# GistNet {net.net_id} for {lm_id}, with trained routing keys",
        f"Its gists are those of the net it was made from. Its routing keys, {net.key_dim} numbers for every {K} "
        f"tokens, are made of {made_of} and compared by cosine. sha256 {net.digest()}.",
        "Load it with `--gistnet.path <this folder>`.",
        *(table.markdown() for table in tables),
        Table([{"key": key, "value": str(value)} for key, value in recipe.items()], "Keys made with").markdown(),
    ]
    if begun_card:
        # Of a net whose keys are trained anew, what is said of the old ones no longer holds.
        parts.append(f"{MADE_FROM}\n\n{begun_card.rpartition(MADE_FROM)[2].strip()}")
    return "\n\n".join(parts) + "\n"


def plot_training(
    losses: Sequence[Mapping[str, float]], measured: Sequence[Mapping[str, Any]], rival: Found, path: Path
) -> None:
    """Losses by step, and recall by epoch with the rival's as a line."""
    with figure(path, "Routing keys", num_columns=2, size=(14.0, 4.0)) as (left, right):
        for name in losses[0]:
            if name not in {"step", "loss"}:
                points = [(line["step"], line[name]) for line in losses if name in line]
                left.plot(*zip(*points, strict=True), label=name, alpha=0.8)
        left.set(xlabel="step", ylabel="NLL of the answer among wrong blocks, nats", yscale="log")
        left.legend()
        epochs = [line["epoch"] for line in measured]
        for kind in measured[-1]["found"]:
            found = [recall(line["found"][kind], 1) for line in measured]
            means, errors = np.array([e.mean for e in found]), np.array([e.standard_error for e in found])
            (drawn,) = right.plot(epochs, means, marker="o", label=kind)
            right.fill_between(
                epochs, means - 2 * errors, means + 2 * errors, alpha=0.15, color=drawn.get_color(), linewidth=0
            )
            right.axhline(recall(rival[kind], 1).mean, color=drawn.get_color(), linestyle=":", label=f"{kind}, MiniLM")
        right.set(xlabel="epoch", ylabel="found first (two standard errors)", ylim=(0, 1))
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # lines are everywhere inside
