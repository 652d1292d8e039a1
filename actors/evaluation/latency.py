"""A session with a memory against the model that keeps everything in its context: time and memory, by length.

Both read the same text, both answer behind it. The session writes it to a tree, makes gists, searches, refocuses and
decodes behind a Working Context of fixed size; the full-context model reads every token and decodes behind all of them.
The focused side pays for everything it does, disk included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from actors.plan import CompactionPlan
from actors.session import Session, SessionSpec
from actors.session_turn import Turn
from cluster.config import StoreConfig
from cluster.errors import ConfigError
from cluster.session_config import SamplingConfig, SessionConfig
from models.base_lm import BaseLM
from storage.contract import DocumentMeta

PIECE_TOKENS = 1024
"""The full-context model reads at a time."""
QUESTION_TOKENS = 24


@dataclass(frozen=True)
class Latency:
    """One way to answer behind so many tokens, once."""

    tokens: int
    focused: bool
    read_s: float
    """Wall time to read the text."""
    first_token_s: float
    """From the question to its first token."""
    decode_s: float
    """A token of the answer, refocuses included."""
    cache_bytes: int
    """Keys and values while it answers."""

    @property
    def answered_s(self) -> float:
        """From new text to the first token of an answer."""
        return self.read_s + self.first_token_s


def measure_latency(
    plan: CompactionPlan,
    lm: BaseLM,
    ids: Int64[np.ndarray, " n"],
    lengths: Sequence[int],
    root: Path,
    config: SessionConfig,
    *,
    num_decoded: int = 64,
    repeats: int = 3,
    on_measured: Callable[[], None] = lambda: None,
) -> list[Latency]:
    """Both ways in turns, at each length, so many times.

    Args:
        plan: models of the session.
        lm: the plan's, loaded.
        ids: text, at least as long as the longest.
        lengths: tokens read before the question.
        root: an empty folder for the sessions' stores, on the disk that stores use.
        config: of the session.
        num_decoded: tokens of an answer.
        repeats: of everything.
        on_measured: called after each.

    Raises:
        ConfigError: too little text, or lengths that the model was not trained for.
        BudgetError: the session's budget does not hold the longest.
    """
    longest = max(lengths) + QUESTION_TOKENS + num_decoded
    if len(ids) < longest or longest > lm.trained_context:
        raise ConfigError(
            f"latency is measured at up to {longest:,} tokens, question and answer included; the text has "
            f"{len(ids):,}, the model was trained for {lm.trained_context:,}: take shorter lengths"
        )
    found = []
    for repeat in range(repeats):
        for length in lengths:
            ways = [
                lambda n: _full(lm, ids, n, num_decoded),
                lambda n: _focused(plan, lm, ids, n, root, config, num_decoded),
            ]
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                found.append(way(length))
                on_measured()
    return found


def _full(lm: BaseLM, ids: np.ndarray, length: int, num_decoded: int) -> Latency:
    cache = lm.new_cache()
    tokens = torch.from_numpy(np.asarray(ids[: length + QUESTION_TOKENS + num_decoded], np.int64))[None].to(lm.device)
    with torch.inference_mode():
        started = time.perf_counter()
        for first in range(0, length, PIECE_TOKENS):
            lm.read(lm.embed(tokens[:, first : min(first + PIECE_TOKENS, length)]), cache=cache)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        read = time.perf_counter()
        # Every token is waited for, as a session does.
        lm.logits(lm.embed(tokens[:, length : length + QUESTION_TOKENS]), cache=cache, last_only=True).argmax().item()
        asked = time.perf_counter()
        for at in range(length + QUESTION_TOKENS, length + QUESTION_TOKENS + num_decoded):
            lm.logits(lm.embed(tokens[:, at : at + 1]), cache=cache, last_only=True).argmax().item()
        decoded = time.perf_counter()
    return Latency(length, False, read - started, asked - read, (decoded - asked) / num_decoded, cache.num_bytes)


def _focused(
    plan: CompactionPlan, lm: BaseLM, ids: np.ndarray, length: int, root: Path, config: SessionConfig, num_decoded: int
) -> Latency:
    number = sum(1 for _ in root.iterdir())
    store = StoreConfig(root=root / str(number), context="latency")
    decode = plan.tokenizer.decode
    text = decode(ids[:length])
    question = decode(ids[length : length + QUESTION_TOKENS])
    sampling = SamplingConfig(max_new_tokens=num_decoded, do_sample=False, ignore_eos=True)
    with closing(Session(SessionSpec(plan, store, config=config), lm)) as session:
        started = time.perf_counter()
        session.read(DocumentMeta("text", "file:///text", size_bytes=len(text.encode())), text)
        read = time.perf_counter()
        *_, turn = session.ask(question, sampling)
        assert isinstance(turn, Turn)
        if session.warning:
            raise ConfigError(f"the session did not focus ({session.warning}): nothing to compare")
        after_first = sum(turn.seconds.values()) - turn.first_token_s
        decode_s = after_first / max(1, turn.num_answer_tokens - 1)
        return Latency(length, True, read - started, turn.first_token_s, decode_s, session.cache_bytes)


def crossing(lengths: Sequence[int], full: Sequence[float], focused: Sequence[float]) -> float | None:
    """The length from which on the focused way costs less, between two measured ones by a straight line of differences.

    None where it does not within what was measured; the shortest length where it does from there on.
    """
    gain = np.asarray(full) - np.asarray(focused)
    behind = np.flatnonzero(gain <= 0)
    if len(behind) == 0:
        return float(lengths[0])
    last = int(behind[-1])
    if last == len(lengths) - 1:
        return None
    low, high = gain[last], gain[last + 1]
    return float(lengths[last] + (lengths[last + 1] - lengths[last]) * (-low / (high - low)))
