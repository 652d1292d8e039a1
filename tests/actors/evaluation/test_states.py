"""Trees whose tokens are pruned in places, as evaluations see them."""

from __future__ import annotations

import numpy as np
import pytest

from actors.evaluation.contents import Reading
from actors.evaluation.places import choose_places, stops_with_tokens
from actors.evaluation.planted import PlantedReader
from actors.evaluation.rivals import BM25, FORMS, RAW_FORMS, RECENCY, UNIFORM, conditions, contents_of
from actors.evaluation.states import CuratedReader, has_tokens, states_of
from actors.evaluation.task_places import block_sizes, needle_places
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from models.base_lm import BaseLM
from models.focus.history import History
from storage.contract import BlockState
from storage.geometry import NO_TOKEN
from storage.schema import GISTS
from tests.actors.evaluation.support import random_tree


def curated(*pruned: tuple[int, int], documents: tuple[int, ...] = (64 * K, 64 * K - 9, 64 * K)) -> CuratedReader:
    """A tree whose spans `[first, stop)` are pruned, the last of them tombstoned."""
    reader = random_tree(documents).reader()
    states = np.zeros(reader.version.num_blocks, np.int8)
    for first, stop in pruned:
        states[first:stop] = BlockState.GIST_ONLY
    if pruned:
        states[slice(*pruned[-1])] = BlockState.TOMBSTONED
    return CuratedReader(reader, states)


def test_a_curated_reader_hides_tokens_and_nothing_else() -> None:
    plain, reader = curated(), curated((32, 96))
    tokens, counts = reader.tokens(30, 68)
    there, there_counts = plain.tokens(30, 68)
    whole = np.r_[0:2, 66:68]
    np.testing.assert_array_equal(tokens[whole], there[whole])
    np.testing.assert_array_equal(counts[whole], there_counts[whole])
    assert (tokens[2:66] == NO_TOKEN).all()
    assert not counts[2:66].any()
    blocks = np.arange(193)
    np.testing.assert_array_equal(reader.tokens_before(blocks), plain.tokens_before(blocks))
    assert (reader.read(GISTS, 1, blocks[:192]) == plain.read(GISTS, 1, blocks[:192])).all()
    assert states_of(reader, 30, 4).tolist() == [0, 0, BlockState.TOMBSTONED, BlockState.TOMBSTONED]
    # What is pruned beneath cannot be made whole by saying so.
    above = CuratedReader(reader, np.zeros(192, np.int8))
    np.testing.assert_array_equal(has_tokens(above), has_tokens(reader))


def test_nothing_is_planted_into_pruned_text_of_its_own_accord() -> None:
    reader = curated((32, 64))
    assert not block_sizes(reader)[32:64].any()
    assert needle_places(block_sizes(reader), 0, 192, 64).tolist() == [0, 2, 4]
    assert PlantedReader(reader, {}).block_states(0, 192).tolist() == reader.block_states(0, 192).tolist()


@pytest.mark.parametrize("per_history", [1, 2])
def test_horizons_lie_where_there_are_tokens(per_history: int) -> None:
    reader = curated((32, 60), (130, 170))

    def chosen(**options: int) -> list[int]:
        found = choose_places(
            reader,
            1000,
            512,
            64,
            within_document=False,
            max_per_document=50,
            places_per_history=per_history,
            seed=0,
            **options,  # type: ignore[arg-type]
        )
        return [place.stop_block for place in found]

    stops = chosen()
    assert len(stops) > 5
    assert all(has_tokens(reader)[stop : stop + 2].all() for stop in stops)
    allowed = stops_with_tokens([reader, curated()], 4, 2)
    assert allowed.shape == (193,)
    assert [int(s) for s in np.flatnonzero(~allowed)][:4] == [0, 1, 2, 3]
    stops = chosen(may_stand=allowed)  # type: ignore[arg-type]
    assert all(has_tokens(reader)[stop - 4 : stop + 2].all() for stop in stops)
    with pytest.raises(ConfigError, match="0 place"):
        chosen(may_stand=np.zeros(193, bool))  # type: ignore[arg-type]


def test_every_form_shows_what_there_is_within_the_budget(lm: BaseLM) -> None:
    reader = curated((20, 84), (180, 186))
    history = History.of(reader, 0, 192)
    reading = Reading(lm, reader, history)
    ranked = [(block, 0) for block in (25, 183, 30, 10, 100, 80, 11)]
    for condition in conditions((RECENCY, UNIFORM, BM25), FORMS):
        contents, picked = contents_of(condition, reading, ranked, 320, 64, 2)
        assert contents.num_rows <= 320
        if condition.chooser == BM25:
            assert picked == [10, 100], "what is pruned takes nobody's place"
        if condition.form in RAW_FORMS:
            assert contents.num_rows == 320
