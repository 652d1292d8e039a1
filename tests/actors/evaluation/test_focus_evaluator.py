"""All rivals at one place with the tiny model: equal slots, agreement where contents agree, the needle found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.focus_evaluator import FocusEvaluator, FocusEvaluatorSpec, Measured
from actors.evaluation.focus_search import Room
from actors.evaluation.names import SharedNames
from actors.evaluation.places import Place
from actors.evaluation.rivals import CHOOSERS, FORMS, LENSNET, MEASURING, MINILM, RAW_FORMS, RETRIEVERS, bare_rows
from actors.packing import windows_of
from actors.plan import plan_models
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.evaluation_config import FocusEvaluationConfig, RetrievalConfig
from models.base_lm import BaseLM
from models.focus.history import History
from models.focus.layout import Policy
from models.sentence_encoder import SentenceEncoder
from storage.contract import DocumentMeta
from storage.lexical.search import LexicalSearcher
from tests.actors.evaluation.support import NEEDLE, StoredText, plain_nll, stored, text_with_needle
from tests.actors.helpers import make_compactor, make_text, open_context

RIVALS = [chooser for chooser in CHOOSERS if chooser not in {MINILM, LENSNET}]
"""All that need no packaged or trained model."""
CONFIG = FocusEvaluationConfig(
    history_tokens=30 * K,
    horizon_tokens=31,
    budgets=[8 * K, 12 * K],
    rivals=["none", "full", *RIVALS],
    forms=list(FORMS),
    tail_tokens=2 * K,
    max_blocks=3,
    oracle_blocks=4,
    retrieval=RetrievalConfig(bm25_query_tokens=40, dense_query_tokens=16, fusion=["bm25", "dense"]),
    shortlist_blocks=16,
    oracle_readings=6,
)
MEASURED_SHOWN_FROM = {8 * K: 35 - (8 - 4 - 1), 12 * K: 35 - (12 - 4 - 1)}
"""Where the tail begins beside four blocks and 32 gists of 32 blocks."""
NEEDLE_BLOCK = 12
PLACE = Place(0, "doc1.txt", 3, 35)
"""Blocks 0-2 are a document of 2½ blocks."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[StoredText]:
    """Document 1 holds the needle, asks for it at the end of the history, and repeats it as the horizon."""
    text = text_with_needle(32, NEEDLE_BLOCK - 3, end=" and of the quokka, of zanzibar: ")
    after = text_with_needle(8, 7, seed=4)
    with stored(tiny_lm_config, tmp_path_factory.mktemp("tree"), ["y" * 80, f"{text}{NEEDLE} {after}"]) as tree:
        yield tree


def evaluator(lm: BaseLM, tree: StoredText, config: FocusEvaluationConfig = CONFIG) -> FocusEvaluator:
    spec = FocusEvaluatorSpec(tree.plan.base_lm, tree.store, tree.reader.version.seq, config)
    return FocusEvaluator(spec, lm, tree.gistnet, tree.reader, tree.lexical)


def reading_at(lm: BaseLM, tree: StoredText, place: Place = PLACE) -> Reading:
    return Reading(lm, tree.reader, History.of(tree.reader, place.first_block, place.stop_block))


@pytest.fixture(scope="module")
def found(lm: BaseLM, tree: StoredText) -> dict[tuple[str, int], Measured]:
    return {(m.condition, m.budget): m for m in evaluator(lm, tree).evaluate(PLACE)}


def numbers(measured: list[Measured]) -> list[Measured]:
    return [replace(m, decide_s=0.0, read_s=0.0) for m in measured]


def halves(nll: np.ndarray) -> tuple[float, float]:
    return float(np.mean([nll[i] for i in range(0, len(nll), 2)])), float(np.mean(nll[[*range(1, len(nll), 2)]]))


def test_every_condition_is_measured_once_a_budget(found: dict[tuple[str, int], Measured]) -> None:
    expected = {("none", 0), ("full", 0)}
    for budget in CONFIG.budgets:
        expected |= {(f"{chooser}/{form}", budget) for chooser in RIVALS for form in FORMS}
        expected -= {(f"uniform/{form}", budget) for form in RAW_FORMS}
    assert set(found) == expected


