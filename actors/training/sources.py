"""Where windows to train on come from: a corpus, or the documents of a stored context.

Both are read by Ray Data tasks, in order, and give the same windows of the same documents: a window begins at every
`window_tokens`-th token of a document, and what does not fill one is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray.data

from actors.feeds import MAX_INPUT_BLOCKS, PACKER_CPUS, task_tokenizer
from actors.packing import Packer, Window
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, CorpusSplit
from cluster.errors import CorpusError, IncompatibleTreeError
from cluster.ray_data import stream_in_order
from models.tokenizer import Tokenizer
from storage.contract import DocumentInfo
from storage.corpus import CorpusSource, split_of
from storage.store import Store

DOCUMENTS_PER_TASK = 64
TOKENS_PER_TABLE = 2**18
TOKENS_PER_READ = 2**17
"""Of a stored document: a multiple of every window's length."""


class WindowSource(Protocol):
    """Text that can be cut into windows."""

    def digest(self) -> str:
        """Hex: equal ones, equal text."""
        ...

    def describe(self) -> str:
        """For people."""
        ...

    def tables(self, window_tokens: int) -> Iterator[pa.Table]:
        """Rows of `tokens` (uint32, windows one after the other), `num_documents` that end in them, and `num_tokens` of
        them, whole windows or not; in the text's order. Needs a cluster."""
        ...


class CorpusWindows:
    """Documents of a corpus, tokenised."""

    def __init__(self, source: CorpusSource, base_lm: BaseLMConfig) -> None:
        """Args: `base_lm` is whose tokenizer the tasks load."""
        self._source = source
        self._base_lm = base_lm

    def digest(self) -> str:
        return self._source.digest()

    def describe(self) -> str:
        return self._source.describe()

    def tables(self, window_tokens: int) -> Iterator[pa.Table]:
        shards = [{"what": pickle.dumps(shard)} for shard in self._source.shards()]
        return _run(shards, _CutShards(self._base_lm, window_tokens))


class ContextWindows:
    """Documents of a context as one version has them."""

    def __init__(
        self, root: Path, context: str, tokenizer: Tokenizer, split: CorpusSplit, version: int | None = None
    ) -> None:
        """Look the documents up; nothing is read.

        Args:
            version: sequence number; None: the newest.

        Raises:
            ContextNotFoundError: no such context.
            IncompatibleTreeError: it was made with another tokenizer.
            CorpusError: it has no document of the split.
        """
        store = Store(root)
        made_with = store.identity(context)[0].tokenizer_digest
        if made_with != tokenizer.digest:
            raise IncompatibleTreeError(
                f"context {context!r} was made with tokenizer {made_with[:12]}…, base_lm has {tokenizer.digest[:12]}…; "
                "take the model it was made for, or another context"
            )
        with contextlib.closing(store.open_reader(context, seq=version)) as reader:
            self.version = reader.version.seq
            documents = reader.documents()
        self._root, self._context, self._split = root, context, split
        self._documents = [one for one in documents if split == "all" or split_of(one.meta.content_sha256) == split]
        if not self._documents:
            raise CorpusError(f"{self.describe()} has no documents; the whole context has {len(documents):,}")

    def digest(self) -> str:
        found = hashlib.sha256()
        for one in self._documents:
            found.update(f"{one.meta.content_sha256}\0{one.num_tokens}\0".encode())
        return found.hexdigest()

    def describe(self) -> str:
        part = "" if self._split == "all" else f"the {self._split} split of "
        return f"{part}context {self._context!r} of {self._root}"

    def tables(self, window_tokens: int) -> Iterator[pa.Table]:
        groups = [
            {"what": pickle.dumps(self._documents[first : first + DOCUMENTS_PER_TASK])}
            for first in range(0, len(self._documents), DOCUMENTS_PER_TASK)
        ]
        task = _CutDocuments(self._root, self._context, self.version, window_tokens)
        # The version is kept while tasks read it, however long that takes.
        with contextlib.closing(Store(self._root).open_reader(self._context, seq=self.version)) as pin:
            for table in _run(groups, task):
                pin.renew()
                yield table


@dataclass(frozen=True)
class _CutShards:
    """Ray Data task: shards of a corpus."""

    base_lm: BaseLMConfig
    window_tokens: int

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        packer = Packer(task_tokenizer(self.base_lm), lambda _keys: {})
        for shard in batch["what"]:
            items = packer.pack(pickle.loads(shard.as_py()).read())
            parts = ((window.tokens, window.last) for window in items if isinstance(window, Window))
            yield from _tables(_joined(parts, self.window_tokens), self.window_tokens)


@dataclass(frozen=True)
class _CutDocuments:
    """Ray Data task: documents of a context."""

    root: Path
    context: str
    seq: int
    window_tokens: int

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        reader = Store(self.root).open_reader(self.context, seq=self.seq)
        try:
            for group in batch["what"]:
                yield from _tables(self._parts(reader, pickle.loads(group.as_py())), self.window_tokens)
        finally:
            reader.close()

    @staticmethod
    def _parts(reader: Any, documents: list[DocumentInfo]) -> Iterator[tuple[np.ndarray, bool]]:
        for one in documents:
            reader.require_whole(one.first_block, one.num_blocks, "training")
            for first in range(0, one.num_tokens, TOKENS_PER_READ):
                size = min(TOKENS_PER_READ, one.num_tokens - first)
                tokens, _ = reader.tokens(one.first_block + first // K, -(-size // K))
                yield tokens.reshape(-1)[:size], first + size == one.num_tokens


def _joined(parts: Iterable[tuple[np.ndarray, bool]], window_tokens: int) -> Iterator[tuple[np.ndarray, bool]]:
    """A packer's windows of 1,024 tokens as longer ones; shorter ones are parts of them."""
    held: list[np.ndarray] = []
    for tokens, last in parts:
        held.append(tokens)
        if last or sum(map(len, held)) >= window_tokens:
            yield np.concatenate(held), last
            held = []


def _tables(parts: Iterable[tuple[np.ndarray, bool]], window_tokens: int) -> Iterator[pa.Table]:
    """Tables of `(tokens, whether a document ends there)`, each beginning where a window does, a few at a time."""
    taken: list[tuple[np.ndarray, bool]] = []
    size = 0
    for part in parts:
        taken.append(part)
        size += len(part[0])
        if size >= TOKENS_PER_TABLE:
            yield _table(taken, window_tokens)
            taken, size = [], 0
    if taken:
        yield _table(taken, window_tokens)


def _table(parts: list[tuple[np.ndarray, bool]], window_tokens: int) -> pa.Table:
    whole = [tokens[: len(tokens) // window_tokens * window_tokens] for tokens, _ in parts]
    return pa.table(
        {
            "tokens": pa.array([np.concatenate(whole).astype("<u4").tobytes()], pa.large_binary()),
            "num_documents": pa.array([sum(last for _, last in parts)], pa.int64()),
            "num_tokens": pa.array([sum(len(tokens) for tokens, _ in parts)], pa.int64()),
        }
    )


def _run(rows: list[dict[str, bytes]], task: Any) -> Iterator[pa.Table]:
    if not rows:
        return
    stream_in_order()
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_INPUT_BLOCKS)).map_batches(
        task, batch_size=1, batch_format="pyarrow", num_cpus=PACKER_CPUS, zero_copy_batch=True
    )
    whole_blocks: Any = None  # Ray's annotation of `batch_size` does not say that it may be None
    yield from dataset.iter_batches(batch_size=whole_blocks, batch_format="pyarrow", prefetch_batches=1)
