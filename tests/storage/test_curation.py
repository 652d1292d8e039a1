"""Pruned tokens: out of sight at once, collected later, brought back bit for bit, and in nobody's way."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zarr

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BranchConflictError, CorruptTreeError, DiskFullError, InvalidWriteError, StorageError
from models.focus.history import EntryState
from storage.bundles.export import export_bundle
from storage.check import check_context
from storage.contract import BlockState
from storage.geometry import NO_TOKEN
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.writer import ContextWriter
from storage.versions.archive import ARCHIVE_FOLDER, Archives
from storage.versions.branching import Branching
from storage.versions.curation import expire_archives, prune, restore
from storage.versions.removal import erase_documents, remove_documents
from tests.storage.support import CONTEXT, Text, encoding_of, new_store, open_context, rows
from tests.storage.version_support import holds, is_sound, write, write_and_seal

ENCODING = encoding_of("float16", key_width=3)
ONE, TWO, THREE = Text("one", 100 * K), Text("two", 60 * K - 7), Text("three", 45 * K)
# Later than whatever the clock says while the tests run.
NOW = float(int(time.time()) + 100_000)
LATER = NOW + 100.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


def pruned_blocks(reader: ContextReader) -> set[int]:
    return set(np.flatnonzero(reader.block_states(0, reader.version.num_blocks)).tolist())


def newest(root: Path, branch: str = "main", seq: int | None = None) -> ContextReader:
    return ContextReader(root / CONTEXT, CONTEXT, branch, seq)


def collect(root: Path, writer: ContextWriter, now: float = LATER):
    return Store(root).collect(writer, keep_s=0.0, now=now)


def shown(root: Path, first: int, count: int, **which) -> tuple[np.ndarray, np.ndarray]:
    with newest(root, **which) as reader:
        return reader.tokens(first, count)


def token_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / CONTEXT / "segments").glob("*/lod0/tokens/c.0"))


def shards_of(root: Path) -> set[bytes]:
    return {path.read_bytes() for path in (root / CONTEXT / "segments").rglob("c/*") if path.is_file()}


def test_states_are_those_that_focus_knows() -> None:
    assert {s.name: s.value for s in BlockState} == {s.name: s.value for s in EntryState}


@pytest.mark.parametrize("sealed", [False, True])
def test_pruned_tokens_are_out_of_sight_at_once_and_in_older_versions_still(root: Path, sealed: bool) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write(writer, ONE, TWO)
        if sealed:
            writer.flush()
        before = writer.version()
        after = prune(writer, [(90, 20), (0, 32)], keep_until=LATER, message="old")
        assert after.seq == before.seq + 1
        assert after.num_tokens == before.num_tokens
        tokens, counts = shown(root, 85, 30)
        wanted, real = shown(root, 85, 30, seq=before.seq)
        assert (tokens[5:25] == NO_TOKEN).all()
        assert counts[5:25].sum() == 0
        np.testing.assert_array_equal(np.delete(tokens, range(5, 25), 0), np.delete(wanted, range(5, 25), 0))
        assert real[:15].min() == K
        with newest(root) as reader:
            assert pruned_blocks(reader) == {*range(32), *range(90, 110)}
            # Places, gists and documents are as they were.
            assert reader.tokens_before(np.array([100, 160])).tolist() == [100 * K, ONE.num_tokens + TWO.num_tokens]
            with pytest.raises(StorageError, match=r"a rebuild needs all tokens.*blocks 90-94"):
                reader.require_whole(50, 45, "a rebuild")
            reader.require_whole(40, 50, "a rebuild")
            file, identity = root / "span.mcb", Store(root).identity(CONTEXT)[0]
            wanted = (
                rf"blocks 0-31 and 20 others, up to block 109, .*version {after.seq}.*curate restore.*store.version"
            )
            with pytest.raises(StorageError, match=wanted):
                export_bundle(reader, identity, file)
            assert not file.exists()
            assert export_bundle(reader, identity, file, first_block=32, num_blocks=58).num_blocks == 58
        with newest(root, seq=before.seq) as reader:
            assert export_bundle(reader, identity, file, overwrite=True).num_blocks == 160
        holds(root, ONE, TWO, seq=before.seq)
        assert restore(writer, [(0, 160)]).blocks == 52
        holds(root, ONE, TWO)
        assert restore(writer, [(0, 160)]).blocks == 0
        with newest(root, seq=after.seq) as reader:
            assert len(pruned_blocks(reader)) == 52
    is_sound(root)


def test_nonsense_is_refused_and_changes_nothing(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, ONE)
        version = writer.version()
        for spans, match in (([(90, 11)], "ends at block 101"), ([(0, 5), (4, 1)], "overlap"), ([(3, 0)], "overlap")):
            with pytest.raises(InvalidWriteError, match=match):
                prune(writer, spans, keep_until=0.0)
        assert writer.version() == version
        with newest(root) as reader, pytest.raises(StorageError, match="has 100"):
            reader.block_states(90, 11)


def test_collection_takes_whole_groups_when_their_time_is_over(root: Path) -> None:
    with open_context(root, segment_super_blocks=2) as writer:
        write_and_seal(writer, ONE, TWO)
        all_bytes = token_bytes(root)
        prune(writer, [(0, 40), (64, 64)], keep_until=LATER)
        assert not collect(root, writer, now=NOW).token_bytes
        assert token_bytes(root) == all_bytes
        # Groups 0, 2 and 3; of group 1 eight blocks only.
        done = collect(root, writer)
        assert done.token_bytes == 3 * K * K * 4
        assert all_bytes - token_bytes(root) == 3 * (K * K * 4 + 4)
        is_sound(root)
        tokens, counts = shown(root, 0, 160)
        whole = np.r_[40:64, 128:160]
        np.testing.assert_array_equal(tokens[whole[:24]], ONE.packed(40, 64)[0])
        assert counts[np.setdiff1d(np.arange(160), whole)].sum() == 0
        # Once more there is nothing to take, and what is sealed later is as ever.
        assert not collect(root, writer).token_bytes
        write_and_seal(writer, THREE)
        assert collect(root, writer).token_bytes == 0
    with newest(root) as reader:
        assert reader.tokens(160, 45)[1].sum() == THREE.num_tokens
    is_sound(root)


def test_what_is_left_is_plain_zarr(root: Path) -> None:
    with open_context(root, segment_super_blocks=2) as writer:
        write_and_seal(writer, ONE)
        prune(writer, [(32, 32)], keep_until=NOW)
        collect(root, writer)
    [segment] = (root / CONTEXT / "segments").glob("lod0*_0000000000_*")
    array = zarr.open_group(segment, mode="r")["lod0/tokens"]
    assert isinstance(array, zarr.Array)
    values = np.asarray(array[:]).reshape(-1, K)
    np.testing.assert_array_equal(values[:32], ONE.packed(0, 32)[0])
    assert (values[32:] == NO_TOKEN).all()


def test_tags_leases_and_other_branches_keep_their_tokens(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        write_and_seal(writer, ONE)
        Branching(writer).tag("kept")
        old = writer.version().seq
        lease = Store(root).open_reader(CONTEXT)
        prune(writer, [(0, 100)], keep_until=NOW)
        assert not collect(root, writer).token_bytes
        Branching(writer).delete_tag("kept")
        assert not collect(root, writer).token_bytes
        Branching(writer).fork("side", seq=old)
        assert lease.tokens(0, 100)[1].sum() == ONE.num_tokens
        lease.close()
        assert not collect(root, writer).token_bytes
        holds(root, ONE, branch="side")
        Branching(writer).discard("side")
        assert collect(root, writer).token_bytes == 96 * K * 4
        with pytest.raises(StorageError, match="version"):
            newest(root, seq=old)
    is_sound(root)


def test_a_reader_without_a_lease_is_told_and_never_served_nothing(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        write_and_seal(writer, ONE)
        with newest(root) as reader:
            prune(writer, [(0, 64)], keep_until=NOW)
            collect(root, writer)
            with pytest.raises(StorageError, match="without a lease"):
                reader.tokens(0, 10)
            assert reader.tokens(64, 36)[1].sum() == 36 * K


@pytest.mark.parametrize("sealed", [False, True])
def test_archived_tokens_come_back_bit_for_bit_after_they_were_collected(root: Path, sealed: bool) -> None:
    with open_context(root, segment_super_blocks=2) as writer:
        write_and_seal(writer, ONE, TWO)
        shards = shards_of(root)
        prune(writer, [(10, 120)], keep_until=NOW, archive_until=0.0, now=NOW)
        collect(root, writer)
        assert expire_archives(writer, now=NOW + 1e9) == 0
        if not sealed:
            # A removal writes the blocks behind it anew, into the journal: without tokens.
            write(writer, THREE)
            remove_documents(writer, ["one"])
            restored = restore(writer, [(0, 60)])
            assert (restored.blocks, restored.from_archive) == (30, 28)
            holds(root, TWO, THREE)
            return
        done = restore(writer, [(0, 160)])
        # The last two are of a segment in which too little was pruned to write it anew.
        assert (done.blocks, done.from_archive) == (120, 118)
        holds(root, ONE, TWO)
        assert shards_of(root) == shards
    is_sound(root)


def test_what_no_archive_has_is_named_and_nothing_is_restored(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        write_and_seal(writer, ONE)
        prune(writer, [(0, 32)], keep_until=NOW, archive_until=LATER, now=NOW)
        prune(writer, [(32, 32)], keep_until=NOW)
        collect(root, writer)
        with pytest.raises(StorageError, match=r"32 block\(s\) are kept nowhere.*block 32 of document 'one'"):
            restore(writer, [(0, 64)])
        with newest(root) as reader:
            assert len(pruned_blocks(reader)) == 64
        [file] = (root / CONTEXT / ARCHIVE_FOLDER).iterdir()
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptTreeError, match="is damaged"):
            restore(writer, [(0, 32)])
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        assert restore(writer, [(0, 32)]).from_archive == 32
        assert expire_archives(writer, now=LATER) == len(data)
        assert Archives(root / CONTEXT).files() == []
        assert rows(writer, "SELECT count(*) FROM audit WHERE action = 'expire_archives'") == [(1,)]
    is_sound(root)


def test_documents_are_erased_from_a_curated_context_and_its_archives(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        write_and_seal(writer, ONE, TWO, THREE)
        prune(writer, [(96, 64)], keep_until=NOW, archive_until=0.0, now=NOW)
        collect(root, writer)
        erase_documents(Store(root), writer, ["one"], keep_s=0.0)
        is_sound(root)
        tables = [file.table() for file in Archives(root / CONTEXT).files()]
        assert {key for table in tables for key in table.column("key").to_pylist()} == {"two"}
        assert restore(writer, [(0, 105)]).blocks == 60
        holds(root, TWO, THREE)
    is_sound(root)


def test_branches_share_what_was_pruned_before_they_were_forked(root: Path) -> None:
    with open_context(root, seal_in_background=False) as writer:
        write(writer, ONE)
        prune(writer, [(0, 50)], keep_until=LATER)
        Branching(writer).fork("side", at_block=40)
        prune(writer, [(50, 10)], keep_until=LATER)
        restore(writer, [(0, 10)])
        with newest(root) as reader:
            assert pruned_blocks(reader) == set(range(10, 60))
        with newest(root, "side") as reader:
            assert pruned_blocks(reader) == set(range(40))
        writer.switch("side")
        writer.close_document("one")
        restore(writer, [(20, 20)])
        write(writer, TWO)
        with newest(root, "side") as reader:
            assert pruned_blocks(reader) == set(range(20))
        writer.switch("main")
        Branching(writer).fork("later")
        prune(writer, [(99, 1)], keep_until=LATER)
        with pytest.raises(BranchConflictError, match="has gone on"):
            Branching(writer).fast_forward("later")
    is_sound(root)


def test_blocks_of_one_document_that_went_on_in_two_ways_come_back_each_as_its_own(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        growing = Text("chat", 64 * K)
        writer.append([growing.span(ENCODING, 0, 32, ends=False)])
        Branching(writer).fork("other")
        other = replace(Text("another", 64 * K).span(ENCODING, 32, 64), document=growing.meta)
        for branch, end in (("main", growing.span(ENCODING, 32, 64)), ("other", other)):
            writer.switch(branch)
            writer.append([end])
            writer.flush()
            prune(writer, [(32, 32)], keep_until=NOW, archive_until=0.0, now=NOW)
        assert collect(root, writer).token_bytes
        for branch, text in (("main", growing), ("other", Text("another", 64 * K))):
            writer.switch(branch)
            assert restore(writer, [(32, 32)]).from_archive == 32
            np.testing.assert_array_equal(shown(root, 32, 32, branch=branch)[0], text.packed(32, 64)[0])
        # What one branch alone has archived is not the other's.
        prune(writer, [(32, 32)], keep_until=NOW)
        collect(root, writer)
        for file in Archives(root / CONTEXT).files()[1:]:
            file.path.unlink()
        with pytest.raises(StorageError, match="kept nowhere"):
            restore(writer, [(32, 32)])
    is_sound(root)


def test_an_archive_of_before_gists_were_named_is_read_where_it_can_only_be_this(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        write_and_seal(writer, ONE)
        prune(writer, [(0, 64)], keep_until=NOW, archive_until=0.0, now=NOW)
        collect(root, writer)
        [file] = Archives(root / CONTEXT).files()
        old = file.table().drop_columns("gists_crc")
        other = old.set_column(3, "tokens", pa.array([[7] * K] * 64, pa.list_(pa.uint32())))
        Archives(root / CONTEXT)._write(old, NOW, 0.0)
        file.path.unlink()
        assert restore(writer, [(0, 32)]).from_archive == 32
        Archives(root / CONTEXT)._write(other, NOW + 1, 0.0)
        with pytest.raises(StorageError, match="kept nowhere"):
            restore(writer, [(32, 32)])


def test_what_was_pruned_without_an_archive_can_be_archived_while_it_is_kept(root: Path) -> None:
    with open_context(root, segment_super_blocks=1) as writer:
        write_and_seal(writer, ONE)
        prune(writer, [(0, 32)], keep_until=LATER)
        prune(writer, [(0, 64)], keep_until=NOW, archive_until=0.0, now=NOW)
        collect(root, writer)
        assert restore(writer, [(0, 64)]).from_archive == 64
        holds(root, ONE)


def test_what_a_killed_process_left_half_written_is_removed(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, ONE, TWO)
        prune(writer, [(0, 10)], keep_until=NOW, archive_until=0.0, now=NOW)
        [file] = (root / CONTEXT / ARCHIVE_FOLDER).iterdir()
        left = file.with_name(f".{file.name}.tmp")
        left.write_bytes(file.read_bytes())
        prune(writer, [(20, 10)], keep_until=NOW, archive_until=0.0, now=NOW)
        assert not left.exists()
        left.write_bytes(file.read_bytes())
        erase_documents(Store(root), writer, ["one"], keep_s=0.0)
        assert list((root / CONTEXT / ARCHIVE_FOLDER).iterdir()) == []


def test_a_damaged_archive_is_named(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, ONE)
        prune(writer, [(0, 10)], keep_until=NOW, archive_until=0.0, now=NOW)
    assert check_context(Store(root), CONTEXT).problems == []
    [file] = (root / CONTEXT / ARCHIVE_FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    [problem] = check_context(Store(root), CONTEXT).problems
    assert str(file) in problem


def test_a_disk_that_refuses_an_archive_is_told_as_ours(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with open_context(root) as writer:
        write(writer, ONE)
        version = writer.version()
        with monkeypatch.context() as patch:
            patch.setattr("storage.versions.archive.write_file_durably", refuse)
            with pytest.raises(DiskFullError, match="nothing was pruned"):
                prune(writer, [(0, 10)], keep_until=NOW, archive_until=0.0)
        assert writer.version() == version
        assert prune(writer, [(0, 10)], keep_until=NOW, archive_until=0.0).seq == version.seq + 1
