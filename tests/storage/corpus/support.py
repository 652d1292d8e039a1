"""What the corpus tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.config import CorpusConfig
from storage.corpus.document import CorpusItem, Document, QuarantinedItem
from storage.corpus.shard import ShardLimits
from storage.corpus.source import open_corpus, read_corpus
from storage.corpus.walk import FileRef


def write_tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read_all(*paths: Path | str, limits: ShardLimits | None = None, **fields) -> list[CorpusItem]:
    config = CorpusConfig(paths=[str(path) for path in paths], **fields)
    return list(read_corpus(open_corpus(config, limits)))


def uris(items: Iterable[CorpusItem]) -> list[str]:
    return [item.uri for item in items]


def documents(items: Iterable[CorpusItem]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def reasons(items: Iterable[CorpusItem]) -> dict[str, str]:
    return {item.uri: item.reason for item in items if isinstance(item, QuarantinedItem)}


def file_ref(path: Path, uri: str | None = None) -> FileRef:
    status = path.stat()
    return FileRef(str(path), uri or path.name, status.st_size, status.st_mtime_ns)


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder in which permissions count, also when the tests are run by root."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        if is_root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if is_root:
                os.seteuid(0)
            for parent, _, _ in os.walk(folder):
                os.chmod(parent, 0o700)
