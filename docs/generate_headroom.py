"""Writes tables and pictures of `headroom.md` from the packed samples: `python docs/generate_headroom.py`.

A folder `headroom/<group>/<kind of text>-<length>` holds what runs of `evaluate focus` measured: `gate` who wins, at
every place; `positions` and `thorough` what is compared at some of them. To add a run, or places to one that is there:
`python docs/generate_headroom.py <run's folder>=<group>/<kind>-<length> …`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actors.evaluation.headroom import Cell, FocusRun, cells_of
from cluster.tables import Table
from pipelines.headroom_report import headroom_tables, plot_chosen, plot_gaps, plot_long_context
from pipelines.packed_runs import pack_named, with_tables

PAGE = Path(__file__).with_name("headroom.md")
FOLDER = Path(__file__).with_name("headroom")
BASE, ORACLE = "recency/raw", "oracle/raw"
GATE = "gate"
PROGRAM = "docs/generate_headroom.py"


def read_groups() -> dict[str, list[Cell]]:
    """Cells of all packed runs."""
    groups: dict[str, list[FocusRun]] = {}
    for folder in sorted(path.parent for path in FOLDER.glob("*/*/config.yaml")):
        run = FocusRun.read(folder.name.rpartition("-")[0], folder)
        groups.setdefault(folder.parent.name, []).append(run)
    return {group: cells_of(runs) for group, runs in groups.items()}


def render(groups: dict[str, list[Cell]]) -> str:
    """The page, with its tables anew."""
    page = PAGE.read_text(encoding="utf-8")
    for group, cells in groups.items():
        # The legend stands once, above all of them.
        tables = [Table(t.rows, t.title.partition(": nats")[0]) for t in headroom_tables(cells, BASE, ORACLE)]
        page = with_tables(page, PROGRAM, group, tables)
    return page


def main(arguments: list[str]) -> None:
    """Pack what is named, then write the page and its pictures."""
    pack_named(arguments, FOLDER)
    groups = read_groups()
    PAGE.write_text(render(groups), encoding="utf-8")
    cells = groups[GATE]
    plot_gaps(cells, BASE, FOLDER / "gaps.png")
    plot_chosen(cells, ORACLE, FOLDER / "chosen.png")
    plot_long_context(cells, BASE, FOLDER / "long-context.png")


if __name__ == "__main__":
    main(sys.argv[1:])
