"""Whoever dies of an ingest, and whenever: it is done exactly once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_runtime import RaySession
from tests.torture.contents import Contents, difference
from tests.torture.ingest_drill import MATRIX, Feed, IngestCounts, IngestDrill, Victim

NUM_DOCUMENTS = 24
"""About 70,000 tokens."""


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RaySession) -> Iterator[IngestDrill]:
    folder = tmp_path_factory.mktemp("ingests")
    made = IngestDrill(folder, int(time.time()), IngestCounts(), num_documents=NUM_DOCUMENTS, own_cluster=False)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("feed", "victims"),
    [
        ("actors", ("compactor", "store", "driver")),
        ("ray_data", ("tokeniser", "compactor", "store", "driver")),
    ],
)
def test_an_ingest_is_done_exactly_once(
    drill: IngestDrill, feed: Feed, victims: tuple[Victim, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    drill.run(feed, victims)
    with capsys.disabled():
        print(f"\n{drill.counts.table()}")
    assert drill.counts.ok, drill.counts.failures
    assert drill.counts.deaths[feed, "store"] == drill.counts.deaths[feed, "driver"] == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kind_of_process_of_both_feeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = IngestCounts()
    drill = IngestDrill(tmp_path / "drill", int(time.time()), counts)
    drill.run_all(4)
    drill.close()
    with capsys.disabled():
        print(f"\n{counts.table()}")
    assert counts.ok, counts.failures
    assert counts.deaths.total() > 3 * len(MATRIX["ray_data"])


def test_a_difference_is_found(drill: IngestDrill) -> None:
    wanted = drill.wanted()
    assert difference(wanted, wanted).num_bytes == 0
    assert {
        "tokens",
        "documents",
        "lod1 gists",
        "lod2 keys",
        "lexical postings",
        "lexical terms",
    } <= wanted.parts.keys()
    for name, part in wanted.parts.items():
        if part:
            changed = bytes([part[0] ^ 1]) + part[1:]
            assert difference(Contents({**wanted.parts, name: changed}, wanted.blocks), wanted).differing_bytes == {
                name: 1
            }
            cut = Contents({**wanted.parts, name: part[:-1]}, wanted.blocks)
            assert difference(cut, wanted).differing_bytes == {name: 1}
    block = next(iter(wanted.blocks))
    fewer, more = wanted.blocks.copy(), wanted.blocks.copy()
    fewer[block] -= 1
    more[block] += 1
    assert difference(Contents(wanted.parts, fewer), wanted).lost_blocks == 1
    assert difference(Contents(wanted.parts, more), wanted).doubled_blocks == 1
