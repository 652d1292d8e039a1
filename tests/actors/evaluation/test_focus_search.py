"""What a budget leaves to be chosen, and what is chosen of it, against plain measurements of every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.focus_search import Choices, FocusSearch, Room
from actors.evaluation.retrieval import Retrieval
from actors.evaluation.rivals import Condition, bare_rows, contents_of, working_context
from actors.evaluation.scorer import Scorer
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.evaluation_config import FocusEvaluationConfig, RetrievalConfig
from models.base_lm import BaseLM
from models.focus.dense import KeySpace
from models.focus.history import History
from models.focus.layout import Policy
from models.focus.working_context import smallest_budget
from storage.memory_tree import MemoryTree
from storage.schema import KEYS
from tests.actors.evaluation.support import (
    StoredText,
    continued,
    masked_nll,
    plain_nll,
    random_tree,
    reading_of,
    stored,
    text_with_needle,
)

# -- room ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_tree() -> MemoryTree:
    """96 whole blocks under three LOD2 nodes, then 40, 5 and 70 tokens."""
    return random_tree([96 * K, 40, 5, 70])


def room_of(reading: Reading, budget: int, max_blocks: int = 8, tail_tokens: int = 2 * K) -> Room:
    config = FocusEvaluationConfig(max_blocks=max_blocks, oracle_blocks=max_blocks + 1, tail_tokens=tail_tokens)
    # Those that measure have the room of others that may choose as many.
    more = replace(config, max_blocks=max_blocks + 1, oracle_blocks=100)
    assert Room.of(budget, reading, config, measuring=True) == Room.of(budget, reading, more)
    return Room.of(budget, reading, config)


@pytest.mark.parametrize(
    ("budget", "max_blocks", "expected"),
    [
        # Blocks that fit beside the tail, its tokens, its first block. Three gists stand for the history.
        (65, 8, (0, 64, 94)),
        (95, 8, (0, 92, 94)),
        (96, 8, (1, 64, 94)),
        (130, 8, (2, 64, 94)),
        (512, 8, (8, 512 - 256 - 3, 96 - 7)),
        (512, 2, (2, 512 - 64 - 3, 96 - 13)),
        (512, 100, (14, 64, 94)),
        (5000, 8, (8, 5000 - 256 - 3, 0)),
    ],
)
def test_room_is_what_tail_and_gists_leave(
    lm: BaseLM, long_tree: MemoryTree, budget: int, max_blocks: int, expected: tuple[int, int, int]
) -> None:
    reading = reading_of(lm, long_tree, 0, 96)
    assert smallest_budget([reading.history]) == 3
    assert room_of(reading, budget, max_blocks) == Room(budget, *expected)


def test_a_history_of_short_blocks_has_a_longer_tail_in_blocks(lm: BaseLM, long_tree: MemoryTree) -> None:
    # Blocks 96-101 hold 32, 8 | 5 | 32, 32, 6 tokens; six more gists stand for them.
    reading = reading_of(lm, long_tree, 0, 102)
    assert smallest_budget([reading.history]) == 9
    assert room_of(reading, 76, 1) == Room(76, 0, 67, 100)
    assert room_of(reading, 192, 2) == Room(192, 2, 119, 96)


@given(
    first=st.integers(0, 90),
    num_blocks=st.integers(1, 102),
    budget=st.integers(130, 900),
    max_blocks=st.integers(1, 12),
    tail_blocks=st.integers(1, 4),
)
@settings(deadline=None, max_examples=100)
def test_what_may_be_chosen_lies_before_the_tail_that_is_shown_beside_it(
    lm: BaseLM, long_tree: MemoryTree, first: int, num_blocks: int, budget: int, max_blocks: int, tail_blocks: int
) -> None:
    """Whichever are chosen, an overlay shows that tail, so no choice is wasted on what is shown anyway."""
    reading = reading_of(lm, long_tree, first, min(first + num_blocks, 102))
    history = reading.history
    smallest = smallest_budget([history])
    room = room_of(reading, budget, max_blocks, tail_blocks * K)
    assert room.max_blocks <= max_blocks
    assert room.tail_tokens >= tail_blocks * K
    if budget < smallest + tail_blocks * K:
        return  # refused before anything is measured
    oldest = [(block, 0) for block in range(history.first_block, room.shown_from)]
    wc = working_context(
        Condition("bm25", "overlay"), reading.history, oldest, budget, tail_blocks * K, room.max_blocks
    )
    raw = wc.raw_blocks().tolist()
    assert set(raw) >= set(range(room.shown_from, history.stop_block))
    if smallest + room.max_blocks * K + tail_blocks * K <= budget:
        assert set(raw) >= {block for block, _ in oldest[: room.max_blocks]}
    # One block more of a tail of whole blocks would not fit beside them, unless it takes the place of gists.
    sizes = np.diff(history.tokens_before)
    before = room.shown_from - 1 - history.first_block
    if before >= 0:
        assert int(sizes[before:].sum()) > room.tail_tokens


# -- search ----------------------------------------------------------------------------------------------------------

FIRST, STOP, NEEDLE_BLOCK = 1, 29, 9
CONFIG = FocusEvaluationConfig(
    history_tokens=28 * K,
    horizon_tokens=31,
    budgets=[7 * K, 10 * K],
    tail_tokens=2 * K,
    max_blocks=3,
    oracle_blocks=4,
    shortlist_blocks=14,
    oracle_readings=6,
    retrieval=RetrievalConfig(bm25_query_tokens=40, dense_query_tokens=16, fusion=["bm25", "dense"]),
)
MEASURING = ("rerank", "oracle_greedy", "oracle", "exhaustive")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[StoredText]:
    """A needle in block 9; block 28, the history's last, asks for it."""
    text = text_with_needle(STOP, NEEDLE_BLOCK, end=" and now of the quokka in zanzibar")
    with stored(
        tiny_lm_config, tmp_path_factory.mktemp("search"), [text + "the quokka whistles, and so on " * 4]
    ) as tree:
        yield tree


