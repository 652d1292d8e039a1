"""Tables and pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.training.worker import STAGES
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.plots import figure
from cluster.tables import Table
from models.adapter import SavedAdapter
from models.gistnet import GistNet

Lines = Sequence[Mapping[str, Any]]

STAGE_COLOURS = [f"tab:{name}" for name in ("olive", "orange", "green", "purple", "pink", "gray", "blue")]

NEWEST = 50
"""Steps at the end that a report's losses and times are means of."""


def training_tables(losses: Lines, fidelity: Lines) -> list[Table]:
    """The last steps, their speed, and what gists are worth on validation text, by raw tail."""
    newest = losses[-NEWEST:]

    def mean(name: str) -> float:
        return float(np.mean([line[name] for line in newest]))

    names = {
        "loss": "loss, as the objective weighs it",
        "kl": "KL to the model that read everything raw, nats a token that counts",
        "nll": "NLL behind gists, nats a token that counts",
        "states": "square distance to the teacher's states over their variance",
        "repeat": "NLL of a block behind its own gist alone, nats a token",
        "spread": "variance share of the gists",
        "inner": "square distance to where inner steps brought the gists, over the mean square there",
    }
    rows: list[dict[str, Any]] = [{"of the newest steps": f"mean of {len(newest)}", "value": None}]
    rows += [
        {"of the newest steps": text, "value": mean(name)}
        for name, text in names.items()
        if newest and name in newest[0]
    ]
    tables = [Table(rows, "Training"), Table(speed_rows(losses), "Speed, mean of the newest steps")]
    return [*tables, *(fidelity_tables(fidelity[-1]) if fidelity else [])]


def fidelity_tables(line: Mapping[str, Any]) -> list[Table]:
    """What one validation found, on text that was not trained on."""
    tables = [Table(fidelity_rows(line), f"Validation after {line['step']:,} steps, nats a token")]
    own, other = line["repeat_own"], line["repeat_shuffled"]
    row = {"own gist": own, "another block's": other, "difference": other - own}
    tables.append(Table([row], "Saying a block again from its gist alone, nats a token"))
    if "node_content" in line:
        tables.append(Table([{"content_nats": line["node_content"]}], "LOD2 gists, behind all else the same"))
    return tables


def speed_rows(losses: Lines) -> list[dict[str, Any]]:
    """Throughput, utilisation, memory, and where the time of a step goes. The first one warms up and is left out."""
    steady = losses[1:][-NEWEST:] or losses
    if not steady:
        return []

    def mean(name: str) -> float:
        return float(np.mean([line[name] for line in steady]))

    rows = [
        {"speed": "tokens a second", "value": mean("tokens_s")},
        {"speed": "utilisation (MFU): needed over possible multiplications", "value": mean("mfu")},
        {"speed": "most memory of a worker, GiB", "value": max(line["memory_gib"] for line in steady)},
        {"speed": "seconds a step", "value": mean("step_s")},
    ]
    rows += [{"speed": f"of it {stage}", "value": mean(f"{stage}_s") / mean("step_s")} for stage in STAGES]
    return rows


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
        values = [row["value"] for row in speed_rows(losses)]
        names = ("tokens_s", "mfu", "memory_gib", "step_s", *(f"{stage}_share" for stage in STAGES))
        numbers["speed"] = dict(zip(names, values, strict=True))
    if fidelity:
        numbers["validation"] = fidelity_rows(fidelity[-1])
        numbers["repeating"] = {name: fidelity[-1][name] for name in ("repeat_own", "repeat_shuffled")}
        if "node_content" in fidelity[-1]:
            numbers["node_content_nats"] = fidelity[-1]["node_content"]
    return numbers


