"""What a refocus costs against reading the whole Working Context anew, on edits that sessions made.

Sessions over 65,536 tokens of real text (random gists: no time depends on them) answer three courses of questions, all
words of the text: `steady` ones on neighbouring blocks, `needles` on blocks far apart, `ask_again` back and forth
between two. Every refocus is timed whole: search, choice, assembly, reading. Beside each answer the rows that it ended
with are read from nothing. Then one row in the last tenth of a Working Context is changed, and what must be read again
is read.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import numpy as np

from actors.plan import plan_models
from actors.session import Session, SessionSpec
from benchmarks.assembly import one_thread
from benchmarks.harness import BenchmarkError, Result, Setting, median_ratio, say, time_in_turns
from benchmarks.text_contexts import build_text_context
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig, StoreConfig
from cluster.session_config import SamplingConfig, SessionConfig
from models.base_lm import BaseLM
from models.decoding.focused_cache import FocusedCache

PARTS = ("search", "focus", "assemble", "read")
"""Of a refocus; writing and decoding are no part of it."""
QUESTION_TOKENS = 24


def edit_traces(setting: Setting) -> Result:
    """Ratio of a refocus whose only edit lies in the last tenth to reading all rows; whole traces in the detail."""
    num_tokens, rounds = setting.size(65_536, 10_000), setting.size(20, 3)
    net = GistNetConfig(lm_layers=2) if setting.quick else GistNetConfig()
    with setting.scratch() as root, one_thread():
        plan = plan_models(setting.base_lm, net, StoreConfig(root=root, context="text"))
        build_text_context(setting, root, "text", plan, num_tokens)
        lm = BaseLM.load(plan.base_lm)
        detail: dict[str, Any] = {}
        for name in ("steady", "needles", "ask_again"):
            spec = SessionSpec(plan, StoreConfig(root=root, context=f"of-{name}"), ("text",), SessionConfig())
            with closing(Session(spec, lm)) as session:
                detail[name] = _trace(session, lm, _questions(session, name, rounds + 1), setting.size(64, 40))
                rows = session._rows()
            say(f"  {name}: {detail[name]}")
        seconds = _last_tenth(lm, rows, rounds)
    return median_ratio(seconds["edited"], seconds["anew"], "edits in the last tenth", detail)


def _trace(session: Session, lm: BaseLM, questions: list[str], num_decoded: int) -> dict[str, float]:
    """Answers a course of questions; medians of its refocuses, the first question left out."""
    anew = []
    for number, question in enumerate(questions):
        sampling = SamplingConfig(max_new_tokens=num_decoded, ignore_eos=True, seed=number)
        for _ in session.ask(question, sampling):
            pass
        if session.warning:
            raise BenchmarkError(f"a session did not focus ({session.warning}): nothing to compare")
        if number:
            started = time.perf_counter()
            FocusedCache(lm).refocus(*session._rows())
            anew.append(time.perf_counter() - started)
    events = session.events()
    first = next(i for i, event in enumerate(events[1:], start=1) if event["reason"] == "question")
    seconds = [dict(event["seconds"]) for event in events[first:]]
    whole = [sum(of.get(part, 0.0) for part in PARTS) for of in seconds]
    rows = [event["rows_read"] / (event["rows_read"] + event["rows_reused"]) for event in events[first:]]
    again = float(np.median(anew))
    return {
        "refocuses": len(whole),
        "of_reading_anew": round(float(np.median(whole)) / again, 3),
        "reading_alone": round(float(np.median([of["read"] for of in seconds])) / again, 3),
        "share_of_rows_read": round(float(np.mean(rows)), 3),
        "blocks_changed": round(float(np.mean([len(e["added"]) + len(e["dropped"]) for e in events[first:]])), 2),
    }


def _last_tenth(lm: BaseLM, rows: tuple[Any, np.ndarray, int], rounds: int) -> dict[str, np.ndarray]:
    """Seconds to read again behind one changed row of the last tenth, and to read everything."""
    embeds, places, next_place = rows
    at = int(0.9 * len(embeds))
    cache = FocusedCache(lm)
    cache.refocus(embeds, places, next_place)
    changed = [embeds.clone(), embeds.clone()]
    changed[1][at] = changed[1][at].roll(1)

    def edited(number: int) -> None:
        if cache.refocus(changed[(number + 1) % 2], places, next_place).num_read != len(embeds) - at:
            raise BenchmarkError("an edit of the last tenth made other rows be read")

    def anew(_: int) -> None:
        FocusedCache(lm).refocus(embeds, places, next_place)

    return time_in_turns({"edited": edited, "anew": anew}, rounds, warm_up=2)


def _questions(session: Session, course: str, count: int) -> list[str]:
    """Words of the text, from the blocks a course is about."""
    reader = session.memory.readers()[0]
    rng = np.random.default_rng(0)
    last = reader.version.num_blocks - 1
    begin = int(rng.integers(0, last - count))
    far = rng.integers(0, last, count).tolist()
    blocks = {
        "steady": [begin + number for number in range(count)],
        "needles": far,
        "ask_again": [far[number % 2] for number in range(count)],
    }[course]
    texts = [session.memory.decode(reader.tokens(block, 1)[0][0][: min(QUESTION_TOKENS, K)]) for block in blocks]
    return [text.strip() or "what is this?" for text in texts]
