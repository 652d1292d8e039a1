"""One place after another: every rival's contents, measured on the horizon that really came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.evaluation import rivals
from actors.evaluation.contents import Contents, Reading
from actors.evaluation.oracle import choose, choosing_half, scoring_half
from actors.evaluation.places import Place
from actors.evaluation.retrieval import Retrieval, fused, shortlist
from actors.evaluation.rivals import Condition
from actors.evaluation.scorer import BlockCaches, CandidateScorer, FullHistory, Scorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, StoreConfig
from cluster.evaluation_config import FocusEvaluationConfig
from models.base_lm import BaseLM
from models.focus.allocators import RankedBlocks
from models.focus.dense import KeySpace
from models.focus.history import History
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical import LexicalSearcher
from storage.schema import KEYS
from storage.store import Store


@dataclass(frozen=True)
class FocusEvaluatorSpec:
    """Everything a worker needs to measure the same anywhere."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    store: StoreConfig
    seq: int
    """Version of the context, so that all workers read the same."""
    evaluation: FocusEvaluationConfig

    def build(self, gistnets: list[GistNet]) -> FocusEvaluator:
        """The evaluator, of the one net that made the tree."""
        store = Store(self.store.root)
        return FocusEvaluator(
            self,
            BaseLM.load(self.base_lm),
            gistnets[0],
            store.open_reader(self.store.context, seq=self.seq),
            LexicalSearcher(store.folder(self.store.context), Tokenizer.load(self.base_lm).decode_batch),
        )


@dataclass(frozen=True)
class Measured:
    """One condition at one place."""

    condition: str
    budget: int
    """0 where the condition has none."""
    slots: int
    """Rows the model read before the horizon."""
    nll_choosing: float
    """Mean NLL over the tokens the oracle chooses on, nats a token."""
    nll_scoring: float
    """Over the others."""
    picked: list[int] = field(default_factory=list)
    """Blocks shown because they were chosen, the best first."""
    decide_s: float = 0.0
    """Seconds to find and choose."""
    read_s: float = 0.0
    """Seconds to assemble and to read the horizon."""

    @property
    def nll(self) -> float:
        """Mean over both halves, which differ by at most one token."""
        return (self.nll_choosing + self.nll_scoring) / 2


