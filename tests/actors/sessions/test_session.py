"""A session remembers, keeps its budget, predicts as a full pass would, and goes on where it ended."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.plan import CompactionPlan, plan_models
from actors.session import Session, SessionSpec
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.errors import (
    BudgetError,
    ContextNotFoundError,
    FocusError,
    IncompatibleTreeError,
    NodeMissingError,
    StorageError,
    WriterConflictError,
)
from models.base_lm import BaseLM
from models.focus.picture import picture
from pipelines.session_report import session_numbers, swap_rate
from storage.focus.events import read_focus_events
from storage.store import Store
from storage.tree.verify import verify_context
from tests.actors.helpers import make_text, open_context
from tests.actors.sessions.support import CONFIG, SAMPLING, ask, assert_as_full_pass, document, other_context, said


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
    ("layout", "positional"),
    [("before_turn", "compact"), ("own_turn", "compact"), ("timeline", "compact"), ("timeline", "anchored")],
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
    for layout in ("before_turn", "own_turn", "timeline"):
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
            stop = len(embeds) - session._turn_tokens - len(session._markup)
            assert torch.equal(embeds[stop - K : stop], shown) == (layout != "timeline")
            if layout == "own_turn":
                between = lm.embed(torch.from_numpy(session._format.between_turns)[None].long())[0]
                assert torch.equal(embeds[stop : stop + len(between)], between)
                first = stop - 3 * K
                assert torch.equal(embeds[first - len(between) + 1 : first], between[1:]), "the question's markup"
                markup = session._tokenizer.decode(session._format.between_turns)
                assert said(session).count(markup) == 1, "what is only read is not written"
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
        assert torch.equal(embeds[num_gists + K * len(found) + len(session._markup)], tail_row)
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
        folder, budget, markup = session.memory.folder, session._room, len(session._markup)
    events = session.events()
    assert len(events) == sum(turn.num_refocuses for turn in turns)
    assert [event["number"] for event in events] == list(range(len(events)))
    assert {event["reason"] for event in events} == {"question", "interval"}
    assert sum(event["num_decoded"] for event in events) == sum(turn.num_answer_tokens for turn in turns)
    for event in events:
        assert event["cost"] <= event["budget"] == budget
        assert event["rows_reused"] + event["rows_read"] == event["cost"] + (markup if event["found"] else 0)
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
