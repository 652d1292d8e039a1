"""A dataset of the Hugging Face hub (or a local dataset folder), streamed; needs the `hub` extra.

A dataset with several configurations is given as `<id>:<configuration>`. A row is named
`<id>/<split>#<shard>:<row>`: how many rows stand in the shards before is not known without reading them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.config import CorpusConfig
from cluster.errors import CorpusError
from storage.corpus.document import CorpusItem
from storage.corpus.rows import read_row
from storage.corpus.shard import ReadOptions, Shard


@dataclass(frozen=True, slots=True)
class HuggingFacePart:
    """One shard of a streamed split, pinned to the revision that was found when the corpus was opened."""

    rows: Any
    """A `datasets.IterableDataset`; pickles as a recipe, not as data."""
    uri: str
    index: int
    estimated_bytes: int

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        """Yield the shard's rows.

        Raises:
            CorpusError: the stream broke. This says nothing about a row, so nothing is set aside.
        """
        stream = iter(self.rows)
        num_read = 0
        while True:
            try:
                row = next(stream, None)
            except Exception as error:  # whatever the network, the file format's reader or a proxy raises
                raise CorpusError(
                    f"the stream of {self.uri} broke in shard {self.index} after {num_read} rows: {error}. "
                    "Run the same command again to go on"
                ) from error
            if row is None:
                return
            position = f"{self.uri}#{self.index}:{num_read}"
            yield read_row(row, position, options, size_bytes=0, modified_at=None)
            num_read += 1


class HuggingFaceCorpus:
    """One split of a dataset. See `storage.corpus.source.CorpusSource`."""

    def __init__(self, config: CorpusConfig) -> None:
        """Find the dataset and check its columns.

        Raises:
            CorpusError: `datasets` is not installed, or the dataset, configuration, split or a column is not
                there.
        """
        try:
            import datasets  # pyright: ignore[reportMissingImports]: an extra
        except ImportError as error:
            raise CorpusError(
                "corpus.format=huggingface needs the 'datasets' package: pip install -e '.[hub]'"
            ) from error
        self._options = ReadOptions.from_config(config)
        name, _, configuration = config.dataset.partition(":")
        where = f"corpus.dataset={config.dataset!r}, corpus.dataset_split={config.dataset_split!r}"
        try:
            builder = datasets.load_dataset_builder(name, configuration or None)
            rows = builder.as_streaming_dataset(split=config.dataset_split)
            columns = rows.column_names
        except Exception as error:  # the library raises its own, the hub client's and the file system's errors
            raise CorpusError(
                f"{where} cannot be opened: {error}. Check the id (<id>:<configuration> if it has several), "
                "the split and the network"
            ) from error
        wanted = [column for column in (config.text_column, config.uri_column) if column]
        for column in wanted:
            if columns is not None and column not in columns:
                raise CorpusError(
                    f"{where} has no column {column!r}; it has {', '.join(map(repr, columns))}. Set "
                    "--corpus.text_column (and --corpus.uri_column) to one of them"
                )
        # Other columns may be images or audio, which would be decoded for nothing.
        self._rows = rows if columns is None else rows.select_columns(wanted)
        split = (builder.info.splits or {}).get(config.dataset_split)
        self._estimated_bytes: int | None = getattr(split, "num_bytes", None) or None
        # A local folder is named by its last component: the rest differs between machines.
        is_local = os.path.isdir(os.path.expanduser(name))
        self._uri = f"{os.path.basename(os.path.abspath(name)) if is_local else name}/{config.dataset_split}"
        identity = f"{config.dataset}\0{config.dataset_split}\0{builder.hash}\0{builder.info.version}"
        self._digest = hashlib.sha256(identity.encode()).hexdigest()

    @property
    def num_files(self) -> int:
        return self._rows.num_shards

    @property
    def estimated_bytes(self) -> int | None:
        return self._estimated_bytes

    def shards(self) -> Iterator[Shard]:
        num_shards = self._rows.num_shards
        for index in range(num_shards):
            rows = self._rows.shard(num_shards=num_shards, index=index)
            part = HuggingFacePart(rows, self._uri, index, (self._estimated_bytes or 0) // num_shards)
            yield Shard((part,), self._options)

    def digest(self) -> str:
        return self._digest

    def describe(self) -> str:
        return f"{self._uri} of the Hugging Face hub, {self.num_files} shards"
