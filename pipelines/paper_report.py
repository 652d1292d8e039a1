"""Tables, figures and text of `paper 0`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from actors.evaluation.fidelity import BARS, CASES, CLAIM_PLACES, FidelityRun, Measure, measured
from actors.evaluation.headroom import Cell
from actors.evaluation.latency import Latency, crossing
from cluster.paper_config import PaperJob
from cluster.plots import figure
from cluster.tables import Table
from pipelines.fidelity_report import bars_table, case_tables, plot_cases
from pipelines.headroom_report import cells_as_report, headroom_tables, plot_chosen, plot_gaps, plot_long_context

BASE, ORACLE = "recency/raw", "oracle/raw"
TITLE = "A virtualised context for a frozen language model"

LATENCIES: Mapping[str, str] = {
    "answered_s": "from new text to an answer's first token, s",
    "decode_s": "a decoded token, refocuses included, s",
    "cache_bytes": "keys and values, bytes",
}
"""Measures of `Latency` that are compared, and what they are."""


@dataclass(frozen=True)
class Paper:
    """Everything that was measured."""

    fidelity: Mapping[str, Sequence[FidelityRun]]
    """By case: each kind of text, and all of them."""
    cells: Sequence[Cell]
    """Focus, each kind of text, and all of them."""
    lensnet: Mapping[str, Any] | None
    """The report of the LensNet's training; None where one was given."""
    latency: Sequence[Latency]
    digests: Mapping[str, str]
    stages: Mapping[str, Mapping[str, Any]]
    """Reports of the stages' runs, by stage."""

    def tables(self) -> list[Table]:
        """All of them, in the order of the text."""
        found = [bars_table(self.fidelity), *case_tables(self.fidelity), *headroom_tables(self.cells, BASE, ORACLE)]
        if self.cells:
            found.append(focus_table(self.cells))
        if self.lensnet is not None:
            found.append(lens_table(self.lensnet))
        if self.latency:
            found.append(latency_table(self.latency))
        return found


def focus_table(cells: Sequence[Cell]) -> Table:
    """Every condition of every cell: gain over recency in raw blocks, and LensNet's share of the oracle's gap."""
    rows = []
    for cell in cells:
        row: dict[str, object] = {"text, history / budget": cell.name, "places": cell.num_places}
        for condition in cell.conditions:
            if condition not in {BASE, "none"}:
                row[condition] = str(cell.gain(condition, BASE))
        rows.append(row)
    return Table(rows, f"Every condition: gain over {BASE} on the half no oracle chose on, nats a token")


def lens_table(report: Mapping[str, Any]) -> Table:
    """What LensNet's order is worth on labels of documents that were held back, beside its rivals."""
    rows = [{"order by": name, **numbers} for name, numbers in report["by"].items()]
    return Table(rows, f"LensNet on labels of {report['num_documents']} documents that were held back, nats a token")


def latency_medians(latency: Sequence[Latency], name: str, *, focused: bool) -> tuple[list[int], np.ndarray]:
    """Lengths, and of each `(median, lowest, highest)`, `(n, 3)`."""
    lengths = sorted({of.tokens for of in latency})
    values = [[getattr(of, name) for of in latency if of.tokens == n and of.focused == focused] for n in lengths]
    return lengths, np.array([[np.median(of), np.min(of), np.max(of)] for of in values])


def latency_crossings(latency: Sequence[Latency]) -> dict[str, float | None]:
    """By measure the length from which on a session costs less; None where it never does."""
    found = {}
    for name in LATENCIES:
        lengths, full = latency_medians(latency, name, focused=False)
        _, focused = latency_medians(latency, name, focused=True)
        found[name] = crossing(lengths, full[:, 0].tolist(), focused[:, 0].tolist())
    return found


