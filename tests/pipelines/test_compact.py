"""The compact job on a real cluster: both feeds, resume, lost processes, reports, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

import pipelines.compact as compact_job
from actors.crew import Crew
from actors.lexical_indexer import LexicalIndexer, LexicalIndexerSpec
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import CompactJob, StoreConfig
from cluster.errors import (
    ConfigError,
    CorpusError,
    DiskFullError,
    IncompatibleTreeError,
    ResourceError,
    WriterConflictError,
)
from cluster.ray_runtime import RaySession
from models.tokenizer import Tokenizer
from storage.contract import SpanWrite
from storage.lexical.index import LEXICAL_FILE
from storage.lexical.search import LexicalSearcher
from storage.store import Store
from storage.tree.verify import verify_context
from tests.actors.helpers import assert_same_tree, make_text
from tests.pipelines.conftest import JobFactory

pytestmark = pytest.mark.usefixtures("ray_cluster")


def report_of(job: CompactJob) -> dict[str, Any]:
    return json.loads((job.run.dir / job.run.name / "report.json").read_text())


def assert_sound(store: StoreConfig) -> None:
    report = verify_context(Store(store.root).folder(store.context), store.context)
    assert report.problems == []


def test_both_feeds_make_the_same_tree(make_job: JobFactory) -> None:
    actors, bulk = make_job("actors", "actors"), make_job("bulk", "bulk", feed="ray_data", num_compactors=1)
    compact_job.run(actors)
    compact_job.run(bulk)
    store = Store(actors.store.root)
    with store.open_reader("actors") as left, store.open_reader("bulk") as right:
        assert left.version.max_lod >= 2
        assert_same_tree(left, right)
        assert [d.meta.uri for d in left.documents()] == [d.meta.uri for d in right.documents()]
    for job in (actors, bulk):
        assert_sound(job.store)
        report = report_of(job)
        assert report["status"] == "finished"
        assert report["quarantined_by_reason"] == {"binary": 1, "empty": 1}
        assert report["documents_total"] == 7
        table = pq.read_table(job.run.dir / job.run.name / "quarantine.parquet").to_pylist()
        assert {(row["uri"], row["reason"]) for row in table} == {
            ("corpus/bad.txt", "binary"),
            ("corpus/empty.txt", "empty"),
        }


def indexed_blocks(job: CompactJob) -> int:
    with contextlib.closing(
        LexicalIndexer.patient(LexicalIndexerSpec(job.store, job.base_lm), Tokenizer.load(job.base_lm))
    ) as i:
        return i.num_blocks


@pytest.mark.parametrize("feed", ["actors", pytest.param("ray_data", marks=pytest.mark.slow)])
def test_text_is_indexed_behind_the_commits(make_job: JobFactory, feed: str) -> None:
    job = make_job("indexed", "indexed", feed=feed)
    compact_job.run(job)
    store = Store(job.store.root)
    with store.open_reader("indexed") as reader:
        assert indexed_blocks(job) == reader.version.num_blocks
        tokenizer = Tokenizer.load(job.base_lm)
        text = tokenizer.decode(reader.tokens(5, 1)[0][0])
        blocks, _ = LexicalSearcher(store.folder("indexed"), tokenizer.decode_batch).search(reader, text, 3)
        assert 5 in blocks


@pytest.mark.slow
def test_without_an_index_nothing_is_indexed(make_job: JobFactory) -> None:
    job = make_job("bare", "bare", lexical=False)
    compact_job.run(job)
    assert not (Store(job.store.root).folder("bare") / LEXICAL_FILE).exists()


@pytest.mark.slow
def test_an_index_that_somebody_else_builds_does_not_stop_a_job(make_job: JobFactory) -> None:
    job = make_job("shared", "shared")
    compact_job.run(dataclasses.replace(job, compaction=dataclasses.replace(job.compaction, lexical=False)))
    tokenizer = Tokenizer.load(job.base_lm)
    with contextlib.closing(LexicalIndexer(LexicalIndexerSpec(job.store, job.base_lm), tokenizer)):
        compact_job.run(job)
    assert report_of(job)["status"] == "finished"


def test_the_run_leaves_what_it_promises(make_job: JobFactory) -> None:
    job = make_job("full")
    compact_job.run(job)
    folder = job.run.dir / "full"
    assert {"config.yaml", "report.json", "report.md", "tree.png", "job.log", "quarantine.parquet"} <= set(
        os.listdir(folder)
    )
    report = report_of(job)
    assert report["digests"].keys() == {"base_lm", "tokenizer", "gistnet", "corpus"}
    assert report["nodes_by_lod"]["1"] == report["blocks_total"]
    (experiment,) = [e for e in _client(job).search_experiments() if e.name == job.tracking.experiment]
    (run,) = _client(job).search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["tokens_total"] == report["tokens_total"]
    assert run.data.tags["megacontext.digest.gistnet"] == report["digests"]["gistnet"]
    assert {"report.json", "tree.png"} <= {a.path for a in _client(job).list_artifacts(run.info.run_id)}


def _client(job: CompactJob) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{job.run.dir}/mlflow.db")


@pytest.mark.parametrize("feed", ["actors", pytest.param("ray_data", marks=pytest.mark.slow)])
def test_a_second_run_redoes_nothing_and_new_documents_are_added(
    make_job: JobFactory, corpus_folder: Path, feed: str
) -> None:
    job = make_job(feed=feed, num_compactors=1)
    compact_job.run(job)
    first = report_of(job)
    compact_job.run(job)
    second = report_of(job)
    assert second["new_tokens"] == 0
    assert second["documents_skipped_total"] == 7
    assert second["version"] == first["version"]
    (corpus_folder / "later.txt").write_text(make_text(99, 200))
    compact_job.run(job)
    third = report_of(job)
    assert third["documents_total"] == 8
    assert 0 < third["new_tokens"] < first["new_tokens"]
    assert_sound(job.store)


@pytest.mark.parametrize("feed", [pytest.param("actors", marks=pytest.mark.slow), "ray_data"])
def test_an_interrupted_document_is_finished_before_a_new_one_that_sorts_before_it(
    make_job: JobFactory, corpus_folder: Path, feed: str
) -> None:
    long = corpus_folder / "m_long.txt"
    long.write_text(make_text(50, 2500))
    whole = make_job("whole", "whole", feed=feed, num_compactors=1, paths=[str(long)])
    compact_job.run(whole)
    job = make_job("interrupted", feed=feed, num_compactors=1)
    _store_half_of_a_document(whole, job)
    (corpus_folder / "b_later.txt").write_text(make_text(51, 300))
    compact_job.run(job)
    store = Store(job.store.root)
    with store.open_reader("whole") as left, store.open_reader("c") as right:
        documents = right.documents()
        assert [d.state for d in documents] == ["complete"] * 9
        assert len({d.meta.key for d in documents}) == 9
        (first, *_) = documents
        assert first.num_blocks == left.version.num_blocks
        np.testing.assert_array_equal(right.tokens(0, first.num_blocks)[0], left.tokens(0, first.num_blocks)[0])
    assert_sound(job.store)


def _store_half_of_a_document(whole: CompactJob, job: CompactJob) -> None:
    """Leave a context as an ingest of another context's document does that was killed in the middle."""
    store = Store(job.store.root)
    identity, encoding = store.identity(whole.store.context)
    with (
        store.open_reader(whole.store.context) as reader,
        store.open_writer(job.store.context, identity, encoding, create=True) as writer,
    ):
        # What a corpus of one file calls it, the folder does not.
        meta = reader.documents()[0].meta
        meta = dataclasses.replace(meta, uri=f"corpus/{meta.uri}", key=f"corpus/{meta.key}")
        blocks = reader.stored_arrays(0, 0, 40)
        tokens, counts = blocks["tokens"].reshape(40, K), blocks["num_tokens"].reshape(40)
        writer.append([SpanWrite(meta, 0, tokens, counts, reader.stored_arrays(1, 0, 40))])


