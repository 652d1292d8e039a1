"""tree repair on what compact made with the tiny model: what comes back is, bit for bit, what was there."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.compact as compact_job
import pipelines.tree_repair as repair_job
import pipelines.tree_verify as verify_job
from cluster.config import (
    BaseLMConfig,
    CompactionConfig,
    CompactJob,
    CorpusConfig,
    GistNetConfig,
    RunConfig,
    StoreConfig,
    TreeVerifyJob,
)
from cluster.errors import CorruptTreeError, IncompatibleTreeError
from cluster.tree_config import TreeRepairJob
from storage.lexical.index import LEXICAL_FILE
from storage.store import Store
from storage.tree import catalogue
from storage.versions.backup import back_up
from storage.versions.history import History
from tests.actors.helpers import make_text

NAME = "c"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig, ray_cluster: None) -> CompactJob:
    """About 700 blocks in segments of 128, with three levels, the rest in the journal."""
    folder = tmp_path_factory.mktemp("repair")
    (folder / "corpus").mkdir()
    for index, words in enumerate((300, 1, 900, 40, 1200, 500, 77)):
        (folder / "corpus" / f"doc{index}.txt").write_text(make_text(index, words))
    job = CompactJob(
        run=RunConfig(name="made", dir=folder / "runs"),
        corpus=CorpusConfig(paths=[str(folder / "corpus")]),
        base_lm=tiny_lm_config,
        gistnet=GistNetConfig(lm_layers=2),
        store=StoreConfig(root=folder / "store", context=NAME, segment_super_blocks=4),
        compaction=CompactionConfig(feed="actors", num_compactors=1, threads_per_compactor=1),
    )
    compact_job.run(job)
    back_up(Store(job.store.root), NAME, folder / "backup")
    return job


@pytest.fixture
def job(made: CompactJob, tmp_path: Path) -> TreeRepairJob:
    """A repair of a copy."""
    shutil.copytree(made.store.root, tmp_path / "store")
    return TreeRepairJob(
        store=replace(made.store, root=tmp_path / "store"), base_lm=made.base_lm, gistnet=made.gistnet, apply=True
    )


def contents(root: Path) -> dict[str, bytes]:
    with Store(root).open_reader(NAME) as reader:
        version = reader.version
        found = {
            f"LOD{lod} {name}": values.tobytes()
            for lod in range(version.max_lod + 1)
            for name, values in reader.stored_arrays(lod, 0, version.num_nodes(max(lod, 1))).items()
        }
        found["documents"] = repr(reader.documents()).encode()
    return found


def segment_file(root: Path, lod: str, number: int, path: str) -> Path:
    return sorted((root / NAME / "segments").glob(f"lod{lod}_*"))[number] / path


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 4
    path.write_bytes(data)


def spoil_rows(root: Path, lod: int) -> int:
    with closing(sqlite3.connect(root / NAME / catalogue.CATALOGUE_FILE, isolation_level=None)) as db:
        rows = db.execute("SELECT row_id, payload FROM journal WHERE lod = ?", (lod,)).fetchall()
        for row_id, payload in rows:
            spoiled = bytearray(payload)
            spoiled[5] ^= 16
            db.execute("UPDATE journal SET payload = ? WHERE row_id = ?", (bytes(spoiled), row_id))
    return len(rows)


def is_whole(job: TreeRepairJob, made: CompactJob) -> None:
    verify_job.run(TreeVerifyJob(store=job.store))
    assert contents(job.store.root) == contents(made.store.root)


def asked(job: TreeRepairJob, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    repair_job.run(replace(job, json=True))
    return json.loads(capsys.readouterr().out)


def test_gists_of_every_level_and_the_index_are_made_again(
    job: TreeRepairJob, made: CompactJob, capsys: pytest.CaptureFixture[str]
) -> None:
    root = job.store.root
    flip(segment_file(root, "0-1", 1, "lod1/gists/c.0.0"), 100, 9000, 9001)
    flip(segment_file(root, "0-1", 2, "lod1/keys/c.0.0"), 11, 12)
    assert spoil_rows(root, 1) == 1
    assert spoil_rows(root, 2) >= 1
    with closing(sqlite3.connect(root / NAME / LEXICAL_FILE, isolation_level=None)) as db:
        db.execute("UPDATE state SET num_terms = num_terms + 1")
    before = {path: path.read_bytes() for path in root.rglob("c.0.0")}

    planned = asked(replace(job, apply=False), capsys)
    assert not planned["applied"]
    hows = " ".join(entry["how"] for entry in planned["repairs"])
    assert "64 nodes of LOD1 made anew" in hows
    assert "nodes of LOD2 made anew" in hows
    assert "built anew from the blocks" in hows
    assert {path: path.read_bytes() for path in root.rglob("c.0.0")} == before

    done = asked(job, capsys)
    assert done["left"] == []
    is_whole(job, made)
    assert [entry.action for entry in History(root / NAME, NAME).audit()].count("repair") == len(done["repairs"])
    assert asked(job, capsys)["repairs"] == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


MENDED: dict[str, Callable[[Path], None]] = {
    "metadata": lambda root: flip(segment_file(root, "0-1", 0, "lod0/tokens/zarr.json"), 10),
    "a missing file": lambda root: segment_file(root, "0-1", 1, "lod1/gists/c.0.0").unlink(),
    "a short file": lambda root: truncate(segment_file(root, "0-1", 3, "lod1/keys/c.0.0")),
    "counts": lambda root: flip(segment_file(root, "0-1", 2, "lod0/num_tokens/c.0"), 3, 4),
    "prefix sums": lambda root: flip(segment_file(root, "0-1", 2, "lod0/tokens_before/c.0"), 3, 900),
    "a shard's index": lambda root: flip(segment_file(root, "0-1", 1, "lod0/tokens/c.0"), -10, -30),
    "a checksum": lambda root: flip(segment_file(root, "0-1", 1, "lod0/tokens/c.0"), 4097),
    "one bit of the tokens": lambda root: flip(segment_file(root, "0-1", 1, "lod0/tokens/c.0"), 1000),
    "tokens and their gists": lambda root: (
        flip(segment_file(root, "0-1", 1, "lod0/tokens/c.0"), 1000),
        flip(segment_file(root, "0-1", 1, "lod1/gists/c.0.0"), 7, 8),
        flip(segment_file(root, "0-1", 1, "lod0/num_tokens/c.0"), 7, 8),
    )[0],
}


@pytest.mark.parametrize("kind", MENDED)
def test_what_can_be_had_from_the_segment_itself(job: TreeRepairJob, made: CompactJob, kind: str) -> None:
    MENDED[kind](job.store.root)
    segments = {path.name for path in (job.store.root / NAME / "segments").iterdir()}
    with Store(job.store.root).open_reader(NAME) as pinned:
        repair_job.run(job)
        # Segments are replaced, never edited, and a reader that was there before goes on.
        assert len(segments - {path.name for path in (job.store.root / NAME / "segments").iterdir()}) == 1
        assert len(pinned.tokens(0, pinned.version.num_blocks)[0]) == pinned.version.num_blocks
    is_whole(job, made)


def test_tokens_come_from_a_backup_and_from_nowhere_else(job: TreeRepairJob, made: CompactJob) -> None:
    shard = segment_file(job.store.root, "0-1", 1, "lod0/tokens/c.0")
    flip(shard, 1000, 1001, 1002)
    num_rows = spoil_rows(job.store.root, 0)
    assert num_rows > 0
    damaged = shard.read_bytes()
    with pytest.raises(CorruptTreeError, match=r"tokens of blocks 128-159 are damaged: document '.*', tokens \d+-\d+"):
        repair_job.run(replace(job, apply=False))
    with pytest.raises(CorruptTreeError, match="problem.s. still"):
        repair_job.run(job)
    assert shard.read_bytes() == damaged
    repair_job.run(replace(job, from_store=str(made.store.root.parent / "backup")))
    is_whole(job, made)


def test_another_net_is_refused(job: TreeRepairJob) -> None:
    shard = segment_file(job.store.root, "0-1", 1, "lod1/gists/c.0.0")
    flip(shard, 100, 101)
    damaged = shard.read_bytes()
    with pytest.raises(IncompatibleTreeError, match="gistnet_digest"):
        repair_job.run(replace(job, gistnet=replace(job.gistnet, kind="block")))
    assert shard.read_bytes() == damaged


def test_a_log_that_lost_commits_is_cut_and_kept(job: TreeRepairJob) -> None:
    store, folder = Store(job.store.root), job.store.root / NAME
    copy = job.store.root.with_name("copy")
    with store.open_maintenance(NAME) as writer:
        for number in range(6):
            with writer.commit() as db:
                writer.audit(db, f"change {number}", {})
        shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    copy.rename(folder)
    log = folder / "catalogue.sqlite-wal"
    flip(log, log.stat().st_size // 2)
    damaged = log.read_bytes()
    with pytest.raises(CorruptTreeError, match="acknowledged behind it are gone"):
        store.open_maintenance(NAME)
    repair_job.run(job)
    verify_job.run(TreeVerifyJob(store=job.store))
    assert (folder / "catalogue.sqlite-wal.damaged").read_bytes() == damaged
    actions = [entry.action for entry in History(folder, NAME).audit()]
    assert actions[0] == "repair"
    assert "change 0" in actions
    assert "change 5" not in actions


def test_nothing_is_done_where_nothing_is_wrong(job: TreeRepairJob, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in job.store.root.rglob("*.sqlite")}
    assert asked(job, capsys)["repairs"] == []
    assert {path: path.read_bytes() for path in job.store.root.rglob("*.sqlite")} == before


def test_the_same_bytes_from_zarr(job: TreeRepairJob, made: CompactJob) -> None:
    """A segment written anew is plain Zarr, too."""
    import zarr

    flip(segment_file(job.store.root, "0-1", 1, "lod1/gists/c.0.0"), 100, 101)
    sound: Any = zarr.open_group(segment_file(made.store.root, "0-1", 1, ""), mode="r")
    repair_job.run(job)
    mended: Any = zarr.open_group(segment_file(job.store.root, "0-1", 1, ""), mode="r")
    np.testing.assert_array_equal(mended["lod1/gists"][:], sound["lod1/gists"][:])