def test_slots_are_equal_and_picks_few(lm: BaseLM, tree: StoredText, found: dict[tuple[str, int], Measured]) -> None:
    reading = reading_at(lm, tree)
    shown_from = {budget: Room.of(budget, reading, CONFIG).shown_from for budget in CONFIG.budgets}
    # 32 gists stand for 32 blocks; three blocks, and what is left is tail.
    assert shown_from == {8 * K: 35 - (8 - 3 - 1), 12 * K: 35 - (12 - 3 - 1)}
    measuring = {budget: Room.of(budget, reading, CONFIG, measuring=True).shown_from for budget in CONFIG.budgets}
    assert measuring == MEASURED_SHOWN_FROM
    for (condition, budget), m in found.items():
        assert np.isfinite([m.nll_choosing, m.nll_scoring]).all()
        if condition in {"none", "full"}:
            assert (m.slots, m.picked) == (0 if condition == "none" else 32 * K, [])
            continue
        chooser, form = condition.split("/")
        assert m.slots == budget if form == "raw" else m.slots <= budget
        assert len(m.picked) <= (CONFIG.oracle_blocks if chooser in MEASURING else CONFIG.max_blocks)
        before = (MEASURED_SHOWN_FROM if chooser in MEASURING else shown_from)[budget]
        assert all(PLACE.first_block <= block < before for block in m.picked)
        if chooser in {"recency", "uniform"}:
            assert m.picked == []
        elif chooser in {"random", "dense", "fusion", "rerank"} and form != "strict":
            assert len(m.picked) == CONFIG.max_blocks
        assert bool(m.steps) == (chooser in {"oracle", "exhaustive"} and form == "raw")
        if m.steps:
            assert m.steps[0][0] == 0 <= m.steps[-1][0] <= CONFIG.oracle_readings
            assert m.steps[-1][1:] == (len(m.picked), m.nll_choosing, m.nll_scoring)


def test_full_and_none_are_plain_passes(lm: BaseLM, tree: StoredText, found: dict[tuple[str, int], Measured]) -> None:
    reading = reading_at(lm, tree)
    ids = reading.ids(PLACE.stop_block, 1)[:31]
    for name, rows in (("full", reading.raw(range(3, 35))), ("none", reading.nothing())):
        measured = found[name, 0]
        expected = halves(plain_nll(lm, rows, ids, 32 * K))
        assert (measured.nll_choosing, measured.nll_scoring) == pytest.approx(expected, abs=1e-4)
        assert measured.nll == pytest.approx(np.mean(expected), abs=1e-4)


def test_bm25_shows_the_needle_and_recency_does_not(found: dict[tuple[str, int], Measured]) -> None:
    for budget in CONFIG.budgets:
        for form in FORMS:
            assert found[f"bm25/{form}", budget].picked[0] == NEEDLE_BLOCK
            assert NEEDLE_BLOCK not in found[f"recency/{form}", budget].picked


def test_on_the_half_it_chooses_on_no_rival_is_better_than_the_oracle(found: dict[tuple[str, int], Measured]) -> None:
    """In raw tokens, which it reads exactly. Nor is the oracle better than the one that measures every block."""
    for budget in CONFIG.budgets:
        oracle, exhaustive = found["oracle/raw", budget], found["exhaustive/raw", budget]
        for chooser in RIVALS:
            if chooser not in {"uniform", "exhaustive"}:
                assert oracle.nll_choosing <= found[f"{chooser}/raw", budget].nll_choosing + 1e-6, chooser
        assert oracle.picked
        assert oracle.nll_choosing < found["recency/raw", budget].nll_choosing
        assert exhaustive.nll_choosing <= oracle.nll_choosing + 1e-6


