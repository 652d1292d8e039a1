"""What the rivals choose at one place, for every budget: searched once, shortlisted and measured a budget at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.contents import Reading
from actors.evaluation.lens_rival import LensRival
from actors.evaluation.oracle import Step, choose, choosing_half, climb, scoring_half
from actors.evaluation.retrieval import RANDOM_SEED_STRIDE, Found, Retrieval, shortlist
from actors.evaluation.scorer import BlockCaches, CandidateScorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.evaluation_config import FocusEvaluationConfig
from models.focus.allocators import RankedBlocks
from models.focus.layout import Policy
from models.focus.working_context import smallest_budget

SingleGains = list[tuple[int, float, float]]
"""`(block, gain on the choosing half, on the scoring half)`: what each block is worth alone, nats a token."""


@dataclass(frozen=True)
class Room:
    """What a budget leaves to be chosen."""

    budget: int
    max_blocks: int
    """Blocks that may be chosen."""
    tail_tokens: int
    """Newest tokens that are raw when so many are, beside the gists."""
    shown_from: int
    """First block of that tail: what is chosen lies before it."""

    @classmethod
    def of(cls, budget: int, reading: Reading, config: FocusEvaluationConfig, *, measuring: bool = False) -> Room:
        """At one place, for those that search, or for those that measure."""
        most = config.oracle_blocks if measuring else config.max_blocks
        max_blocks = min(most, max(0, budget - config.tail_tokens) // K)
        tail_tokens = max(config.tail_tokens, budget - max_blocks * K - smallest_budget([reading.history]))
        shown_from = reading.history.stop_block - len(rivals.tail_blocks(reading, tail_tokens))
        return cls(budget, max_blocks, tail_tokens, shown_from)


ExactReading = Callable[[Sequence[int], int], np.ndarray]
"""`(blocks, budget)` to the NLL of every token of the horizon, the rest of the budget being raw tail."""


@dataclass
class Choices:
    """What every chooser shows within one budget, the best first."""

    ranked: dict[str, RankedBlocks] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds to find and choose, what a choice builds on included."""
    steps: dict[str, list[Step]] = field(default_factory=dict)
    """How those that read whole Working Contexts came to their choice."""
    single_gains: SingleGains = field(default_factory=list)
    """Of every block of the history, where it was measured."""


