"""Edits of a Working Context, each read whole before and after, and how they are kept.

Every edit is read as a session would read it: the Working Context without it, the one with it, both within the same
budget, and the tokens that really came behind. So a label says what showing a block was worth instead of as many of the
oldest tokens of the raw tail, hindsight that LensNet is to foresee.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from actors.evaluation import rivals
from actors.evaluation.contents import Contents, Reading
from actors.evaluation.oracle import choosing_half, scoring_half
from actors.evaluation.rivals import Condition
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.label_config import LabelConfig
from models.focus.working_context import smallest_budget
from models.lensnet.features import CandidateSet

EditRecord = tuple[list[int], list[int], list[int], float, float, float, float]
"""`(shown, added, removed, before a, before b, after a, after b)`: blocks shown before, those the edit shows and gives
up, and the mean NLL of both halves of the horizon without and with it, nats a token."""


@dataclass(frozen=True)
class PlaceLabels:
    """All that was measured at one place."""

    shown_from: int
    """First block of the raw tail where nothing is chosen but `max_blocks` could be."""
    blocks: list[int]
    """Candidates."""
    features: list[list[float]]
    """Of each, with nothing shown; columns as `FEATURES`."""
    keys: str
    """Routing keys of the candidates and of the question behind them, float16, base64."""
    edits: list[EditRecord]

    @classmethod
    def of(cls, shown_from: int, candidates: CandidateSet, edits: Sequence[EditRecord]) -> PlaceLabels:
        """As they are kept: numbers to five digits."""
        keys = np.concatenate([candidates.keys, candidates.query[None]]).astype(np.float16)
        return cls(
            shown_from,
            candidates.blocks.tolist(),
            [[round(float(value), 5) for value in row] for row in candidates.features],
            base64.b64encode(keys.tobytes()).decode(),
            list(edits),
        )

    def candidates(self) -> CandidateSet:
        """As they were."""
        keys = np.frombuffer(base64.b64decode(self.keys), np.float16).astype(np.float32)
        keys = keys.reshape(len(self.blocks) + 1, -1)
        features = np.array(self.features, np.float32).reshape(len(self.blocks), -1)
        return CandidateSet(np.array(self.blocks, np.int64), features, keys[:-1].copy(), keys[-1].copy())


def proposed_edits(
    candidates: CandidateSet,
    measured: MeasuredContexts,
    config: LabelConfig,
    rng: np.random.Generator,
    first: Sequence[int] = (),
) -> Iterable[EditRecord]:
    """Edits of a Working Context that shows nothing by choice, measured as they are proposed.

    Args:
        candidates: what could be shown.
        measured: reads them.
        config: how many of which kind.
        rng: of chance.
        first: candidates that are shown alone before chance chooses others.
    """
    blocks = candidates.blocks
    if len(blocks) == 0:
        return
    # Expand one, nothing else being shown.
    wanted = [block for block in first if block in blocks]
    single = list(dict.fromkeys([*wanted, *rng.permutation(blocks).tolist()]))[: config.num_single]
    for block in sorted(single):
        yield measured.edit([], [block], [])
    # Several at once; from there, collapse one and swap one for another.
    for _ in range(config.num_sets):
        size = int(rng.integers(2, config.max_blocks + 1))
        shown = _likely(candidates, rng)[:size].tolist()
        if len(shown) < 2:
            return
        yield measured.edit([], shown, [])
        for block in rng.permutation(shown)[: config.num_collapsed].tolist():
            yield measured.edit(shown, [], [block])
        others = [block for block in rng.permutation(blocks).tolist() if block not in shown]
        for block in others[: config.num_swapped]:
            yield measured.edit(shown, [block], [int(rng.choice(shown))])


def _likely(candidates: CandidateSet, rng: np.random.Generator) -> np.ndarray:
    """Candidates in an order in which what was found tends to come first, as in the contexts of a session."""
    found = candidates.column("lexical_rank") + candidates.column("key_rank")
    return candidates.blocks[np.argsort(-(np.log(found + 0.02) + rng.gumbel(size=len(found))), kind="stable")]


class MeasuredContexts:
    """Working Contexts of one place, each read once."""

    def __init__(
        self,
        reading: Reading,
        config: LabelConfig,
        budget: int,
        nll_behind: Callable[[Contents], Float32[np.ndarray, " n"]],
    ) -> None:
        """Args:
        reading: the history.
        config: form and tail.
        budget: slots of the Working Context.
        nll_behind: NLL of the tokens that count, given contents; at least two, one for each half.
        """
        self._reading = reading
        self._config = config
        self._budget = budget
        self._nll_behind = nll_behind
        self._condition = Condition(rivals.ORACLE, config.form)
        self._known: dict[frozenset[int], tuple[float, float]] = {}

    def edit(self, shown: Sequence[int], added: Sequence[int], removed: Sequence[int]) -> EditRecord:
        """One edit, read before and after."""
        after = [block for block in (*shown, *added) if block not in removed]
        (before_a, before_b), (after_a, after_b) = self._read(shown), self._read(after)
        return list(shown), list(added), list(removed), before_a, before_b, after_a, after_b

    def _read(self, blocks: Sequence[int]) -> tuple[float, float]:
        key = frozenset(blocks)
        if key not in self._known:
            contents, _ = rivals.contents_of(
                self._condition,
                self._reading,
                [(block, 0) for block in blocks],
                self._budget,
                self._config.tail_tokens,
                len(blocks),
            )
            nll = self._nll_behind(contents)
            halves = choosing_half(nll), scoring_half(nll)
            self._known[key] = round(float(halves[0].mean()), 6), round(float(halves[1].mean()), 6)
        return self._known[key]


def tail_start(reading: Reading, config: LabelConfig, budget: int) -> int:
    """First block of the raw tail that is left where as many blocks are chosen as may be."""
    tail = max(config.tail_tokens, budget - config.max_blocks * K - smallest_budget([reading.history]))
    return reading.history.stop_block - len(rivals.tail_blocks(reading, tail))
