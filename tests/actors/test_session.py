"""A session remembers, keeps its budget, predicts as a full pass would, and goes on where it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.lens_service import start_lens_service
from actors.plan import CompactionPlan, plan_models
from actors.session import Session, SessionSpec
from actors.session_actor import SessionActor, turn_metrics
from actors.session_lens import SessionLens
from actors.session_turn import Turn
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.errors import (
    BudgetError,
    ContextNotFoundError,
    FocusError,
    IncompatibleTreeError,
    ModelError,
    NodeMissingError,
    ResourceTimeoutError,
    StorageError,
    WriterConflictError,
)
from cluster.ray_runtime import RaySession
from cluster.session_config import SamplingConfig, SessionConfig
from models.base_lm import BaseLM
from models.focus.picture import picture
from models.lensnet import FEATURES, CandidateSet, LensNetSpec
from models.lensnet.net import untrained_lensnet
from models.positions import Positions
from pipelines.session_report import session_numbers, swap_rate
from storage.contract import DocumentMeta
from storage.focus_events import read_focus_events
from storage.store import Store
from storage.verify import verify_context
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, make_text, open_context
from tests.prometheus import scrape

CONFIG = SessionConfig(
    budget=320, compact_tokens=64, tail_tokens=64, refocus_tokens=16, age_tokens=64, max_blocks=3, row_price=0.0
)
SAMPLING = SamplingConfig(max_new_tokens=40, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two torch threads spin while they wait for each other; on a busy machine that is most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lm(tiny_lm_config: BaseLMConfig) -> BaseLM:
    return BaseLM.load(tiny_lm_config)


@pytest.fixture
def plan(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> CompactionPlan:
    net = GistNetConfig(kind="windowed", lm_layers=2)
    return plan_models(tiny_lm_config, net, StoreConfig(root=tmp_path, context="own"))


@pytest.fixture
def spec(tmp_path: Path, plan: CompactionPlan) -> SessionSpec:
    return SessionSpec(plan, StoreConfig(root=tmp_path, context="own", segment_super_blocks=4), config=CONFIG)


@pytest.fixture
def session(spec: SessionSpec, lm: BaseLM) -> Iterator[Session]:
    with closing(Session(spec, lm)) as opened:
        yield opened


def document(name: str, text: str) -> DocumentMeta:
    return DocumentMeta(name, f"file:///{name}", size_bytes=len(text))


def ask(session: Session, question: str, **sampling: Any) -> Turn:
    *pieces, turn = session.ask(question, replace(SAMPLING, **sampling))
    assert isinstance(turn, Turn)
    assert "".join(str(piece) for piece in pieces) == turn.text
    return turn


def said(session: Session) -> str:
    """All of the session's own context."""
    reader = session.memory.readers()[-1]
    tokens, counts = reader.tokens(0, reader.version.num_blocks)
    ids = [int(t) for row, count in zip(tokens, counts, strict=True) for t in row[:count]]
    tail = reader.tail()
    return session._tokenizer.decode(ids + ([] if tail is None else tail.tokens.tolist()))


def assert_as_full_pass(session: Session) -> None:
    """The next token's logits are those of the Working Context read in one pass."""
    embeds, places, _ = session._rows()
    with torch.inference_mode():
        at = Positions(torch.from_numpy(places)[None])
        expected = session._lm.logits(embeds[None], positions=at, last_only=True)[0, -1]
    assert torch.allclose(session._cache.logits(), expected, atol=1e-3, rtol=0)


def test_what_is_asked_and_answered_is_remembered(session: Session) -> None:
    first = ask(session, "where is the tree?")
    second = ask(session, "and the model?", max_new_tokens=5)
    assert (first.num_answer_tokens, first.ended, second.num_answer_tokens) == (40, "length", 5)
    assert first.num_refocuses == 3
    text = said(session)
    assert text.index("where is the tree?") < text.index("and the model?")
    assert first.text in text
    assert {"write", "search", "focus", "assemble", "read", "decode"} <= set(first.seconds)
    assert 0 < first.first_token_s < sum(first.seconds.values()) + 1