class FocusEvaluator:
    """Measures places. Plain class; `workers.EvaluatorActor` hosts it."""

    def __init__(
        self, spec: FocusEvaluatorSpec, lm: BaseLM, gistnet: GistNet, reader: TreeReader, lexical: LexicalSearcher
    ) -> None:
        self._spec = spec
        self._config = spec.evaluation
        self._lm = lm
        self._gistnet = gistnet
        self._reader = reader
        self._lexical = lexical
        self._tokenizer = Tokenizer.load(spec.base_lm)
        self._scorer = Scorer(lm, spec.evaluation.positional)
        self._full = FullHistory(lm)
        self._conditions = rivals.conditions(spec.evaluation.rivals, spec.evaluation.forms)
        # Of all the context: a history of a few thousand tokens holds too few keys to measure their spread.
        self._key_space = KeySpace.of_tree(reader, array=KEYS)
        self._known: dict[bytes, np.ndarray] = {}

    def evaluate(self, place: Place) -> list[Measured]:
        """Every condition at one place, for every budget."""
        config = self._config
        history = History.of(
            self._reader, place.first_block, place.stop_block, vectors_per_node=self._gistnet.num_vectors
        )
        reading = Reading(self._lm, self._reader, history)
        num_blocks = -(-config.horizon_tokens // K)
        ids = reading.ids(place.stop_block, num_blocks)[: config.horizon_tokens]
        self._known.clear()
        search = self._search(reading, place)
        measured = [self._measure(c, reading, ids, (), 0, 0.0) for c in self._conditions if not c.form]
        for budget in dict.fromkeys(config.budgets):
            self._add_oracles(search, ids, budget)
            for condition in self._conditions:
                if condition.form:
                    ranked = search.ranked.get(condition.chooser, ())
                    took = search.seconds.get(condition.chooser, 0.0)
                    measured.append(self._measure(condition, reading, ids, ranked, budget, took))
        return measured

    def _measure(
        self, condition: Condition, reading: Reading, ids: np.ndarray, ranked: RankedBlocks, budget: int, took: float
    ) -> Measured:
        config = self._config
        started = time.perf_counter()
        if condition.chooser == rivals.FULL:
            nll, slots, picked = self._full.nll(reading, ids), reading.history.num_tokens, []
        else:
            contents, picked = rivals.contents_of(
                condition, reading, ranked, budget, config.tail_tokens, config.max_blocks
            )
            slots = contents.num_rows
            # Rivals often agree: what was read before is not read again.
            digest = contents.digest()
            if digest not in self._known:
                self._known[digest] = self._scorer.nll(contents, ids, reading.history.num_tokens)
            nll = self._known[digest]
        return Measured(
            condition.name,
            budget,
            slots,
            float(choosing_half(nll).mean()),
            float(scoring_half(nll).mean()),
            picked,
            round(took, 4),
            round(time.perf_counter() - started, 4),
        )

    def _search(self, reading: Reading, place: Place) -> _Search:
        """What every retriever finds, and the shortlist made of it."""
        config, history = self._config, reading.history
        wanted = {condition.chooser for condition in self._conditions}
        shown_from = history.stop_block - len(rivals.tail_blocks(reading, config.tail_tokens))
        retrieval = Retrieval(
            reading, self._lexical, self._tokenizer, self._gistnet, self._key_space, shown_from, config.query_tokens
        )
        search = _Search(reading)
        if not wanted & {*rivals.RETRIEVERS, *rivals.ORACLES}:
            return search
        search.timed(rivals.BM25, retrieval.bm25)
        search.timed(rivals.DENSE, retrieval.dense)
        found = search.ranked
        both = (rivals.BM25, rivals.DENSE)
        search.timed(rivals.FUSION, lambda: fused([found[name] for name in both]), *both)
        search.timed(rivals.RANDOM, lambda: retrieval.random(config.seed * 1_000_003 + place.number))
        if not wanted & {rivals.RERANK, *rivals.ORACLES}:
            return search
        picks = min(config.max_blocks, config.shortlist_blocks // len(found))
        search.shortlist = shortlist(list(found.values()), picks, config.shortlist_blocks)
        stand_ins, _ = rivals.bare_rows(reading, config.budgets[0], config.tail_tokens)
        blocks = [reading.raw([block]) for block in search.shortlist]
        search.timed("", lambda: search.read(self._lm, stand_ins, blocks), rivals.FUSION)
        if rivals.RERANK in wanted:
            search.timed(rivals.RERANK, lambda: retrieval.reranked(search.shortlist, search.caches), "")
        return search

    def _add_oracles(self, search: _Search, ids: np.ndarray, budget: int) -> None:
        config = self._config
        if not {condition.chooser for condition in self._conditions} & set(rivals.ORACLES):
            return
        started = time.perf_counter()
        stand_ins, tail = rivals.bare_rows(search.reading, budget, config.tail_tokens)
        affordable = min(config.max_blocks, (budget - stand_ins.num_rows - tail.num_rows) // K)
        candidates = CandidateScorer(search.caches, tail)
        chosen = choose(candidates, len(search.shortlist), ids, affordable, config.oracle_pool)
        took = search.seconds[""] + time.perf_counter() - started
        blocks = search.shortlist
        search.ranked[rivals.ORACLE_GREEDY] = [(blocks[i], 0) for i in chosen.greedy if chosen.single_gains[i] > 0]
        search.ranked[rivals.ORACLE] = [(blocks[i], 0) for i in chosen.sequential]
        search.seconds.update(dict.fromkeys(rivals.ORACLES, took))


class _Search:
    """What was found at one place, and how long it took, what it builds on included."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.ranked: dict[str, RankedBlocks] = {}
        self.seconds: dict[str, float] = {}
        self.shortlist: list[int] = []
        self.caches: BlockCaches

    def timed(self, name: str, call: Callable[[], RankedBlocks], *builds_on: str) -> None:
        started = time.perf_counter()
        self.ranked[name] = call()
        self.seconds[name] = time.perf_counter() - started + sum(self.seconds[other] for other in builds_on)

    def read(self, lm: BaseLM, stand_ins: Contents, blocks: Sequence[Contents]) -> RankedBlocks:
        """Read the shortlist's blocks; returns it as a ranking of its own."""
        self.caches = BlockCaches(lm, stand_ins, blocks, self.reading.history.num_tokens)
        return [(block, 0) for block in self.shortlist]
