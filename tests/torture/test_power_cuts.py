"""Power cuts lose nothing that was acknowledged, and a missing fsync would not go unnoticed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.torture.counts import Counts
from tests.torture.oracle import Oracle
from tests.torture.power_drill import PowerDrill, Recording
from tests.torture.workloads import WORKLOADS

NUM_CUTS = 7 * len(WORKLOADS)

PLANTED = {
    "log": ("streaming", "*/catalogue.sqlite-wal"),
    "catalogue": ("reopening", "*/catalogue.sqlite"),
    "segment files": ("sealing", "*/segments/*/c.*"),
    "folders in a segment": ("bulk", "*/segments/*"),
    "folder of segments": ("sealing", "*/segments"),
    "folder of contexts": ("streaming", "/store"),
    "focus events": ("events", "*/focus/*"),
    "archives": ("curation", "*/archive/*"),
    "folder of archives": ("curation", "*/archive"),
}
"""What is not synced: the workload that needs it, and the paths."""


@pytest.mark.timeout(180)
def test_nothing_acknowledged_is_lost_or_doubled(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counts()
    PowerDrill(scratch, int(time.time()), counts).run(NUM_CUTS)
    with capsys.disabled():
        print(f"\n{counts.table()}")
    assert counts.ok, counts.failures
    assert counts.cuts.total() == NUM_CUTS
    assert counts.cuts_in_recovery > 0
    assert counts.acknowledged > 0


@pytest.mark.parametrize("what", PLANTED)
def test_a_missing_fsync_is_found(scratch: Path, what: str) -> None:
    name, unsynced = PLANTED[what]
    assert not any_finding(scratch / "sound", name, "")
    assert any_finding(scratch / "planted", name, unsynced)


def any_finding(folder: Path, name: str, unsynced: str) -> list[str]:
    """What cuts near the end of one run find, up to the first; nothing that was not synced is left by them."""
    (folder / "live").mkdir(parents=True)
    recording = Recording(folder, name, 3, 900, unsynced)
    size = len(recording.operations)
    for number in range(8):
        oracle = Oracle()
        stop = size - number * size // 20
        for ack in recording.acknowledged(stop):
            oracle.hear(ack)
        recording.cut(stop, image := folder / str(number), random.Random(number), "lost")
        findings = oracle.inspect(image / "store")
        if not findings.ok:
            return [*findings.lost, *findings.torn]
    return []