@pytest.fixture(scope="module")
def reading(lm: BaseLM, tree: StoredText) -> Reading:
    return Reading(lm, tree.reader, History.of(tree.reader, FIRST, STOP))


def rooms_of(reading: Reading, config: FocusEvaluationConfig, measuring: bool = False) -> list[Room]:
    return [Room.of(budget, reading, config, measuring=measuring) for budget in config.budgets]


def run(
    reading: Reading,
    tree: StoredText,
    ids: np.ndarray,
    wanted: tuple[str, ...],
    policy: Policy = "global",
    config: FocusEvaluationConfig = CONFIG,
    number: int = 0,
) -> list[Choices]:
    rooms = rooms_of(reading, config)
    space = KeySpace.of_tree(tree.reader, array=KEYS)
    shown_from = max(room.shown_from for room in rooms)
    retrieval = Retrieval(reading, tree.lexical, tree.plan.tokenizer, tree.gistnet, space, shown_from, config.retrieval)

    def read(blocks: Sequence[int], budget: int) -> np.ndarray:
        ranked = [(block, 0) for block in blocks]
        rows, _ = contents_of(Condition("oracle", "raw"), reading, ranked, budget, config.tail_tokens, len(blocks))
        return Scorer(reading.lm, policy).nll(rows, ids, reading.history.num_tokens)

    return FocusSearch(retrieval, config, policy, wanted, read).run(
        rooms, rooms_of(reading, config, measuring=True), ids, number
    )


