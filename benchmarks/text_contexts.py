"""Contexts of real text with vectors drawn at random: what long histories are made of where nobody waits for gists.

The text is that of `corpus.py`, tokenised and indexed by its words. Encoding 10 M tokens takes hours, and no time that
is measured on these contexts depends on what their gists say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from actors.compactor import span_of
from actors.lexical_indexer import LexicalIndexer, LexicalIndexerSpec
from actors.packing import Marks, Packer, Window
from actors.plan import CompactionPlan
from benchmarks.corpus import corpus_files, open_files
from benchmarks.harness import Setting
from benchmarks.synthetic import put_levels
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import StoreConfig
from storage.contract import SpanWrite
from storage.corpus import read_corpus
from storage.schema import GISTS, KEYS
from storage.store import Store
from storage.tree.bulk_writer import BulkWriter

SPANS_AT_A_TIME = 8

DrawKeys = Callable[[int], np.ndarray]
"""Keys of so many blocks: `(n, D_key)` float32."""


def build_text_context(
    setting: Setting,
    root: Path,
    name: str,
    plan: CompactionPlan,
    num_tokens: int,
    draw_keys: DrawKeys | None = None,
) -> None:
    """Write and index a context of the corpus' first `num_tokens` tokens.

    Args:
        setting: whose corpus.
        root: of the store, made where there is none.
        name: of the context, which must not exist.
        plan: the models it is for.
        num_tokens: of it; its last document is cut there.
        draw_keys: makes so many blocks' keys; by default they are random, too.
    """
    writer = Store(root, create=True).open_writer(name, plan.identity, plan.encoding, create=True)
    bulk = BulkWriter(writer)
    rng = np.random.default_rng(0)
    waiting: list[SpanWrite] = []
    for window in corpus_windows(setting, plan, num_tokens, writer.marks):
        num_blocks = -(-len(window.tokens) // K)
        counts = np.full(num_blocks, K, np.uint8)
        counts[-1] = len(window.tokens) - (num_blocks - 1) * K
        arrays = {
            spec.name: rng.standard_normal((num_blocks * spec.rows_per_node, spec.width), np.float32)
            for spec in plan.encoding.arrays
        }
        if draw_keys is not None:
            arrays[KEYS] = draw_keys(num_blocks)
        waiting.append(span_of(window, counts, {GISTS: arrays[GISTS], KEYS: arrays[KEYS]}, plan.encoding.arrays))
        if len(waiting) == SPANS_AT_A_TIME:
            bulk.append(waiting)
            waiting = []
    if waiting:
        bulk.append(waiting)
    bulk.flush()
    put_levels(writer, plan.encoding)
    writer.flush()
    writer.close()
    indexer = LexicalIndexer(LexicalIndexerSpec(StoreConfig(root=root, context=name), plan.base_lm), plan.tokenizer)
    indexer.advance()
    indexer.close()


def corpus_windows(setting: Setting, plan: CompactionPlan, num_tokens: int, marks: Marks) -> Iterator[Window]:
    """Windows of the corpus' documents, until there are so many tokens; the last document is cut.

    Args:
        setting: whose corpus.
        plan: whose tokenizer.
        num_tokens: of all windows.
        marks: how far documents have been read already, by their keys.
    """
    left = num_tokens
    for first in itertools.count():
        source = open_files(corpus_files(setting, first, 1))
        for item in Packer(plan.tokenizer, marks).pack(read_corpus(source)):
            if not isinstance(item, Window):
                continue
            if len(item.tokens) >= left:
                yield replace(item, tokens=item.tokens[:left], last=True)
                return
            left -= len(item.tokens)
            yield item