@pytest.mark.parametrize("mode", ["overlay", "strict"])
@pytest.mark.parametrize(
    ("layout", "positional"), [("before_turn", "compact"), ("timeline", "compact"), ("timeline", "anchored")]
)
def test_over_a_long_session_the_model_reads_what_a_full_pass_would(
    spec: SessionSpec, lm: BaseLM, mode: Any, layout: Any, positional: Any
) -> None:
    config = replace(CONFIG, mode=mode, layout=layout, positional=positional, budget=420)
    with closing(Session(replace(spec, config=config), lm)) as session:
        reused = 0
        for number in range(6):
            if number in {0, 3}:
                text = make_text(number, 400)
                assert session.read(document(f"d{number}", text), text)
            session.refocus(make_text(number, 4))
            assert_as_full_pass(session)
            turn = ask(session, make_text(number, 6), seed=number)
            reused += turn.rows_reused
            assert session._cache.num_rows <= config.budget
            assert session.focus is not None
            assert session.focus.wc.total_cost <= config.budget - config.refocus_tokens
        assert reused > 0
        folder, name = session.memory.folder, session.memory.name
    assert verify_context(folder, name).problems == []


def test_found_blocks_stand_before_the_turn_and_leave_what_is_before_them(spec: SessionSpec, lm: BaseLM) -> None:
    config = replace(CONFIG, budget=600, compact_tokens=32)
    read = {}
    for layout in ("before_turn", "timeline"):
        store = replace(spec.store, context=layout)
        laid_out = replace(spec, store=store, config=replace(config, layout=layout))
        with closing(Session(laid_out, lm)) as session:
            text = make_text(7, 700)
            session.read(document("d", text), text)
            ask(session, text[50:110], max_new_tokens=8)
            read[layout] = ask(session, text[2000:2060], max_new_tokens=8).rows_read
            assert session.focus is not None
            assert len(session.focus.found) == 3
            embeds, _, _ = session._rows()
            best = max(session.focus.found, key=lambda name: session.matches[name].score)
            neighbours = [best]
            while (neighbours[-1][0] + 1, best[1]) in session.focus.found:
                neighbours.append((neighbours[-1][0] + 1, best[1]))
            block, source = neighbours[-1]
            tokens = session.memory.readers()[source].tokens(block, 1)[0][0].astype(np.int64)
            shown = lm.embed(torch.from_numpy(tokens)[None])[0]
            stop = len(embeds) - session._turn_tokens
            assert torch.equal(embeds[stop - K : stop], shown) == (layout == "before_turn")
    assert read["before_turn"] < 0.7 * read["timeline"]


def test_a_question_longer_than_the_tail_is_read_behind_what_was_found(spec: SessionSpec, lm: BaseLM) -> None:
    with closing(Session(spec, lm)) as session:
        text = make_text(8, 400)
        session.read(document("d", text), text)
        ask(session, make_text(9, 200) + text[600:660], max_new_tokens=4)
        focus, assembled = session.focus, session._assembled
        assert focus is not None
        assert assembled is not None
        assert focus.found
        embeds, _, _ = session._rows()
        num_gists = int(focus.wc.cost[focus.wc.lod > 0].sum())
        found = {(0, block, source) for block, source in focus.found}
        first = next(i for i, node in enumerate(focus.wc.nodes()) if tuple(node) not in found and node.lod == 0)
        tail_row = assembled.embeds[assembled.row_of_entry[first]]
        # Gists, then what was found, then the tail, in which no gist stands.
        assert torch.equal(embeds[num_gists + K * len(found)], tail_row)
        assert_as_full_pass_after_refocus(session)


def test_a_session_goes_on_where_it_ended(spec: SessionSpec, lm: BaseLM) -> None:
    with closing(Session(spec, lm)) as session:
        ask(session, "where is the tree?")
        before = said(session)
    with closing(Session(spec, lm)) as session:
        assert said(session) == before
        ask(session, "go on")
        assert said(session).startswith(before)
        documents = session.memory.readers()[-1].documents()
        assert len(documents) == 1
        assert documents[0].meta.uri == "session:own/1"


