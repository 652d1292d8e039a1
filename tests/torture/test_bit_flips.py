"""One flipped bit in any file: it is detected and named, or what is read is what was there before."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.torture.flip_drill import KINDS, FlipCounts, FlipDrill, table
from tests.torture.scratch import scratch_folder


@pytest.fixture(scope="module")
def drill() -> Iterator[FlipDrill]:
    with scratch_folder() as folder:
        yield FlipDrill(folder, seed=1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("megacontext.storage")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def assert_none_is_silent(counts: FlipCounts, kind: str) -> None:
    print("\n" + table({kind: counts}))
    assert counts.silent == []
    # A flip in SQLite's own header or schema may be met by an error of SQLite that names no place.
    assert counts.named >= counts.detected * 0.99
    assert counts.earlier == 0 or kind == "catalogue log"
    # Files that are all content have no place where a flip is harmless.
    if kind in {"segment", "focus events", "archive", "bundle"}:
        assert counts.detected == counts.flips


@pytest.mark.parametrize("kind", KINDS)
def test_no_flip_is_silent(drill: FlipDrill, kind: str) -> None:
    counts = drill.run(kind, 40)
    assert_none_is_silent(counts, kind)
    assert counts.detected > 10


def test_every_kind_of_file_of_a_segment_is_hit(drill: FlipDrill) -> None:
    names = {name.rpartition(".zarr/")[2] for name in drill.files("segment")}
    assert {"zarr.json", "lod0/tokens/c.0", "lod1/gists/c.0.0", "lod1/keys/zarr.json"} <= names


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_flips(drill: FlipDrill, kind: str) -> None:
    assert_none_is_silent(drill.run(kind, 1000), kind)
