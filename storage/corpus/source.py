"""A corpus, checked and ready to be read: the door of this package.

Opening looks at every path once (names, sizes, Parquet footers; no text) and refuses what cannot work, so a
wrong path costs a second and not a cluster. Packages that are not in the cache are fetched then. Reading is by
shards, in one stable order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, Protocol

from cluster.config import CorpusConfig
from cluster.errors import CorpusError
from storage.corpus.document import CorpusItem, QuarantinedItem
from storage.corpus.huggingface import HuggingFaceCorpus
from storage.corpus.json_lines import plan_json_lines
from storage.corpus.packages import resolve_packages
from storage.corpus.parquet import plan_parquet
from storage.corpus.shard import Part, ReadOptions, RefusedPart, Shard, ShardLimits, group_parts, refuse_size
from storage.corpus.splits import SplitCorpus
from storage.corpus.standard_library import resolve_standard_library
from storage.corpus.text_file import TextFilePart
from storage.corpus.walk import FileRef, Root, resolve_roots, walk_roots

FileFormat = Literal["text", "jsonl", "parquet"]


class CorpusSource(Protocol):
    """What can be read. `shards` may be called again and gives the same while the files stay the same."""

    @property
    def num_files(self) -> int:
        """Files found (of a Hugging Face split: its shards)."""
        ...

    @property
    def estimated_bytes(self) -> int | None:
        """Bytes of raw text, from sizes and footers alone; None where the source does not say."""
        ...

    def shards(self) -> Iterator[Shard]:
        """Yield the units of work, lazily; one after the other they are the corpus in order."""
        ...

    def digest(self) -> str:
        """Hex SHA-256 over the names, sizes and times of what was found: cheap, for experiment tracking."""
        ...

    def describe(self) -> str:
        """One line for people."""
        ...


def open_corpus(config: CorpusConfig, limits: ShardLimits | None = None) -> CorpusSource:
    """Check what the configuration names and return it ready to be read.

    Raises:
        ConfigError: the section itself cannot work (no paths, no globs, an unknown `package:` name, …).
        CorpusError: a path is missing or cannot be opened, a package cannot be fetched or is not what was pinned,
            a glob or filter leaves nothing, a Parquet file or dataset lacks the named column, or no file can be
            read at all.
    """
    config.validate()
    config.require_text()
    source = HuggingFaceCorpus(config) if config.format == "huggingface" else _open_files(config, limits)
    return source if config.split == "all" else SplitCorpus(source, config.split)


def _open_files(config: CorpusConfig, limits: ShardLimits | None) -> FileCorpus:
    config, uri_prefixes = resolve_packages(resolve_standard_library(config))
    return FileCorpus(config, limits or ShardLimits(), uri_prefixes)


def read_corpus(source: CorpusSource) -> Iterator[CorpusItem]:
    """Read a whole corpus in this process, one document in memory at a time."""
    for shard in source.shards():
        yield from shard.read()


class FileCorpus:
    """Local files: text, JSON Lines and Parquet, mixed as they come.

    `uri_prefixes` names documents below some of the paths otherwise than by the path's own name.
    """

    def __init__(self, config: CorpusConfig, limits: ShardLimits, uri_prefixes: Mapping[str, str]) -> None:
        self._config = config
        self._limits = limits
        self._options = ReadOptions.from_config(config)
        self._roots = [
            replace(root, uri_prefix=uri_prefixes.get(root.path, root.uri_prefix))
            for root in resolve_roots(config.paths)
        ]
        for root in self._roots:
            self._check_glob(root)
        self._num_files_by_format: Counter[FileFormat] = Counter()
        self._estimated_bytes = 0
        digest = hashlib.sha256()
        num_readable = 0
        first_refused: QuarantinedItem | None = None
        for entry in self._entries():
            if isinstance(entry, QuarantinedItem):
                first_refused = first_refused or entry
                digest.update(f"{entry.uri}\0{entry.reason}\n".encode())
                continue
            digest.update(f"{entry.uri}\0{entry.size_bytes}\0{entry.modified_ns}\n".encode())
            self._num_files_by_format[self._format(entry)] += 1
            for part in self._parts(entry):
                if isinstance(part, RefusedPart) and part.item.reason in ("malformed", "unreadable"):
                    first_refused = first_refused or part.item
                else:
                    num_readable += 1
                self._estimated_bytes += part.estimated_bytes
        self._digest = digest.hexdigest()
        if num_readable == 0:
            self._refuse_all(first_refused)

    @property
    def num_files(self) -> int:
        return self._num_files_by_format.total()

    @property
    def estimated_bytes(self) -> int | None:
        return self._estimated_bytes

    def shards(self) -> Iterator[Shard]:
        parts = (part for entry in self._entries() for part in self._parts(entry))
        return group_parts(parts, self._options, self._limits)

    def digest(self) -> str:
        return self._digest

    def describe(self) -> str:
        by_format = ", ".join(f"{count} {name}" for name, count in sorted(self._num_files_by_format.items()))
        return f"{self.num_files} files ({by_format}), {self._estimated_bytes / 1e6:.1f} MB of text"

    def _entries(self) -> Iterator[FileRef | QuarantinedItem]:
        return walk_roots(self._roots, self._config.include, self._config.exclude)

    def _format(self, file: FileRef) -> FileFormat:
        if self._config.format in ("text", "jsonl", "parquet"):
            return self._config.format
        name = file.path.lower()
        if name.endswith((".jsonl", ".ndjson")):
            return "jsonl"
        return "parquet" if name.endswith(".parquet") else "text"

    def _parts(self, entry: FileRef | QuarantinedItem) -> Iterator[Part]:
        if isinstance(entry, QuarantinedItem):
            yield RefusedPart(entry)
            return
        file_format = self._format(entry)
        if file_format == "text":
            # An oversized file is refused here, so that it counts neither in the estimate nor in a shard's size.
            refused = refuse_size(entry.uri, entry.size_bytes, self._options)
            yield RefusedPart(refused) if refused else TextFilePart(entry)
        elif file_format == "jsonl":
            yield from plan_json_lines(entry, self._limits.range_bytes)
        else:
            planned = plan_parquet(entry, self._options, self._limits.range_bytes)
            yield from (RefusedPart(planned),) if isinstance(planned, QuarantinedItem) else planned

    def _check_glob(self, root: Root) -> None:
        if not root.pattern:
            return
        found = walk_roots([root], self._config.include, self._config.exclude)
        if not any(isinstance(entry, FileRef) for entry in found):
            raise CorpusError(
                f"corpus.paths: the glob {root.given!r} matches no file below {root.path} that "
                f"corpus.exclude={self._config.exclude} lets through (folders it matches are walked for "
                f"corpus.include={self._config.include})"
            )

    def _refuse_all(self, first_refused: QuarantinedItem | None) -> None:
        if first_refused is not None:
            raise CorpusError(
                f"none of the files of corpus.paths={self._config.paths} can be read; the first, "
                f"{first_refused.uri}, is {first_refused.reason}: {first_refused.detail}. Replace it, or "
                "give others"
            )
        raise CorpusError(
            f"nothing to read in corpus.paths={self._config.paths}: no file matches "
            f"corpus.include={self._config.include} and escapes corpus.exclude={self._config.exclude}"
        )
