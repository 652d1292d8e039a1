"""One place after another: every rival's contents, measured on the horizon that really came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from actors.evaluation import rivals
from actors.evaluation.candidate_finder import CandidateFinder
from actors.evaluation.contents import Contents, Reading
from actors.evaluation.focus_search import Choices, FocusSearch, Room, SingleGains
from actors.evaluation.lens_rival import LensRival
from actors.evaluation.names import SharedNames
from actors.evaluation.opened import open_searchable
from actors.evaluation.oracle import choosing_half, scoring_half
from actors.evaluation.places import Place
from actors.evaluation.retrieval import Retrieval
from actors.evaluation.rivals import Condition
from actors.evaluation.scorer import FullHistory, Scorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, StoreConfig
from cluster.evaluation_config import FocusEvaluationConfig
from models.base_lm import BaseLM
from models.focus.block_embeddings import BlockEmbeddings
from models.focus.dense import KeySpace
from models.focus.history import History
from models.focus.layout import Policy, policy_for
from models.gistnet import GistNet
from models.lensnet import LensNet
from models.sentence_encoder import SentenceEncoder
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.schema import KEYS


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
        opened = open_searchable(self.store, self.seq, Tokenizer.load(self.base_lm))
        return FocusEvaluator(self, BaseLM.load(self.base_lm), gistnets[0], *opened)


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
    """CPU seconds to find and choose."""
    read_s: float = 0.0
    """CPU seconds to read what is shown and the horizon; of `full`, what places before it had not read yet."""
    num_same_document: int = 0
    """Picked blocks that are of the horizon's document."""
    num_shared_names: int = 0
    """Picked blocks that share a name with the horizon; see `names`."""
    share_same_document: float = 0.0
    """Of the blocks that could have been picked, those of the horizon's document: what chance would pick."""
    share_shared_names: float = 0.0
    """Those that share a name with the horizon."""
    single_gains: SingleGains = field(default_factory=list)
    """`exhaustive` only: what each block of the history is worth alone."""
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)
    """`oracle` and `exhaustive` in raw blocks only: `(readings, blocks, nll_choosing, nll_scoring)` of each choice that
    was better than those read before."""

    @property
    def nll(self) -> float:
        """Mean over both halves, which differ by at most one token."""
        return (self.nll_choosing + self.nll_scoring) / 2


Known = dict[tuple[str, bytes], tuple[np.ndarray, float]]
"""By position policy and digest of contents: NLL of a horizon, and the CPU seconds it took."""


