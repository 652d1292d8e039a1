"""`runs/bench/report.json`: the newest measurement of every benchmark, and the table of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Result
from benchmarks.registry import BENCHMARKS, Benchmark
from cluster.run import write_atomically
from cluster.tables import Table

Row = dict[str, Any]


def row_of(benchmark: Benchmark, result: Result, seconds: float, *, quick: bool) -> Row:
    """A measurement as the report keeps it."""
    return {
        "name": benchmark.name,
        "value": round(result.value, 4),
        "spread": [round(bound, 4) for bound in result.spread],
        "rival": benchmark.rival,
        "budget": benchmark.budget,
        "holds": result.value <= benchmark.budget,
        "unit": "ratio",
        "spread_is": f"smallest and largest of {result.repeats}",
        "quick": quick,
        "took_s": round(seconds, 1),
        "detail": dict(result.detail),
    }


def merge(path: Path, row: Row) -> None:
    """Put a row in the place of the report's row of that name; the others stay.

    Raises:
        BenchmarkError: the file there is no report.
    """
    rows = {found["name"]: found for found in _read(path)} | {row["name"]: row}
    order = [benchmark.name for benchmark in BENCHMARKS]
    # Names of other programs that add to the list come last and stay.
    ordered = sorted(
        rows.values(), key=lambda found: order.index(found["name"]) if found["name"] in order else len(order)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(ordered, indent=2) + "\n")


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(row["name"], str) for row in rows):
            return rows
    except (ValueError, TypeError, KeyError):
        pass
    raise BenchmarkError(f"{path} is no list of measurements; move it away, or give another --out")


def table(rows: Sequence[Row]) -> Table:
    """What a person reads."""
    title = "Ratios (quick: sizes too small to mean anything)" if any(row["quick"] for row in rows) else "Ratios"
    shown = [
        {
            "name": row["name"],
            "value": f"{row['value']:.3f}",
            "spread": f"{row['spread'][0]:.3f} .. {row['spread'][1]:.3f}",
            "budget": f"<= {row['budget']:.2f}",
            "holds": "yes" if row["holds"] else "NO",
            "against": row["rival"],
            "repeats": row["spread_is"].removeprefix("smallest and largest of "),
        }
        for row in rows
    ]
    return Table(shown, title)
