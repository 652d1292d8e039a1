import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.errors import DiskFullError, StorageError
from storage.corpus.document import QuarantinedItem
from storage.corpus.quarantine import SCHEMA, QuarantineTable

ITEMS = [
    QuarantinedItem("src/b.png", "binary", "NUL byte at offset 8", 100),
    QuarantinedItem("src/a.txt", "empty", "no text", 0),
    QuarantinedItem("rows.jsonl#17", "malformed", "Expecting value at column 3", 2**40),
    QuarantinedItem("src/c.png", "binary", "NUL byte at offset 8", 5),
]


def rows_of(path: Path) -> list[tuple]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def as_rows(items: list[QuarantinedItem]) -> list[tuple]:
    return sorted((item.uri, item.reason, item.detail, item.size_bytes) for item in items)


def test_the_table_is_plain_parquet_sorted_by_uri(tmp_path: Path) -> None:
    path = tmp_path / "run/quarantine.parquet"
    with QuarantineTable(path) as table:
        table.extend(ITEMS)
        assert table.counts() == {"binary": 2, "empty": 1, "malformed": 1}
        assert not path.exists()
    assert table.counts() == {"binary": 2, "empty": 1, "malformed": 1}
    assert pq.read_schema(path).equals(SCHEMA)
    assert rows_of(path) == as_rows(ITEMS)
    assert [entry.name for entry in path.parent.iterdir()] == ["quarantine.parquet"]
    table.close()  # again changes nothing
    assert rows_of(path) == as_rows(ITEMS)


def test_nothing_quarantined_is_a_table_without_rows(tmp_path: Path) -> None:
    with QuarantineTable(tmp_path / "q.parquet") as table:
        pass
    assert table.counts() == {}
    assert pq.read_table(tmp_path / "q.parquet").num_rows == 0


def test_a_finished_table_is_gone_on_with_and_items_met_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    with QuarantineTable(path) as table:
        table.extend(ITEMS[:3])
    with QuarantineTable(path) as table:
        assert table.counts() == {"binary": 1, "empty": 1, "malformed": 1}
        table.extend(ITEMS)
        table.add(QuarantinedItem("src/a.txt", "undecodable", "changed meanwhile", 7))
        table.discard("rows.jsonl#17")
        table.discard("was/never/here")
    changed = [ITEMS[0], ITEMS[3], QuarantinedItem("src/a.txt", "undecodable", "changed meanwhile", 7)]
    assert rows_of(path) == as_rows(changed)


def test_a_killed_job_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    program = f"""
import os, signal
from pathlib import Path
from storage.corpus.document import QuarantinedItem
from storage.corpus.quarantine import QuarantineTable
table = QuarantineTable(Path({str(path)!r}))
for i in range(3000):
    table.add(QuarantinedItem(f"u{{i:04}}", "empty", "", i))
    if i == 2499:
        table.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert not path.exists()
    with QuarantineTable(path) as table:
        assert table.counts()["empty"] >= 2500
        for i in range(3000):
            table.add(QuarantinedItem(f"u{i:04}", "empty", "", i))
    assert pq.read_table(path)["size_bytes"].to_pylist() == list(range(3000))


def test_an_exception_in_the_job_still_leaves_the_table(tmp_path: Path) -> None:
    def job() -> None:
        with QuarantineTable(tmp_path / "q.parquet") as table:
            table.extend(ITEMS)
            raise RuntimeError("the job failed")

    with pytest.raises(RuntimeError, match="the job failed"):
        job()
    assert rows_of(tmp_path / "q.parquet") == as_rows(ITEMS)


@pytest.mark.parametrize("name", ["q.parquet", "q.parquet.partial"])
def test_a_damaged_table_is_refused_and_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither Parquet nor SQLite, but long enough" * 100)
    with pytest.raises(StorageError, match=r"cannot be opened.*remove it"):
        QuarantineTable(tmp_path / "q.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_and_the_items_can_still_be_finished(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    (tmp_path / "q.parquet.tmp").symlink_to("/dev/full")  # where the Parquet file is written first
    table = QuarantineTable(path)
    table.extend(ITEMS)
    with pytest.raises(DiskFullError, match="Free space and run the same command again"):
        table.close()
    assert not path.exists()
    with QuarantineTable(path) as resumed:
        assert resumed.counts() == {"binary": 2, "empty": 1, "malformed": 1}
    assert rows_of(path) == as_rows(ITEMS)


def test_lone_surrogates_are_written_as_escapes(tmp_path: Path) -> None:
    with QuarantineTable(tmp_path / "q.parquet") as table:
        table.add(QuarantinedItem("caf\udce9", "undecodable", "key '\ud83d'", 1))
    assert rows_of(tmp_path / "q.parquet") == [("caf\\udce9", "undecodable", "key '\\ud83d'", 1)]


def test_memory_does_not_grow_with_the_number_of_items(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        with QuarantineTable(tmp_path / "q.parquet") as table:
            for i in range(20_000):
                table.add(QuarantinedItem(f"a/rather/long/folder/name/{i}.bin", "binary", "x" * 100, i))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pq.read_metadata(tmp_path / "q.parquet").num_rows == 20_000
    assert peak < 2e6
