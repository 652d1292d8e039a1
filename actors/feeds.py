"""Two ways of feeding the same stages: plain actors with a bounded window, or Ray Data.

Both keep the corpus's order up to the store, hold a bounded number of batches, and may be started again at any time:
the store's marks say what is there, so nothing is done or stored twice.
"""

from __future__ import annotations

import functools
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from actors.compactor import CompactorActor, CompactorSpec
from actors.crew import Crew, Workers
from actors.packing import Marks, PackedItem, Packer, batched_windows
from actors.rows import encoded_table, other_items, packed_table, windows_from
from cluster.config import BaseLMConfig, CompactionConfig
from cluster.ray_calls import CALL_TIMEOUT_S, get_or_raise
from cluster.ray_data import stream_in_order
from models.tokenizer import Tokenizer
from storage.contract import Ack, DocumentMark
from storage.corpus import CorpusSource
from storage.corpus.document import CorpusItem

PACKER_CPUS = 0.5
"""Must differ from a compactor's: Ray Data fuses stages of equal resources into one."""

MAX_INPUT_BLOCKS = 200
"""Tasks of the packing stage; a block holds several shards of a larger corpus. Each task costs some 10 ms."""

ROWS_PER_TABLE = 256
"""Of a packing task's output, which streams."""

TABLES_IN_FLIGHT = 2
"""Tables the store may have waiting; more would only fill the object store."""

OnAck = Callable[[Ack], None]
OnOther = Callable[[PackedItem], None]


def remote_marks(store: Any, at_block: int | None = None) -> Marks:
    """Marks asked of a store actor, as they are or as they were when the timeline had `at_block` blocks."""

    def marks(keys: Sequence[str]) -> dict[str, DocumentMark]:
        if not keys:
            return {}
        return get_or_raise(store.marks.remote(list(keys), at_block), CALL_TIMEOUT_S, "asking what is stored")

    return marks


def run_actor_feed(
    crew: Crew,
    items: Iterable[CorpusItem],
    tokenizer: Tokenizer,
    config: CompactionConfig,
    on_ack: OnAck,
    on_other: OnOther,
) -> None:
    """Read and pack in this process, encode in the crew's compactors, store in order.

    Spans go from compactor to store without passing here; Ray keeps the order of one caller's calls.
    """
    packed = Packer(tokenizer, remote_marks(crew.store)).pack(items)
    limit = config.max_in_flight * len(crew.compactors)
    waiting: deque[Any] = deque()

    def collect() -> None:
        on_ack(crew.call(waiting.popleft(), "storing a batch"))

    for batch in batched_windows(packed, config.windows_per_batch, on_other):
        waiting.append(crew.store.append.remote(crew.epoch, crew.encode(batch)))
        while len(waiting) >= limit:
            collect()
    while waiting:
        collect()


class PackShard:
    """Ray Data task: reads and packs one shard.

    A task whose process died is made again, and Ray hands on only what comes after the tables it has already: they
    must be the same ones. So a task leaves out what was stored before the feed began, not what was stored since.
    """

    def __init__(self, base_lm: BaseLMConfig, store: Any, num_stored_blocks: int) -> None:
        self._base_lm = base_lm
        self._store = store
        self._num_stored_blocks = num_stored_blocks

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Packed rows of each shard in the batch, a few at a time."""
        packer = Packer(task_tokenizer(self._base_lm), remote_marks(self._store, self._num_stored_blocks))
        for shard in batch["shard"]:
            items = packer.pack(pickle.loads(shard.as_py()).read())
            while rows := list(islice(items, ROWS_PER_TABLE)):
                yield packed_table(rows)


@functools.lru_cache(maxsize=2)
def task_tokenizer(base_lm: BaseLMConfig) -> Tokenizer:
    """Loaded once a process that runs tasks."""
    return Tokenizer.load(base_lm)


class EncodeWindows:
    """Ray Data actor: a compactor over rows."""

    def __init__(self, spec: CompactorSpec, gistnet_refs: list[Any]) -> None:
        self._compactor = CompactorActor(spec).load(gistnet_refs)
        self._specs = spec.encoding.arrays

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of spans for rows of windows; other rows pass through in their place."""
        spans = self._compactor.encode(windows_from(batch))
        return encoded_table(batch, spans, self._specs)


def run_ray_data_feed(
    crew: Crew,
    source: CorpusSource,
    spec: CompactorSpec,
    workers: Workers,
    config: CompactionConfig,
    on_ack: OnAck,
    on_other: OnOther,
) -> None:
    """Shards through Ray Data: packing tasks, then a pool of compactor actors, in order, into the store."""
    stream_in_order()
    shards = [{"shard": pickle.dumps(shard)} for shard in source.shards()]
    if not shards:
        return
    dataset = (
        ray.data.from_items(shards, override_num_blocks=min(len(shards), MAX_INPUT_BLOCKS))
        .map_batches(
            PackShard(spec.base_lm, crew.store, crew.version.num_blocks),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=PACKER_CPUS,
            concurrency=config.num_packers or None,
            zero_copy_batch=True,
        )
        .map_batches(
            EncodeWindows,
            fn_constructor_args=(spec, crew.gistnet_refs),
            batch_size=config.windows_per_batch,
            batch_format="pyarrow",
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
            compute=ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=config.max_in_flight),
        )
    )
    waiting: deque[Any] = deque()
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for item in other_items(table):
            on_other(item)
        waiting.append(crew.store.append_table.remote(crew.epoch, table))
        while len(waiting) >= TABLES_IN_FLIGHT:
            on_ack(crew.call(waiting.popleft(), "storing a table"))
    while waiting:
        on_ack(crew.call(waiting.popleft(), "storing a table"))
