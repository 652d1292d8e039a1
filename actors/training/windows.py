"""From a corpus to tokenised windows on disk, through Ray Data; made once for each corpus and tokenizer.

Tasks read and tokenise shards of the corpus, in order; this process writes. Only whole windows are kept: a window never
crosses a document's border, as a gist's never does.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from filelock import FileLock

from actors.feeds import MAX_INPUT_BLOCKS, PACKER_CPUS, task_tokenizer
from actors.packing import Packer, Window
from cluster.config import SLOTS_PER_SUPER_BLOCK, BaseLMConfig
from cluster.errors import CorpusError
from cluster.progress import Progress
from cluster.ray_data import stream_in_order
from models.tokenizer import Tokenizer
from storage.corpus import CorpusSource
from storage.token_windows import TokenWindows, TokenWindowWriter, is_finished

WINDOWS_PER_TABLE = 256


class CutShards:
    """Ray Data task: the windows of a shard, and of how many documents and tokens they are."""

    def __init__(self, base_lm: BaseLMConfig, window_tokens: int) -> None:
        self._base_lm = base_lm
        self._window_tokens = window_tokens

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Rows of windows, a few at a time."""
        packer = Packer(task_tokenizer(self._base_lm), lambda _keys: {})
        for shard in batch["shard"]:
            items = packer.pack(pickle.loads(shard.as_py()).read())
            windows = (item for item in items if isinstance(item, Window))
            while part := list(islice(windows, WINDOWS_PER_TABLE)):
                yield self._table(part)

    def _table(self, windows: list[Window]) -> pa.Table:
        size = self._window_tokens
        whole = [window.tokens[: len(window.tokens) // size * size] for window in windows]
        columns = {
            "tokens": pa.array([np.concatenate(whole).astype("<u4").tobytes()], pa.large_binary()),
            "num_documents": pa.array([sum(window.last for window in windows)], pa.int64()),
            "num_tokens": pa.array([sum(len(window.tokens) for window in windows)], pa.int64()),
        }
        return pa.table(columns)


def windows_folder(root: Path, source: CorpusSource, tokenizer: Tokenizer, window_tokens: int) -> Path:
    """Where the windows of a corpus are kept: another corpus, tokenizer or length, another folder."""
    what = "\0".join((source.digest(), tokenizer.digest, str(window_tokens)))
    return root / hashlib.sha256(what.encode()).hexdigest()[:16]


def prepare_windows(
    source: CorpusSource, base_lm: BaseLMConfig, tokenizer: Tokenizer, folder: Path, window_tokens: int, label: str
) -> TokenWindows:
    """The windows of a corpus, cut now unless they were before. Needs a cluster only then.

    Args:
        source: the corpus.
        base_lm: whose tokenizer the tasks load.
        tokenizer: the same, for its digest.
        folder: of `windows_folder`; one process at a time fills it.
        window_tokens: of every window; divides 1,024.
        label: what the corpus is for, in the progress display.

    Raises:
        CorpusError: no document of it is as long as a window.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_finished(folder):
            _cut(source, base_lm, tokenizer, folder, window_tokens, label)
    windows = TokenWindows(folder)
    if len(windows) == 0:
        raise CorpusError(
            f"{source.describe()} has no document of {window_tokens} tokens: nothing to train on. Give longer "
            "documents, or lower windows.window_tokens"
        )
    return windows


def _cut(
    source: CorpusSource, base_lm: BaseLMConfig, tokenizer: Tokenizer, folder: Path, window_tokens: int, label: str
) -> None:
    assert SLOTS_PER_SUPER_BLOCK % window_tokens == 0
    stream_in_order()
    shards = [{"shard": pickle.dumps(shard)} for shard in source.shards()]
    origin = {"corpus": source.digest(), "tokenizer": tokenizer.digest}
    num_documents = num_tokens = 0
    with TokenWindowWriter(folder, window_tokens, origin) as writer, Progress(None, "windows", label) as progress:
        if shards:
            dataset = ray.data.from_items(shards, override_num_blocks=min(len(shards), MAX_INPUT_BLOCKS)).map_batches(
                CutShards(base_lm, window_tokens),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=PACKER_CPUS,
                zero_copy_batch=True,
            )
            tables: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
            for table in tables:
                for row in range(table.num_rows):
                    tokens = np.frombuffer(table["tokens"][row].as_buffer(), "<u4").reshape(-1, window_tokens)
                    writer.append(tokens)
                    progress.advance(len(tokens))
                num_documents += sum(table["num_documents"].to_pylist())
                num_tokens += sum(table["num_tokens"].to_pylist())
        writer.finish(num_documents, num_tokens)
