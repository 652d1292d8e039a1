"""A LensNet over what a session found, in all its contexts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from actors.plan import CompactionPlan
from actors.session import Session, SessionSpec
from actors.session_lens import SessionLens
from cluster.errors import (
    ModelError,
    ResourceTimeoutError,
)
from models.base_lm import BaseLM
from models.lensnet import FEATURES, CandidateSet, LensNetSpec
from models.lensnet.net import untrained_lensnet
from storage.store import Store
from tests.actors.helpers import make_text
from tests.actors.sessions.support import CONFIG, ask, document, other_context


@dataclass
class ByWords:
    """A lens that believes in words alone: the block they find first is worth 0.1 nats, others cost something."""

    seen: list[CandidateSet] = field(default_factory=list)

    def scores(self, candidates: CandidateSet) -> np.ndarray:
        self.seen.append(candidates)
        return 0.12 * candidates.column("lexical_rank") - 0.02


def test_a_lens_scores_the_candidates_of_all_contexts(
    tmp_path: Path, spec: SessionSpec, plan: CompactionPlan, lm: BaseLM
) -> None:
    other_context(tmp_path, plan, [600, 300])
    with Store(tmp_path).open_reader("other") as reader:
        wanted = plan.tokenizer.decode(reader.tokens(11, 1)[0][0].astype(np.int64))
    lens = ByWords()
    with closing(Session(replace(spec, reads=("other",)), lm, lens)) as session:
        text = make_text(5, 500)
        session.read(document("d", text), text)
        focus = session.refocus(wanted)
        assert focus.found[0] == (11, 0)
        match = session.matches[(11, 0)]
        assert match.nats == pytest.approx(0.1)
        assert match.score == pytest.approx(2.0), "0.05 nats are a score of 1"
        assert match.why.startswith("words #1")
        assert match.why.endswith("LensNet +0.100 nats")
        worthless = [name for name, of in session.matches.items() if of.score < 0]
        assert worthless
        assert not set(worthless) & set(focus.found)
        # Keys of untrained nets are compared in another space in every context: a set for each.
        scored = [of for of in session.matches.values() if of.nats is not None]
        assert sum(len(candidates) for candidates in lens.seen) == len(scored)
        assert {of.leads_to is None for of in session.matches.values() if of.nats is None} == {False}
        assert {source for _, source in session.matches} == {0, 1}
        lens.seen.clear()

        session.refocus(wanted)
        other = lens.seen[0]
        shown = other.column("is_shown").astype(bool)
        assert 11 in other.blocks[shown]
        assert other.column("shown_before")[shown].min() == pytest.approx(np.log2(2) / 8)
        assert ask(session, wanted).num_answer_tokens == 40
        assert not session.warning


def test_candidates_whose_keys_compare_are_one_set(plan: CompactionPlan) -> None:
    def candidates(*blocks: int, query: float) -> CandidateSet:
        features = np.zeros((len(blocks), len(FEATURES)), np.float32)
        features[:, list(FEATURES).index("lexical_rank")] = blocks
        return CandidateSet(np.array(blocks), features, np.ones((len(blocks), 4), np.float32), np.full(4, query))

    lens = ByWords()
    scores = SessionLens(lens, plan.gistnet, 1.0)._scores([candidates(1, 2, query=0.5), candidates(3, query=0.5)])
    assert scores.tolist() == pytest.approx([0.10, 0.22, 0.34])
    (one,) = lens.seen
    assert one.blocks.tolist() == [1, 2, 3]
    lens.seen.clear()
    apart = SessionLens(lens, plan.gistnet, 1.0)._scores([candidates(1, 2, query=0.5), candidates(3, query=0.4)])
    assert apart.tolist() == pytest.approx(scores.tolist())
    assert [of.blocks.tolist() for of in lens.seen] == [[1, 2], [3]]


def test_a_net_that_expects_nothing_shows_the_newest_tokens(spec: SessionSpec, lm: BaseLM, tmp_path: Path) -> None:
    net = untrained_lensnet(LensNetSpec(key_dim=spec.plan.gistnet.key_dim))
    net.save(tmp_path / "net")
    text = make_text(1, 500)
    configured = replace(spec, config=replace(CONFIG, lensnet=str(tmp_path / "net")))
    with closing(Session(configured, lm)) as session:
        session.read(document("d", text), text)
        assert session.refocus(text[:60]).found == ()
        assert session.matches
        assert not session.warning


def test_a_lens_that_does_not_fit_is_refused_at_once(spec: SessionSpec, lm: BaseLM, tmp_path: Path) -> None:
    untrained_lensnet(LensNetSpec(key_dim=3)).save(tmp_path / "net")
    with pytest.raises(ModelError, match="keys of 3 dimensions"):
        Session(replace(spec, config=replace(CONFIG, lensnet=str(tmp_path / "net"))), lm)
    strange = untrained_lensnet(LensNetSpec())
    strange.trained_with = {"base_lm": "0" * 64}
    strange.save(tmp_path / "strange")
    with pytest.raises(ModelError, match="trained with another base_lm"):
        Session(replace(spec, config=replace(CONFIG, lensnet=str(tmp_path / "strange"))), lm)
    with pytest.raises(ModelError, match="no LensNet"):
        Session(replace(spec, config=replace(CONFIG, lensnet=str(tmp_path / "nowhere"))), lm)
    assert not (tmp_path / "own").exists(), "and no context is made"


def test_where_a_lens_fails_the_newest_tokens_are_shown(spec: SessionSpec, lm: BaseLM) -> None:
    class Gone:
        def scores(self, candidates: CandidateSet) -> np.ndarray:
            raise ResourceTimeoutError("the service is gone")

    with closing(Session(spec, lm, Gone())) as session:
        text = make_text(1, 500)
        session.read(document("d", text), text)
        assert session.refocus(text[:60]).found == ()
        assert "the service is gone" in session.warning


def test_within_an_answer_blocks_that_stay_keep_their_order(spec: SessionSpec, lm: BaseLM) -> None:
    with closing(Session(spec, lm)) as session:
        text = make_text(5, 500)
        session.read(document("d", text), text)
        session.refocus(text[:60])
        before = session.found_order
        assert len(before) == 3
        assert session.focus is not None
        other = next((block, 0) for block in range(10) if (block, 0) not in before)
        session.focus = replace(session.focus, found=(*before[1:], other))
        session._order_found({other: 9.0, before[1]: 1.0}, "interval")
        assert session.found_order == (other, *before[1:])
        session._order_found({other: 9.0, before[1]: 1.0}, "question")
        assert session.found_order[-1] == other


def test_what_a_question_found_is_worth_no_less_within_its_answer(spec: SessionSpec, lm: BaseLM) -> None:
    class OnceByWords(ByWords):
        def scores(self, candidates: CandidateSet) -> np.ndarray:
            first = not self.seen
            found = super().scores(candidates)
            return found if first else np.full(len(found), -1.0, np.float32)

    with closing(Session(spec, lm, OnceByWords())) as session:
        text = make_text(5, 500)
        session.read(document("d", text), text)
        session.refocus(text[:60])
        found = session.found_order
        assert found
        asked = session._asked_for
        assert min(asked.values()) > 0
        histories = session.memory.histories()
        query = session._tokenizer.encode(text[:60]).astype(np.int64)
        within = session._scores(query, histories, "interval")
        assert {name: within[name] for name in found} == asked
        others = set(within) - set(found)
        assert others
        assert {within[name] for name in others} == {-20.0}
        assert session._scores(query, histories, "question")[found[-1]] == -20.0, "another question is another matter"
