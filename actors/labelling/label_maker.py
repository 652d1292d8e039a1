"""Labels of running text: edits of Working Contexts at random places, and the text that came behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.evaluation.candidate_finder import CandidateFinder
from actors.evaluation.contents import Contents, Reading
from actors.evaluation.opened import open_searchable
from actors.evaluation.places import Place
from actors.evaluation.scorer import Scorer
from actors.labelling.edits import MeasuredContexts, PlaceLabels, proposed_edits, tail_start
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, StoreConfig
from cluster.label_config import LabelConfig
from models.base_lm import BaseLM
from models.focus.dense import KeySpace
from models.focus.history import History
from models.focus.layout import policy_for
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.schema import KEYS


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
        opened = open_searchable(self.store, self.seq, Tokenizer.load(self.base_lm))
        return LabelMaker(self, BaseLM.load(self.base_lm), gistnets[0], *opened)


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
        policy = policy_for(history.num_tokens + config.horizon_tokens, self._lm.trained_context)
        shown_from = tail_start(reading, config, config.budget)
        rng = np.random.default_rng((config.seed, place.number))
        num_random = config.num_random
        candidates = self._finder.find(
            reading, shown_from, lambda before: rng.choice(before, min(num_random, len(before)), replace=False)
        )

        def nll_behind(contents: Contents) -> np.ndarray:
            return self._scorer.nll(contents, ids, history.num_tokens, policy)

        measured = MeasuredContexts(reading, config, config.budget, nll_behind)
        return [PlaceLabels.of(shown_from, candidates, list(proposed_edits(candidates, measured, config, rng)))]
