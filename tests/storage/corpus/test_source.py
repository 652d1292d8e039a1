import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import CorpusConfig
from cluster.errors import ConfigError, CorpusError
from storage.corpus.document import Document
from storage.corpus.shard import ShardLimits
from storage.corpus.source import CorpusSource, open_corpus, read_corpus
from tests.storage.corpus.support import documents, read_all, reasons, uris, without_privileges, write_tree


def source_of(*paths: Path, limits: ShardLimits | None = None, **fields) -> CorpusSource:
    return open_corpus(CorpusConfig(paths=[str(path) for path in paths], **fields), limits)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": f"json row {i} " + "é" * (i % 7)}, ensure_ascii=False) for i in range(50)]
    write_tree(
        tmp_path / "mixed",
        {
            "a/one.md": "# One\n",
            "a/two.py": "two = 2\n",
            "b.jsonl": "\n".join(rows),
            "c.NDJSON": '{"text": "upper case"}\n{"bad',
            "e.txt": "last\n",
            "empty.jsonl": "",
            "empty.txt": "",
            "image.png": b"\x89PNG\r\n\x1a\n\0\0",
            "wrong.parquet": "not parquet",
        },
    )
    table = pa.table({"text": [f"parquet row {i}" for i in range(20)]})
    pq.write_table(table, tmp_path / "mixed/d.parquet", row_group_size=3)
    return tmp_path / "mixed"


def test_formats_go_by_name_and_come_in_the_order_of_names(mixed: Path) -> None:
    items = read_all(mixed, tags=["t"])
    names = [uri.partition("#")[0] for uri in uris(items)]
    assert list(dict.fromkeys(names)) == [
        "mixed/a/one.md",
        "mixed/a/two.py",
        "mixed/b.jsonl",
        "mixed/c.NDJSON",
        "mixed/d.parquet",
        "mixed/e.txt",
        "mixed/empty.jsonl",
        "mixed/empty.txt",
        "mixed/image.png",
        "mixed/wrong.parquet",
    ]
    assert reasons(items) == {
        "mixed/c.NDJSON#23": "malformed",
        "mixed/empty.jsonl": "empty",
        "mixed/empty.txt": "empty",
        "mixed/image.png": "binary",
        "mixed/wrong.parquet": "malformed",
    }
    assert len(documents(items)) == 2 + 50 + 1 + 20 + 1
    assert all(document.tags == ("t",) for document in documents(items))
    assert len({document.key for document in documents(items)}) == len(documents(items))


def test_shards_read_apart_in_any_order_give_the_corpus(mixed: Path) -> None:
    whole = read_all(mixed)
    limits = ShardLimits(group_bytes=100, group_files=2, range_bytes=64)
    source = source_of(mixed, limits=limits)
    pickled = [pickle.dumps(shard) for shard in source.shards()]
    assert len(pickled) > 20
    assert all(len(shard) < 4000 for shard in pickled)
    order = list(range(len(pickled)))
    random.Random(0).shuffle(order)
    read = {index: list(pickle.loads(pickled[index]).read()) for index in order}
    assert [item for index in range(len(pickled)) for item in read[index]] == whole


def test_opening_again_gives_the_same_shards_and_digest(mixed: Path) -> None:
    first, second = source_of(mixed), source_of(mixed)
    assert list(first.shards()) == list(first.shards()) == list(second.shards())
    assert first.digest() == second.digest()
    assert len(first.digest()) == 64


