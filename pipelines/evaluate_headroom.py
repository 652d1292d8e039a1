"""evaluate headroom: how much is there to win by choosing what is shown, in which form, and who wins it?

Reads several runs of `evaluate focus` (kinds of text, lengths, budgets) as one answer. Starts no cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.evaluation.headroom import Cell, FocusRun, cells_of
from cluster.headroom_config import EvaluateHeadroomJob
from cluster.run import JobRun
from pipelines.headroom_report import cells_as_report, headroom_tables, plot_chosen, plot_gaps, plot_long_context


def run(job: EvaluateHeadroomJob) -> None:
    """Read the runs, tell their cells apart, report."""
    config = job.headroom
    runs = [FocusRun.read(kind, Path(folder)) for kind, _, folder in (given.partition("=") for given in config.runs)]
    cells = cells_of(runs)
    with JobRun.start("evaluate headroom", job) as job_run:
        report(cells, config.base, config.oracle, job_run)


def report(cells: list[Cell], base: str, oracle: str, job_run: JobRun) -> None:
    """Tables, plots, report."""
    tables = headroom_tables(cells, base, oracle)
    for table in tables:
        table.show()
    plot_gaps(cells, base, job_run.folder / "gaps.png")
    plot_chosen(cells, oracle, job_run.folder / "chosen.png")
    plot_long_context(cells, base, job_run.folder / "long-context.png")
    numbers: dict[str, Any] = {"cells": cells_as_report(cells, base, oracle)}
    job_run.finish(numbers, tables)
    print(f"report    {job_run.folder / 'report.md'}")
