"""Rivals of focus on tasks: one question after another, what each of them shows, and what the model answers.

Slots: a budget counts every row the model reads before the answer, the question's own tokens included. They are the
same for every rival, so the history's part of it, budget minus question, is too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from actors.compactor import Compactor, CompactorSpec
from actors.evaluation import rivals
from actors.evaluation.candidate_finder import CandidateFinder
from actors.evaluation.contents import Contents, Reading
from actors.evaluation.lens_rival import LensRival
from actors.evaluation.opened import open_searchable
from actors.evaluation.oracle import choose
from actors.evaluation.retrieval import RANDOM_SEED_STRIDE, Retrieval, shortlist
from actors.evaluation.rivals import Condition
from actors.evaluation.scorer import BlockCaches, CandidateScorer
from actors.evaluation.task_places import TaskPlace
from actors.evaluation.task_planter import Question, TaskPlanter
from actors.evaluation.task_scorer import Answers, AnswerScorer, end_ids, until_end
from actors.focus_signals import Planted
from actors.tasks import TASKS, choose_candidate, exact_match, infeasible
from actors.tasks.sample import NumberedTask
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, StoreConfig
from cluster.errors import ConfigError
from cluster.task_evaluation_config import TaskEvaluationConfig
from models.base_lm import BaseLM
from models.focus.allocators import RankedBlocks
from models.focus.block_embeddings import BlockEmbeddings
from models.focus.dense import KeyIndex, KeySpace
from models.focus.history import History
from models.focus.layout import Policy, policy_for
from models.gistnet import GistNet
from models.lensnet import LensNet
from models.node_encoder import NodeEncoder
from models.sentence_encoder import SentenceEncoder
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.schema import KEYS

EXTRA_TOKENS = 4
"""Tokens a greedy answer may be longer than the answer: quotes, a space."""


def tasks_of(names: Sequence[str]) -> dict[str, NumberedTask]:
    """Tasks by name.

    Raises:
        ConfigError: an unknown one, listing those there are.
    """
    tasks: dict[str, NumberedTask] = {}
    for name in names:
        task = TASKS[name]()
        if not isinstance(task, NumberedTask):
            raise ConfigError(f"task {name!r} cannot make single samples")
        tasks[name] = task
    return tasks


def task_conditions(config: TaskEvaluationConfig) -> list[Condition]:
    """What is compared.

    Raises:
        ConfigError: a rival, form or policy there is not.
    """
    return rivals.conditions(config.rivals, config.forms, rivals.TASK_CHOOSERS, rivals.TASK_FORMS)


@dataclass(frozen=True)
class TaskEvaluatorSpec:
    """Everything a worker needs to measure the same anywhere."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    compactor: CompactorSpec
    """Encodes what is planted as the tree was encoded."""
    store: StoreConfig
    seq: int
    """Version of the context, so that all workers read the same."""
    evaluation: TaskEvaluationConfig

    def build(self, gistnets: list[GistNet]) -> TaskEvaluator:
        """The evaluator, of the one net that made the tree."""
        tokenizer = Tokenizer.load(self.base_lm)
        compactor = Compactor(self.compactor, gistnets[0])
        opened = open_searchable(self.store, self.seq, tokenizer)
        return TaskEvaluator(self.evaluation, BaseLM.load(self.base_lm), gistnets[0], compactor, tokenizer, *opened)


@dataclass(frozen=True)
class TaskMeasured:
    """One condition at one place."""

    condition: str
    budget: int
    """0 where the condition has none."""
    slots: int
    """Rows the model read before the answer, the question included."""
    feasible: bool
    """Whether any choice of blocks could show what the answer depends on, in this form and budget."""
    correct: bool
    """The answer is the likeliest of the candidates."""
    exact: bool | None
    """The greedy answer begins with the answer; None where nothing was generated."""
    answer_nll: float
    """Mean NLL of the answer's tokens, nats a token."""
    recall: float
    """Share of the needed blocks that were shown raw, whole."""
    num_needed: int
    """Needed blocks."""
    depth: float
    """Mean place of the needed blocks in the history, 0 (oldest) to 1."""
    num_candidates: int
    cluster: str
    """Places that are not independent share it."""
    generated: str = ""
    picked: list[int] = field(default_factory=list)
    """Blocks shown because they were chosen, the best first."""
    decide_s: float = 0.0
    """CPU seconds to find and choose."""
    read_s: float = 0.0
    """CPU seconds to assemble, read and answer; small where another condition had shown the same."""


