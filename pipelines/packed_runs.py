"""Runs of evaluations, packed beside the pages that are written from them: samples compressed, and the part of their
recipe that says what was measured."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.tables import Table


def pack_named(arguments: Sequence[str], folder: Path) -> None:
    """Pack runs given as `<run's folder>=<name>` into folders of that name."""
    for argument in arguments:
        run, _, name = argument.partition("=")
        pack(Path(run), folder / name)


def pack(run: Path, target: Path) -> None:
    """Add a run's places to those packed in a folder, which is made where it is missing; of a place that is there, what
    was measured of other conditions.

    Raises:
        ConfigError: a place of the run is another one there.
    """
    target.mkdir(parents=True, exist_ok=True)
    (samples,) = run.glob("samples-*.jsonl")
    packed = next(iter(target.glob("samples-*.jsonl.gz")), target / f"{samples.name}.gz")
    lines = gzip.decompress(packed.read_bytes()).splitlines() if packed.exists() else []
    places: dict[int, dict[str, Any]] = {}
    for line in [*lines, *samples.read_bytes().splitlines()]:
        sample = json.loads(line)
        there = places.setdefault(sample["place"]["number"], sample)
        if there["place"] != sample["place"]:
            raise ConfigError(f"{run} was measured at other places than {target}: {sample['place']}, {there['place']}")
        measured = {_condition(one): one for one in [*there["measured"], *sample["measured"]]}
        there["measured"] = list(measured.values())
    content = "".join(json.dumps(places[number]) + "\n" for number in sorted(places))
    packed.write_bytes(gzip.compress(content.encode(), mtime=0))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    evaluation = {**recipe["evaluation"], "num_places": len(places)}
    if "first_place" in evaluation:
        evaluation["first_place"] = 0
    kept = {"store": {"context": recipe["store"]["context"]}, "evaluation": evaluation}
    header = f"# What the samples beside this were measured with; see docs/{target.parts[-3]}.md.\n"
    (target / "config.yaml").write_text(header + yaml.safe_dump(kept, sort_keys=False))


def _condition(measured: dict[str, Any]) -> tuple[Any, ...]:
    """What was measured, of the evaluations' several kinds."""
    return tuple(measured.get(name) for name in ("condition", "budget", "name", "lod", "tail_tokens"))


def with_tables(page: str, program: str, group: str, tables: list[Table]) -> str:
    """The page with a group's tables between its two marks.

    Raises:
        SystemExit: it has no such marks; the message says which.
    """
    begin, end = f"<!-- {group}: written by {program} -->", f"<!-- {group}: to here -->"
    before, found, rest = page.partition(begin)
    if not found:
        raise SystemExit(
            f"the page has no place for {group!r}: put these two lines where its tables should stand:\n{begin}\n{end}"
        )
    written = "\n\n".join(table.markdown() for table in tables)
    return f"{before}{begin}\n\n{written}\n\n{end}{rest.partition(end)[2]}"
