"""Records a session's refocuses: each is an event when the next begins, for only then is known what it was worth."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import StorageError
from models.decoding.focused_cache import Reuse
from models.focus.refocus import BlockName, Focus, RefocusPolicy
from storage.focus.events import FocusEvent, FocusEventLog, read_focus_events

logger = logging.getLogger("megacontext.session")


class FocusRecorder:
    """Of one session. A disk that refuses costs a warning: events wait and are tried again, and the session goes on."""

    def __init__(self, session: str, context_folder: Path, policy: RefocusPolicy, *, enabled: bool) -> None:
        self._session = session
        self._folder = context_folder
        self._policy = json.dumps(asdict(policy), sort_keys=True)
        self._log = FocusEventLog(context_folder) if enabled else None
        self._event: FocusEvent | None = None
        self._nll = 0.0

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self._log is not None

    def begin(
        self,
        focus: Focus,
        reason: str,
        scores: Mapping[BlockName, float],
        read: Reuse,
        seconds: Mapping[str, float],
        warning: str,
    ) -> None:
        """A refocus was made; the one before is finished."""
        self.finish()
        wc = focus.wc
        self._nll = 0.0
        self._event = FocusEvent(
            self._session,
            focus.number,
            reason,
            self._policy,
            [(history.context, history.seq) for history in wc.histories],
            wc.total_tokens,
            wc.budget,
            wc.total_cost,
            [(node.lod, node.index, node.source) for node in wc.nodes()],
            dict(scores),
            list(focus.found),
            list(focus.pinned),
            list(focus.added),
            list(focus.dropped),
            focus.num_aged,
            read.num_reused,
            read.num_read,
            dict(seconds),
            warning=warning,
        )

    def decoded(self, nll: float) -> None:
        """A token was decoded behind the last refocus, with this NLL in nats."""
        if self._event is not None:
            self._nll += nll
            self._event.num_decoded += 1

    def finish(self) -> None:
        """The last refocus has shown what it is worth."""
        event, self._event = self._event, None
        if event is None or self._log is None:
            return
        event.nll_decoded = self._nll / event.num_decoded if event.num_decoded else None
        try:
            self._log.add(event)
        except StorageError as error:
            logger.warning("%s", error)

    def end_answer(self) -> None:
        """The last refocus of an answer is finished, and all of them are durable if the disk lets them."""
        try:
            self.flush()
        except StorageError as error:
            logger.warning("%s", error)

    def flush(self) -> None:
        """Make every finished event durable.

        Raises:
            DiskFullError, StorageError: the disk refused.
        """
        self.finish()
        if self._log is not None:
            self._log.flush()

    def events(self) -> list[dict[str, Any]]:
        """Events that are durable, oldest first."""
        return read_focus_events(self._folder, self._session).to_pylist()
