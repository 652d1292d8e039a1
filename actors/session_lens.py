"""LensNet in a session: candidates of all its contexts, scored as one set.

What words and keys found, what stands behind the best of it, the beginning of the document at hand, the newest blocks
before the raw tail, and what is shown (`focus_signals`): each gets the nats a token that showing it is expected to win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32

from actors.focus_signals import Hits, Question, find_candidates, newest_keys, signals
from actors.session_search import Match
from models.focus.dense import KeySpace
from models.focus.history import History
from models.focus.refocus import BlockName, Focus
from models.gistnet import GistNet
from models.lensnet import CandidateSet
from storage.contract import TreeReader


class Lens(Protocol):
    """A net of the session's own, or a service for many (`lens_service.RemoteLens`)."""

    def scores(self, candidates: CandidateSet) -> Float32[np.ndarray, " n"]:
        """What showing each candidate is worth, nats a token."""
        ...


@dataclass(frozen=True)
class SessionLens:
    """Scores candidates of a session."""

    lens: Lens
    gistnet: GistNet
    unit: float
    """Nats a token that are a score of 1, what a block has that both searches find first."""

    def matches(
        self,
        question: Question,
        readers: Sequence[TreeReader],
        histories: Sequence[History],
        spaces: Sequence[KeySpace | None],
        hits: Sequence[Hits],
        found: Mapping[BlockName, Match],
        tail_from: int,
        focus: Focus | None,
    ) -> dict[BlockName, Match]:
        """Every candidate with its score, also those that are worth nothing.

        Args:
            question: what is asked of all contexts.
            readers, histories, spaces, hits: of each context, the session's own last.
            found: ranks by words and keys, for people to see.
            tail_from: first block of the raw tail, in the last history.
            focus: what is shown.

        Raises:
            ModelError: the candidates do not fit the net.
            ResourceTimeoutError: a service did not answer.
        """
        last = len(histories) - 1
        tail_keys = newest_keys(readers[last], histories[last])
        names: list[BlockName] = []
        sets: list[CandidateSet] = []
        for source, (reader, history, space) in enumerate(zip(readers, histories, spaces, strict=True)):
            if history.num_blocks == 0 or space is None:
                continue
            own = source == last
            shown_from = tail_from if own else history.stop_block
            shown = {} if focus is None else _shown(focus, source)
            blocks = find_candidates(reader, history, hits[source], shown_from, opening=own, also=list(shown))
            sets.append(
                signals(
                    reader,
                    history,
                    self.gistnet,
                    space,
                    question,
                    hits[source],
                    blocks,
                    shown_from,
                    tail_keys=tail_keys,
                    own=own,
                    shown=shown,
                )
            )
            names += [(block, source) for block in blocks.tolist()]
        matches = {}
        for name, nats in zip(names, self._scores(sets), strict=True):
            ranks = found.get(name, Match(0.0))
            matches[name] = Match(float(nats) / self.unit, ranks.lexical_rank, ranks.key_rank, float(nats))
        return matches

    def _scores(self, sets: Sequence[CandidateSet]) -> Float32[np.ndarray, " n"]:
        """One set where questions are placed alike, so that candidates of all contexts look at each other."""
        if len(sets) > 1 and all(np.array_equal(sets[0].query, of.query) for of in sets):
            blocks = np.concatenate([of.blocks for of in sets])
            features = np.concatenate([of.features for of in sets])
            keys = np.concatenate([of.keys for of in sets])
            return self.lens.scores(CandidateSet(blocks, features, keys, sets[0].query))
        return np.concatenate([np.empty(0, np.float32), *(self.lens.scores(of) for of in sets)])


def _shown(focus: Focus, source: int) -> dict[int, int]:
    """Blocks of a context that are shown for their scores, to how many refocuses showed them."""
    return {block: focus.number + 1 - focus.since[block, of] for block, of in focus.found if of == source}
