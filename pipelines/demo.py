"""demo: compact a real corpus, show the tree, and let the real model read it back.

What `make demo` runs. A second run resumes: what is compacted already is not compacted again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from cluster.run import JobRun

from actors.read_back import CONDITIONS, FULL, NONE, OWN, RECENT, SHUFFLED, ReadBackResult, read_back
from cluster import metric_names as names
from cluster.config import DemoJob, ReadBackConfig
from cluster.plots import figure, save_figure
from cluster.tables import print_table
from models.base_lm import BaseLM
from pipelines.compact import compact, compaction_tables, prepare, report_compaction, result_report
from pipelines.tree_report import encoding_rows, measure_tree
from storage.corpus import open_corpus
from storage.store import Store

Tables = list[tuple[str, list[dict[str, object]]]]

DESCRIPTIONS = {
    FULL: "the raw history",
    NONE: "nothing",
    OWN: "the history's gists",
    SHUFFLED: "another place's gists (control)",
    RECENT: "as many recent raw tokens as gists (rival)",
}


def run(job: DemoJob) -> None:
    """Compact, show, read back, report."""
    source = open_corpus(job.corpus)
    plan = prepare(job, source)
    with JobRun.start("demo", job) as job_run:
        result = compact(job, plan, source, job_run)
        tree = measure_tree(job.store)
        picture = report_compaction(job_run, result, tree)
        tables: Tables = [
            *compaction_tables(result, tree),
            ("What made the gists", encoding_rows(tree.version.encoding)),
        ]
        for title, rows in tables:
            print_table(title, rows)

        lm = BaseLM.load(plan.base_lm)
        with (
            Store(job.store.root).open_reader(job.store.context) as reader,
            job_run.progress(job.read_back.num_samples, "places", "reading back") as progress,
        ):
            torch.set_num_threads(max(torch.get_num_threads(), 1))
            reading = read_back(lm, reader, job.read_back, on_place=lambda: progress.advance(1))
        trained = bool(job.gistnet.path)
        tables.append((reading_title(job.read_back, reading, trained=trained), reading_rows(reading)))
        print_table(*tables[-1])
        plot_reading(reading, job_run.folder)

        numbers = reading_numbers(reading)
        job_run.log_metrics(numbers)
        job_run.finish({**result_report(result, tree), **numbers, "gistnet_trained": trained}, tables)
        where_to_look(job, job_run.folder, picture)


def reading_title(config: ReadBackConfig, reading: ReadBackResult, *, trained: bool) -> str:
    """Says what was measured, and that untrained gists are untrained."""
    state = "trained" if trained else "UNTRAINED: little to expect"
    return (
        f"The model reads {config.horizon_tokens - 1} tokens at {len(reading.places)} places after "
        f"{config.history_tokens} tokens of history (gists: {state})"
    )


def reading_rows(reading: ReadBackResult) -> list[dict[str, object]]:
    """One row a condition."""
    rows: list[dict[str, object]] = []
    for condition in CONDITIONS:
        nll, gain = reading.estimate(condition), reading.gain(condition)
        rows.append(
            {
                "before the horizon": DESCRIPTIONS[condition],
                "NLL, nats/token": f"{nll.mean:.3f} ± {nll.standard_error:.3f}",
                "gain over nothing": "" if condition == NONE else f"{gain.mean:+.3f} ± {gain.standard_error:.3f}",
                "recovered": "" if condition == NONE else f"{reading.recovered_fraction(condition):.0%}",
            }
        )
    content = reading.content_nats
    rows.append(
        {
            "before the horizon": "content_nats (shuffled - own)",
            "NLL, nats/token": f"{content.mean:+.3f} ± {content.standard_error:.3f}",
            "gain over nothing": "",
            "recovered": "",
        }
    )
    return rows


def reading_numbers(reading: ReadBackResult) -> dict[str, float]:
    """The reading as metrics."""
    return {
        names.NLL_FULL: reading.estimate(FULL).mean,
        names.NLL_NONE: reading.estimate(NONE).mean,
        names.NLL_GISTS: reading.estimate(OWN).mean,
        "nll_shuffled_gists": reading.estimate(SHUFFLED).mean,
        "nll_recent_raw": reading.estimate(RECENT).mean,
        names.DELTA_NLL: reading.estimate(OWN).mean - reading.estimate(FULL).mean,
        names.RECOVERED_FRACTION: reading.recovered_fraction(OWN),
        "content_nats": reading.content_nats.mean,
        "content_nats_se": reading.content_nats.standard_error,
    }


def plot_reading(reading: ReadBackResult, folder: Path) -> Path:
    """NLL by condition with error bars: `read_back.png`."""
    fig, axes = figure(1, 1)
    ax = axes[0]
    estimates = [reading.estimate(condition) for condition in CONDITIONS]
    ax.barh(
        [DESCRIPTIONS[condition] for condition in CONDITIONS],
        [estimate.mean for estimate in estimates],
        xerr=[estimate.standard_error for estimate in estimates],
        capsize=3,
    )
    ax.invert_yaxis()
    ax.set(xlabel="NLL of the horizon, nats a token (lower is better)", title="What stands before the horizon")
    return save_figure(fig, folder / "read_back.png")


def where_to_look(job: DemoJob, folder: Path, picture: Path | None) -> None:
    """The last lines of the demo: where everything is."""
    tracking = job.tracking.uri or f"sqlite:///{job.run.dir}/mlflow.db"
    lines = [
        f"report   {folder / 'report.md'}",
        f"pictures {picture or folder / 'tree.png'}, {folder / 'read_back.png'}",
        f"tree     python ray_job.py inspect --store.root {job.store.root} --store.context {job.store.context}",
    ]
    if job.tracking.enabled:
        lines.append(f"MLflow   .venv/bin/mlflow ui --backend-store-uri {tracking} --host 127.0.0.1")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