class FocusSearch:
    """The search of one place."""

    def __init__(
        self,
        retrieval: Retrieval,
        config: FocusEvaluationConfig,
        policy: Policy,
        wanted: Collection[str],
        read: ExactReading,
        lens: LensRival | None = None,
    ) -> None:
        """Args: `read` measures a choice of blocks in raw tokens; `wanted` are the choosers that are compared; `lens`
        is LensNet where it is one of them."""
        self._retrieval = retrieval
        self._reading = retrieval.reading
        self._config = config
        self._policy: Policy = policy
        self._wanted = set(wanted)
        self._read_exactly = read
        self._lens = lens

    def run(self, rooms: Sequence[Room], oracle_rooms: Sequence[Room], ids: np.ndarray, number: int) -> list[Choices]:
        """Choices for every budget.

        Args:
            rooms: what those that search have, for each budget.
            oracle_rooms: what those that measure have, for the same budgets.
            ids: the horizon, which oracles look at.
            number: the place's.
        """
        if not self._wanted & {*rivals.RETRIEVERS, *rivals.ORACLES, rivals.EXHAUSTIVE}:
            return [Choices() for _ in rooms]
        found = self._retrieval.find(self._wanted, self._config.seed * RANDOM_SEED_STRIDE + number)
        choices = [
            Choices({name: _before(room.shown_from, pairs) for name, pairs in found.ranked.items()}, {**found.seconds})
            for room in rooms
        ]
        if self._lens is not None:
            for room, choice in zip(rooms, choices, strict=True):
                started = time.process_time()
                choice.ranked[rivals.LENSNET] = self._lens.rank(self._reading, room.shown_from)
                choice.seconds[rivals.LENSNET] = time.process_time() - started
        if self._wanted & {rivals.RERANK, *rivals.ORACLES}:
            self._measure_shortlists(oracle_rooms, choices, found, ids)
            for room, choice in zip(rooms, choices, strict=True):
                # It searches, and so has a longer tail than those whose shortlist it ranks.
                choice.ranked[rivals.RERANK] = _before(room.shown_from, choice.ranked[rivals.RERANK])
        if rivals.EXHAUSTIVE in self._wanted:
            self._measure_all(oracle_rooms, choices, ids)
        return choices

    def _measure_shortlists(
        self, rooms: Sequence[Room], choices: Sequence[Choices], found: Found, ids: np.ndarray
    ) -> None:
        # Chance is in no shortlist: it would take the place of what a rival found. What recency would show instead is:
        # a choice must be worth more than as much more of the tail.
        lists = [name for name in found.ranked if name != rivals.RANDOM]
        shortlists = [
            shortlist(
                [choice.ranked[name] for name in lists],
                # As many of each as an oracle could show, but no more than all of them have room for.
                min(room.max_blocks, self._config.shortlist_blocks // max(len(lists), 1)),
                self._config.shortlist_blocks,
                self._older_tail(room),
            )
            for room, choice in zip(rooms, choices, strict=True)
        ]
        started = time.process_time()
        blocks = sorted({block for chosen in shortlists for block in chosen})
        caches = self._read(rooms, blocks)
        # All rankings were needed to know the shortlist.
        took = sum(found.seconds[name] for name in self._retrieval.config.fusion) + time.process_time() - started
        started = time.process_time()
        ranking = self._retrieval.reranked(blocks, caches) if rivals.RERANK in self._wanted else ()
        rerank_took = time.process_time() - started
        for room, choice, chosen in zip(rooms, choices, shortlists, strict=True):
            choice.ranked[rivals.RERANK] = [pair for pair in ranking if pair[0] in chosen]
            choice.seconds[rivals.RERANK] = took + rerank_took
            if self._wanted & set(rivals.ORACLES):
                self._add_oracles(room, choice, caches, [blocks.index(block) for block in chosen], blocks, ids, took)

    def _older_tail(self, room: Room) -> RankedBlocks:
        """Blocks before the tail, the newest first."""
        oldest = max(self._reading.history.first_block, room.shown_from - room.max_blocks)
        return [(block, 0) for block in range(room.shown_from - 1, oldest - 1, -1)]

    def _add_oracles(
        self,
        room: Room,
        choice: Choices,
        caches: BlockCaches,
        pool: Sequence[int],
        blocks: Sequence[int],
        ids: np.ndarray,
        took: float,
    ) -> None:
        started = time.process_time()
        alone = choose(self._candidates(room, caches), pool, ids, 0, 0)
        greedy = [blocks[i] for i in alone.greedy if alone.gain(i) > 0]
        choice.ranked[rivals.ORACLE_GREEDY] = [(block, 0) for block in greedy[: room.max_blocks]]
        if rivals.ORACLE in self._wanted:
            self._climb(rivals.ORACLE, room, choice, [blocks[i] for i in alone.greedy])
        choice.seconds.update(dict.fromkeys(rivals.ORACLES, took + time.process_time() - started))

    def _climb(self, name: str, room: Room, choice: Choices, ranking: Sequence[int]) -> None:
        """From what the rivals show, and from nothing but the tail, upwards."""
        # What oracles show may be more than what others do.
        shown = dict.fromkeys(choice.ranked, self._config.max_blocks) | dict.fromkeys(rivals.MEASURING, room.max_blocks)
        starts = [[block for block, _ in ranked[: shown[other]]] for other, ranked in choice.ranked.items()]
        steps = climb(
            lambda chosen: self._read_exactly(chosen, room.budget),
            [[], *starts],
            ranking,
            room.max_blocks,
            self._config.oracle_readings,
        )
        choice.steps[name] = steps
        choice.ranked[name] = [(block, 0) for block in steps[-1].blocks]

    def _measure_all(self, rooms: Sequence[Room], choices: Sequence[Choices], ids: np.ndarray) -> None:
        """The oracle without a shortlist, and what every block is worth alone."""
        started = time.process_time()
        blocks = list(range(self._reading.history.first_block, max(room.shown_from for room in rooms)))
        caches = self._read(rooms, blocks)
        took = time.process_time() - started
        for room, choice in zip(rooms, choices, strict=True):
            started = time.process_time()
            pool = [i for i, block in enumerate(blocks) if block < room.shown_from]
            alone = choose(self._candidates(room, caches), pool, ids, 0, 0)
            self._climb(rivals.EXHAUSTIVE, room, choice, [blocks[i] for i in alone.greedy])
            choice.seconds[rivals.EXHAUSTIVE] = took + time.process_time() - started
            gains = alone.base - alone.alone
            choice.single_gains = [
                (blocks[i], round(float(choosing_half(gain).mean()), 5), round(float(scoring_half(gain).mean()), 5))
                for i, gain in zip(pool, gains, strict=True)
            ]

    def _read(self, rooms: Sequence[Room], blocks: Sequence[int]) -> BlockCaches:
        """Blocks after the stand-ins of the smallest budget, which has gists where others have a raw tail."""
        reading = self._reading
        smallest = min(rooms, key=lambda room: room.budget)
        stand_ins, _ = rivals.bare_rows(reading, smallest.budget, smallest.tail_tokens)
        rows = [reading.raw([block]) for block in blocks]
        return BlockCaches(reading.lm, stand_ins, rows, reading.history.num_tokens, self._policy)

    def _candidates(self, room: Room, caches: BlockCaches) -> CandidateScorer:
        _, tail = rivals.bare_rows(self._reading, room.budget, room.tail_tokens)
        return CandidateScorer(caches, tail)


def _before(shown_from: int, ranked: RankedBlocks) -> RankedBlocks:
    return [pair for pair in ranked if pair[0] < shown_from]