def latency_table(latency: Sequence[Latency]) -> Table:
    """The session's cost as a multiple of the full context's: absolute times mean nothing elsewhere."""
    rows: list[dict[str, object]] = []
    crossings = latency_crossings(latency)
    for name, what in LATENCIES.items():
        lengths, full = latency_medians(latency, name, focused=False)
        _, focused = latency_medians(latency, name, focused=True)
        ratios = {f"{n:,} tokens": f"{b / a:.2f}" for n, a, b in zip(lengths, full[:, 0], focused[:, 0], strict=True)}
        at = crossings[name]
        rows.append({"session over full context": what.rpartition(",")[0], **ratios, "less from": _tokens(at)})
    return Table(rows, "What a session costs, as a multiple of the model that keeps everything (medians)")


def _tokens(at: float | None) -> str:
    return "nowhere measured" if at is None else f"{at:,.0f} tokens on"


def paper_numbers(paper: Paper) -> dict[str, Any]:
    """For `report.json` and the notebook: every number with its standard error."""
    fidelity: dict[str, Any] = {}
    for case in CASES:
        for run in paper.fidelity.get(case.name, ()):
            entry: dict[str, Any] = {"num_places": len(run.results.samples)}
            for name in get_args(Measure):
                estimate = measured(run.results, case.setting, name)
                entry[name], entry[f"{name}_se"] = estimate.mean, estimate.standard_error
            fidelity.setdefault(case.name, {})[run.kind] = entry
    bars = [{"case": bar.case, "measure": bar.measure, "bound": bar.bound} for bar in BARS]
    numbers: dict[str, Any] = {
        "fidelity": fidelity,
        "bars": bars,
        "focus": cells_as_report(paper.cells, BASE, ORACLE),
        "stage_seconds": {name: report.get("wall_seconds") for name, report in paper.stages.items()},
    }
    if paper.lensnet is not None:
        numbers["lensnet"] = {key: paper.lensnet[key] for key in paper.lensnet if key == "by" or "@" in key}
    if paper.latency:
        numbers["latency"] = [vars(of) for of in paper.latency]
        numbers["latency_crossings"] = latency_crossings(paper.latency)
    return numbers


def plot_paper(paper: Paper, folder: Path) -> None:
    """Every figure."""
    if paper.fidelity:
        plot_cases(paper.fidelity, folder / "fidelity.png")
    plot_gaps(paper.cells, BASE, folder / "gaps.png")
    if any(cell.has(ORACLE) for cell in paper.cells):
        plot_chosen(paper.cells, ORACLE, folder / "chosen.png")
    plot_long_context(paper.cells, BASE, folder / "long-context.png")
    if paper.latency:
        plot_latency(paper.latency, folder / "latency.png")


def plot_latency(latency: Sequence[Latency], path: Path) -> None:
    """Both ways by length, a panel a measure, with the range of the repeats."""
    with figure(path, "A session against a full context", num_columns=len(LATENCIES), size=(13.0, 4.0)) as axes:
        panels = np.atleast_1d(np.asarray(axes))
        for panel, (name, what) in zip(panels, LATENCIES.items(), strict=True):
            for focused, label in ((False, "full context"), (True, "session")):
                lengths, values = latency_medians(latency, name, focused=focused)
                spread = np.abs(values[:, 1:] - values[:, :1]).T
                panel.errorbar(lengths, values[:, 0], yerr=spread, marker="o", capsize=3, label=label)
            panel.set(xlabel="tokens read", ylabel=what, ylim=(0, None))
        panels[0].legend()


