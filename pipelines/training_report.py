"""Tables and pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.plots import figure
from cluster.tables import Table
from models.gistnet import GistNet

Lines = Sequence[Mapping[str, Any]]

NEWEST = 50
"""Steps at the end that a report's losses and times are means of."""


def training_tables(losses: Lines, fidelity: Lines, tokens_per_step: int) -> list[Table]:
    """The last steps, and what gists are worth on validation text, by raw tail."""
    newest = losses[-NEWEST:]

    def mean(name: str) -> float:
        return float(np.mean([line[name] for line in newest])) if newest else float("nan")

    steady = losses[1:][-NEWEST:] or newest
    step_s = float(np.mean([line["step_s"] for line in steady])) if steady else float("nan")
    rows = [
        {"of the newest steps": f"mean of {len(newest)}", "value": None},
        {"of the newest steps": "loss, nats a token", "value": mean("loss")},
        {"of the newest steps": "KL to the model that read everything raw, nats a token", "value": mean("kl")},
        {"of the newest steps": "NLL, nats a token", "value": mean("nll")},
        {"of the newest steps": "variance share of the gists", "value": mean("spread")},
        {"of the newest steps": "tokens a second", "value": tokens_per_step / step_s},
        {"of the newest steps": "waiting for data, share of the time", "value": mean("wait_s") / mean("step_s")},
    ]
    tables = [Table(rows, "Training")]
    if fidelity:
        tables.append(
            Table(fidelity_rows(fidelity[-1]), f"Validation after {fidelity[-1]['step']:,} steps, nats a token")
        )
    return tables


def fidelity_rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each length of raw tail, and one over all of them."""
    names = ("full", "own", "shuffled", "mean_gist")
    weights = np.array(line["num_tokens"])
    rows = []
    for group, count in enumerate(weights.tolist()):
        values = {name: line[name][group] for name in names}
        rows.append(_fidelity_row(f"{K * group} to {K * group + K - 1}", int(count), values))
    whole = {name: float(np.average(line[name], weights=weights)) for name in names}
    return [*rows, _fidelity_row("all", int(weights.sum()), whole)]


def _fidelity_row(tail: str, num_tokens: int, values: Mapping[str, float]) -> dict[str, Any]:
    return {
        "raw tail, tokens": tail,
        "tokens": num_tokens,
        "content_nats": values["shuffled"] - values["own"],
        "over the mean gist": values["mean_gist"] - values["own"],
        "NLL own": values["own"],
        "NLL shuffled": values["shuffled"],
        "NLL mean gist": values["mean_gist"],
        "NLL full": values["full"],
    }


def training_numbers(losses: Lines, fidelity: Lines, exported_step: int) -> dict[str, Any]:
    """For `report.json`."""
    numbers: dict[str, Any] = {"num_steps": len(losses), "exported_step": exported_step}
    if losses:
        numbers["last_step"] = dict(losses[-1])
    if fidelity:
        numbers["validation"] = fidelity_rows(fidelity[-1])
    return numbers


def model_card(net: GistNet, lm_id: str, recipe: Mapping[str, Any], fidelity: Lines, step: int) -> str:
    """What whoever finds the net should know: Markdown."""
    measured = [line for line in fidelity if line["step"] <= step]
    parts = [
        f"# GistNet {net.net_id} for {lm_id}",
        f"Makes {net.num_vectors} vector(s) of size {net.dim} of every {K} tokens, and a routing key. Distilled from "
        f"the frozen model for {step:,} steps; of no use to another one. sha256 {net.digest()}.",
        "Load it with `--gistnet.path <this folder>`.",
    ]
    if measured:
        rows = fidelity_rows(measured[-1])
        title = f"On text it was not trained on, after {measured[-1]['step']:,} steps, nats a token"
        parts.append(Table(rows, title).markdown())
    parts.append(Table([{"key": key, "value": str(value)} for key, value in recipe.items()], "Made with").markdown())
    return "\n\n".join(parts) + "\n"


def plot_losses(losses: Lines, path: Path) -> None:
    """KL and NLL step by step, and how different gists are."""
    with figure(path, "Training", num_columns=2, size=(11.0, 4.0)) as (left, right):
        steps = np.array([line["step"] for line in losses])
        for name in ("kl", "nll"):
            values = np.array([line[name] for line in losses])
            left.plot(steps, values, alpha=0.25)
            left.plot(steps, _smoothed(values), label=name, color=left.lines[-1].get_color())
        right.plot(steps, [line["spread"] for line in losses], label="variance share of the gists")
        left.set(xlabel="step", ylabel="nats a token", yscale="log")
        right.set(xlabel="step")
        left.legend()
        right.legend()


def plot_fidelity(fidelity: Lines, path: Path) -> None:
    """What gists say of the text, by raw tail, over training."""
    steps = [line["step"] for line in fidelity]
    with figure(path, "Validation: own gists over shuffled ones", size=(8.0, 4.0)) as axes:
        for group in range(len(fidelity[-1]["num_tokens"])):
            content = [line["shuffled"][group] - line["own"][group] for line in fidelity]
            axes.plot(steps, content, marker="o", label=f"tail of {K * group} to {K * group + K - 1} tokens")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="step", ylabel="content_nats, nats a token")
        axes.legend()


def _smoothed(values: np.ndarray, over: int = 20) -> np.ndarray:
    """Mean of the newest values at each step."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(stops - over, 0)
    return (sums[stops] - sums[starts]) / (stops - starts)
