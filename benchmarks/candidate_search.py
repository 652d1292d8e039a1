"""Finding candidate blocks in 10 M tokens, against decoding the 32 tokens between two refocuses.

The whole search of a session: the question's states, words, keys, and their fusion, with the real model and its
net. Both sides run in turns on one thread, and the search by codes is compared with the exact scan of all keys.

Keys of the 10 M tokens cannot be encoded here (hours). Those of 65,536 tokens are, and every key of a context is one
of them, moved half as far as two others are apart: they keep the mean of real keys, their main directions and their
unevenness, and a question has some that are much nearer than the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.focus_signals import Question
from actors.plan import CompactionPlan, plan_models
from actors.session_memory import SessionMemory
from actors.session_search import SessionSearch, fused_hits
from benchmarks.assembly import one_thread
from benchmarks.harness import BenchmarkError, Result, Setting, median_ratio, percentiles, say, time_in_turns
from benchmarks.text_contexts import build_text_context, corpus_windows
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig, StoreConfig
from cluster.session_config import SessionConfig
from models.base_lm import BaseLM
from models.decoding.focused_cache import FocusedCache
from models.focus.allocators import ranked_by_score
from models.focus.dense import KeyIndex, KeySpace
from models.focus.key_search import KeySearch
from models.window_encoder import WindowEncoder
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.schema import KEYS

QUESTION_TOKENS = 24
DECODED_TOKENS = 32
SHOWN_TOKENS = 480
"""What the model reads before it decodes: the default budget, less the tokens that are decoded."""

MOVED = 0.5
RECALLS = (8, 32)


def candidate_search(setting: Setting) -> Result:
    """Ratio of the time of a search in 10 M tokens to that of decoding 32 tokens."""
    sizes = {"64k": setting.size(65_536, 4_000), "1M": setting.size(1_000_000, 8_000)}
    sizes["10M"] = setting.size(10_000_000, 80_000)
    rounds, warm_up = setting.size((20, 2), (2, 1))
    net = GistNetConfig(lm_layers=2) if setting.quick else GistNetConfig()
    with setting.scratch() as root, one_thread(), ExitStack() as stack:
        plan = plan_models(setting.base_lm, net, StoreConfig(root=root, context="long"))
        lm = BaseLM.load(plan.base_lm)
        draw = _key_source(setting, plan, lm)
        for name, size in sizes.items():
            say(f"  {name}: a context of {size:,} tokens")
            build_text_context(setting, root, name, plan, size, draw)
        sides = {name: stack.enter_context(closing(_Side(root, name, plan, lm))) for name in sizes}
        questions = _questions(sides["64k"].reader, rounds + warm_up)
        decode = _decoding(sides["64k"].reader, lm)
        seconds = time_in_turns(
            {"decoding": decode, **{name: _search(side, questions) for name, side in sides.items()}}, rounds, warm_up
        )
        detail: dict[str, Any] = {"tokens": sizes, "decoding": percentiles(seconds["decoding"], 1e3, "ms")}
        for name, side in sides.items():
            say(f"  {name}: its parts, and the exact scan")
            detail[name] = {
                **percentiles(seconds[name], 1e3, "ms"),
                "of_decoding": round(float(np.median(seconds[name]) / np.median(seconds["decoding"])), 4),
                **_parts(side, plan, questions),
            }
    return median_ratio(seconds["10M"], seconds["decoding"], "questions", detail)


class _Side:
    """A context that is searched as a session does, with nothing of the session's own."""

    def __init__(self, root: Path, name: str, plan: CompactionPlan, lm: BaseLM) -> None:
        config = SessionConfig()
        store = StoreConfig(root=root, context=f"of-{name}")
        self.memory = SessionMemory(
            plan, store, (name,), lm, compact_tokens=config.compact_tokens, owner="candidate_search"
        )
        self.search = SessionSearch(self.memory, lm, plan.gistnet, plan.tokenizer, config.candidates)
        self.limit = config.candidates

    @property
    def reader(self) -> TreeReader:
        return self.memory.readers()[0]

    def close(self) -> None:
        self.search.close()
        self.memory.close()


