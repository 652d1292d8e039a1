"""A store that was cut off and goes on calling is refused by the epoch, and only by that."""

from __future__ import annotations

import json
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from actors.packing import Packer, Window, batched_windows
from actors.tree_store import TreeStore, TreeStoreSpec
from cluster.config import BaseLMConfig, StoreConfig
from cluster.errors import MegaContextError
from storage.contract import SpanWrite
from storage.corpus.document import Document
from storage.tree.verify import verify_context
from tests.actors.helpers import make_compactor, make_documents, tiny_plan
from tests.torture import fence_drill
from tests.torture.contents import difference, read_contents
from tests.torture.fence_drill import Fencing, orphan_outcome
from tests.torture.orphan import HELD_AT_BLOCKS, HELD_FILE, UNCHECKED_FILE, ask, start_store

ROUNDS_S = 1.0
"""How long the orphan goes on between the new owner's commits."""


def spec_and_batches(tiny: BaseLMConfig, root: Path, *, bulk: bool) -> tuple[TreeStoreSpec, list[list[SpanWrite]]]:
    """A context, and what an ingest of six documents sends to its store."""
    plan = tiny_plan(tiny, root)
    store = StoreConfig(root=root, context="c", segment_super_blocks=2)
    documents: list[Document] = make_documents([1500, 900, 1200, 30, 1500, 1400])
    compactor = make_compactor(plan)
    windows = Packer(plan.tokenizer, lambda _: {}).pack(documents)
    batches: list[list[Window]] = list(batched_windows(windows, 2, lambda _: None))
    return TreeStoreSpec(store, plan.identity, plan.encoding, bulk=bulk), [compactor.encode(b) for b in batches]


def undisturbed(spec: TreeStoreSpec, batches: list[list[SpanWrite]]) -> None:
    with closing(TreeStore(spec)) as store:
        _, epoch = store.open()
        for batch in batches:
            store.append(epoch, batch)


def orphaned(spec: TreeStoreSpec, batches: list[list[SpanWrite]], folder: Path) -> str:
    """The same by two stores, of which the first is cut off while it holds a batch; the second's error, if any."""
    connection: Connection = start_store(spec, folder)
    _, epoch = ask(connection, "open")
    for batch in batches:
        connection.send(("append", (epoch, batch), {}))
        while not (held := (folder / HELD_FILE).exists()) and not connection.poll(0.01):
            pass
        if held:
            break
        error, _ = connection.recv()
        assert error is None
    connection.close()
    try:
        with closing(_take_over(spec)) as store:
            _, epoch = store.open()
            marks = store.marks([span.document.key for batch in batches for span in batch])
            stored = {key: mark.num_blocks for key, mark in marks.items()}
            for batch in batches:
                store.append(epoch, [s for s in batch if s.first_block + s.num_blocks > stored.get(s.document.key, 0)])
                time.sleep(ROUNDS_S / len(batches))
    except MegaContextError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _take_over(spec: TreeStoreSpec) -> TreeStore:
    """A store of this process, as soon as the file lock is free."""
    give_up = time.monotonic() + 30.0
    while True:
        store = TreeStore(spec)
        try:
            store.open()
            return store
        except MegaContextError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def drill(tiny: BaseLMConfig, folder: Path, *, bulk: bool, unchecked: bool) -> Fencing:
    if unchecked:
        (folder / UNCHECKED_FILE).touch()
    calm, batches = spec_and_batches(tiny, folder / "calm", bulk=bulk)
    undisturbed(calm, batches)
    spec, _ = spec_and_batches(tiny, folder / "store", bulk=bulk)
    error = orphaned(spec, batches, folder)
    outcome = orphan_outcome(folder)
    result = Fencing(outcome["first"], outcome["outcomes"], error=error, restarts=1)
    result.problems = verify_context(folder / "store/c", "c").problems
    if not result.problems:
        apart = difference(read_contents(folder / "store/c", "c"), read_contents(folder / "calm/c", "c"))
        result.lost_blocks, result.doubled_blocks = apart.lost_blocks, apart.doubled_blocks
        result.differing_bytes = apart.num_bytes
    assert calm.store.root != spec.store.root
    assert sum(span.num_blocks for batch in batches for span in batch) > HELD_AT_BLOCKS
    return result


@pytest.mark.parametrize("bulk", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["journal", "bulk"])
def test_the_epoch_refuses_a_store_that_was_cut_off(tiny_lm_config: BaseLMConfig, tmp_path: Path, bulk: bool) -> None:
    result = drill(tiny_lm_config, tmp_path, bulk=bulk, unchecked=False)
    assert result.ok, result
    assert result.refused > 10


@pytest.mark.parametrize("bulk", [pytest.param(False, marks=pytest.mark.slow), True], ids=["journal", "bulk"])
def test_without_the_look_at_the_epoch_the_damage_is_found(
    tiny_lm_config: BaseLMConfig, tmp_path: Path, bulk: bool
) -> None:
    result = drill(tiny_lm_config, tmp_path, bulk=bulk, unchecked=True)
    assert result.accepted > 0, result
    assert result.damaged, result


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_job_goes_on_where_the_node_of_its_store_was_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fence_drill.run(tmp_path / "drill", "actors")
    with capsys.disabled():
        print(f"\n{json.dumps(result.outcomes)}, {result.restarts} restarts")
    assert result.ok, result
    assert result.refused > 10
