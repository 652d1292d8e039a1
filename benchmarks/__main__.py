"""The door: `python -m benchmarks [--only NAME[,NAME]] [--quick] [--list]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from cluster.environment import base_folder, quiet_environment

quiet_environment()  # before anything imports Ray or torch

from benchmarks import report  # noqa: E402
from benchmarks.harness import Setting, say  # noqa: E402
from benchmarks.registry import BENCHMARKS  # noqa: E402
from cluster.errors import ConfigError, MegaContextError  # noqa: E402


def main() -> int:
    """Run benchmarks. A budget that does not hold is a result; only a benchmark that fails is an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME[,NAME]", help="run these")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that the programs work")
    parser.add_argument("--list", action="store_true", help="list the names")
    parser.add_argument("--out", type=Path, default=base_folder() / "runs/bench/report.json", help="the report")
    parser.add_argument("--cache", type=Path, default=base_folder() / "data/bench", help="corpora and scratch files")
    options = parser.parse_args()
    if options.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:<20} <= {benchmark.budget:<5} of {benchmark.rival}")
        return 0
    names = [benchmark.name for benchmark in BENCHMARKS]
    only = options.only.split(",") if options.only else names
    unknown = [name for name in only if name not in names]
    if unknown:
        print(f"error: no benchmark {unknown[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return ConfigError.exit_code
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in only]
    setting = Setting(options.quick, options.cache.absolute())
    rows, failed = [], 0
    for number, benchmark in enumerate(chosen, start=1):
        say(f"[{number}/{len(chosen)}] {benchmark.name}, against {benchmark.rival}")
        started = time.monotonic()
        try:
            result = benchmark.run(setting)
        except MegaContextError as error:
            failed = error.exit_code
            say(f"error: {benchmark.name}: {error}")
            continue
        row = report.row_of(benchmark, result, time.monotonic() - started, quick=options.quick)
        report.merge(options.out, row)
        rows.append(row)
        say(f"  {row['value']} ({row['took_s']} s)")
    if rows:
        report.table(rows).show()
        print(f"report: {options.out}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