def _search(side: _Side, questions: list[np.ndarray]) -> Callable[[int], object]:
    def search(number: int) -> object:
        found = fused_hits(side.search.hits(side.search.read(questions[number]), 0), side.limit)
        if not found:
            raise BenchmarkError("a search found nothing: nothing to compare")
        return found

    return search


def _decoding(reader: TreeReader, lm: BaseLM) -> Callable[[int], object]:
    """Decodes 32 tokens behind what a session shows; that has been read already, as after a refocus."""
    tokens = reader.tokens(0, SHOWN_TOKENS // K)[0].reshape(-1)
    ids = torch.from_numpy(tokens[tokens < lm.vocab_size].astype(np.int64))
    cache = FocusedCache(lm)
    with torch.inference_mode():
        embeds = lm.embed(ids[None])[0]
    places = 2 * np.arange(len(ids), dtype=np.int64)

    def decode(_: int) -> object:
        # Every row but the last is in the cache by then: going back to where decoding began reads one.
        cache.refocus(embeds, places, 2 * len(ids))
        for _ in range(DECODED_TOKENS):
            cache.append(cache.logits().argmax(dim=-1, keepdim=True).numpy())
        return cache

    return decode


def _questions(reader: TreeReader, count: int) -> list[np.ndarray]:
    """Words of the short context, which all contexts hold."""
    rng = np.random.default_rng(0)
    tokens, counts = reader.tokens(0, reader.version.num_blocks)
    whole = np.flatnonzero(counts == K)
    return [tokens[block, :QUESTION_TOKENS].astype(np.int64) for block in rng.choice(whole, count, replace=False)]


def _key_source(setting: Setting, plan: CompactionPlan, lm: BaseLM) -> Callable[[int], np.ndarray]:
    encoder = WindowEncoder(lm, plan.gistnet)
    num_windows = setting.size(64, 2)
    say(f"  keys of {num_windows} windows of text")
    windows = corpus_windows(setting, plan, num_windows * 1024, lambda keys: {})
    encoded = encoder.encode_windows([window.tokens for window in itertools.islice(windows, num_windows)])
    real = np.concatenate([window.keys for window in encoded])
    rng = np.random.default_rng(0)

    def draw(num_blocks: int) -> np.ndarray:
        base, one, other = real[rng.integers(len(real), size=(3, num_blocks))]
        keys = base + MOVED * (one - other)
        return keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)

    return draw


def _parts(side: _Side, plan: CompactionPlan, questions: list[np.ndarray]) -> dict[str, Any]:
    """Median times of what a search is made of, in ms, and what the search by codes finds of the exact scan's."""
    reader, net = side.reader, plan.gistnet
    cases = [side.search.read(question) for question in questions]
    space = KeySpace.of_net(net, reader, array=KEYS)
    keys, index = KeySearch(reader, space, array=KEYS), KeyIndex(reader, space, array=KEYS)
    with closing(LexicalSearcher(side.memory.folder_of(0), plan.tokenizer.decode_batch)) as lexical:
        seconds = time_in_turns(
            {
                "states": lambda number: side.search.read(questions[number]),
                "words": lambda number: lexical.search(reader, cases[number].text, side.limit),
                "keys": lambda number: keys.best(cases[number].states, "pooled", side.limit),
                "exact_keys": lambda number: index.scores(cases[number].states, "pooled"),
            },
            rounds=len(questions) - 1,
            warm_up=1,
        )
    recalls = {f"recall_at_{first}": round(_recall(keys, index, cases, first), 4) for first in RECALLS}
    parts = {f"{name}_ms": round(1e3 * float(np.median(taken)), 3) for name, taken in seconds.items()}
    return {**parts, **recalls, "resident_bytes": keys.resident_bytes}


def _recall(keys: KeySearch, index: KeyIndex, cases: list[Question], first: int) -> float:
    """Share of the exact scan's first blocks that the search by codes has among its own."""
    found = 0
    for case in cases:
        wanted = {block for block, _ in ranked_by_score(index.scores(case.states, "pooled"), 0, limit=first)}
        found += len(wanted & set(keys.best(case.states, "pooled", first)[0].tolist()))
    return found / (first * len(cases))