def test_an_answer_nobody_waits_for_stays(session: Session) -> None:
    stream = session.ask("where is the tree?", SAMPLING)
    heard = "".join(str(next(stream)) for _ in range(3))
    stream.close()
    assert heard in said(session)
    ask(session, "go on")
    assert_as_full_pass_after_refocus(session)


def assert_as_full_pass_after_refocus(session: Session) -> None:
    session.refocus("tree")
    assert_as_full_pass(session)


def test_one_seed_is_one_answer(spec: SessionSpec, lm: BaseLM, tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        store = replace(spec.store, root=tmp_path / name)
        with closing(Session(replace(spec, store=store), lm)) as session:
            texts.append(ask(session, "where?", seed=5).text)
    assert texts[0] == texts[1]


def test_a_stop_string_ends_an_answer_and_is_not_said(spec: SessionSpec, lm: BaseLM, tmp_path: Path) -> None:
    with closing(Session(spec, lm)) as session:
        whole = ask(session, "where?", seed=3).text
    stop = next(letter for letter in whole[3:] if letter.isascii() and letter.isalpha())
    store = replace(spec.store, root=tmp_path / "stopped")
    with closing(Session(replace(spec, store=store), lm)) as session:
        turn = ask(session, "where?", seed=3, stop_strings=[stop])
    assert (turn.text, turn.ended) == (whole[: whole.index(stop)], "stop")


def other_context(root: Path, plan: CompactionPlan, texts: Sequence[int], name: str = "other") -> None:
    writer = open_context(root, plan, name)
    ingest(writer, plan, make_compactor(plan), make_documents(texts))
    follow(writer, plan)
    writer.close()


def test_other_contexts_are_read_and_not_written(
    tmp_path: Path, spec: SessionSpec, plan: CompactionPlan, lm: BaseLM
) -> None:
    other_context(tmp_path, plan, [600, 300])
    with Store(tmp_path).open_reader("other") as reader:
        before = reader.version
        wanted = reader.tokens(11, 1)[0][0]
    with closing(Session(replace(spec, reads=("other",)), lm)) as session:
        # Whole words of the block, so that its rare ones are found.
        question = plan.tokenizer.decode(wanted.astype(np.int64))
        focus = session.refocus(question)
        assert (11, 0) in focus.found
        assert session.matches[(11, 0)].lexical_rank == 1
        ask(session, question)
        assert session.memory.span(11, 0).context == "other"
        assert picture(session.focus.wc).count("|") == 1  # type: ignore[union-attr]
    with Store(tmp_path).open_reader("other") as reader:
        assert reader.version == before


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
        assert sum(len(candidates) for candidates in lens.seen) == len(session.matches)
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


def test_where_search_fails_the_newest_tokens_are_shown(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = make_text(1, 500)
    session.read(document("d", text), text)
    assert session.refocus(text[:60]).found

    def fail(*_: object) -> None:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(session._search, "hits", fail)
    turn = ask(session, text[:60])
    assert turn.num_answer_tokens == 40
    assert "the disk is gone" in session.warning
    assert "newest tokens are shown" in caplog.text
    assert "the disk is gone" in session.events()[-1]["warning"]


def test_every_refocus_leaves_an_event(spec: SessionSpec, lm: BaseLM) -> None:
    with closing(Session(spec, lm)) as session:
        text = make_text(2, 500)
        session.read(document("d", text), text)
        turns = [ask(session, text[30:90]), ask(session, text[400:480])]
        folder, budget = session.memory.folder, session.config.budget - session.config.refocus_tokens
    events = session.events()
    assert len(events) == sum(turn.num_refocuses for turn in turns)
    assert [event["number"] for event in events] == list(range(len(events)))
    assert {event["reason"] for event in events} == {"question", "interval"}
    assert sum(event["num_decoded"] for event in events) == sum(turn.num_answer_tokens for turn in turns)
    for event in events:
        assert event["cost"] <= event["budget"] == budget
        assert event["rows_reused"] + event["rows_read"] == event["cost"]
        raw = {entry["index"] for entry in event["entries"] if entry["lod"] == 0}
        assert {block["block"] for block in event["found"]} <= raw
        assert event["nll_decoded"] is None or 0 < event["nll_decoded"] < 20
        assert dict(event["seconds"])["read"] > 0
    assert read_focus_events(folder).num_rows == len(events)


def test_an_answer_says_how_much_it_swapped(spec: SessionSpec, lm: BaseLM) -> None:
    """The same that the events tell, which the report of `chat` is made of."""
    with closing(Session(spec, lm)) as session:
        texts = [make_text(seed, 500) for seed in (2, 3)]
        for number, text in enumerate(texts):
            session.read(document(str(number), text), text)
        turns = [ask(session, text[at : at + 60]) for at in (30, 300) for text in texts]
    events = session.events()
    assert any(turn.swap_rate > 0 for turn in turns)
    assert any(turn.residency is not None for turn in turns)
    first = 0
    for turn in turns:
        own = events[first : first + turn.num_refocuses]
        first += turn.num_refocuses
        assert turn.swap_rate == pytest.approx(np.mean([swap_rate(e) if e["number"] else 0.0 for e in own]))
    numbers = session_numbers(turns, events)
    stayed = [turn.residency for turn in turns if turn.residency is not None]
    assert min(stayed) <= numbers["residency"] <= max(stayed)


def test_events_can_be_left_out(spec: SessionSpec, lm: BaseLM) -> None:
    with closing(Session(replace(spec, config=replace(CONFIG, record_events=False)), lm)) as session:
        ask(session, "where?")
    assert session.events() == []


def test_pinned_and_expanded_blocks_are_shown(session: Session) -> None:
    text = make_text(3, 600)
    session.read(document("d", text), text)
    session.pin(2)
    session.expand(5)
    focus = session.refocus("nothing of the kind")
    assert {2, 5} <= set(focus.wc.raw_blocks().tolist())
    assert session.pinned == ((2, 0),)
    assert session.unpin(2)
    assert not session.unpin(2)
    with pytest.raises(NodeMissingError):
        session.pin(10_000)
    with pytest.raises(FocusError, match="no context number 3"):
        session.pin(1, 3)
    for block in range(CONFIG.budget // 2 // K):
        session.pin(block)
    with pytest.raises(BudgetError, match="5 blocks are pinned"):
        session.pin(9)


def test_a_system_prompt_is_always_shown(spec: SessionSpec, lm: BaseLM) -> None:
    """Also after a restart, behind other documents, and of the turns that begin anew."""
    prompt = "Answer as the keeper of the tree would, in few words. " * 2
    spec = replace(spec, config=replace(CONFIG, system_prompt=prompt))

    def shown(session: Session) -> str:
        assert session.focus is not None
        return "".join(session.memory.text(block, source) for block, source in session.focus.pinned)

    with closing(Session(spec, lm)) as session:
        text = make_text(3, 300)
        session.read(document("first", text), text)
        ask(session, "where?")
        ask(session, "and what?")
        assert shown(session) == prompt[: len(prompt) // K * K]
    with closing(Session(spec, lm)) as session:
        ask(session, "where?")
        assert shown(session) == prompt[: len(prompt) // K * K]
        text = make_text(4, 900)
        session.read(document("d", text), text)
        before = session.focus
        ask(session, "where?")
        ask(session, "and what?")
        assert before is not None
        assert session.focus is not None
        assert session.focus.pinned[0] > before.pinned[0]
        assert shown(session) == prompt[: len(prompt) // K * K]
        assert said(session).count(prompt) == 2


def test_a_document_is_read_once(session: Session) -> None:
    text = make_text(5, 50)
    assert session.read(document("d", text), text)
    assert not session.read(document("d", text), text)
    with pytest.raises(StorageError, match="holds no text"):
        session.read(document("empty", ""), "")


def test_a_document_whose_reading_was_interrupted_goes_on(
    spec: SessionSpec, lm: BaseLM, caplog: pytest.LogCaptureFixture
) -> None:
    text = make_text(6, 300)
    for goes_on in (True, False):
        name = f"d{goes_on}"
        with closing(Session(spec, lm)) as session:
            if session.memory._stream is not None:
                session.memory._stream.finish()
            session.memory._open(document(name, text)).push(session._tokenizer.encode(text)[:900])
        with closing(Session(spec, lm)) as session:
            if not goes_on:
                ask(session, "where?")
            assert session.read(document(name, text), text)
            found = [d.state for d in session.memory.readers()[-1].documents() if d.meta.key == name]
            assert found == (["complete"] if goes_on else ["cut", "complete"])
            assert said(session).count(text) == 1 + (not goes_on)
    assert caplog.text.count("does not go on now") == 1


def test_what_cannot_be_opened_is_refused_and_nothing_is_kept(
    tmp_path: Path, spec: SessionSpec, plan: CompactionPlan, lm: BaseLM, tiny_lm_config: BaseLMConfig
) -> None:
    with pytest.raises(ContextNotFoundError, match="nowhere"):
        Session(replace(spec, reads=("nowhere",)), lm)
    other = plan_models(tiny_lm_config, GistNetConfig(kind="mean"), StoreConfig(root=tmp_path / "x", context="x"))
    open_context(tmp_path, other, "other").close()
    with pytest.raises(IncompatibleTreeError, match="other"):
        Session(replace(spec, reads=("other",)), lm)
    with closing(Session(spec, lm)), pytest.raises(WriterConflictError):
        Session(spec, lm)
    with closing(Session(spec, lm)) as session:
        assert session.memory.num_tokens == 0


def test_a_budget_that_cannot_hold_the_contexts_is_refused(
    tmp_path: Path, spec: SessionSpec, plan: CompactionPlan, lm: BaseLM
) -> None:
    for name in ("other", "another"):
        other_context(tmp_path, plan, [2200], name)  # 14 nodes of LOD2 and 22 blocks behind them
    small = replace(spec, reads=("other", "another"), config=replace(CONFIG, budget=176))
    with pytest.raises(BudgetError, match=r"Set session\.budget"):
        Session(small, lm)


def test_the_actor_streams_its_answers(spec: SessionSpec, ray_cluster: RaySession) -> None:
    del ray_cluster
    actor: Any = ray.remote(SessionActor).options(num_cpus=0.1).remote(spec)
    assert ray.get(actor.ready.remote()) == 0
    stream = actor.ask.options(num_returns="streaming").remote("where is the tree?", SAMPLING)
    *pieces, turn = [ray.get(piece) for piece in stream]
    assert isinstance(turn, Turn)
    assert "".join(str(piece) for piece in pieces) == turn.text
    assert ray.get(actor.read.remote(document("d", "text"), "some text"))
    ray.get(actor.close.remote())
    ray.kill(actor)


@pytest.mark.slow
def test_the_actor_asks_a_service_and_publishes_its_numbers(
    spec: SessionSpec, tmp_path: Path, ray_cluster: RaySession
) -> None:
    del ray_cluster
    untrained_lensnet(LensNetSpec(key_dim=spec.plan.gistnet.key_dim)).save(tmp_path / "net")
    service = start_lens_service(tmp_path / "net", num_cpus=0.1)
    actor: Any = ray.remote(SessionActor).options(num_cpus=0.1).remote(spec, lens_service=service)
    text = make_text(1, 500)
    ray.get(actor.read.remote(document("d", text), text))
    *_, turn = [ray.get(piece) for piece in actor.ask.options(num_returns="streaming").remote(text[:60], SAMPLING)]
    assert isinstance(turn, Turn)
    stats: Any = ray.get(service.stats.remote())
    assert stats["num_requests"] >= turn.num_refocuses
    present, added = turn_metrics(turn, 0)
    wanted = {f"ray_{name}" for name in {**present, **added}}
    assert {"ray_swap_rate", "ray_first_token_seconds", "ray_turn_seconds_decode"} <= wanted
    found = scrape(wanted, timeout_s=40)
    assert found.keys() == wanted
    assert float(found["ray_answer_tokens_total"].rpartition(" ")[2]) == turn.num_answer_tokens == 40
    assert all('job="session"' in line and 'run="own"' in line for line in found.values())
    ray.get(actor.close.remote())
    ray.kill(actor)
    ray.kill(service)