def exactly(reading: Reading, ids: np.ndarray, blocks: Sequence[int], budget: int) -> np.ndarray:
    """NLL after these blocks and as much of the tail as the budget still holds, in raw tokens."""
    others = [block for block in range(FIRST, STOP) if block not in blocks]
    newest = others[len(others) - (budget // K - len(blocks)) :]
    return plain_nll(reading.lm, reading.raw([*blocks, *newest]), ids, reading.history.num_tokens)


@pytest.fixture(scope="module")
def horizon(reading: Reading) -> np.ndarray:
    """What the model itself writes with the needle in view: nothing else predicts it as well."""
    room = rooms_of(reading, CONFIG, measuring=True)[0]
    stand_ins, tail = bare_rows(reading, room.budget, room.tail_tokens)
    rows = Contents.joined([stand_ins, reading.raw([NEEDLE_BLOCK]), tail])
    return continued(reading.lm, rows, reading.history.num_tokens, 31)


def plain_gains(
    reading: Reading, ids: np.ndarray, room: Room, blocks: range, stand_ins_of: Room
) -> dict[int, tuple[float, float]]:
    """What each block adds to stand-ins and tail: on every other token from the first, and on the others."""
    num_tokens = reading.history.num_tokens
    stand_ins, _ = bare_rows(reading, stand_ins_of.budget, stand_ins_of.tail_tokens)
    _, tail = bare_rows(reading, room.budget, room.tail_tokens)
    base = masked_nll(reading.lm, stand_ins, tail, [], ids, num_tokens)
    gains = {}
    for block in blocks:
        gain = base - masked_nll(reading.lm, stand_ins, tail, [reading.raw([block])], ids, num_tokens)
        gains[block] = (float(gain[0::2].mean()), float(gain[1::2].mean()))
    return gains


@pytest.fixture(scope="module")
def found(reading: Reading, tree: StoredText, horizon: np.ndarray) -> list[Choices]:
    return run(reading, tree, horizon, ("random", "bm25", "dense", "fusion", *MEASURING))


def test_everything_that_is_chosen_lies_before_the_tail_of_its_budget(reading: Reading, found: list[Choices]) -> None:
    rooms, oracle_rooms = rooms_of(reading, CONFIG), rooms_of(reading, CONFIG, measuring=True)
    # 28 gists beside three blocks and the tail; an oracle may choose one more.
    assert [(room.max_blocks, room.shown_from) for room in rooms] == [(3, STOP - 3), (3, STOP - 6)]
    assert [(room.max_blocks, room.shown_from) for room in oracle_rooms] == [(4, STOP - 2), (4, STOP - 5)]
    for room, oracle_room, choices in zip(rooms, oracle_rooms, found, strict=True):
        for name, ranked in choices.ranked.items():
            own = oracle_room if name in {"oracle", "oracle_greedy", "exhaustive"} else room
            blocks = [block for block, _ in ranked]
            assert len(set(blocks)) == len(blocks), name
            assert all(FIRST <= block < own.shown_from for block in blocks), name
        assert choices.ranked["bm25"][0] == (NEEDLE_BLOCK, 0)
        assert sorted(choices.ranked["random"]) == [(block, 0) for block in range(FIRST, room.shown_from)]
        for name in ("oracle", "oracle_greedy", "exhaustive"):
            assert 0 < len(choices.ranked[name]) <= oracle_room.max_blocks


def test_the_shortlist_is_every_rivals_picks_and_what_recency_would_show(
    reading: Reading, tree: StoredText, horizon: np.ndarray, found: list[Choices]
) -> None:
    """As many of each as an oracle may choose, however few a rival shows; fewer where the list is short."""
    rooms, oracle_rooms = rooms_of(reading, CONFIG), rooms_of(reading, CONFIG, measuring=True)
    sizes = []
    for size in (14, 6):
        config = replace(CONFIG, shortlist_blocks=size)
        all_choices = found if size == 14 else run(reading, tree, horizon, MEASURING[:3], config=config)
        for room, oracle_room, choices in zip(rooms, oracle_rooms, all_choices, strict=True):
            each = min(4, size // 3)
            picks = {block for name in ("bm25", "dense", "fusion") for block, _ in choices.ranked[name][:each]}
            older = range(oracle_room.shown_from - 1, oracle_room.shown_from - 5, -1)
            expected = picks | set([block for block in older if block not in picks][: size - len(picks)])
            sizes.append(len(expected) - len(picks))
            # What reranks sees what measures sees, as far as it may show it.
            reranked = {block for block in expected if block < room.shown_from}
            assert {block for block, _ in choices.ranked["rerank"]} == reranked
            assert {block for block, _ in choices.ranked["oracle_greedy"]} <= expected
            assert {block for block, _ in choices.ranked["oracle"]} <= expected
    assert max(sizes) == 4
    assert min(sizes) < 4


def test_the_gain_of_every_block_is_that_of_a_plain_measurement(
    reading: Reading, horizon: np.ndarray, found: list[Choices]
) -> None:
    rooms = rooms_of(reading, CONFIG, measuring=True)
    for room, choices in zip(rooms, found, strict=True):
        blocks = range(FIRST, room.shown_from)
        expected = plain_gains(reading, horizon, room, blocks, stand_ins_of=rooms[0])
        assert [block for block, _, _ in choices.single_gains] == list(blocks)
        for block, choosing, scoring in choices.single_gains:
            assert (choosing, scoring) == pytest.approx(expected[block], abs=2e-4)
        assert np.ptp([choosing for _, choosing, _ in choices.single_gains]) > 0.01
        # The oracles begin with the best of what they measure, by the half they choose on.
        best = sorted(blocks, key=lambda block: -expected[block][0])
        assert best[0] == NEEDLE_BLOCK
        picks = {block for name in ("bm25", "dense", "fusion") for block, _ in choices.ranked[name][:4]}
        older = range(room.shown_from - 4, room.shown_from)
        assert len(picks.union(older)) <= CONFIG.shortlist_blocks
        in_order = [block for block in best if block in picks.union(older) and expected[block][0] > 0]
        assert [block for block, _ in choices.ranked["oracle_greedy"]] == in_order[:4]


def test_no_rival_shows_what_is_better_than_what_an_oracle_chose(
    reading: Reading, horizon: np.ndarray, found: list[Choices]
) -> None:
    """By exact readings of raw tokens, on the half that is chosen on. Nothing but the tail is a choice, too."""

    def loss(blocks: list[int], budget: int) -> float:
        return float(exactly(reading, horizon, blocks, budget)[0::2].mean())

    for budget, choices in zip(CONFIG.budgets, found, strict=True):
        shown = {
            name: [block for block, _ in ranked][: 4 if name in {"oracle", "oracle_greedy", "exhaustive"} else 3]
            for name, ranked in choices.ranked.items()
        }
        losses = {name: loss(blocks, budget) for name, blocks in shown.items()} | {"tail": loss([], budget)}
        assert losses["exhaustive"] <= losses["oracle"] + 1e-5
        assert losses["oracle"] <= min(value for name, value in losses.items() if name != "exhaustive") + 1e-5
        assert losses["oracle"] < losses["tail"] - 0.01
        assert losses["oracle"] < max(losses["random"], losses["dense"])


def test_exhaustive_needs_no_other_rival(
    reading: Reading, tree: StoredText, horizon: np.ndarray, found: list[Choices]
) -> None:
    """It searches nothing, and says the same of blocks whatever else is compared, whichever budget comes first."""
    alone = run(reading, tree, horizon, ("exhaustive",), config=replace(CONFIG, budgets=[10 * K, 7 * K]))
    for choices, before in zip(alone, reversed(found), strict=True):
        assert set(choices.ranked) == set(choices.seconds) == {"exhaustive"}
        assert choices.ranked["exhaustive"]
        for mine, theirs in zip(choices.single_gains, before.single_gains, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("policy", ["compact", "anchored"])
def test_candidates_are_measured_under_the_evaluations_policy(
    reading: Reading, tree: StoredText, horizon: np.ndarray, found: list[Choices], policy: Policy
) -> None:
    """Stand-ins, all blocks that are measured and the tail, one after the other."""
    choices = run(reading, tree, horizon, ("exhaustive",), policy)
    rooms = rooms_of(reading, CONFIG, measuring=True)
    stand_ins, _ = bare_rows(reading, rooms[0].budget, rooms[0].tail_tokens)
    assert choices[0].single_gains != found[0].single_gains
    for room, mine in zip(rooms, choices, strict=True):
        _, tail = bare_rows(reading, room.budget, room.tail_tokens)
        end = stand_ins.num_rows + sum(reading.raw([b]).num_rows for b in range(FIRST, rooms[0].shown_from))
        at = replace(stand_ins, half_tokens=2 * np.arange(stand_ins.num_rows))
        behind = replace(tail, half_tokens=2 * np.arange(end, end + tail.num_rows))
        block = reading.raw([NEEDLE_BLOCK])
        first = stand_ins.num_rows + (NEEDLE_BLOCK - FIRST) * K
        shown = replace(block, half_tokens=2 * np.arange(first, first + K))
        gain = masked_nll(reading.lm, at, behind, [], horizon, end + tail.num_rows)
        gain -= masked_nll(reading.lm, at, behind, [shown], horizon, end + tail.num_rows)
        expected = (float(gain[0::2].mean()), float(gain[1::2].mean()))
        assert mine.single_gains[NEEDLE_BLOCK - FIRST][1:] == pytest.approx(expected, abs=2e-4)


def test_what_a_choice_builds_on_is_part_of_its_price(found: list[Choices]) -> None:
    for choices in found:
        seconds = choices.seconds
        assert seconds["fusion"] >= seconds["bm25"] + seconds["dense"]
        for name in ("rerank", "oracle"):
            assert seconds[name] >= seconds["bm25"] + seconds["dense"]
        assert seconds["oracle"] == seconds["oracle_greedy"]


def test_nothing_is_searched_for_those_that_do_not_search(
    reading: Reading, tree: StoredText, horizon: np.ndarray
) -> None:
    for choices in run(reading, tree, horizon, ("none", "full", "recency", "uniform")):
        assert choices == Choices()


def test_a_budget_without_room_chooses_nothing(reading: Reading, tree: StoredText, horizon: np.ndarray) -> None:
    config = replace(CONFIG, budgets=[3 * K - 1, 7 * K])
    small, usual = run(reading, tree, horizon, ("bm25", *MEASURING), config=config)
    for name in ("oracle", "exhaustive", "rerank"):
        assert len(usual.ranked[name]) > 0
        assert name == "rerank" or small.ranked[name] == []
    assert small.ranked["rerank"] == []
    # What blocks are worth is known all the same.
    assert len(small.single_gains) == STOP - 2 - FIRST


def test_another_number_draws_other_blocks(reading: Reading, tree: StoredText, horizon: np.ndarray) -> None:
    first, again, other = (run(reading, tree, horizon, ("random",), number=number)[0].ranked for number in (3, 3, 4))
    assert first == again != other
    other_seed = run(reading, tree, horizon, ("random",), number=3, config=replace(CONFIG, seed=1))[0].ranked
    assert other_seed not in (first, other)
