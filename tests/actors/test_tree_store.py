"""The store actor: what it refuses after a restart, and what it says was stored when."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from actors.feeds import PackShard
from actors.packing import Packer, Window
from actors.rows import windows_from
from actors.tree_store import TreeStore, TreeStoreSpec
from cluster.config import BaseLMConfig, CorpusConfig, StoreConfig
from cluster.errors import StoreRestartedError
from cluster.ray_runtime import RaySession
from storage.contract import SpanWrite
from storage.corpus import open_corpus
from tests.actors.helpers import make_compactor, make_documents, make_text, tiny_plan


def spec_of(tiny: BaseLMConfig, root: Path, *, bulk: bool = False) -> TreeStoreSpec:
    plan = tiny_plan(tiny, root)
    store = StoreConfig(root=root, context="c", segment_super_blocks=2)
    return TreeStoreSpec(store, plan.identity, plan.encoding, bulk=bulk)


def spans_of(tiny: BaseLMConfig, root: Path, lengths: Sequence[int]) -> list[SpanWrite]:
    plan = tiny_plan(tiny, root)
    items = Packer(plan.tokenizer, lambda _: {}).pack(make_documents(lengths))
    return make_compactor(plan).encode([item for item in items if isinstance(item, Window)])


def test_a_flush_finds_out_that_what_it_should_keep_was_lost(tiny_lm_config: BaseLMConfig, tmp_path: Path) -> None:
    spec = spec_of(tiny_lm_config, tmp_path, bulk=True)
    spans = spans_of(tiny_lm_config, tmp_path, [77])
    lost = TreeStore(spec)
    _, epoch = lost.open()
    assert lost.append(epoch, spans).pending_blocks > 0
    # What a kill does: the lock is free, nothing was flushed.
    lost._opened().close()
    with closing(TreeStore(spec)) as restarted:
        with pytest.raises(StoreRestartedError):
            restarted.flush(epoch)
        _, epoch = restarted.open()
        restarted.append(epoch, spans)
        assert restarted.flush(epoch).version.num_blocks == sum(span.num_blocks for span in spans)


def test_marks_as_of_a_block(tiny_lm_config: BaseLMConfig, tmp_path: Path) -> None:
    spans = spans_of(tiny_lm_config, tmp_path, [77, 900, 77])
    keys = list(dict.fromkeys(span.document.key for span in spans))
    with closing(TreeStore(spec_of(tiny_lm_config, tmp_path))) as store:
        _, epoch = store.open()
        seen = []
        for span in spans:
            seen.append((store.open()[0].num_blocks, store.marks(keys)))
            store.append(epoch, [span])
        assert [len(marks) for _, marks in seen] == sorted(len(marks) for _, marks in seen)
        for num_blocks, marks in seen:
            assert store.marks(keys, num_blocks) == marks
        assert store.marks(keys, store.open()[0].num_blocks) == store.marks(keys)


def test_a_packing_task_made_again_gives_the_same_tables(
    tiny_lm_config: BaseLMConfig, tmp_path: Path, ray_cluster: RaySession
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        (corpus / f"{number}.txt").write_text(make_text(number, 400))
    (shard,) = open_corpus(CorpusConfig(paths=[str(corpus)])).shards()
    plan = tiny_plan(tiny_lm_config, tmp_path)
    store: Any = ray.remote(TreeStore).options(num_cpus=0).remote(spec_of(tiny_lm_config, tmp_path))
    try:
        version, epoch = ray.get(store.open.remote())
        task = PackShard(plan.base_lm, store, version.num_blocks)
        batch = pa.table({"shard": [pickle.dumps(shard)]})
        first = list(task(batch))
        windows = [window for table in first for window in windows_from(table)]
        assert len({window.document.key for window in windows}) == 6
        # Its process dies when four of six documents are stored, the fourth in part.
        stored = windows[:8]
        assert not stored[-1].last
        ray.get(store.append.remote(epoch, make_compactor(plan).encode(stored)))
        again = list(task(batch))
        assert [table.to_pylist() for table in again] == [table.to_pylist() for table in first]
        # A later feed leaves out what the earlier one stored.
        version, _ = ray.get(store.open.remote())
        later = [w for table in PackShard(plan.base_lm, store, version.num_blocks)(batch) for w in windows_from(table)]
        assert [(w.document.key, w.first_block) for w in later] == [
            (w.document.key, w.first_block) for w in windows[8:]
        ]
    finally:
        ray.kill(store)
