"""Writes tables and pictures of `headroom.md` from the packed samples: `python docs/generate_headroom.py`.

A folder `headroom/<group>/<kind of text>-<length>` holds what runs of `evaluate focus` measured: `gate` who wins, at
every place; `positions` and `thorough` what is compared at some of them. To add a run, or places to one that is there:
`python docs/generate_headroom.py <run's folder>=<group>/<kind>-<length> …`.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import yaml

from actors.evaluation.headroom import Cell, FocusRun, cells_of
from cluster.tables import Table
from pipelines.headroom_report import headroom_tables, plot_chosen, plot_gaps, plot_long_context

PAGE = Path(__file__).with_name("headroom.md")
FOLDER = Path(__file__).with_name("headroom")
BASE, ORACLE = "recency/raw", "oracle/raw"
GATE = "gate"
BEGIN, END = "<!-- {group}: written by docs/generate_headroom.py -->", "<!-- {group}: to here -->"


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
        begin, end = BEGIN.format(group=group), END.format(group=group)
        before, found, rest = page.partition(begin)
        if not found:
            raise SystemExit(
                f"{PAGE} has no place for {group!r}: put these two lines where its tables should stand:\n{begin}\n{end}"
            )
        # The legend stands once, above all of them.
        tables = [Table(t.rows, t.title.partition(": nats")[0]) for t in headroom_tables(cells, BASE, ORACLE)]
        page = f"{before}{begin}\n\n" + "\n\n".join(t.markdown() for t in tables) + f"\n\n{end}{rest.partition(end)[2]}"
    return page


def pack(run: Path, name: str) -> None:
    """Add a run's places to those packed under a name."""
    target = FOLDER / name
    target.mkdir(parents=True, exist_ok=True)
    (samples,) = run.glob("samples-*.jsonl")
    packed = next(iter(target.glob("samples-*.jsonl.gz")), target / f"{samples.name}.gz")
    lines = gzip.decompress(packed.read_bytes()).splitlines() if packed.exists() else []
    places = {json.loads(line)["place"]["number"]: line for line in [*lines, *samples.read_bytes().splitlines()]}
    content = b"".join(places[number] + b"\n" for number in sorted(places))
    packed.write_bytes(gzip.compress(content, mtime=0))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    evaluation = {**recipe["evaluation"], "first_place": 0, "num_places": len(places)}
    kept = {"store": {"context": recipe["store"]["context"]}, "evaluation": evaluation}
    header = "# What the samples beside this were measured with; see ../../headroom.md.\n"
    (target / "config.yaml").write_text(header + yaml.safe_dump(kept, sort_keys=False))


def main(arguments: list[str]) -> None:
    """Pack what is named, then write the page and its pictures."""
    for argument in arguments:
        run, _, name = argument.partition("=")
        pack(Path(run), name)
    groups = read_groups()
    PAGE.write_text(render(groups), encoding="utf-8")
    cells = groups[GATE]
    plot_gaps(cells, BASE, FOLDER / "gaps.png")
    plot_chosen(cells, ORACLE, FOLDER / "chosen.png")
    plot_long_context(cells, BASE, FOLDER / "long-context.png")


if __name__ == "__main__":
    main(sys.argv[1:])
