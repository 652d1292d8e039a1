"""A session: it reads without end, keeps a fixed Working Context of all it has read, and answers.

    what is said -> the tree -> history, search -> refocus -> rows -> KV cache -> tokens -> the tree -> …

There is a refocus on every question and every so many decoded tokens. Between two of them the model reads the Working
Context and what was decoded behind it; the cache keeps what an edit does not touch. The tree is the state: a session
that is opened again goes on where it ended.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.plan import CompactionPlan
from actors.session_events import FocusRecorder
from actors.session_lens import Lens, SessionLens
from actors.session_memory import SessionMemory
from actors.session_search import Match, SessionSearch, fused_hits, leads
from actors.session_turn import Clock, Tally, Turn
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import StoreConfig
from cluster.environment import base_folder
from cluster.errors import BudgetError, FocusError, MegaContextError
from cluster.heap import keep_freed_memory
from cluster.session_config import AUTO_LENSNET, SamplingConfig, SessionConfig
from models.base_lm import BaseLM
from models.decoding.chat_format import ChatFormat
from models.decoding.focused_cache import FocusedCache
from models.decoding.sampling import Sampler
from models.focus.assembly import Assembled, Assembler
from models.focus.history import History
from models.focus.layout import found_before_turn, lay_out, runs_of_neighbours
from models.focus.refocus import BlockName, Focus, RefocusPolicy, refocus
from models.focus.working_context import smallest_budget
from models.lensnet import LensNet
from models.lensnet.net import packaged_lensnet, require_models
from storage.contract import DocumentMeta
from storage.schema import GISTS

logger = logging.getLogger("megacontext.session")

PINNED_SHARE = 0.5
"""Of the budget that pins may take."""


@dataclass(frozen=True)
class SessionSpec:
    """Everything a session needs, before anything is loaded."""

    plan: CompactionPlan
    store: StoreConfig
    """Its `context` is the session's own."""
    reads: tuple[str, ...] = ()
    config: SessionConfig = field(default_factory=SessionConfig)


