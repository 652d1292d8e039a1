"""Disks that are too small, that refuse, and that forget names."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import DiskFullError, StorageError
from storage import durable, store
from storage.store import Store, check_disk_space, estimate_bytes
from storage.tree import catalogue
from tests.storage.support import CONTEXT, IDENTITY, Text, encoding_of, follow, new_store, open_context

ENCODING = encoding_of()
TEXT = Text("doc", 70 * K)


# -- disk space --------------------------------------------------------------------------------------------------------


def test_an_ingest_the_disk_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = encoding_of("float16", 576)
    need = estimate_bytes(encoding, 10_000_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(DiskFullError, match=r"10,000,000 tokens need .* GiB .*--store.gist_dtype int8"):
        check_disk_space(tmp_path / "not" / "made" / "yet", encoding, 10_000_000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage._replace(free=need))
    assert check_disk_space(tmp_path, encoding, 10_000_000) == need


@pytest.mark.parametrize(("dtype", "width", "rows", "key_width"), [("float16", 576, 1, 0), ("int8", 128, 2, 64)])
def test_the_estimate_is_close_and_not_below(tmp_path: Path, dtype, width: int, rows: int, key_width: int) -> None:
    encoding = encoding_of(dtype, width, rows, key_width=key_width)
    # 20,000 tokens in documents of 500 (16 blocks, the last of them short).
    texts = [Text(f"doc{n}", 500) for n in range(40)]
    new_store(tmp_path, encoding)
    with open_context(tmp_path, seal_in_background=False, segment_super_blocks=16) as writer:
        for text in texts:
            writer.append([text.span(encoding)])
        follow(writer, encoding)
        writer.flush()
    in_segments = sum(p.stat().st_size for p in (tmp_path / CONTEXT / "segments").rglob("*") if p.is_file())
    with closing(sqlite3.connect(tmp_path / CONTEXT / catalogue.CATALOGUE_FILE)) as db:
        in_journal = db.execute("SELECT sum(length(payload)) FROM journal").fetchone()[0]
    estimate = estimate_bytes(encoding, 20_000) - estimate_bytes(encoding, 0)
    assert 1.0 <= estimate / (in_segments + in_journal) <= 1.6


# -- a disk that refuses the folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFullError), (errno.EIO, StorageError)])
def test_a_refused_folder_is_an_error_of_ours_and_nothing_is_left_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StorageError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(error, match="cannot make a store at"):
            Store(tmp_path / "above" / "store", create=True)
    made = Store(tmp_path / "above" / "store", create=True)
    for step in ("mkdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, step, refuse)
            with pytest.raises(error, match=f"cannot make context '{CONTEXT}'"):
                made.create_context(CONTEXT, IDENTITY, ENCODING)
        assert [path for path in made.root.iterdir() if path.is_dir()] == []
        assert not made.has_context(CONTEXT)
    made.create_context(CONTEXT, IDENTITY, ENCODING)
    assert made.has_context(CONTEXT)


def test_what_a_killed_process_made_and_did_not_sync_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    for module in (durable, store):
        monkeypatch.setattr(module, "fsync_folder", synced.append)
    (tmp_path / "above").mkdir()
    made = Store(tmp_path / "above" / "deep" / "store", create=True)
    assert {tmp_path / "above", tmp_path / "above" / "deep"} <= set(synced)
    made.create_context(CONTEXT, IDENTITY, ENCODING)
    synced.clear()
    made.create_context(CONTEXT, IDENTITY, ENCODING)
    assert synced == [made.root]
