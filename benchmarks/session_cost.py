"""Decoding in a session that remembers 10 M tokens, against one that remembers 64 k, refocusing included.

The text is real (`corpus.py`), tokenised and indexed by its words; gists and keys are drawn at random, because encoding
10 M tokens takes hours and no time measured here depends on what they say. Both sessions share one model, answer the
same questions in turns, and decode the same number of tokens.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from actors.plan import plan_models
from actors.session import Session, SessionSpec
from actors.session_turn import Turn
from benchmarks.assembly import one_thread
from benchmarks.harness import BenchmarkError, Result, Setting, median_ratio, say
from benchmarks.text_contexts import build_text_context
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig, StoreConfig
from cluster.session_config import SamplingConfig, SessionConfig
from models.base_lm import BaseLM

QUESTION_TOKENS = 24
DECODED_TOKENS = 64


def session_cost(setting: Setting) -> Result:
    """Ratio of wall time a decoded token, refocuses and everything else included."""
    sizes = {"long": setting.size(10_000_000, 60_000), "short": setting.size(65_536, 10_000)}
    rounds = setting.size(20, 2)
    net = GistNetConfig(lm_layers=2) if setting.quick else GistNetConfig()
    with setting.scratch() as root, one_thread(), ExitStack() as stack:
        plan = plan_models(setting.base_lm, net, StoreConfig(root=root, context="long"))
        for name, size in sizes.items():
            say(f"  {name}: a context of {size:,} tokens")
            build_text_context(setting, root, name, plan, size)
        lm = BaseLM.load(plan.base_lm)
        sessions = {}
        for name in sizes:
            store = StoreConfig(root=root, context=f"of-{name}")
            spec = SessionSpec(plan, store, (name,), SessionConfig())
            sessions[name] = stack.enter_context(closing(Session(spec, lm)))
        questions = _questions(sessions["short"], rounds + 1)
        turns: dict[str, list[Turn]] = {name: [] for name in sizes}
        for number, question in enumerate(questions):
            for name in list(sizes)[:: 1 if number % 2 else -1]:
                turns[name].append(_ask(sessions[name], question, number))
            say(f"  question {number} of {rounds}")
        # The first of each builds what later ones keep.
        seconds = {name: np.array([_per_token(turn) for turn in of[1:]]) for name, of in turns.items()}
    detail: dict[str, Any] = {
        name: {
            "first_question_s": round(sum(turns[name][0].seconds.values()), 3),
            "ms_per_token": round(1e3 * float(np.median(seconds[name])), 2),
            "rows_read_per_refocus": round(_mean(turns[name], "rows_read") / _mean(turns[name], "num_refocuses")),
            "share_not_lm": round(_share_not_lm(turns[name][1:]), 4),
            "ms_by_part_and_token": _parts(turns[name][1:]),
        }
        for name in sizes
    }
    detail["tokens"] = sizes
    return median_ratio(seconds["long"], seconds["short"], "questions", detail)


def _ask(session: Session, question: str, seed: int) -> Turn:
    sampling = SamplingConfig(max_new_tokens=DECODED_TOKENS, ignore_eos=True, seed=seed)
    *_, turn = session.ask(question, sampling)
    if not isinstance(turn, Turn) or turn.num_answer_tokens != DECODED_TOKENS or session.warning:
        raise BenchmarkError(f"an answer was cut or unfocused ({session.warning}): nothing to compare")
    return turn


def _per_token(turn: Turn) -> float:
    return sum(turn.seconds.values()) / turn.num_answer_tokens


def _mean(turns: list[Turn], name: str) -> float:
    return float(np.mean([getattr(turn, name) for turn in turns]))


def _share_not_lm(turns: list[Turn]) -> float:
    """Of the time, what is neither reading nor decoding; `write` holds the lower layers that make gists."""
    total = sum(sum(turn.seconds.values()) for turn in turns)
    return 1 - sum(turn.seconds["read"] + turn.seconds["decode"] for turn in turns) / total


def _parts(turns: list[Turn]) -> dict[str, float]:
    tokens = sum(turn.num_answer_tokens for turn in turns)
    return {part: round(1e3 * sum(t.seconds[part] for t in turns) / tokens, 3) for part in turns[0].seconds}


def _questions(session: Session, count: int) -> list[str]:
    """Words of the short context, which both contexts hold."""
    reader = session.memory.readers()[0]
    rng = np.random.default_rng(0)
    texts = []
    for block in rng.integers(0, reader.version.num_blocks - 1, count).tolist():
        tokens = reader.tokens(block, 1)[0][0]
        texts.append(session.memory.decode(tokens[: min(QUESTION_TOKENS, K)]))
    return [text.strip() or "what is this?" for text in texts]
