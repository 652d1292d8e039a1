import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import CorpusError
from storage.corpus.document import CorpusItem, QuarantinedItem
from storage.corpus.parquet import ParquetPart, plan_parquet
from storage.corpus.shard import ReadOptions
from tests.storage.corpus.support import documents, file_ref, reasons, uris


def plan(path: Path, part_bytes: int = 2**24, **options) -> list[ParquetPart]:
    parts = plan_parquet(file_ref(path), ReadOptions(**options), part_bytes)
    assert isinstance(parts, list)
    return parts


def read(path: Path, part_bytes: int = 2**24, **options) -> list[CorpusItem]:
    parts = plan(path, part_bytes, **options)
    return [item for part in parts for item in pickle.loads(pickle.dumps(part)).read(ReadOptions(**options))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    table = pa.table({"text": [f"row {i} é" for i in range(100)], "id": range(100), "junk": [b"\0" * 50] * 100})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    return tmp_path / "rows.parquet"


def test_rows_are_numbered_over_the_whole_file_however_it_is_cut(path: Path) -> None:
    whole = read(path)
    assert [document.text for document in documents(whole)] == [f"row {i} é" for i in range(100)]
    assert uris(whole) == [f"rows.parquet#{i}" for i in range(100)]
    assert documents(whole)[0].modified_at == pytest.approx(path.stat().st_mtime)
    for part_bytes in (1, 150, 400, 10**6):
        assert read(path, part_bytes) == whole
    assert len(plan(path, 1)) == 15
    assert len(plan(path)) == 1


def test_the_estimate_counts_the_text_column_alone(path: Path) -> None:
    estimate = sum(part.estimated_bytes for part in plan(path, 150))
    raw = sum(document.size_bytes for document in documents(read(path)))
    assert raw < estimate < 2 * raw + 15 * 100  # each of 15 chunks has a dictionary and headers


def test_rows_are_named_by_a_string_or_an_integer_column(path: Path) -> None:
    assert uris(read(path, uri_column="id"))[:2] == ["0", "1"]
    assert uris(read(path, uri_column="text"))[1] == "row 1 é"


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["one", "two", None, "one"]
    column = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    items = read(tmp_path / "rows.parquet")
    assert [document.text for document in documents(items)] == ["one", "two", "one"]
    assert reasons(items) == {"rows.parquet#2": "missing_column"}


def test_bad_rows_are_set_aside_by_their_number(tmp_path: Path) -> None:
    raw = [b"good", None, b"", b"nul\0", b"caf\xe9", b"x" * 30, b"last"]
    strings = pa.array(raw, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": strings}), tmp_path / "rows.parquet", row_group_size=2)
    items = read(tmp_path / "rows.parquet", max_document_bytes=20)
    assert [document.text for document in documents(items)] == ["good", "last"]
    assert reasons(items) == {
        "rows.parquet#1": "missing_column",
        "rows.parquet#2": "empty",
        "rows.parquet#3": "binary",
        "rows.parquet#4": "undecodable",
        "rows.parquet#5": "oversized",
    }
    sizes = {item.uri: item.size_bytes for item in items}
    assert (sizes["rows.parquet#5"], sizes["rows.parquet#4"]) == (30, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ReadOptions(text_column="body"),
            r"corpus\.text_column='body' is not a column.*'text' \(string\), 'id' \(int64\)",
        ),
        (ReadOptions(text_column="id"), r"holds int64, not strings.*'text' \(string\)"),
        (ReadOptions(uri_column="url"), r"corpus\.uri_column='url' is not a column"),
        (ReadOptions(uri_column="junk"), r"corpus\.uri_column='junk'.*holds binary"),
    ],
)
def test_a_column_that_cannot_be_used_is_refused_with_those_there_are(
    path: Path, options: ReadOptions, said: str
) -> None:
    with pytest.raises(CorpusError, match=said):
        plan_parquet(file_ref(path), options, 100)


@pytest.mark.parametrize(
    ("raw", "reason"), [(b"", "empty"), (b"no parquet at all", "malformed"), (b"PAR1" * 100, "malformed")]
)
def test_a_file_that_is_not_parquet_is_set_aside(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "rows.parquet").write_bytes(raw)
    item = plan_parquet(file_ref(tmp_path / "rows.parquet"), ReadOptions(), 100)
    assert isinstance(item, QuarantinedItem)
    assert (item.uri, item.reason, item.size_bytes) == ("rows.parquet", reason, len(raw))
    assert str(tmp_path) not in item.detail


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    item = plan_parquet(file_ref(tmp_path / "rows.parquet"), ReadOptions(), 100)
    assert isinstance(item, QuarantinedItem)
    assert (item.reason, item.detail) == ("empty", "no rows")


def test_a_damaged_row_group_is_set_aside_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"row {i}" for i in range(30)]})
    pq.write_table(table, path, row_group_size=10, write_page_checksum=True, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(1).column(0)
    raw[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 0xFF
    path.write_bytes(raw)
    items = read(path)
    assert [document.text for document in documents(items)] == [f"row {i}" for i in (*range(10), *range(20, 30))]
    assert uris(documents(items))[10] == "rows.parquet#20"
    assert reasons(items) == {"rows.parquet#10": "malformed"}


def test_a_file_that_changed_after_it_was_listed_is_set_aside(path: Path) -> None:
    parts = plan(path, 1)
    path.unlink()
    (item,) = parts[3].read(ReadOptions())
    assert item == QuarantinedItem("rows.parquet#group3", "unreadable", "No such file or directory", 0)
    pq.write_table(pa.table({"text": ["x"]}), path)
    (item,) = parts[3].read(ReadOptions())
    assert isinstance(item, QuarantinedItem)
    assert item.reason == "malformed"


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    rows = [f"{i} " + "The quick brown fox. " * 100 for i in range(20_000)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=20_000, compression="NONE", use_dictionary=False)
    assert path.stat().st_size > 40e6
    # Arrow's peak counts from the start of the process, so the reading gets one of its own.
    program = f"""
import pyarrow as pa
from storage.corpus.parquet import plan_parquet
from storage.corpus.shard import ReadOptions
from tests.storage.corpus.support import file_ref
from pathlib import Path
(part,) = plan_parquet(file_ref(Path({str(path)!r})), ReadOptions(), 2**40)
num_bytes = sum(item.size_bytes for item in part.read(ReadOptions()))
print(num_bytes, pa.default_memory_pool().max_memory())
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    num_bytes, peak_bytes = map(int, output.split())
    assert num_bytes == sum(len(row) for row in rows)
    assert peak_bytes < 16e6
