"""Labels of tasks: edits of Working Contexts behind which something planted is asked for, and its answer.

Running text seldom needs one certain block. A question does, and a session must show it: the same edits, measured on
the tokens of the right answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from actors.compactor import Compactor, CompactorSpec
from actors.evaluation.candidate_finder import CandidateFinder
from actors.evaluation.contents import Contents, Reading
from actors.evaluation.opened import open_searchable
from actors.evaluation.scorer import Scorer
from actors.evaluation.task_evaluator import tasks_of
from actors.evaluation.task_places import TaskPlace
from actors.evaluation.task_planter import TaskPlanter
from actors.focus_signals import Planted
from actors.labelling.edits import MeasuredContexts, PlaceLabels, proposed_edits, tail_start
from cluster.config import BaseLMConfig, StoreConfig
from cluster.label_config import LabelConfig
from models.base_lm import BaseLM
from models.focus.dense import KeyIndex, KeySpace
from models.focus.history import History
from models.focus.layout import policy_for
from models.gistnet import GistNet
from models.node_encoder import NodeEncoder
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.schema import KEYS


@dataclass(frozen=True)
class TaskLabelMakerSpec:
    """Everything a worker needs to measure the same anywhere."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    compactor: CompactorSpec
    """Encodes what is planted as the tree was encoded."""
    store: StoreConfig
    seq: int
    """Version of the context."""
    labels: LabelConfig

    def build(self, gistnets: list[GistNet]) -> TaskLabelMaker:
        """The maker, with the one net that made the tree."""
        opened = open_searchable(self.store, self.seq, Tokenizer.load(self.base_lm))
        compactor = Compactor(self.compactor, gistnets[0])
        return TaskLabelMaker(self, BaseLM.load(self.base_lm), gistnets[0], compactor, *opened)


class TaskLabelMaker:
    """Measures edits behind questions. Plain class; `actors.evaluation.workers.EvaluatorActor` hosts it."""

    def __init__(
        self,
        spec: TaskLabelMakerSpec,
        lm: BaseLM,
        gistnet: GistNet,
        compactor: Compactor,
        reader: TreeReader,
        lexical: LexicalSearcher,
    ) -> None:
        self._config = spec.labels
        self._lm = lm
        self._gistnet = gistnet
        self._reader = reader
        self._scorer = Scorer(lm)
        tokenizer = Tokenizer.load(spec.base_lm)
        self._planter = TaskPlanter(
            reader,
            tokenizer,
            compactor,
            NodeEncoder(gistnet),
            tasks_of(spec.labels.tasks),
            tail_tokens=spec.labels.tail_tokens,
            seed=spec.labels.seed,
        )
        self._space = KeySpace.of_net(gistnet, reader, array=KEYS)
        self._finder = CandidateFinder(gistnet, tokenizer, lexical, self._space, spec.labels.query_key_tokens)

    def evaluate(self, place: TaskPlace) -> list[PlaceLabels]:
        """Candidates of one question, and what edits are worth to its answer."""
        config = self._config
        question = self._planter.question(place)
        vectors = self._gistnet.num_vectors
        history = History.of(question.reader, place.first_block, place.stop_block, vectors_per_node=vectors)
        # A tree may end in a tail of its own; the question follows the blocks.
        reading = Reading(self._lm, question.reader, replace(history, tail_tokens=0))
        answer = question.candidates[question.right]
        ids = np.concatenate([question.query, answer])
        budget = config.budget - len(question.query)
        shown_from = tail_start(reading, config, budget)
        rng = np.random.default_rng((config.seed, place.number))
        needed = question.needed[question.needed < shown_from]
        planted_blocks = question.planted_blocks
        index = KeyIndex(self._reader, self._space, history.first_block, shown_from, array=KEYS)
        planted = Planted(self._reader, planted_blocks, index.over(question.reader, planted_blocks))

        def others(before: np.ndarray) -> np.ndarray:
            chance = rng.choice(before, min(config.num_random, len(before)), replace=False)
            return np.concatenate([needed, chance])

        candidates = self._finder.find(reading, shown_from, others, asked=question.query, planted=planted)
        num_tokens = reading.history.num_tokens
        policy = policy_for(num_tokens + len(ids), self._lm.trained_context)

        def nll_behind(contents: Contents) -> np.ndarray:
            return self._scorer.nll(contents, ids, num_tokens, policy)[-len(answer) :]

        measured = MeasuredContexts(reading, config, budget, nll_behind)
        # An answer of one token has no halves, of which one could choose what the other is measured on.
        edits = proposed_edits(candidates, measured, config, rng, first=needed.tolist()) if len(answer) > 1 else ()
        return [PlaceLabels.of(shown_from, candidates, list(edits))]
