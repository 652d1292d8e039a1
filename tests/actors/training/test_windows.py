"""A corpus as windows: all whole ones, in order, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.training.windows import prepare_windows, windows_folder
from cluster.config import BaseLMConfig, CorpusConfig
from cluster.errors import CorpusError
from cluster.ray_runtime import RaySession
from models.tokenizer import Tokenizer
from storage.corpus import open_corpus
from storage.token_windows import MANIFEST, TokenWindows
from tests.actors.helpers import make_text

SIZES = (300, 1, 900, 40, 1200)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index, words in enumerate(SIZES):
        (folder / f"doc{index}.txt").write_text(make_text(index, words))
    (folder / "bad.txt").write_bytes(b"\x00\x01binary")
    return CorpusConfig(paths=[str(folder)])


@pytest.mark.parametrize("size", [64, 1024])
def test_every_whole_window_of_every_document_in_order(
    corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path, ray_cluster: RaySession, size: int
) -> None:
    source, tokenizer = open_corpus(corpus), Tokenizer.load(tiny_lm_config)
    folder = windows_folder(tmp_path / "windows", source, tokenizer, size)
    windows = prepare_windows(source, tiny_lm_config, tokenizer, folder, size, "cutting")
    texts = [tokenizer.encode(make_text(index, words)) for index, words in enumerate(SIZES)]
    expected = np.concatenate([ids[: len(ids) // size * size].reshape(-1, size) for ids in texts])
    np.testing.assert_array_equal(windows.read(np.arange(len(windows))), expected)
    assert windows.manifest.num_documents == len(SIZES)
    assert windows.manifest.num_tokens == sum(map(len, texts))
    # Made once: a second call finds it, without a cluster, and an unfinished folder is made anew.
    written = (folder / MANIFEST).stat().st_mtime_ns
    prepare_windows(source, tiny_lm_config, tokenizer, folder, size, "cutting")
    assert (folder / MANIFEST).stat().st_mtime_ns == written
    (folder / MANIFEST).unlink()
    assert len(prepare_windows(source, tiny_lm_config, tokenizer, folder, size, "cutting")) == len(expected)


def test_another_text_or_length_has_another_folder(
    corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tiny_lm_config)
    folders = {
        windows_folder(tmp_path, open_corpus(config), tokenizer, size)
        for config in (corpus, replace(corpus, split="train"), replace(corpus, include=["doc1.txt"]))
        for size in (64, 1024)
    }
    assert len(folders) == 6


def test_a_corpus_of_short_documents_is_refused(
    corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path, ray_cluster: RaySession
) -> None:
    source, tokenizer = open_corpus(replace(corpus, include=["doc1.txt"])), Tokenizer.load(tiny_lm_config)
    with pytest.raises(CorpusError, match="no document of 1024 tokens"):
        prepare_windows(source, tiny_lm_config, tokenizer, tmp_path / "w", 1024, "cutting")
    assert len(TokenWindows(tmp_path / "w")) == 0