class FocusEvaluator:
    """Measures places. Plain class; `workers.EvaluatorActor` hosts it."""

    def __init__(
        self, spec: FocusEvaluatorSpec, lm: BaseLM, gistnet: GistNet, reader: TreeReader, lexical: LexicalSearcher
    ) -> None:
        self._config = spec.evaluation
        self._lm = lm
        self._gistnet = gistnet
        self._reader = reader
        self._lexical = lexical
        self._tokenizer = Tokenizer.load(spec.base_lm)
        self._scorer = Scorer(lm)
        self._full = FullHistory(lm)
        self._conditions = rivals.conditions(spec.evaluation.rivals, spec.evaluation.forms)
        self._choosers = {condition.chooser for condition in self._conditions}
        # Of all the context: a history of a few thousand tokens holds too few keys to measure their spread.
        self._key_space = KeySpace.of_net(gistnet, reader, array=KEYS)
        self._embeddings: BlockEmbeddings | None = None
        if rivals.MINILM in self._choosers or rivals.MINILM in spec.evaluation.retrieval.fusion:
            self._embeddings = BlockEmbeddings(SentenceEncoder.load(), self._tokenizer.decode_batch, reader)
        self._lens: LensRival | None = None
        if rivals.LENSNET in self._choosers:
            self._lens = LensRival(
                LensNet.load(spec.evaluation.lensnet),
                CandidateFinder(
                    gistnet,
                    self._tokenizer,
                    lexical,
                    self._key_space,
                    spec.evaluation.retrieval.dense_query_tokens,
                ),
            )
        line_break = torch.tensor([[int(self._tokenizer.encode("\n")[-1])]], device=lm.device)
        self._constant = lm.embed(line_break)[0, 0]
        self._known: Known = {}

    def evaluate(self, place: Place, known: Known | None = None) -> list[Measured]:
        """Every condition at one place, for every budget.

        Args:
            place: whose horizon is predicted.
            known: what was read of the same horizon; added to. Who compares two versions of a tree reads what they have
                in common once.
        """
        config = self._config
        history = History.of(
            self._reader, place.first_block, place.stop_block, vectors_per_node=self._gistnet.num_vectors
        )
        reading = Reading(self._lm, self._reader, history, self._constant)
        num_blocks = -(-config.horizon_tokens // K)
        ids = reading.ids(place.stop_block, num_blocks)[: config.horizon_tokens]
        self._known = {} if known is None else known
        budgets = list(dict.fromkeys(config.budgets))
        rooms = [Room.of(budget, reading, config) for budget in budgets]
        oracle_rooms = [Room.of(budget, reading, config, measuring=True) for budget in budgets]
        choices = self._search(reading, rooms, ids).run(rooms, oracle_rooms, ids, place.number)
        names = SharedNames(self._reader, self._tokenizer, history, ids)
        measured = [self._measure(c, reading, ids, Choices(), None, names) for c in self._conditions if not c.form]
        for room, oracle_room, choice in zip(rooms, oracle_rooms, choices, strict=True):
            for condition in self._conditions:
                if condition.form:
                    own = oracle_room if condition.chooser in rivals.MEASURING else room
                    measured.append(self._measure(condition, reading, ids, choice, own, names))
        return measured

    def _search(self, reading: Reading, rooms: list[Room], ids: np.ndarray) -> FocusSearch:
        retrieval = Retrieval(
            reading,
            self._lexical,
            self._tokenizer,
            self._gistnet,
            self._key_space,
            max(room.shown_from for room in rooms),
            self._config.retrieval,
            self._embeddings,
        )

        def read(blocks: Sequence[int], budget: int) -> np.ndarray:
            ranked = [(block, 0) for block in blocks]
            shown = Condition(rivals.ORACLE, "raw")
            contents, _ = rivals.contents_of(shown, reading, ranked, budget, self._config.tail_tokens, len(blocks))
            return self._nll(contents, reading, ids, self._policy(reading.history))[0]

        return FocusSearch(retrieval, self._config, self._policy(reading.history), self._choosers, read, self._lens)

    def _nll(self, contents: Contents, reading: Reading, ids: np.ndarray, policy: Policy) -> tuple[np.ndarray, float]:
        """NLL of the horizon, and the CPU seconds it took."""
        # Rivals often agree, and oracles read what rivals show: what was read before is not read again.
        digest = (policy, contents.digest())
        if digest not in self._known:
            started = time.process_time()
            nll = self._scorer.nll(contents, ids, reading.history.num_tokens, policy)
            self._known[digest] = nll, time.process_time() - started
        return self._known[digest]

    def _policy(self, history: History) -> Policy:
        if self._config.positional != "auto":
            return self._config.positional
        return policy_for(history.num_tokens + self._config.horizon_tokens, self._lm.trained_context)

    def _measure(
        self,
        condition: Condition,
        reading: Reading,
        ids: np.ndarray,
        choices: Choices,
        room: Room | None,
        names: SharedNames,
    ) -> Measured:
        started = time.process_time()
        history = reading.history
        budget, max_blocks = (0, 0) if room is None else (room.budget, room.max_blocks)
        if condition.chooser == rivals.FULL:
            nll, slots, picked = self._full.nll(reading, ids), history.num_tokens, []
            took = time.process_time() - started
        else:
            ranked = choices.ranked.get(condition.chooser, ())
            contents, picked = rivals.contents_of(
                condition, reading, ranked, budget, self._config.tail_tokens, max_blocks
            )
            slots = contents.num_rows
            policy = cast(Policy, condition.policy) or self._policy(history)
            nll, took = self._nll(contents, reading, ids, policy)
        exhaustive = condition.chooser == rivals.EXHAUSTIVE
        pool = range(history.first_block, history.stop_block if room is None else room.shown_from)
        return Measured(
            condition.name,
            budget,
            slots,
            *_halves(nll),
            picked,
            round(choices.seconds.get(condition.chooser, 0.0), 4),
            round(took, 4),
            names.num_same_document(picked),
            names.num_sharing(picked),
            round(names.num_same_document(pool) / max(len(pool), 1), 5),
            round(names.num_sharing(pool) / max(len(pool), 1), 5),
            choices.single_gains if exhaustive else [],
            [
                (step.num_readings, len(step.blocks), *_halves(step.nll))
                for step in choices.steps.get(condition.chooser, ())
                if condition.form == "raw"
            ],
        )


def _halves(nll: np.ndarray) -> tuple[float, float]:
    return float(choosing_half(nll).mean()), float(scoring_half(nll).mean())
