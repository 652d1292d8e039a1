"""Focus events come back as they were, in order, whatever happens on the way."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.errors import CorruptTreeError, DiskFullError, StorageError
from storage.focus import events as focus_events
from storage.focus.events import EVENTS_FOLDER, SCHEMA, FocusEvent, FocusEventLog, read_focus_events


def event(number: int, session: str = "s", **fields: Any) -> FocusEvent:
    given: dict[str, Any] = {
        "session": session,
        "number": number,
        "reason": "question",
        "policy": "{}",
        "contexts": [("other", 3), ("own", 7)],
        "num_tokens": 1000,
        "budget": 480,
        "cost": 400,
        "entries": [(2, 0, 0), (0, 31, 1)],
        "scores": {(5, 0): 0.5, (31, 1): 0.25},
        "found": [(5, 0)],
        "pinned": [],
        "added": [(5, 0)],
        "dropped": [(9, 1)],
        "num_aged": 2,
        "seconds": {"read": 0.5},
    }
    return FocusEvent(**{**given, **fields})


def test_events_come_back_in_order(tmp_path: Path) -> None:
    log = FocusEventLog(tmp_path)
    for number in range(150):
        log.add(event(number))
    files = list((tmp_path / EVENTS_FOLDER).iterdir())
    assert len(files) == 150 // focus_events.FLUSH_EVENTS
    log.flush()
    log.flush()
    found = read_focus_events(tmp_path).to_pylist()
    assert [row["number"] for row in found] == list(range(150))
    first = found[0]
    assert first["contexts"] == [{"context": "other", "version": 3}, {"context": "own", "version": 7}]
    assert first["entries"][0] == {"source": 0, "lod": 2, "index": 0}
    assert first["scores"] == [{"source": 0, "block": 5, "score": 0.5}, {"source": 1, "block": 31, "score": 0.25}]
    assert first["dropped"] == [{"source": 1, "block": 9}]
    assert dict(first["seconds"]) == {"read": 0.5}
    assert first["nll_decoded"] is None


def test_sessions_can_be_told_apart(tmp_path: Path) -> None:
    for session in ("a", "b"):
        log = FocusEventLog(tmp_path)
        log.add(event(1, session, nll_decoded=2.5, num_decoded=3))
        log.flush()
    assert read_focus_events(tmp_path).num_rows == 2
    assert read_focus_events(tmp_path, "b").column("session").to_pylist() == ["b"]


def test_a_context_without_events_has_an_empty_table(tmp_path: Path) -> None:
    assert read_focus_events(tmp_path).schema.equals(SCHEMA)


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFullError), (errno.EIO, StorageError)])
def test_what_the_disk_refuses_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    log = FocusEventLog(tmp_path)
    log.add(event(0))

    def refuse(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(code, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(focus_events, "write_file_durably", refuse)
        with pytest.raises(error, match="kept and tried again"):
            log.flush()
    assert list((tmp_path / EVENTS_FOLDER).iterdir()) == []
    log.flush()
    assert read_focus_events(tmp_path).num_rows == 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    log = FocusEventLog(tmp_path)
    log.add(event(0))
    log.flush()
    (path,) = (tmp_path / EVENTS_FOLDER).iterdir()
    assert pq.read_schema(path).metadata[b"megacontext.focus_events"] == b"1"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptTreeError, match=path.name):
        read_focus_events(tmp_path)


def test_every_flipped_bit_is_noticed_and_names_without_a_checksum_are_read(tmp_path: Path) -> None:
    log = FocusEventLog(tmp_path)
    log.add(event(0))
    log.flush()
    (path,) = (tmp_path / EVENTS_FOLDER).iterdir()
    sound = path.read_bytes()
    for place in range(0, len(sound), 97):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
        with pytest.raises(CorruptTreeError, match=path.name):
            read_focus_events(tmp_path)
    path.write_bytes(sound)
    path.rename(path.with_name("01795622400000000000-5f2c91ab.parquet"))
    assert read_focus_events(tmp_path).num_rows == 1


def test_small_files_are_merged_and_events_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = FocusEventLog(tmp_path)
    folder = tmp_path / EVENTS_FOLDER
    for number in range(10):
        log.add(event(number))
        log.flush()
    assert len(list(folder.iterdir())) == 10
    left = {path: path.read_bytes() for path in folder.iterdir()}
    for number in range(10, focus_events.FLUSH_EVENTS + 3):
        log.add(event(number))
        log.flush()
    assert len(list(folder.iterdir())) == 1 + 3, "one of as many as are enough, and those since"
    numbers = list(range(focus_events.FLUSH_EVENTS + 3))
    assert read_focus_events(tmp_path).column("number").to_pylist() == numbers
    for path, content in left.items():
        path.write_bytes(content)  # as if it had died before they were removed
    assert sorted(read_focus_events(tmp_path).column("number").to_pylist()) == numbers


def test_files_that_cannot_be_merged_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = FocusEventLog(tmp_path)
    for number in range(focus_events.FLUSH_EVENTS - 1):
        log.add(event(number))
        log.flush()
    real, calls = focus_events.write_file_durably, []

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(focus_events, "write_file_durably", full)
    log.add(event(focus_events.FLUSH_EVENTS - 1))
    log.flush()
    assert len(calls) == 2
    found = read_focus_events(tmp_path).column("number").to_pylist()
    assert found == list(range(focus_events.FLUSH_EVENTS))
