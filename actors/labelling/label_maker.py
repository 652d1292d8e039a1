"""What edits of a Working Context are worth, measured: one place after another.

Every edit is read as a whole, as a session would read it: the Working Context without it, the one with it, both within
the same budget, and the text that really came behind. So a label says what showing a block was worth instead of as
many of the oldest tokens of the raw tail, hindsight that LensNet is to foresee.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.candidate_finder import CandidateFinder
from actors.evaluation.contents import Reading
from actors.evaluation.oracle import choosing_half, scoring_half
from actors.evaluation.places import Place
from actors.evaluation.rivals import Condition
from actors.evaluation.scorer import Scorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, StoreConfig
from cluster.label_config import LabelConfig
from models.base_lm import BaseLM
from models.focus.dense import KeySpace
from models.focus.history import History
from models.focus.layout import Policy, policy_for
from models.focus.working_context import smallest_budget
from models.gistnet import GistNet
from models.lensnet.features import CandidateSet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical import LexicalSearcher
from storage.schema import KEYS
from storage.store import Store

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


@dataclass(frozen=True)
class LabelMakerSpec:
    """Everything a worker needs to measure the same anywhere."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    store: StoreConfig
    seq: int
    """Version of the context."""
    labels: LabelConfig

    def build(self, gistnets: list[GistNet]) -> LabelMaker:
        """The maker, with the one net that made the tree."""
        store = Store(self.store.root)
        return LabelMaker(
            self,
            BaseLM.load(self.base_lm),
            gistnets[0],
            store.open_reader(self.store.context, seq=self.seq),
            LexicalSearcher(store.folder(self.store.context), Tokenizer.load(self.base_lm).decode_batch),
        )


class LabelMaker:
    """Measures edits. Plain class; `actors.evaluation.workers.EvaluatorActor` hosts it."""

    def __init__(
        self, spec: LabelMakerSpec, lm: BaseLM, gistnet: GistNet, reader: TreeReader, lexical: LexicalSearcher
    ) -> None:
        self._config = spec.labels
        self._lm = lm
        self._gistnet = gistnet
        self._reader = reader
        self._scorer = Scorer(lm)
        self._finder = CandidateFinder(
            gistnet,
            Tokenizer.load(spec.base_lm),
            lexical,
            KeySpace.of_net(gistnet, reader, array=KEYS),
            spec.labels.query_key_tokens,
        )

    def evaluate(self, place: Place) -> list[PlaceLabels]:
        """Candidates of one place, and what edits are worth there."""
        config = self._config
        history = History.of(
            self._reader, place.first_block, place.stop_block, vectors_per_node=self._gistnet.num_vectors
        )
        reading = Reading(self._lm, self._reader, history)
        num_blocks = -(-config.horizon_tokens // K)
        ids = reading.ids(place.stop_block, num_blocks)[: config.horizon_tokens]
        shown_from = tail_start(reading, config)
        rng = np.random.default_rng((config.seed, place.number))
        num_random = config.num_random
        candidates = self._finder.find(
            reading, shown_from, lambda before: rng.choice(before, min(num_random, len(before)), replace=False)
        )
        measured = _Measured(reading, ids, config, self._scorer)
        return [PlaceLabels.of(shown_from, candidates, list(self._edits(candidates, measured, rng)))]

    def _edits(self, candidates: CandidateSet, measured: _Measured, rng: np.random.Generator) -> Iterable[EditRecord]:
        config = self._config
        blocks = candidates.blocks
        if len(blocks) == 0:
            return
        # Expand one, nothing else being shown.
        for block in sorted(rng.permutation(blocks)[: config.num_single].tolist()):
            yield measured.edit([], [block], [])
        # Several at once; from there, collapse one and swap one for another.
        for _ in range(config.num_sets):
            size = int(rng.integers(2, config.max_blocks + 1))
            shown = self._likely(candidates, rng)[:size].tolist()
            if len(shown) < 2:
                return
            yield measured.edit([], shown, [])
            for block in rng.permutation(shown)[: config.num_collapsed].tolist():
                yield measured.edit(shown, [], [block])
            others = [block for block in rng.permutation(blocks).tolist() if block not in shown]
            for block in others[: config.num_swapped]:
                yield measured.edit(shown, [block], [int(rng.choice(shown))])

    @staticmethod
    def _likely(candidates: CandidateSet, rng: np.random.Generator) -> np.ndarray:
        """Candidates in an order in which what was found tends to come first, as in the contexts of a session."""
        found = candidates.column("lexical_rank") + candidates.column("key_rank")
        return candidates.blocks[np.argsort(-(np.log(found + 0.02) + rng.gumbel(size=len(found))), kind="stable")]


class _Measured:
    """Working Contexts of one place, each read once."""

    def __init__(self, reading: Reading, ids: np.ndarray, config: LabelConfig, scorer: Scorer) -> None:
        self._reading = reading
        self._ids = ids
        self._config = config
        self._scorer = scorer
        self._condition = Condition(rivals.ORACLE, config.form)
        history = reading.history
        self._policy: Policy = policy_for(history.num_tokens + config.horizon_tokens, reading.lm.trained_context)
        self._known: dict[frozenset[int], tuple[float, float]] = {}

    def edit(self, shown: Sequence[int], added: Sequence[int], removed: Sequence[int]) -> EditRecord:
        """One edit, read before and after."""
        after = [block for block in (*shown, *added) if block not in removed]
        (before_a, before_b), (after_a, after_b) = self._read(shown), self._read(after)
        return list(shown), list(added), list(removed), before_a, before_b, after_a, after_b

    def _read(self, blocks: Sequence[int]) -> tuple[float, float]:
        key = frozenset(blocks)
        if key not in self._known:
            config = self._config
            contents, _ = rivals.contents_of(
                self._condition,
                self._reading,
                [(block, 0) for block in blocks],
                config.budget,
                config.tail_tokens,
                len(blocks),
            )
            nll = self._scorer.nll(contents, self._ids, self._reading.history.num_tokens, self._policy)
            self._known[key] = round(float(choosing_half(nll).mean()), 6), round(float(scoring_half(nll).mean()), 6)
        return self._known[key]


def tail_start(reading: Reading, config: LabelConfig) -> int:
    """First block of the raw tail that is left where as many blocks are chosen as may be."""
    tail = max(config.tail_tokens, config.budget - config.max_blocks * K - smallest_budget([reading.history]))
    return reading.history.stop_block - len(rivals.tail_blocks(reading, tail))