def test_exhaustive_says_what_every_block_is_worth_and_nobody_else_does(
    found: dict[tuple[str, int], Measured],
) -> None:
    for (condition, budget), m in found.items():
        if not condition.startswith("exhaustive"):
            assert m.single_gains == []
            continue
        assert [block for block, _, _ in m.single_gains] == list(range(3, MEASURED_SHOWN_FROM[budget]))
        on_choosing = {block: gain for block, gain, _ in m.single_gains}
        best = found[f"oracle_greedy/{condition.partition('/')[2]}", budget].picked
        assert best == sorted(best, key=lambda block: -on_choosing[block])


def test_what_was_picked_is_counted_by_document_and_by_name(
    lm: BaseLM, tree: StoredText, found: dict[tuple[str, int], Measured]
) -> None:
    reading = reading_at(lm, tree)
    ids = reading.ids(PLACE.stop_block, 1)[:31]
    names = SharedNames(tree.reader, tree.plan.tokenizer, reading.history, ids)
    assert names.names == {"whistles"}, "the others are asked for, too, in blocks of their own"
    shown_from = {0: 35, **{budget: Room.of(budget, reading, CONFIG).shown_from for budget in CONFIG.budgets}}
    for (condition, budget), m in found.items():
        before = MEASURED_SHOWN_FROM if condition.partition("/")[0] in MEASURING else shown_from
        # The history is of one document, and one of its blocks holds the name.
        assert (m.share_same_document, m.num_same_document) == (1, len(m.picked))
        assert m.share_shared_names == pytest.approx(1 / (before[budget] - 3), abs=1e-5)
        assert m.num_shared_names == (NEEDLE_BLOCK in m.picked)
    assert found["bm25/raw", 8 * K].num_shared_names == 1


def test_constant_gists_are_line_breaks(lm: BaseLM, tree: StoredText, found: dict[tuple[str, int], Measured]) -> None:
    """What stands in the gists' places is what the tokenizer makes of a line break, and raw rows are the overlay's."""
    reading = reading_at(lm, tree)
    gists, tail = bare_rows(reading, 8 * K, 7 * K)
    # A gist of a block that is raw itself would say nothing.
    assert (gists.num_rows, tail.num_rows) == (32 - 7, 7 * K)
    same = lm.embed(torch.tensor([[10]]))[0].expand(gists.num_rows, -1)
    ids = reading.ids(PLACE.stop_block, 1)[:31]
    for form, rows in (("constant", Contents(same, gists.half_tokens)), ("overlay", gists)):
        nll = plain_nll(lm, Contents.joined([rows, tail]), ids, 32 * K)
        measured = found[f"recency/{form}", 8 * K]
        assert (measured.nll_choosing, measured.nll_scoring) == pytest.approx(halves(nll), abs=1e-4)
    constant, overlay = (found[f"recency/{form}", 8 * K] for form in ("constant", "overlay"))
    assert constant.nll != overlay.nll


def measured_by_name(lm: BaseLM, tree: StoredText, **config: Any) -> dict[str, Measured]:
    fields = {"budgets": [8 * K], "forms": ["raw"], **config}
    measured = numbers(evaluator(lm, tree, replace(CONFIG, **fields)).evaluate(PLACE))
    return {m.condition: m for m in measured}


