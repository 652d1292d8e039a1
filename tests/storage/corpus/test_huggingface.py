"""Runs against the real `datasets` package where the `hub` extra is installed, on a local dataset folder."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import CorpusConfig
from cluster.errors import ConfigError, CorpusError
from storage.corpus.huggingface import HuggingFaceCorpus, HuggingFacePart
from storage.corpus.shard import ReadOptions
from storage.corpus.source import open_corpus, read_corpus
from tests.storage.corpus.support import documents, reasons, uris

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the hub extra: pip install -e '.[hub]'"
)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "prose"
    folder.mkdir()
    for shard in range(3):
        texts = [f"row {shard}-{row} é" for row in range(5)] + [None]
        pq.write_table(pa.table({"text": texts, "n": range(6)}), folder / f"train-{shard:05}-of-00003.parquet")
    return folder


def config_of(dataset: Path | str, **fields) -> CorpusConfig:
    return CorpusConfig(format="huggingface", dataset=str(dataset), **fields)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install -e '\.\[hub\]'"):
        open_corpus(config_of("someone/something"))


def test_the_dataset_must_be_named() -> None:
    with pytest.raises(ConfigError, match=r"corpus\.dataset=<id>"):
        open_corpus(config_of(""))


def test_a_broken_stream_is_an_error_and_not_the_end() -> None:
    class Rows:
        def __iter__(self):
            yield {"text": "first"}
            raise ConnectionError("reset by peer")

    part = HuggingFacePart(Rows(), "id/train", 4, 0).read(ReadOptions())
    assert next(part).uri == "id/train#4:0"
    with pytest.raises(CorpusError, match=r"id/train broke in shard 4 after 1 rows: reset by peer.*again"):
        next(part)


@needs_datasets
def test_rows_come_in_order_and_shards_can_be_read_apart(dataset: Path) -> None:
    source = open_corpus(config_of(dataset, tags=["t"]))
    items = list(read_corpus(source))
    assert [document.text for document in documents(items)] == [
        f"row {shard}-{row} é" for shard in range(3) for row in range(5)
    ]
    assert reasons(items) == {f"prose/train#{shard}:5": "missing_column" for shard in range(3)}
    assert uris(items)[:2] == ["prose/train#0:0", "prose/train#0:1"]
    assert documents(items)[0].tags == ("t",)
    assert documents(items)[0].modified_at is None
    copies = [pickle.loads(pickle.dumps(shard)) for shard in source.shards()]
    assert [item for shard in copies for item in shard.read()] == items
    assert source.num_files == len(copies) == 3


@needs_datasets
def test_opening_again_gives_the_same_digest_and_another_split_or_data_another(dataset: Path) -> None:
    digest = open_corpus(config_of(dataset)).digest()
    assert open_corpus(config_of(dataset)).digest() == digest
    pq.write_table(pa.table({"text": ["more"], "n": [1]}), dataset / "test-00000-of-00001.parquet")
    assert open_corpus(config_of(dataset, dataset_split="test")).digest() != digest
    assert open_corpus(config_of(dataset)).digest() != digest


@needs_datasets
def test_what_is_not_there_is_refused(dataset: Path) -> None:
    with pytest.raises(CorpusError, match=r"no column 'body'; it has 'text', 'n'"):
        HuggingFaceCorpus(config_of(dataset, text_column="body"))
    with pytest.raises(CorpusError, match=r"dataset_split='nope' cannot be opened.*'train'"):
        HuggingFaceCorpus(config_of(dataset, dataset_split="nope"))
    with pytest.raises(CorpusError, match=r"cannot be opened.*configuration"):
        HuggingFaceCorpus(config_of(f"{dataset}:no-such-configuration"))
    with pytest.raises(CorpusError, match="cannot be opened"):
        HuggingFaceCorpus(config_of(dataset / "gone"))


@needs_datasets
def test_rows_can_be_named_by_a_column(dataset: Path) -> None:
    items = list(read_corpus(open_corpus(config_of(dataset, uri_column="n"))))
    assert uris(documents(items))[:3] == ["0", "1", "2"]