@pytest.fixture
def long_job(make_job: JobFactory, corpus_folder: Path) -> JobFactory:
    """Jobs that take some seconds, so that there is time to kill something."""
    for index in range(4):
        (corpus_folder / f"long{index}.txt").write_text(make_text(100 + index, 2500))
    return make_job


def test_killing_a_compactor_changes_nothing(long_job: JobFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = long_job("calm", "calm")
    compact_job.run(calm)
    killed: list[int] = []
    pids_after: list[int] = []
    original = compact_job.run_actor_feed

    def feed(crew: Crew, *arguments: Any) -> None:
        def pid() -> int:
            return crew.call(crew.compactors[0].ready.remote(crew.gistnet_refs), "its process id")

        killed.append(pid())
        threading.Timer(0.5, os.kill, (killed[0], signal.SIGKILL)).start()
        original(crew, *arguments)
        pids_after.append(pid())

    monkeypatch.setattr(compact_job, "run_actor_feed", feed)
    job = long_job("killed", "killed")
    compact_job.run(job)
    assert pids_after != killed
    assert report_of(job)["restarts"] == 0
    store = Store(job.store.root)
    with store.open_reader("calm") as left, store.open_reader("killed") as right:
        assert_same_tree(left, right)
    assert_sound(job.store)


@pytest.mark.parametrize("feed", [pytest.param("actors", marks=pytest.mark.slow), "ray_data"])
def test_killing_the_store_is_survived(long_job: JobFactory, monkeypatch: pytest.MonkeyPatch, feed: str) -> None:
    calm = long_job("calm", "calm")
    compact_job.run(calm)
    killed = _kill_store_during_feed(monkeypatch, delay_s=1.5 if feed == "actors" else 6.0)
    job = long_job("killed", "killed", feed=feed, num_compactors=1)
    compact_job.run(job)
    assert len(killed) == 1
    assert report_of(job)["restarts"] == 1
    store = Store(job.store.root)
    with store.open_reader("calm") as left, store.open_reader("killed") as right:
        assert_same_tree(left, right)
    assert_sound(job.store)


def _kill_store_during_feed(monkeypatch: pytest.MonkeyPatch, delay_s: float) -> list[int]:
    """From now on the first feed loses its store, `delay_s` after it began."""
    killed: list[int] = []

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def feed(crew: Crew, *arguments: Any) -> None:
            if not killed:
                pid = crew.call(crew.store.process_id.remote(), "its process id")
                killed.append(pid)
                threading.Timer(delay_s, os.kill, (pid, signal.SIGKILL)).start()
            original(crew, *arguments)

        return feed

    for name in ("run_actor_feed", "run_ray_data_feed"):
        monkeypatch.setattr(compact_job, name, wrap(getattr(compact_job, name)))
    return killed


def test_another_gistnet_is_refused_and_nothing_changes(make_job: JobFactory) -> None:
    from dataclasses import replace

    job = make_job()
    compact_job.run(job)
    before = report_of(job)
    other = replace(job, gistnet=replace(job.gistnet, kind="last_token"))
    with pytest.raises(IncompatibleTreeError, match=r"gistnet_id: the tree has 'windowed-m1-l2'.*'last_token-m1'"):
        compact_job.run(other)
    assert report_of(job)["status"] == "failed"
    compact_job.run(job)
    assert report_of(job)["version"] == before["version"]


def test_a_second_writer_is_refused(make_job: JobFactory) -> None:
    job = make_job()
    compact_job.run(job)
    store = Store(job.store.root)
    identity, encoding = store.identity("c")
    with (
        store.open_writer("c", identity, encoding, owner="somebody else"),
        pytest.raises(WriterConflictError, match="somebody else"),
    ):
        compact_job.run(job)


def test_a_missing_corpus_is_refused_before_anything_starts(make_job: JobFactory, tmp_path: Path) -> None:
    job = make_job(paths=[str(tmp_path / "nowhere")])
    with pytest.raises(CorpusError, match="nowhere"):
        compact_job.run(job)
    assert not job.store.root.exists()


def test_a_disk_that_cannot_hold_it_is_refused(make_job: JobFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"store\.root"):
        compact_job.run(make_job())


def test_more_workers_than_the_cluster_has_are_refused(make_job: JobFactory, ray_cluster: RaySession) -> None:
    job = make_job(gpus_per_compactor=1.0)
    assert "GPU" not in ray_cluster.resources
    with pytest.raises(ResourceError, match="GPU"):
        compact_job.run(job)


def test_impossible_values_are_refused(make_job: JobFactory) -> None:
    with pytest.raises(ConfigError, match="max_in_flight"):
        make_job(max_in_flight=0).compaction.validate()