def test_the_digest_sees_names_sizes_and_times(mixed: Path) -> None:
    digests = {source_of(mixed).digest()}
    status = (mixed / "e.txt").stat()
    os.utime(mixed / "e.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    digests.add(source_of(mixed).digest())
    (mixed / "e.txt").rename(mixed / "f.txt")
    digests.add(source_of(mixed).digest())
    (mixed / "g.txt").write_text("x")
    digests.add(source_of(mixed).digest())
    assert len(digests) == 4


def test_what_is_known_before_reading(mixed: Path) -> None:
    source = source_of(mixed)
    assert source.num_files == 10
    assert source.describe().startswith("10 files (3 jsonl, 2 parquet, 5 text), 0.0 MB")
    (mixed / "d.parquet").unlink()
    (mixed / "wrong.parquet").unlink()
    assert source_of(mixed).estimated_bytes == sum(path.stat().st_size for path in mixed.rglob("*.*"))


def test_a_format_can_be_forced(mixed: Path, tmp_path: Path) -> None:
    as_text = documents(read_all(mixed / "b.jsonl", format="text"))
    assert [document.text for document in as_text] == [(mixed / "b.jsonl").read_text()]
    write_tree(tmp_path, {"rows.log": '{"text": "a row"}\n'})
    assert [d.text for d in documents(read_all(tmp_path / "rows.log", format="jsonl"))] == ["a row"]


def test_oversized_files_count_neither_in_the_estimate_nor_in_a_shard(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "r", {"a.txt": "x" * 1000, "b.txt": "small", "c.txt": "small"})
    source = source_of(root, max_document_bytes=100, limits=ShardLimits(group_bytes=20))
    assert source.estimated_bytes == 10
    assert len(list(source.shards())) == 1
    items = list(read_corpus(source))
    assert reasons(items) == {"r/a.txt": "oversized"}
    assert uris(items) == ["r/a.txt", "r/b.txt", "r/c.txt"]


def test_rows_can_name_their_documents(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "r", {"a.jsonl": '{"body": "x", "url": "https://a"}\n{"body": "y"}\n'})
    items = read_all(root, text_column="body", uri_column="url")
    assert uris(items) == ["https://a", "r/a.jsonl#34"]
    assert reasons(items) == {"r/a.jsonl#34": "missing_column"}


def test_nothing_to_read_is_refused_with_the_filters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.paths is empty"):
        open_corpus(CorpusConfig())
    root = write_tree(tmp_path / "r", {"a.txt": "x", ".git/b.txt": "y"})
    with pytest.raises(CorpusError, match=r"corpus\.include=\['\*\.md'\].*corpus\.exclude="):
        source_of(root, include=["*.md"])
    with pytest.raises(CorpusError, match="matches no file below"):
        source_of(root, root / "*.md")
    with pytest.raises(CorpusError, match="matches no file below"):
        source_of(root / "*/b.txt")  # only in an excluded folder
    (tmp_path / "bare").mkdir()
    with pytest.raises(CorpusError, match="nothing to read"):
        source_of(tmp_path / "bare")
    assert uris(read_all(tmp_path / "bare", root)) == ["r/a.txt"]


def test_paths_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.txt": "x"})
    with pytest.raises(CorpusError, match="'no/such/path' does not exist"):
        open_corpus(CorpusConfig(paths=[str(tmp_path / "a.txt"), "no/such/path"]))


def test_a_parquet_file_without_the_column_is_refused_when_opening(mixed: Path) -> None:
    pq.write_table(pa.table({"content": ["x"], "n": [1]}), mixed / "other.parquet")
    with pytest.raises(CorpusError, match=r"'text' is not a column.*'content' \(string\), 'n' \(int64\)"):
        source_of(mixed)


def test_only_damaged_files_are_refused_and_empty_ones_are_not(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "r", {"a.parquet": "broken", "b.parquet": "broken too"})
    with pytest.raises(CorpusError, match=r"none of the files.*r/a\.parquet, is malformed"):
        source_of(root)
    write_tree(root, {"c.txt": ""})
    assert reasons(read_all(root)) == {
        "r/a.parquet": "malformed",
        "r/b.parquet": "malformed",
        "r/c.txt": "empty",
    }
    for name in ("empty.txt", "empty.jsonl", "empty.parquet"):
        write_tree(tmp_path, {name: ""})
        assert reasons(read_all(tmp_path / name)) == {name: "empty"}


def test_a_folder_of_which_nothing_may_be_read() -> None:
    with without_privileges() as folder:
        write_tree(folder, {"r/closed/a.txt": "x"})
        (folder / "r/closed").chmod(0)
        with pytest.raises(CorpusError, match=r"r/closed/, is unreadable: folder: Permission denied"):
            source_of(folder / "r")
        write_tree(folder, {"r/b.txt": "y", "r/secret.txt": "z"})
        (folder / "r/secret.txt").chmod(0)
        assert reasons(read_all(folder / "r")) == {"r/closed/": "unreadable", "r/secret.txt": "unreadable"}


def test_memory_does_not_grow_with_the_number_or_size_of_files(tmp_path: Path) -> None:
    line = "def work(item):  # the same line again, to make a file of some size\n"
    for index in range(400):
        write_tree(tmp_path / "r", {f"{index % 20}/{index}.py": line * 1500})
    num_bytes = 0
    tracemalloc.start()
    try:
        source = source_of(tmp_path / "r")
        for item in read_corpus(source):
            assert isinstance(item, Document)
            num_bytes += item.size_bytes
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_bytes == source.estimated_bytes == 400 * 1500 * len(line)
    assert num_bytes > 40e6
    assert peak < 2e6
