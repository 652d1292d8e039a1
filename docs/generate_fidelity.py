"""Writes tables and pictures of `fidelity.md` from the packed samples: `python docs/generate_fidelity.py`.

A folder `fidelity/<case>/<kind of text>` holds what a run of `evaluate gist` measured; the cases are those of
`actors/evaluation/fidelity.py`. To add a run, or places to one that is there:
`python docs/generate_fidelity.py <run's folder>=<case>/<kind> …`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from actors.evaluation.fidelity import CASES, FidelityRun, together
from pipelines.fidelity_report import Runs, bars_table, case_tables, plot_cases
from pipelines.packed_runs import pack_named, with_tables

PAGE = Path(__file__).with_name("fidelity.md")
FOLDER = Path(__file__).with_name("fidelity")
PROGRAM = "docs/generate_fidelity.py"


def read_runs() -> Runs:
    """All packed runs."""
    runs = {}
    for case in CASES:
        folders = sorted(path.parent for path in FOLDER.glob(f"{case.name}/*/config.yaml"))
        if folders:
            runs[case.name] = together([FidelityRun.read(folder.name, folder, case) for folder in folders])
    return runs


def render(runs: Runs) -> str:
    """The page, with its tables anew."""
    page = with_tables(PAGE.read_text(encoding="utf-8"), PROGRAM, "bars", [bars_table(runs)])
    return with_tables(page, PROGRAM, "cases", case_tables(runs))


def main(arguments: list[str]) -> None:
    """Pack what is named, then write the page and its picture."""
    pack_named(arguments, FOLDER)
    runs = read_runs()
    PAGE.write_text(render(runs), encoding="utf-8")
    bars_table(runs).show()
    plot_cases(runs, FOLDER / "lost.png")


if __name__ == "__main__":
    main(sys.argv[1:])