class Session:
    """Plain class; one call at a time. `SessionActor` hosts it."""

    def __init__(self, spec: SessionSpec, base_lm: BaseLM | None = None, lens: Lens | None = None) -> None:
        """Load the models and open the contexts.

        Args:
            spec: which, and how it is focused.
            base_lm: the model of `spec.plan`, where it is loaded already; sessions of one process may share it.
            lens: who scores candidates, if not the net that the configuration names: a service's `RemoteLens`.

        Raises:
            ModelError, StorageError: what cannot be loaded or opened, and what to do.
            BudgetError: the budget cannot hold the contexts.
        """
        keep_freed_memory()
        self.config = spec.config
        self._plan = spec.plan
        self._lm = base_lm or BaseLM.load(spec.plan.base_lm)
        self._tokenizer = spec.plan.tokenizer
        self._lens = _session_lens(spec, lens)
        self._format = ChatFormat.of(spec.plan.files.folder, self._tokenizer, spec.config.system_prompt)
        self._markup = self._format.between_turns if spec.config.layout == "own_turn" else np.empty(0, np.int64)
        """Between what was found and the question at hand."""
        self.id = uuid.uuid4().hex[:12]
        self.memory = SessionMemory(
            spec.plan,
            spec.store,
            spec.reads,
            self._lm,
            compact_tokens=spec.config.compact_tokens,
            owner=f"session {self.id}",
        )
        try:
            self._search = SessionSearch(
                self.memory, self._lm, spec.plan.gistnet, self._tokenizer, spec.config.candidates
            )
            self._policy = _policy(spec.config)
            self._recorder = FocusRecorder(self.id, self.memory.folder, self._policy, enabled=spec.config.record_events)
            self._cache = FocusedCache(self._lm)
            self._assembled: Assembled | None = None
            self.focus: Focus | None = None
            self.matches: dict[BlockName, Match] = {}
            """Why the last refocus found what it found."""
            self._found_order: list[BlockName] = []
            self._asked_for: dict[BlockName, float] = {}
            """Blocks the question at hand found, with their scores."""
            self._opening: int | None = None
            """First block of the document that holds the turns."""
            self._turn_tokens = 0
            """Of the question at hand and its answer so far, as far as they stand behind what was found."""
            self._pinned: list[BlockName] = []
            self._by_hand: dict[BlockName, float] = {}
            self.warning = ""
            """Why the last refocus fell back to recency; empty when it did not."""
            self._check_budget(self.memory.histories())
        except BaseException:
            self.memory.close()
            raise

    def _check_budget(self, histories: Sequence[History]) -> None:
        need = smallest_budget(histories) - histories[-1].tail_tokens + self.config.compact_tokens + K
        if need > self._room:
            raise BudgetError(
                f"a budget of {self.config.budget} is too small for {len(histories)} contexts of "
                f"{sum(h.num_tokens for h in histories):,} tokens: gists and waiting tokens need "
                f"{need + self.config.budget - self._room}. Set session.budget to that or more"
            )

    @property
    def _room(self) -> int:
        """Rows a Working Context may have: the budget, less what is kept free for decoded tokens and markup."""
        return self.config.budget - self.config.refocus_tokens - len(self._markup)

    # -- reading and answering -------------------------------------------------------------------------------------

    def read(self, document: DocumentMeta, text: str) -> bool:
        """Read a document into the session's context; False where the context holds it already.

        Raises:
            StorageError: no text, or what writing meets.
        """
        tokens = self._tokenizer.encode(text)
        added = self.memory.read_document(document, tokens)
        self._opening = None  # the turns begin anew behind it
        self.memory.index()
        return added

    def ask(self, question: str, sampling: SamplingConfig) -> Generator[str | Turn]:
        """Answer: pieces of text as they come, and at last the `Turn`. Leave early by closing the iterator.

        What was said by then stays in the context, as it does when the process dies.

        Raises:
            ModelError, StorageError: what reading and writing meet.
        """
        started = time.perf_counter()
        clock, tally = Clock(), Tally()
        asked = self._tokenizer.encode(question)
        opening = self._format.next_turn(self.memory.last_token)
        turn = np.concatenate([opening, asked, self._format.before_answer]).astype(np.uint32)
        with clock.part("write"):
            self.memory.say(turn)
        # As a turn of its own, what was found takes the question's opening, and the question gets another.
        self._turn_tokens = len(turn) - (len(opening) if self.config.layout == "own_turn" else 0)
        query = asked[-self.config.query_tokens :].astype(np.int64)
        self._refocus("question", query, clock, tally)

        sampler = Sampler(sampling, self._lm.device)
        decode = self._tokenizer.decode_stream()
        stops = (*self._format.stop_strings, *sampling.stop_strings)
        answer: list[int] = []
        unsaid: list[int] = []
        text, ended, first_token_s = "", "length", 0.0
        try:
            while len(answer) < sampling.max_new_tokens:
                with clock.part("decode"):
                    token = sampler.draw(answer, self._cache.logits())
                    if self._recorder.enabled:
                        self._recorder.decoded(self._cache.nll_of_next(token))
                first_token_s = first_token_s or time.perf_counter() - started
                answer.append(token)
                unsaid.append(token)
                if token in self._format.end_ids and not sampling.ignore_eos:
                    ended = "end"
                    break
                piece = decode(token)
                if piece:
                    text += piece
                    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
                    if cut is not None:
                        yield piece[: max(0, cut - (len(text) - len(piece)))]
                        text, ended = text[:cut], "stop"
                        break
                    yield piece
                if len(answer) == sampling.max_new_tokens:
                    break
                if len(unsaid) >= self.config.refocus_tokens:
                    with clock.part("write"):
                        self.memory.say(np.array(unsaid, np.uint32))
                    self._turn_tokens += len(unsaid)
                    unsaid.clear()
                    tail = np.array(answer[-K:], np.int64)
                    self._refocus("interval", np.concatenate([query, tail]), clock, tally)
                else:
                    with clock.part("decode"):
                        self._cache.append(np.array([token], np.int64))
        finally:
            with clock.part("write"):
                if unsaid:
                    self.memory.say(np.array(unsaid, np.uint32))
                self.memory.index()
                self._recorder.end_answer()
        yield Turn(
            len(asked),
            len(answer),
            text,
            ended,
            tally.num_refocuses,
            tally.rows_reused,
            tally.rows_read,
            dict(clock.seconds),
            first_token_s,
            tally.swapped / tally.num_refocuses,
            float(np.mean(tally.stayed)) if tally.stayed else None,
        )

    # -- focus -----------------------------------------------------------------------------------------------------

    def refocus(self, question: str) -> Focus:
        """Refocus on a question without asking it."""
        query = self._tokenizer.encode(question)[-self.config.query_tokens :].astype(np.int64)
        self._refocus("question", query, Clock(), Tally())
        assert self.focus is not None
        return self.focus

    def _refocus(self, reason: str, query: np.ndarray, clock: Clock, tally: Tally) -> None:
        self._recorder.finish()
        histories = self.memory.histories()
        before = dict(clock.seconds)
        with clock.part("search"):
            scores = self._scores(query, histories, reason)
        previous = self.focus
        with clock.part("focus"):
            self.focus = refocus(
                self._policy,
                histories,
                self._room,
                scores,
                previous,
                pinned=list(dict.fromkeys([*self._opening_blocks(histories), *self._pinned])),
                new_question=reason == "question",
                rows_behind_found=self._rows_behind_found(),
                seed=self.config.seed,
            )
        if reason == "question":
            self._asked_for = {name: scores.get(name, 0.0) for name in self.focus.found}
        self._order_found(scores, reason)
        with clock.part("assemble"):
            readers = self.memory.readers()
            assembler = Assembler(self._lm.embed, readers, array=GISTS, dtype=self._lm.dtype, device=self._lm.device)
            self._assembled = assembler.assemble(self.focus.wc, self._assembled)
        with clock.part("read"):
            read = self._cache.refocus(*self._rows())
        tally.count(self.focus, previous, read)
        if self.focus.unfit:
            logger.warning("%d pinned blocks no longer fit the budget and are not shown", len(self.focus.unfit))
        seconds = {part: total - before.get(part, 0.0) for part, total in clock.seconds.items()}
        self._recorder.begin(self.focus, reason, scores, read, seconds, self.warning)

    def _rows(self) -> tuple[Tensor, np.ndarray, int]:
        """What the model reads, where it stands, and the place of the token behind it."""
        assert self._assembled is not None
        assert self.focus is not None
        assembled, wc = self._assembled, self.focus.wc
        embeds, places = assembled.embeds, assembled.half_tokens
        if self.config.layout != "timeline" and self.focus.found:
            entry = {tuple(node): position for position, node in enumerate(wc.nodes())}
            found = [entry[(0, block, source)] for block, source in self._found_order]
            # Of a turn that is longer than the tail the older part has become gists: the tail is as far as it reaches.
            own = (wc.source == len(wc.histories) - 1) & (wc.lod == 0) & (wc.first_block >= self.focus.tail_from)
            turn_rows = min(self._turn_tokens, int(wc.cost[own].sum()))
            order = found_before_turn(assembled.row_of_entry, found, turn_rows)
            markup = self._lm.embed(torch.from_numpy(self._markup.astype(np.int64))[None].to(embeds.device))[0]
            rows = embeds[torch.from_numpy(order).to(embeds.device)]
            behind = len(rows) - turn_rows
            embeds = torch.cat([rows[:behind], markup.to(rows.dtype), rows[behind:]])
            places = np.arange(len(embeds))  # one after the other, whatever they are
        layout = lay_out(self.config.positional, places, wc.total_tokens)
        return embeds, layout.half_tokens, layout.next_half_token

    def _order_found(self, scores: Mapping[BlockName, float], reason: str) -> None:
        """Runs of found blocks by their best score, the best last, where the model reads them best. Within an answer
        blocks that stay keep their order, and new ones stand before them: what the question found is still asked."""
        assert self.focus is not None
        found = self.focus.found
        stay = [] if reason == "question" else [name for name in self._found_order if name in found]
        new = sorted((name for name in found if name not in stay), key=lambda name: -scores.get(name, 0.0))
        self._found_order = [name for run in runs_of_neighbours(new)[::-1] for name in run] + stay

    def _rows_behind_found(self) -> int | None:
        """Rows that are read again when a found block changes; None where that depends on the block."""
        if self.config.layout == "timeline":
            return None
        return 0 if self.focus is None else len(self._markup) + self._turn_tokens + K * len(self.focus.found)

    def _scores(self, query: np.ndarray, histories: Sequence[History], reason: str) -> dict[BlockName, float]:
        """What blocks are worth; on trouble nothing, which is recency."""
        self.warning, self.matches = "", {}
        scores = dict(self._by_hand)
        if self._policy.strategy == "recency" or len(query) == 0:
            return scores
        own = histories[-1]
        tail_from = own.stop_block if self.focus is None else min(self.focus.tail_from, own.stop_block)
        try:
            question = self._search.read(query)
            hits = self._search.hits(question, tail_from)
            self.matches = fused_hits(hits, self.config.candidates)
            if self._lens is not None:
                self.matches = self._lens.matches(
                    question,
                    self.memory.readers(),
                    histories,
                    self._search.spaces(),
                    hits,
                    self.matches,
                    tail_from,
                    self.focus,
                )
            self.matches |= leads(self.matches, self.config.lead_share, self.config.max_blocks, self._document_from)
        except MegaContextError as error:
            self.warning = f"search failed ({error}); the newest tokens are shown instead"
            logger.warning("%s", self.warning)
            return scores
        for name, match in self.matches.items():
            # What is asked for by hand is shown whatever a net thinks of it.
            scores[name] = scores[name] + max(0.0, match.score) if name in scores else match.score
        if reason != "question" and self.focus is not None:
            # An answer is still about its question: what that found is never worth less until it ends.
            for name in set(self.focus.found) & self._asked_for.keys():
                scores[name] = max(scores.get(name, 0.0), self._asked_for[name])
        return scores

    def _document_from(self, name: BlockName) -> int:
        """First block of the document that holds a block."""
        block, source = name
        return self.memory.readers()[source].document_at(block).first_block

    # -- by hand ---------------------------------------------------------------------------------------------------

    def expand(self, block: int, source: int = -1) -> None:
        """Show a block from the next refocus on, until others are worth more by far.

        Raises:
            NodeMissingError: there is no such block.
        """
        self._by_hand[self._named(block, source)] = 2.0

    def pin(self, block: int, source: int = -1) -> None:
        """Show a block from the next refocus on, always.

        Raises:
            NodeMissingError: there is no such block.
            BudgetError: pins would take more than half of the budget.
        """
        name = self._named(block, source)
        if name in self._pinned:
            return
        most = int(self.config.budget * PINNED_SHARE) // K
        if len(self._pinned) >= most:
            raise BudgetError(
                f"{most} blocks are pinned, half of a budget of {self.config.budget}; unpin one or raise session.budget"
            )
        self._pinned.append(name)

    def unpin(self, block: int, source: int = -1) -> bool:
        """No longer show a block in any case; False where it was not pinned."""
        name = self._named(block, source)
        self._by_hand.pop(name, None)
        if name not in self._pinned:
            return False
        self._pinned.remove(name)
        return True

    @property
    def found_order(self) -> tuple[BlockName, ...]:
        """Found blocks as the model reads them where they stand before the turn: the last is the nearest to it."""
        return tuple(self._found_order)

    @property
    def pinned(self) -> tuple[BlockName, ...]:
        """Blocks always shown, `(block, source)`."""
        return tuple(self._pinned)

    def _named(self, block: int, source: int) -> BlockName:
        readers = self.memory.readers()
        if not -len(readers) <= source < len(readers):
            raise FocusError(f"there is no context number {source}; the session has {len(readers)}")
        source %= len(readers)
        self.memory.span(block, source)
        return block, source

    def _opening_blocks(self, histories: Sequence[History]) -> list[BlockName]:
        """Blocks of the system prompt, as far as they are full: it is shown whatever else is."""
        if not self.config.system_prompt:
            return []
        if self._opening is None:
            document = self.memory.turns_document()
            if document is None:
                return []
            self._opening = document.first_block
        first, own = self._opening, len(histories) - 1
        stop = min(first + len(self._format.opening) // K, histories[own].stop_block)
        return [(block, own) for block in range(first, stop)]

    @property
    def cache_bytes(self) -> int:
        """What the Working Context takes in the model's KV cache, and its rows."""
        return self._cache.num_bytes

    def events(self) -> list[dict[str, Any]]:
        """This session's focus events that are durable, oldest first: all of them once it is closed."""
        return self._recorder.events()

    def close(self) -> None:
        """Make everything durable and release the contexts."""
        self._search.close()
        try:
            self._recorder.flush()
        finally:
            self.memory.close()


def _session_lens(spec: SessionSpec, lens: Lens | None) -> SessionLens | None:
    """Who scores candidates, if anybody does.

    Raises:
        ModelError: no net there, or one that was trained with other models.
    """
    gistnet, digests = spec.plan.gistnet, spec.plan.digests()
    chosen = packaged_lensnet(digests) if spec.config.lensnet == AUTO_LENSNET else spec.config.lensnet
    if lens is None and chosen:
        folder = base_folder() / Path(chosen).expanduser()
        lens = net = LensNet.load(folder)
        require_models(net, folder, digests, gistnet.key_dim)
    return None if lens is None else SessionLens(lens, gistnet, spec.config.lens_unit)


def _policy(config: SessionConfig) -> RefocusPolicy:
    return RefocusPolicy(
        config.mode,
        config.allocator,
        config.tail_tokens,
        config.max_blocks,
        config.age_tokens,
        config.keep_bonus,
        config.cooldown,
        config.row_price,
        config.exploration,
    )
