"""The long drills: `make torture`. Prints what was done and found.

Exit code 1 when anything was lost, doubled or torn, a flipped bit was served, or an ingest made other bytes than an
undisturbed one.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.torture import fence_drill, flip_drill, loop_drill
from tests.torture.counts import Counts
from tests.torture.fault_drill import ERRORS, FaultDrill
from tests.torture.ingest_drill import FEEDS, IngestCounts, IngestDrill
from tests.torture.kill_drill import KillDrill
from tests.torture.power_drill import PowerDrill
from tests.torture.scratch import scratch_parent

WAYS_TO_FAIL = 2 * len(ERRORS)


def main() -> int:
    """Run the drills that were asked for; returns the exit code."""
    options = _options()
    logging.getLogger("megacontext.storage").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=options.folder or scratch_parent()))
    counts = Counts()
    print(f"seed {options.seed}, in {folder}", flush=True)

    _announce("kill -9", options.kills)
    KillDrill(folder / "kills", options.seed, counts).run(options.kills)

    _announce("power cuts", options.cuts)
    PowerDrill(folder / "cuts", options.seed, counts).run(options.cuts)

    _announce("shutdowns of ext4", options.shutdowns)
    try:
        if options.shutdowns:
            loop_drill.run(folder / "ext4", options.seed, options.shutdowns, counts)
    except OSError as error:
        print(f"no shutdowns of ext4: {error}")

    _announce("faults", options.faults)
    faults = FaultDrill(folder / "faults", counts)
    num_points = faults.count_points() if options.faults else 0
    chance = random.Random(options.seed)
    wanted = min(num_points, options.faults // 2 // WAYS_TO_FAIL)
    faults.run(sorted(chance.sample(range(1, num_points + 1), wanted)))
    faults.run_at_write_points(chance, options.faults - wanted * WAYS_TO_FAIL)

    _announce("bit flips in each kind of file", options.flips)
    flips = dict(flip_drill.run_all(folder / "flips", options.seed, options.flips)) if options.flips else {}
    counts.failures += [f"bit flip: {line}" for found in flips.values() for line in found.silent]

    _announce("ingests with deaths", options.ingests)
    ingests = IngestCounts()
    drill = IngestDrill(folder / "ingests", options.seed, ingests)
    drill.run_all(options.ingests)
    drill.close()

    _announce("stores cut off", options.fencings)
    fencings = [
        fence_drill.run(folder / f"fencing{number}", FEEDS[number % len(FEEDS)]) for number in range(options.fencings)
    ]
    counts.failures += ingests.failures + [f"fencing: {fencing}" for fencing in fencings if not fencing.ok]

    print(counts.table())
    print(f"\n{ingests.table()}")
    print(f"\n{fence_drill.table(fencings)}")
    if flips:
        print(f"\n{flip_drill.table(flips)}")
    if counts.ok:
        shutil.rmtree(folder)
        return 0
    print(f"\n{len(counts.failures)} inspections found something; what was kept of them is in {folder}")
    print("\n".join(counts.failures))
    return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="processes killed (default %(default)s)")
    parser.add_argument("--cuts", type=int, default=120, help="power cuts by the log (default %(default)s)")
    parser.add_argument("--shutdowns", type=int, default=20, help="power cuts of a real ext4 (default %(default)s)")
    parser.add_argument(
        "--faults", type=int, default=200, help="writes refused by the disk (default %(default)s; all are about 11,000)"
    )
    parser.add_argument("--flips", type=int, default=200, help="bits of each kind of file (default %(default)s)")
    parser.add_argument(
        "--ingests",
        type=int,
        default=6,
        help="ingests whose processes are killed, a minute or two each (default %(default)s)",
    )
    parser.add_argument("--fencings", type=int, default=2, help="ingests whose store is cut off (default %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of everything; repeats a failure")
    parser.add_argument("--folder", type=Path, help="where the stores lie (default: a disk in memory, if there is one)")
    return parser.parse_args()


def _announce(what: str, number: int) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {number} {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