def model_card(
    net: GistNet, adapter: SavedAdapter | None, lm_id: str, recipe: Mapping[str, Any], fidelity: Lines, step: int
) -> str:
    """What whoever finds the net should know: Markdown. `adapter`: the reader's, where it was trained with one."""
    measured = [line for line in fidelity if line["step"] <= step]
    parts = [
        f"# GistNet {net.net_id} for {lm_id}",
        f"Makes {net.num_vectors} vector(s) of size {net.dim} of every {K} tokens, and a routing key. Trained before "
        f"the frozen model for {step:,} steps, the best of those that were kept; of no use to another model. sha256 "
        f"{net.digest()}.",
        "Load it with `--gistnet.path <this folder>`.",
    ]
    if adapter is not None:
        parts.append(
            f"It was trained together with a LoRA adapter of {lm_id}, rank {adapter.rank}, for which its gists are "
            f"meant: the run's folder `adapter`, sha256 {adapter.digest()}. The numbers here are of a model that reads "
            "gists with it (`NLL full` of the stock one). `evaluate gist` does with `--base_lm.adapter <that folder>`."
        )
    if measured:
        parts += [table.markdown() for table in fidelity_tables(measured[-1])]
    parts.append(Table([{"key": key, "value": str(value)} for key, value in recipe.items()], "Made with").markdown())
    return "\n\n".join(parts) + "\n"


def plot_losses(losses: Lines, path: Path) -> None:
    """Losses step by step, and how different gists are."""
    with figure(path, "Training", num_columns=2, size=(11.0, 4.0)) as (left, right):
        steps = np.array([line["step"] for line in losses])
        for name in ("kl", "nll", "states", "repeat", "inner"):
            if name not in losses[0]:
                continue
            values = np.array([line[name] for line in losses])
            left.plot(steps, values, alpha=0.25)
            left.plot(steps, _smoothed(values), label=name, color=left.lines[-1].get_color())
        right.plot(steps, [line["spread"] for line in losses], label="variance share of the gists")
        left.set(xlabel="step", ylabel="nats a token (states, inner: shares)", yscale="log")
        right.set(xlabel="step")
        left.legend()
        right.legend()


def plot_speed(losses: Lines, path: Path) -> None:
    """Tokens a second and utilisation step by step, and where the time goes."""
    with figure(path, "Speed", num_columns=2, size=(11.0, 4.0)) as (left, right):
        steps = np.array([line["step"] for line in losses])
        left.plot(steps, [line["tokens_s"] for line in losses], label="tokens a second", color="tab:blue")
        left.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
        other = left.twinx()
        other.plot(steps, [line["mfu"] for line in losses], label="utilisation", color="tab:orange")
        other.set(ylabel="utilisation (MFU)", ylim=(0, 1))
        left.legend(loc="lower left")
        other.legend(loc="lower right")
        shares = [[line[f"{stage}_s"] / line["step_s"] for line in losses] for stage in STAGES]
        right.stackplot(steps, shares, labels=STAGES, colors=STAGE_COLOURS)
        right.set(xlabel="step", ylabel="share of a step's time", ylim=(0, 1))
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def plot_fidelity(fidelity: Lines, path: Path) -> None:
    """What gists say of the text over training: by raw tail, of LOD2, and when a block is to be said again."""
    steps = [line["step"] for line in fidelity]
    with figure(path, "Validation: own gists over shuffled ones", num_columns=2, size=(12.0, 4.0)) as (axes, right):
        for group in range(len(fidelity[-1]["num_tokens"])):
            content = [line["shuffled"][group] - line["own"][group] for line in fidelity]
            axes.plot(steps, content, marker="o", label=f"tail of {K * group} to {K * group + K - 1} tokens")
        axes.axhline(0, color="black", linewidth=0.8)
        if all("node_content" in line for line in fidelity):
            axes.plot(steps, [line["node_content"] for line in fidelity], marker="s", label="LOD2, all else the same")
        axes.set(xlabel="step", ylabel="content_nats, nats a token")
        axes.legend()
        for name, label in (("repeat_own", "own gist"), ("repeat_shuffled", "another block's")):
            right.plot(steps, [line[name] for line in fidelity], marker="o", label=label)
        right.set(xlabel="step", ylabel="a block behind its gist alone, nats a token")
        right.legend()


def _smoothed(values: np.ndarray, over: int = 20) -> np.ndarray:
    """Mean of the newest values at each step."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(stops - over, 0)
    return (sums[stops] - sums[starts]) / (stops - starts)
