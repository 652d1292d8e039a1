"""What an answer of a session took: refocuses, rows, wall time by part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from models.decoding.focused_cache import Reuse
from models.focus.refocus import Focus


@dataclass(frozen=True)
class Turn:
    """What an answer took."""

    num_question_tokens: int
    num_answer_tokens: int
    text: str
    ended: str
    """`end`: by the model; `length`: `max_new_tokens`; `stop`: a stop string; `closed`: nobody read on."""
    num_refocuses: int
    rows_reused: int
    rows_read: int
    """Rows read by refocuses; decoded tokens are not among them."""
    seconds: dict[str, float]
    """Wall time by part: `write` (tree, gists and levels), `search`, `focus`, `assemble`, `read`, `decode`."""
    first_token_s: float
    """From the question to the first token."""
    swap_rate: float = 0.0
    """Share of the raw blocks whose level a refocus changed by choice, mean of the refocuses."""
    residency: float | None = None
    """Refocuses that blocks stayed which were given up meanwhile; None where none was."""


@dataclass
class Tally:
    """Of an answer's refocuses."""

    num_refocuses: int = 0
    rows_reused: int = 0
    rows_read: int = 0
    swapped: float = 0.0
    stayed: list[int] = field(default_factory=list)

    def count(self, focus: Focus, previous: Focus | None, read: Reuse) -> None:
        """One more."""
        self.num_refocuses += 1
        self.rows_reused += read.num_reused
        self.rows_read += read.num_read
        num_changed = len(focus.added) + len(focus.dropped)
        num_raw = int((focus.wc.lod == 0).sum()) + len(focus.dropped)
        if previous is not None:
            self.swapped += num_changed / max(1, num_raw)
            self.stayed += [focus.number - previous.since[block] for block in focus.dropped]


@dataclass
class Clock:
    """Wall seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside is this part's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
