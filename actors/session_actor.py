"""A session in a process of its own, and its numbers among Ray's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from actors.lens_service import RemoteLens
from actors.session import Session, SessionSpec
from actors.session_turn import Turn
from cluster import metric_names as names
from cluster.metrics import MetricPublisher
from cluster.session_config import SamplingConfig
from storage.contract import DocumentMeta


class SessionActor:
    """Hosts a session in a process of its own: one call at a time, answers streamed.

    Call `ask` with `num_returns="streaming"`. The first call loads the models, so that a refusal reaches the caller
    as itself. Every answer's numbers go to Ray's metrics (`turn_metrics`).
    """

    def __init__(self, spec: SessionSpec, num_threads: int = 1, lens_service: Any = None) -> None:
        """Args:
        spec: of the session.
        num_threads: torch threads.
        lens_service: actor of `lens_service.start_lens_service` that scores candidates for many sessions.
        """
        self._spec = spec
        self._num_threads = num_threads
        self._lens = None if lens_service is None else RemoteLens(lens_service)
        self._publisher = MetricPublisher("session", spec.store.context)
        self._session: Session | None = None

    def _opened(self) -> Session:
        if self._session is None:
            torch.set_num_threads(self._num_threads)
            self._session = Session(self._spec, lens=self._lens)
        return self._session

    def ready(self) -> int:
        """Tokens the session remembers, once it is open."""
        return self._opened().memory.num_tokens

    def ask(self, question: str, sampling: SamplingConfig) -> Iterator[str | Turn]:
        """As `Session.ask`."""
        for piece in self._opened().ask(question, sampling):
            if isinstance(piece, Turn):
                present, added = turn_metrics(piece, self._opened().memory.num_tokens)
                self._publisher.set(present)
                self._publisher.add(added)
            yield piece

    def read(self, document: DocumentMeta, text: str) -> bool:
        """As `Session.read`."""
        return self._opened().read(document, text)

    def close(self) -> None:
        """As `Session.close`."""
        session, self._session = self._session, None
        if session is not None:
            session.close()


def turn_metrics(turn: Turn, context_tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of one answer by metric name: present values, and what is added to totals.

    Args:
        turn: the answer.
        context_tokens: what the session's own context holds behind it.
    """
    rows = turn.rows_reused + turn.rows_read
    present = {
        names.ROWS_REUSED_SHARE: turn.rows_reused / max(1, rows),
        names.SWAP_RATE: turn.swap_rate,
        names.FIRST_TOKEN_SECONDS: turn.first_token_s,
        names.CONTEXT_TOKENS: float(context_tokens),
        **{f"{names.TURN_SECONDS}_{part}": seconds for part, seconds in turn.seconds.items()},
    }
    if turn.residency is not None:
        present[names.RESIDENCY] = turn.residency
    added = {
        names.ANSWERS_TOTAL: 1.0,
        names.ANSWER_TOKENS_TOTAL: float(turn.num_answer_tokens),
        names.REFOCUSES_TOTAL: float(turn.num_refocuses),
        names.ROWS_READ_TOTAL: float(turn.rows_read),
    }
    return present, added
