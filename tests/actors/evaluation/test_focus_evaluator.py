"""All rivals at one place with the tiny model: equal slots, agreement where contents agree, the needle found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.focus_evaluator import FocusEvaluator, FocusEvaluatorSpec, Measured
from actors.evaluation.places import Place
from actors.evaluation.rivals import CHOOSERS, FORMS, RETRIEVERS, bare_rows
from actors.evaluation.scorer import Scorer
from actors.packing import windows_of
from actors.plan import plan_models
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.evaluation_config import FocusEvaluationConfig
from models.base_lm import BaseLM
from models.focus.history import History
from storage.contract import DocumentMeta
from storage.lexical import LexicalSearcher
from tests.actors.evaluation.support import NEEDLE, StoredText, plain_nll, stored, text_with_needle
from tests.actors.helpers import make_compactor, make_text, open_context

CONFIG = FocusEvaluationConfig(
    history_tokens=30 * K,
    horizon_tokens=31,
    budgets=[8 * K, 12 * K],
    rivals=["none", "full", *CHOOSERS],
    forms=list(FORMS),
    tail_tokens=2 * K,
    max_blocks=3,
    query_tokens=40,
    shortlist_blocks=16,
    oracle_pool=6,
)
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
        expected |= {(f"{chooser}/{form}", budget) for chooser in CHOOSERS for form in FORMS}
        expected.remove(("uniform/raw", budget))
    assert set(found) == expected


def test_slots_are_equal_and_picks_few(found: dict[tuple[str, int], Measured]) -> None:
    for (condition, budget), m in found.items():
        assert np.isfinite([m.nll_choosing, m.nll_scoring]).all()
        if condition in {"none", "full"}:
            assert (m.slots, m.picked) == (0 if condition == "none" else 32 * K, [])
            continue
        chooser, form = condition.split("/")
        assert m.slots == budget if form == "raw" else m.slots <= budget
        assert len(m.picked) <= CONFIG.max_blocks
        assert all(PLACE.first_block <= block < PLACE.stop_block - 2 for block in m.picked)
        if chooser in {"recency", "uniform"}:
            assert m.picked == []
        elif chooser in {"random", "dense", "fusion", "rerank"} and form != "strict":
            assert len(m.picked) == CONFIG.max_blocks


def test_full_and_none_are_plain_passes(lm: BaseLM, tree: StoredText, found: dict[tuple[str, int], Measured]) -> None:
    reading = Reading(lm, tree.reader, History.of(tree.reader, PLACE.first_block, PLACE.stop_block))
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


def test_the_oracle_gains_on_the_half_it_chooses_on(
    lm: BaseLM, tree: StoredText, found: dict[tuple[str, int], Measured]
) -> None:
    reading = Reading(lm, tree.reader, History.of(tree.reader, PLACE.first_block, PLACE.stop_block))
    ids = reading.ids(PLACE.stop_block, 1)[:31]
    bare = Contents.joined(bare_rows(reading, 8 * K, CONFIG.tail_tokens))
    without, _ = halves(Scorer(lm).nll(bare, ids, 32 * K))
    oracle = found["oracle/overlay", 8 * K]
    assert oracle.picked
    assert oracle.nll_choosing < without
    # In order of choice, the first is the best alone.
    assert oracle.picked[0] == found["oracle_greedy/overlay", 8 * K].picked[0]


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
        config = replace(CONFIG, history_tokens=24 * K, rivals=[*RETRIEVERS, "oracle"])
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
            query_tokens=16,
        )
        spec = FocusEvaluatorSpec(plan.base_lm, StoreConfig(root=tmp_path, context="c"), reader.version.seq, config)
        lexical = LexicalSearcher(writer.folder, plan.tokenizer.decode_batch)
        measured = FocusEvaluator(spec, BaseLM.load(plan.base_lm), plan.gistnet, reader, lexical).evaluate(
            Place(0, "doc", 0, stop)
        )
    full, recency, bm25, greedy, oracle = measured
    assert bm25.picked[0] == greedy.picked[0] == oracle.picked[0] == 5
    assert recency.nll_scoring > max(full.nll_scoring, bm25.nll_scoring, oracle.nll_scoring) + 2
