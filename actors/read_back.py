"""Reading a history back from the tree: what a frozen LM gains from raw tokens, from gists, and from controls.

Every condition predicts the same tokens of a horizon from the horizon itself, with something different before it:
nothing, the raw history, the history's LOD1 gists, another document's gists (shuffled), or as many recent raw tokens
as there are gist vectors. Positions are the true ones (`global`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.scorer import Scorer
from actors.evaluation.statistics import Estimate, clustered_mean
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import ReadBackConfig
from cluster.errors import ConfigError
from models.base_lm import BaseLM
from models.focus.history import History
from storage.contract import TreeReader
from storage.schema import GISTS

FULL, NONE, OWN, SHUFFLED, RECENT = "full", "none", "gists", "shuffled_gists", "recent_raw"
CONDITIONS = (FULL, NONE, OWN, SHUFFLED, RECENT)


@dataclass(frozen=True)
class Place:
    """A history of whole blocks inside one document, and the horizon after it."""

    first_block: int
    num_blocks: int
    uri: str


@dataclass(frozen=True)
class ReadBackResult:
    """NLL in nats a token, by condition: `(num_places,)` each."""

    places: list[Place]
    nll: dict[str, np.ndarray]

    def estimate(self, condition: str) -> Estimate:
        """Mean NLL of a condition."""
        return _over_places(self.nll[condition])

    def gain(self, condition: str) -> Estimate:
        """NLL without any context minus NLL with this one, paired."""
        return _over_places(self.nll[NONE] - self.nll[condition])

    @property
    def content_nats(self) -> Estimate:
        """NLL with shuffled gists minus NLL with own gists, paired: what gists say beyond being a soft prompt."""
        return _over_places(self.nll[SHUFFLED] - self.nll[OWN])

    def recovered_fraction(self, condition: str) -> float:
        """mean(NLL none - NLL condition) / mean(NLL none - NLL full); NaN when the full history gains nothing."""
        available = float((self.nll[NONE] - self.nll[FULL]).mean())
        return float((self.nll[NONE] - self.nll[condition]).mean()) / available if available > 0 else float("nan")


def _over_places(values: np.ndarray) -> Estimate:
    """Mean and standard error of places that count as independent."""
    return clustered_mean(values, [str(place) for place in range(len(values))])


def choose_places(reader: TreeReader, config: ReadBackConfig) -> list[Place]:
    """Random places, no two of which overlap, spread over documents long enough to hold one.

    Raises:
        ConfigError: the context has fewer than two such places.
    """
    num_history = config.history_tokens // K
    num_needed = num_history + -(-config.horizon_tokens // K)
    candidates = [
        Place(document.first_block + start, num_history, document.meta.uri)
        for document in reader.documents()
        # The last block may be short; the places before it are whole.
        for start in range(0, document.num_blocks - num_needed, num_needed)
    ]
    if len(candidates) < 2:
        raise ConfigError(
            f"the context has {len(candidates)} place(s) with {config.history_tokens} + {config.horizon_tokens} tokens "
            "in one document; two are needed. Lower read_back.history_tokens or compact longer documents."
        )
    order = np.random.default_rng(config.seed).permutation(len(candidates))
    return [candidates[i] for i in order[: config.num_samples]]


def read_back(
    lm: BaseLM, reader: TreeReader, config: ReadBackConfig, on_place: Callable[[], None] = lambda: None
) -> ReadBackResult:
    """Measure every condition at every place; `on_place` is called after each."""
    places = choose_places(reader, config)
    nll: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    scorer = Scorer(lm)
    for index, place in enumerate(places):
        stranger = next(p for p in (*places[index + 1 :], *places[: index + 1]) if p is not place)
        history = History.of(reader, place.first_block, place.first_block + place.num_blocks)
        reading = Reading(lm, reader, history)
        num_blocks = -(-config.horizon_tokens // K)
        ids = reading.ids(history.stop_block, num_blocks)[: config.horizon_tokens]
        for condition, contents in _contents(reading, place, stranger):
            nll[condition].append(float(scorer.nll(contents, ids, history.num_tokens).mean()))
        on_place()
    return ReadBackResult(places, {condition: np.array(values) for condition, values in nll.items()})


def _contents(reading: Reading, place: Place, stranger: Place) -> Iterator[tuple[str, Contents]]:
    """`(condition, what stands before the horizon)`."""
    full = reading.raw(range(place.first_block, place.first_block + place.num_blocks))
    yield FULL, full
    yield NONE, full.rows(0, 0)
    own = _gists(reading, place)
    yield OWN, own
    yield SHUFFLED, Contents(_gists(reading, stranger).embeds, own.half_tokens)
    yield RECENT, full.rows(full.num_rows - own.num_rows, full.num_rows)


def _gists(reading: Reading, place: Place) -> Contents:
    """LOD1 gists, each at the centre of its block: tokens 32b ... 32b + 31, so 2 * 32b + 31 half tokens."""
    nodes = reading.reader.read(GISTS, 1, np.arange(place.first_block, place.first_block + place.num_blocks))
    centres = np.repeat(2 * K * np.arange(place.num_blocks) + K - 1, nodes.shape[1])
    return Contents(nodes.flatten(0, 1).to(reading.lm.device, reading.lm.dtype), centres)