def paper_text(paper: Paper, job: PaperJob, folder: Path) -> str:
    """The paper, Markdown: what was asked, how it was measured, what came out, tables and figures."""
    config = job.paper
    num_places = max((cell.num_places for cell in paper.cells), default=0)
    claim = "" if num_places >= CLAIM_PLACES else f" **{num_places} places are a look: a claim needs {CLAIM_PLACES}.**"
    figures = {path.stem: path.name for path in sorted(folder.glob("*.png"))}

    def shown(name: str, caption: str) -> list[str]:
        return [f"![{caption}]({figures[name]})", f"*{caption}*"] if name in figures else []

    fidelity = [bars_table(paper.fidelity), *case_tables(paper.fidelity)]
    focus = [*headroom_tables(paper.cells, BASE, ORACLE), focus_table(paper.cells)]
    parts = [
        f"# {TITLE}",
        "A frozen language model reads without end: everything it has read lives in a tree of learned gists, and a "
        f"Working Context of {config.budget} rows shows it at mixed levels of detail. Three questions, each measured "
        "by one run of one command: what are gists worth in place of the text they were made of; who chooses best "
        "what is shown in detail; what does it cost beside the model that keeps everything in its context.",
        "## What was run",
        _setting(paper, job).markdown(),
        Table(
            [{"what": name, "sha256": digest} for name, digest in sorted(paper.digests.items())], "Digests"
        ).markdown(),
        "## Substitutability",
        "The history before a horizon is replaced by gists. `content_nats` is what they say about their own text and "
        "not as a soft prompt: NLL behind another text's gists less NLL behind their own. ± is a standard error by "
        f"document.{claim}",
        *(_below(table) for table in fidelity),
        *shown("fidelity", "NLL lost by position in the horizon"),
        "## Focus",
        f"At equal slots ({config.budget}), histories of {config.history_tokens:,}. Gains are over the newest tokens "
        "alone, on the half of the horizon's tokens that no oracle chose on; * marks what is more than three standard "
        f"errors from zero.{claim}",
        *(_below(table) for table in focus),
        *shown("gaps", "Gain over recency by chooser"),
        *shown("chosen", "What the oracle shows"),
        *shown("long-context", "Where long context matters"),
    ]
    if paper.lensnet is not None:
        parts += ["## LensNet", _below(lens_table(paper.lensnet))]
    if paper.latency:
        parts += [
            "## Cost",
            "The session writes what it reads to disk, makes gists, searches, refocuses every "
            f"{job.session.refocus_tokens} tokens and decodes behind {job.session.budget} rows; the other side reads "
            "and keeps every token. Same model, same threads, in turns.",
            _below(latency_table(paper.latency)),
            *shown("latency", "Time and memory by length"),
        ]
    return "\n\n".join([*parts, _outlook(job)]) + "\n"


def _below(table: Table) -> str:
    """A table whose title is a heading below those of the text."""
    return f"#{table.markdown()}"


def _setting(paper: Paper, job: PaperJob) -> Table:
    config = job.paper
    compacted = {name: report for name, report in paper.stages.items() if name.startswith("compact-")}
    rows: list[dict[str, object]] = [
        {"what": "model", "value": f"{job.base_lm.source}, frozen, {job.base_lm.dtype}"},
        {"what": "GistNet", "value": config.gistnet_recipe or job.gistnet.path or f"untrained {job.gistnet.kind}"},
        {"what": "LensNet", "value": config.lensnet or f"trained on {config.label_places} places a kind of text"},
        *(
            {"what": f"text, {name.removeprefix('compact-')}", "value": f"{report.get('tokens_total', 0):,} tokens"}
            for name, report in sorted(compacted.items())
        ),
        {"what": "places a kind of text", "value": config.num_places},
        {"what": "seed", "value": config.seed},
        {
            "what": "machine",
            "value": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        },
        {"what": "revision", "value": next((r["git_revision"] for r in paper.stages.values()), "")},
    ]
    return Table(rows, "Setting")


def _outlook(job: PaperJob) -> str:
    return "\n\n".join(
        [
            "## What eight GPUs would change",
            f"This run used {job.base_lm.source} on the CPUs of one machine. The same command on a node of eight GPUs "
            "takes a larger base (`base_lm.source`), trains the GistNet for it first (`paper.gistnet_recipe`, with "
            "`training.num_workers=8`), and raises the places until standard errors stop mattering. What may be "
            "different in kind, and was not run here: wider embeddings leave a gist more room for 32 tokens, and hours "
            "of training become days; a base trained on long contexts gains more from what lies far back, so there is "
            "more to win by focus; decoding on a GPU is bound by memory traffic, so that a full context's keys and "
            "values, which grow with its length, weigh more against a Working Context's, which do not.",
        ]
    )