def test_policies_of_the_evaluation_of_a_rival_and_by_length(
    lm: BaseLM, tree: StoredText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(policy: Policy | Literal["auto"]) -> dict[str, Measured]:
        return measured_by_name(lm, tree, positional=policy, rivals=["recency/overlay", "bm25/raw", "oracle/overlay"])

    everywhere = {policy: at(policy) for policy in ("global", "compact")}
    assert everywhere["global"]["recency/overlay"].nll != everywhere["compact"]["recency/overlay"].nll
    named = ["recency/overlay", "recency/overlay@global", "recency/overlay@compact", "bm25/raw@compact"]
    for policy in ("global", "compact"):
        for name, m in measured_by_name(lm, tree, positional=policy, rivals=named).items():
            rival, _, own = name.partition("@")
            assert replace(m, condition=rival) == everywhere[own or policy][rival]
    # 1,024 tokens and 31 of the horizon.
    for trained, policy in ((1055, "global"), (1054, "compact")):
        monkeypatch.setattr(lm, "trained_context", trained)
        assert at("auto") == everywhere[policy]


def test_how_the_rivals_are_asked_is_configured(lm: BaseLM, tree: StoredText) -> None:
    """A query too short for the needle's name; fusion of one is that one."""
    rivals = ["bm25", "dense", "fusion", "rerank"]
    usual = measured_by_name(lm, tree, rivals=rivals)
    assert usual["bm25/raw"].picked == [NEEDLE_BLOCK]
    retrieval = RetrievalConfig(
        bm25_query_tokens=2, dense_query_tokens=200, rerank_query_tokens=2, fusion=["dense"], fusion_constant=0
    )
    other = measured_by_name(lm, tree, rivals=rivals, retrieval=retrieval)
    assert other["bm25/raw"].picked == []
    assert other["fusion/raw"].picked == other["dense/raw"].picked != usual["dense/raw"].picked
    assert other["rerank/raw"].picked != usual["rerank/raw"].picked


@pytest.mark.real_model
def test_sentence_embeddings_find_the_needle_too(lm: BaseLM, tree: StoredText) -> None:
    """Alone, in a fusion, and in the shortlist of those that measure."""
    retrieval = RetrievalConfig(minilm_query_tokens=33, fusion=["minilm"])
    found = measured_by_name(lm, tree, rivals=["minilm", "minilm/overlay", "fusion", "oracle"], retrieval=retrieval)
    for name in ("minilm/raw", "minilm/overlay", "fusion/raw"):
        assert found[name].picked[0] == NEEDLE_BLOCK
    reading = reading_at(lm, tree)
    texts = [tree.plan.tokenizer.decode(reading.ids(block, 1)) for block in range(3, 31)]
    encoder = SentenceEncoder.load()
    query = encoder.encode([tree.plan.tokenizer.decode(reading.ids(33, 2)[-33:])])[0]
    expected = 3 + np.argsort(-(encoder.encode(texts) @ query))[:3]
    assert found["minilm/raw"].picked == found["fusion/raw"].picked == expected.tolist()
    assert found["oracle/raw"].picked
    # Without such a rival nothing is encoded, and a fusion of it alone is enough to need it.
    assert evaluator(lm, tree)._embeddings is None
    assert evaluator(lm, tree, replace(CONFIG, retrieval=retrieval))._embeddings is not None


def test_the_same_place_gives_the_same_numbers(lm: BaseLM, tree: StoredText) -> None:
    config = replace(
        CONFIG, budgets=[8 * K, 8 * K], rivals=["none", "recency", "random", "oracle", "random"], forms=["raw"]
    )
    first, second = evaluator(lm, tree, config), evaluator(lm, tree, config)
    once = numbers(first.evaluate(PLACE))
    assert [m.condition for m in once] == ["none", "recency/raw", "random/raw", "oracle/raw"]
    # Also after another place, and in a process that saw them the other way round.
    shorter = replace(PLACE, number=1, stop_block=33)
    at_shorter = numbers(first.evaluate(shorter))
    assert at_shorter == numbers(second.evaluate(shorter))
    assert at_shorter[0] != once[0]
    assert numbers(first.evaluate(PLACE)) == once == numbers(second.evaluate(PLACE))
    # Another number draws other random blocks.
    other = numbers(first.evaluate(replace(PLACE, number=5)))
    assert other[:2] == once[:2]
    assert other[2].picked != once[2].picked


def test_places_that_share_a_beginning_equal_places_alone(lm: BaseLM, tree: StoredText) -> None:
    config = replace(CONFIG, rivals=["full"])
    shared = evaluator(lm, tree, config)
    for stop in (20, 27, 35, 24):
        place = replace(PLACE, stop_block=stop)
        (together,), (alone,) = shared.evaluate(place), evaluator(lm, tree, config).evaluate(place)
        assert together.nll == pytest.approx(alone.nll, abs=1e-4)


def test_a_budget_that_holds_the_history_equals_full(lm: BaseLM, tree: StoredText) -> None:
    config = replace(CONFIG, budgets=[32 * K], rivals=["full", "recency", "bm25", "random"], forms=["raw", "overlay"])
    full, *others = evaluator(lm, tree, config).evaluate(PLACE)
    assert len(others) == 6
    for m in others:
        assert m.slots == full.slots == 32 * K
        assert (m.nll_choosing, m.nll_scoring) == pytest.approx((full.nll_choosing, full.nll_scoring), abs=1e-4)


def test_short_blocks_at_the_end_belong_to_the_tail(
    lm: BaseLM, tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig
) -> None:
    """Three documents of a few tokens before the horizon's: their blocks are in the tail, so nobody finds them."""
    texts = [
        text_with_needle(20, 4),
        "quokka",
        "zanzibar",
        "whistles",
        f"and quokka, zanzibar, {text_with_needle(6, 1)}",
    ]
    with stored(tiny_lm_config, tmp_path_factory.mktemp("short"), texts) as tree:
        place = Place(0, "doc4.txt", 0, 24)
        config = replace(CONFIG, history_tokens=24 * K, rivals=[r for r in (*RETRIEVERS, "oracle") if r in RIVALS])
        for m in evaluator(lm, tree, config).evaluate(place):
            # The tail's 64 tokens are a block of 32, blocks of 8, 8 and 6 tokens, and none of block 19.
            assert all(block < 20 for block in m.picked), m
            assert len(set(m.picked)) == len(m.picked)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_model_needs_the_needle_and_oracle_and_bm25_find_it(tmp_path: Path) -> None:
    """A passphrase told once, 15 blocks before it is asked for."""
    base_lm = BaseLMConfig(dtype="bfloat16", device="cpu")
    plan = plan_models(base_lm, GistNetConfig(lm_layers=2), StoreConfig(root=tmp_path, context="c"))
    filler = plan.tokenizer.encode("".join(f"{make_text(seed, 40)}.\n" for seed in range(60)))
    passphrase = " amber walrus trombone seven lantern"
    needle = plan.tokenizer.encode(f" The passphrase of the old lighthouse is{passphrase}.\n")
    question = plan.tokenizer.encode(f"\n The passphrase of the old lighthouse is{passphrase}")
    answer = len(plan.tokenizer.encode(passphrase))
    tokens = filler[: 40 * K].copy()
    tokens[5 * K : 5 * K + len(needle)] = needle
    stop = 20
    first = stop * K - (len(question) - answer)
    tokens[first : first + len(question)] = question
    with open_context(tmp_path, plan) as writer:
        meta = DocumentMeta("doc", "doc")
        writer.append(make_compactor(plan).encode(list(windows_of(meta, tokens.astype(np.uint32)))))
        writer.flush()
        reader = writer.reader()
        config = replace(
            CONFIG,
            history_tokens=stop * K,
            horizon_tokens=answer,
            budgets=[6 * K],
            rivals=["full", "recency", "bm25", "oracle_greedy", "oracle"],
            forms=["raw"],
            retrieval=RetrievalConfig(bm25_query_tokens=16, fusion=["bm25", "dense"]),
        )
        spec = FocusEvaluatorSpec(plan.base_lm, StoreConfig(root=tmp_path, context="c"), reader.version.seq, config)
        lexical = LexicalSearcher(writer.folder, plan.tokenizer.decode_batch)
        measured = FocusEvaluator(spec, BaseLM.load(plan.base_lm), plan.gistnet, reader, lexical).evaluate(
            Place(0, "doc", 0, stop)
        )
    full, recency, bm25, greedy, oracle = measured
    assert bm25.picked[0] == greedy.picked[0] == oracle.picked[0] == 5
    assert recency.nll_scoring > max(full.nll_scoring, bm25.nll_scoring, oracle.nll_scoring) + 2
