"""Jobs on the tiny model, small corpora, and the session's cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import (
    BaseLMConfig,
    CompactionConfig,
    CompactJob,
    CorpusConfig,
    GistNetConfig,
    RunConfig,
    StoreConfig,
)
from tests.actors.helpers import make_text

JobFactory = Callable[..., CompactJob]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Seven documents, of 1 to about 6,000 tokens of the tiny (byte) tokenizer, and two that cannot be read."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index, words in enumerate((300, 1, 900, 40, 1200, 500, 77)):
        (folder / f"doc{index}.txt").write_text(make_text(index, words))
    (folder / "bad.txt").write_bytes(b"\x00\x01\x02binary")
    (folder / "empty.txt").write_text("  \n")
    return folder


@pytest.fixture
def make_job(tmp_path: Path, tiny_lm_config: BaseLMConfig, corpus_folder: Path) -> JobFactory:
    """A compact job; keyword arguments replace fields of the compaction section."""

    def make(name: str = "run", context: str = "c", paths: list[str] | None = None, **compaction: Any) -> CompactJob:
        fields = {"feed": "actors", "num_compactors": 2, "threads_per_compactor": 1, "windows_per_batch": 2}
        return CompactJob(
            run=RunConfig(name=name, dir=tmp_path / "runs"),
            corpus=CorpusConfig(paths=paths or [str(corpus_folder)]),
            base_lm=tiny_lm_config,
            gistnet=GistNetConfig(lm_layers=2),
            store=StoreConfig(root=tmp_path / "store", context=context, segment_super_blocks=4),
            compaction=CompactionConfig(**{**fields, **compaction}),
        )

    return make
