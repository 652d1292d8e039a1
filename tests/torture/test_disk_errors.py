"""Full and broken disks, at write points all over a short story (`make torture` takes more of them)."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.torture.counts import Counts
from tests.torture.fault_drill import FaultDrill

NUM_POINTS = 2
NUM_AT_WRITE_POINTS = 8


@pytest.mark.timeout(180)
def test_what_is_refused_is_said_and_resumes(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed, counts = int(time.time()), Counts()
    drill = FaultDrill(scratch, counts)
    num_points = drill.count_points()
    assert num_points > 500
    points = random.Random(seed).sample(range(1, num_points), NUM_POINTS)
    drill.run(points)
    drill.run_at_write_points(random.Random(seed), NUM_AT_WRITE_POINTS)
    with capsys.disabled():
        print(f"\n{counts.table()}")
    assert counts.ok, [f"seed {seed}", *counts.failures]
    assert counts.refused.total() > 0
    assert set(counts.refused) <= {"DiskFullError", "StorageError"}