@dataclass(frozen=True)
class _Shown:
    contents: Contents
    blocks: np.ndarray
    """Raw and whole."""
    picked: list[int]


class TaskEvaluator:
    """Measures places. Plain class; `workers.EvaluatorActor` hosts it."""

    def __init__(
        self,
        config: TaskEvaluationConfig,
        lm: BaseLM,
        gistnet: GistNet,
        compactor: Compactor,
        tokenizer: Tokenizer,
        reader: TreeReader,
        lexical: LexicalSearcher,
    ) -> None:
        self._config = config
        self._lm = lm
        self._gistnet = gistnet
        self._tokenizer = tokenizer
        self._reader = reader
        self._lexical = lexical
        self.planter = TaskPlanter(
            reader,
            tokenizer,
            compactor,
            NodeEncoder(gistnet),
            tasks_of(config.tasks),
            tail_tokens=config.tail_tokens,
            seed=config.seed,
        )
        self._scorer = AnswerScorer(lm)
        self._end_ids = end_ids(tokenizer)
        self._conditions = task_conditions(config)
        self._key_space = KeySpace.of_net(gistnet, reader, array=KEYS)
        self._embeddings: BlockEmbeddings | None = None
        choosers = {condition.chooser for condition in self._conditions}
        if rivals.MINILM in choosers or rivals.MINILM in config.retrieval.fusion:
            self._embeddings = BlockEmbeddings(SentenceEncoder.load(), tokenizer.decode_batch, reader)
        self._lens: LensRival | None = None
        if rivals.LENSNET in choosers:
            finder = CandidateFinder(gistnet, tokenizer, lexical, self._key_space, config.retrieval.dense_query_tokens)
            self._lens = LensRival(LensNet.load(config.lensnet), finder)
        self._key_index: tuple[tuple[int, int], KeyIndex] | None = None
        self._answers: dict[tuple[str, bytes], Answers] = {}

    def evaluate(self, place: TaskPlace) -> list[TaskMeasured]:
        """Every condition at one place, for every budget."""
        return self.answer(self.planter.question(place), place)

    def answer(
        self, question: Question, place: TaskPlace, known: dict[tuple[str, bytes], Answers] | None = None
    ) -> list[TaskMeasured]:
        """Every condition at one question of a place, for every budget.

        Args:
            question: its reader may be of another version than the evaluator's planter plants in.
            place: where it is asked.
            known: what the model said to the same question; added to. Who asks in two versions of a tree reads
                what they have in common once.
        """
        self._answers = {} if known is None else known
        vectors = self._gistnet.num_vectors
        history = History.of(question.reader, place.first_block, place.stop_block, vectors_per_node=vectors)
        # A tree may end in a tail of its own; the question follows the blocks.
        reading = Reading(self._lm, question.reader, replace(history, tail_tokens=0))
        search = self._search(question, reading, place)
        fits = self._longest(question, reading.history.num_tokens) <= self._lm.trained_context
        measured = [
            self._measure(condition, question, reading, search, 0, True)
            for condition in self._conditions
            if not condition.form and (fits or condition.chooser != rivals.FULL)
        ]
        for budget in self._config.budgets:
            self._add_oracle(question, reading, search, budget)
            forms = {condition.form for condition in self._conditions if condition.form}
            feasible = {form: self._feasible(form, question, reading, budget) for form in forms}
            measured += [
                self._measure(condition, question, reading, search, budget, feasible[condition.form])
                for condition in self._conditions
                if condition.form
            ]
        return measured

    def _longest(self, question: Question, num_tokens: int) -> int:
        """Tokens of history, question and the longest answer."""
        return num_tokens + len(question.query) + max(map(len, question.candidates)) + EXTRA_TOKENS

    def _policy(self, question: Question, num_tokens: int) -> Policy:
        if self._config.positional != "auto":
            return self._config.positional
        return policy_for(self._longest(question, num_tokens), self._lm.trained_context)

    def _measure(
        self,
        condition: Condition,
        question: Question,
        reading: Reading,
        search: _Search,
        budget: int,
        feasible: bool,
    ) -> TaskMeasured:
        started = time.process_time()
        room = budget - len(question.query)
        ranked = search.ranked.get(condition.chooser, ())
        shown = self._shown(condition, question, reading, ranked, room)
        answers = self._answer(question, reading, shown.contents, condition)
        took = time.process_time() - started
        history, needed = reading.history, question.needed
        candidates_nll = np.array([float(nll.sum(dtype=np.float64)) for nll in answers.nll])
        generated = self._tokenizer.decode(until_end(answers.generated, self._end_ids))
        return TaskMeasured(
            condition.name,
            budget,
            shown.contents.num_rows + len(question.query),
            feasible,
            choose_candidate(-candidates_nll) == question.right,
            exact_match(generated, question.sample.answer) if self._config.generate else None,
            float(answers.nll[question.right].mean(dtype=np.float64)),
            float(np.isin(needed, shown.blocks).mean()),
            len(needed),
            round(float((needed - history.first_block).mean()) / history.num_blocks, 6),
            len(question.candidates),
            question.cluster,
            generated,
            shown.picked,
            round(search.seconds.get(condition.chooser, 0.0), 4),
            round(took, 4),
        )

    def _shown(
        self, condition: Condition, question: Question, reading: Reading, ranked: RankedBlocks, room: int
    ) -> _Shown:
        config = self._config
        if condition.chooser == rivals.NEEDLES and not condition.form:
            needed = question.needed.tolist()
            contents = reading.raw([*needed, *rivals.tail_blocks(reading, config.tail_tokens)])
            return _Shown(contents, shown_whole(reading.history, contents), needed)
        if condition.form in {"", *rivals.RAW_FORMS}:
            contents, picked = rivals.contents_of(
                condition, reading, ranked, room, config.tail_tokens, config.max_blocks
            )
            return _Shown(contents, shown_whole(reading.history, contents), picked)
        wc = rivals.working_context(condition, reading.history, ranked, room, config.tail_tokens, config.max_blocks)
        blocks = wc.raw_blocks()
        raw = set(blocks.tolist())
        return _Shown(reading.context(wc), blocks, [block for block, _ in ranked if block in raw][: config.max_blocks])

    def _feasible(self, form: str, question: Question, reading: Reading, budget: int) -> bool:
        """Whether a chooser that knows what is needed could show it."""
        room = budget - len(question.query)
        best = Condition(rivals.NEEDLES, form)
        wanted = [(int(block), 0) for block in question.needed]
        blocks = self._shown(best, question, reading, wanted, room).blocks
        return not infeasible(question.sample, len(wanted), int(np.isin(question.needed, blocks).sum()))

    def _answer(self, question: Question, reading: Reading, contents: Contents, condition: Condition) -> Answers:
        # Rivals often agree: what was read before is not read again.
        num_tokens = reading.history.num_tokens
        policy = condition.policy or self._policy(question, num_tokens)
        digest = (policy, contents.digest())
        if digest not in self._answers:
            right = len(question.candidates[question.right])
            self._answers[digest] = self._scorer.answer(
                contents,
                question.query,
                question.candidates,
                num_tokens,
                cast(Policy, policy),
                right + EXTRA_TOKENS if self._config.generate else 0,
            )
        return self._answers[digest]

    def _search(self, question: Question, reading: Reading, place: TaskPlace) -> _Search:
        """What every retriever finds for the question, and the oracle's shortlist."""
        config, history = self._config, reading.history
        wanted = {condition.chooser for condition in self._conditions}
        search = _Search()
        shown_from = max(history.first_block, history.stop_block - config.tail_tokens // K)
        if wanted & {*rivals.RETRIEVERS, rivals.ORACLE}:
            planted_blocks = question.planted_blocks
            key_index = self._keys(history.first_block, shown_from).over(question.reader, planted_blocks)
            retrieval = Retrieval(
                reading,
                self._lexical,
                self._tokenizer,
                self._gistnet,
                self._key_space,
                shown_from,
                config.retrieval,
                self._embeddings and self._embeddings.over(question.reader, planted_blocks),
                question=question.query,
                indexed=self._reader,
                planted_blocks=planted_blocks,
                key_index=key_index,
            )
            found = retrieval.find(wanted, config.seed * RANDOM_SEED_STRIDE + place.number)
            if (lens := self._lens) is not None:
                planted = Planted(self._reader, planted_blocks, key_index)
                found.timed(rivals.LENSNET, lambda: lens.rank(reading, shown_from, question.query, planted))
            search = _Search(found.ranked, found.seconds)
        if rivals.ORACLE in wanted:
            started = time.process_time()
            self._read_shortlist(question, reading, search, shown_from)
            # All rankings were needed to know the shortlist.
            searched = sum(search.seconds[name] for name in config.retrieval.fusion)
            search.shortlist_seconds = searched + time.process_time() - started
        return search

    def _keys(self, first_block: int, stop_block: int) -> KeyIndex:
        """Keys of the tree itself; the last part's are kept, for places come in groups."""
        if self._key_index is None or self._key_index[0] != (first_block, stop_block):
            index = KeyIndex(self._reader, self._key_space, first_block, stop_block, array=KEYS)
            self._key_index = ((first_block, stop_block), index)
        return self._key_index[1]

    def _read_shortlist(self, question: Question, reading: Reading, search: _Search, shown_from: int) -> None:
        """The needed blocks, so that the oracle is a ceiling, then what the rivals would pick."""
        config = self._config
        found = [ranking for name, ranking in search.ranked.items() if name != rivals.RANDOM]
        needed = [int(block) for block in question.needed if block < shown_from]
        picks = min(config.max_blocks, config.shortlist_blocks // len(found))
        others = shortlist(found, picks, config.shortlist_blocks)
        search.shortlist = list(dict.fromkeys([*needed, *others]))[: config.shortlist_blocks]
        stand_ins, _ = self._bare(question, reading, config.budgets[0])
        blocks = [reading.raw([block]) for block in search.shortlist]
        num_tokens = reading.history.num_tokens
        policy = self._policy(question, num_tokens)
        search.caches = BlockCaches(self._lm, stand_ins, blocks, num_tokens, policy)

    def _add_oracle(self, question: Question, reading: Reading, search: _Search, budget: int) -> None:
        """Chooses by the measured NLL of the answer itself: a ceiling, no rival."""
        if search.caches is None:
            return
        config, started = self._config, time.process_time()
        stand_ins, tail = self._bare(question, reading, budget)
        affordable = (budget - len(question.query) - stand_ins.num_rows - tail.num_rows) // K
        answer = question.candidates[question.right]
        chosen = choose(
            CandidateScorer(search.caches, tail),
            range(len(search.shortlist)),
            np.concatenate([question.query, answer]),
            min(config.max_blocks, affordable),
            config.oracle_pool,
            lambda nll: nll[..., -len(answer) :],
        )
        search.ranked[rivals.ORACLE] = [(search.shortlist[i], 0) for i in chosen.sequential]
        search.seconds[rivals.ORACLE] = search.shortlist_seconds + time.process_time() - started

    def _bare(self, question: Question, reading: Reading, budget: int) -> tuple[Contents, Contents]:
        """What stands for the history where nothing is chosen, and its raw tail."""
        tail_tokens = self._config.tail_tokens
        if all(condition.form in {"", *rivals.RAW_FORMS} for condition in self._conditions):
            return reading.nothing(), reading.raw(rivals.tail_blocks(reading, tail_tokens))
        return rivals.bare_rows(reading, budget - len(question.query), tail_tokens)


@dataclass
class _Search:
    """What was found at one place."""

    ranked: dict[str, RankedBlocks] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds, what a ranking builds on included."""
    shortlist: list[int] = field(default_factory=list)
    shortlist_seconds: float = 0.0
    caches: BlockCaches | None = None


def shown_whole(history: History, contents: Contents) -> np.ndarray:
    """Blocks of which every token is there, int64 ascending; of contents that hold raw tokens alone."""
    places = history.tokens_before[0] + contents.half_tokens // 2
    sizes = np.diff(history.tokens_before)
    owner = np.searchsorted(history.tokens_before, places, side="right") - 1
    counts = np.bincount(owner, minlength=history.num_blocks)
    return history.first_block + np.flatnonzero((counts == sizes) & (sizes > 0))
