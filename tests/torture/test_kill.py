"""kill -9 at random moments and at write points: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.torture.counts import Counts
from tests.torture.kill_drill import KillDrill
from tests.torture.workloads import WORKLOADS

NUM_KILLS = 2 * len(WORKLOADS)


@pytest.mark.timeout(180)
def test_nothing_acknowledged_is_lost_or_doubled(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counts()
    KillDrill(scratch, int(time.time()), counts).run(NUM_KILLS)
    with capsys.disabled():
        print(f"\n{counts.table()}")
    assert counts.ok, counts.failures
    assert counts.kills.total() == NUM_KILLS
    assert counts.points.total() > 0
    assert counts.acknowledged > 2 * NUM_KILLS
