"""A corpus as windows: all whole ones, in order, made once."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.training.sources import ContextWindows, CorpusWindows
from actors.training.windows import prepare_windows, windows_folder
from cluster.config import BaseLMConfig, CorpusConfig, CorpusSplit
from cluster.errors import ContextNotFoundError, CorpusError, IncompatibleTreeError
from cluster.ray_runtime import RaySession
from models.tokenizer import Tokenizer
from storage.corpus import open_corpus, read_corpus
from storage.token_windows import MANIFEST, TokenWindows
from tests.actors.helpers import ingest, make_compactor, make_text, open_context, tiny_plan

SIZES = (300, 1, 900, 40, 1200)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index, words in enumerate(SIZES):
        (folder / f"doc{index}.txt").write_text(make_text(index, words))
    (folder / "bad.txt").write_bytes(b"\x00\x01binary")
    return CorpusConfig(paths=[str(folder)])


@pytest.mark.parametrize("size", [64, 1024, 2048])
def test_every_whole_window_of_every_document_in_order(
    corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path, ray_cluster: RaySession, size: int
) -> None:
    source, tokenizer = CorpusWindows(open_corpus(corpus), tiny_lm_config), Tokenizer.load(tiny_lm_config)
    folder = windows_folder(tmp_path / "windows", source, tokenizer, size)
    windows = prepare_windows(source, tokenizer, folder, size, "cutting")
    texts = [tokenizer.encode(make_text(index, words)) for index, words in enumerate(SIZES)]
    expected = np.concatenate([ids[: len(ids) // size * size].reshape(-1, size) for ids in texts])
    np.testing.assert_array_equal(windows.read(np.arange(len(windows))), expected)
    assert windows.manifest.num_documents == len(SIZES)
    assert windows.manifest.num_tokens == sum(map(len, texts))
    # Made once: a second call finds it, without a cluster, and an unfinished folder is made anew.
    written = (folder / MANIFEST).stat().st_mtime_ns
    prepare_windows(source, tokenizer, folder, size, "cutting")
    assert (folder / MANIFEST).stat().st_mtime_ns == written
    (folder / MANIFEST).unlink()
    assert len(prepare_windows(source, tokenizer, folder, size, "cutting")) == len(expected)


def test_another_text_or_length_has_another_folder(
    corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(tiny_lm_config)
    folders = {
        windows_folder(tmp_path, CorpusWindows(open_corpus(config), tiny_lm_config), tokenizer, size)
        for config in (corpus, replace(corpus, split="train"), replace(corpus, include=["doc1.txt"]))
        for size in (64, 1024)
    }
    assert len(folders) == 6


def test_a_corpus_of_short_documents_is_refused(
    corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path, ray_cluster: RaySession
) -> None:
    source = CorpusWindows(open_corpus(replace(corpus, include=["doc1.txt"])), tiny_lm_config)
    tokenizer = Tokenizer.load(tiny_lm_config)
    with pytest.raises(CorpusError, match="no document of 1024 tokens"):
        prepare_windows(source, tokenizer, tmp_path / "w", 1024, "cutting")
    assert len(TokenWindows(tmp_path / "w")) == 0


@pytest.fixture
def store(corpus: CorpusConfig, tiny_lm_config: BaseLMConfig, tmp_path: Path) -> Path:
    """With the corpus in context `c`."""
    plan = tiny_plan(tiny_lm_config, tmp_path / "store", "last_token")
    with contextlib.closing(open_context(tmp_path / "store", plan)) as writer:
        ingest(writer, plan, make_compactor(plan), list(read_corpus(open_corpus(corpus))))
    return tmp_path / "store"


@pytest.mark.parametrize("split", ["all", "train"])
def test_a_context_has_the_windows_of_the_corpus_it_was_made_of(
    corpus: CorpusConfig,
    store: Path,
    tiny_lm_config: BaseLMConfig,
    tmp_path: Path,
    ray_cluster: RaySession,
    split: CorpusSplit,
) -> None:
    tokenizer = Tokenizer.load(tiny_lm_config)
    of_corpus = CorpusWindows(open_corpus(replace(corpus, split=split)), tiny_lm_config)
    of_context = ContextWindows(store, "c", tokenizer, split)
    found = [
        prepare_windows(source, tokenizer, windows_folder(tmp_path, source, tokenizer, 64), 64, "cutting")
        for source in (of_corpus, of_context)
    ]
    everything = [windows.read(np.arange(len(windows))) for windows in found]
    np.testing.assert_array_equal(everything[0], everything[1])
    assert found[0].manifest.num_tokens == found[1].manifest.num_tokens
    assert found[0].manifest.num_documents == found[1].manifest.num_documents
    assert of_context.digest() == ContextWindows(store, "c", tokenizer, split).digest()
    assert f"context 'c' of {store}" in of_context.describe()


def test_a_context_that_does_not_fit_is_refused(
    store: Path, tiny_lm_config: BaseLMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(tiny_lm_config)
    with pytest.raises(ContextNotFoundError):
        ContextWindows(store, "another", tokenizer, "all")
    monkeypatch.setattr("actors.training.sources.split_of", lambda _: "train")
    with pytest.raises(CorpusError, match="the dev split of context 'c' .* has no documents; the whole .* has 5"):
        ContextWindows(store, "c", tokenizer, "dev")
    monkeypatch.setattr(tokenizer, "_digest", "0" * 64)
    with pytest.raises(IncompatibleTreeError, match="made with tokenizer"):
        ContextWindows(store, "c", tokenizer, "all")
