"""Reading a history back from the tree: what a frozen LM gains from raw tokens, from gists, and from controls.

Every condition predicts the same tokens of a horizon from the horizon itself, with something different before it:
nothing, the raw history, the history's LOD1 gists, another document's gists (shuffled), or as many recent raw tokens
as there are gist vectors. Positions are the true ones (`global`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import ReadBackConfig
from cluster.errors import ConfigError
from models.base_lm import BaseLM
from models.positions import Positions
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
class Estimate:
    """A mean over places with its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """Mean and standard error of independent values."""
        return cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


@dataclass(frozen=True)
class ReadBackResult:
    """NLL in nats a token, by condition: `(num_places,)` each."""

    places: list[Place]
    nll: dict[str, np.ndarray]

    def estimate(self, condition: str) -> Estimate:
        """Mean NLL of a condition."""
        return Estimate.of(self.nll[condition])

    def gain(self, condition: str) -> Estimate:
        """NLL without any context minus NLL with this one, paired."""
        return Estimate.of(self.nll[NONE] - self.nll[condition])

    @property
    def content_nats(self) -> Estimate:
        """NLL with shuffled gists minus NLL with own gists, paired: what gists say beyond being a soft prompt."""
        return Estimate.of(self.nll[SHUFFLED] - self.nll[OWN])

    def recovered_fraction(self, condition: str) -> float:
        """mean(NLL none - NLL condition) / mean(NLL none - NLL full); NaN when the full history gains nothing."""
        available = float((self.nll[NONE] - self.nll[FULL]).mean())
        return float((self.nll[NONE] - self.nll[condition]).mean()) / available if available > 0 else float("nan")


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
    for index, place in enumerate(places):
        stranger = next(p for p in (*places[index + 1 :], *places[: index + 1]) if p is not place)
        for condition, context, positions in _contexts(lm, reader, place, stranger):
            nll[condition].append(_horizon_nll(lm, reader, place, config.horizon_tokens, context, positions))
        on_place()
    return ReadBackResult(places, {condition: np.array(values) for condition, values in nll.items()})


def _tokens(reader: TreeReader, first_block: int, num_blocks: int) -> torch.Tensor:
    tokens, _ = reader.tokens(first_block, num_blocks)
    return torch.from_numpy(tokens.astype(np.int64)).reshape(-1)


def _contexts(
    lm: BaseLM, reader: TreeReader, place: Place, stranger: Place
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """`(condition, embeddings (T, D), positions in half tokens (T,))` of what stands before the horizon."""
    history = _tokens(reader, place.first_block, place.num_blocks)
    embedded = lm.embed(history[None].to(lm.device))[0]
    raw_positions = 2 * torch.arange(len(history))
    yield FULL, embedded, raw_positions
    yield NONE, embedded[:0], raw_positions[:0]
    own = _gists(reader, place).to(lm.device, embedded.dtype)
    num_vectors = own.shape[1]
    # A gist stands at the centre of its block: tokens 32b ... 32b + 31, so 2 * 32b + 31 half tokens.
    centres = (2 * K * torch.arange(place.num_blocks) + K - 1).repeat_interleave(num_vectors)
    yield OWN, own.flatten(0, 1), centres
    yield SHUFFLED, _gists(reader, stranger).to(lm.device, embedded.dtype).flatten(0, 1), centres
    num_equal = place.num_blocks * num_vectors
    yield RECENT, embedded[-num_equal:], raw_positions[-num_equal:]


def _gists(reader: TreeReader, place: Place) -> torch.Tensor:
    """`(num_blocks, m, D)`"""
    return reader.read(GISTS, 1, np.arange(place.first_block, place.first_block + place.num_blocks))


def _horizon_nll(
    lm: BaseLM, reader: TreeReader, place: Place, horizon: int, context: torch.Tensor, positions: torch.Tensor
) -> float:
    """Mean NLL of the horizon's tokens after its first, which nothing could predict without a context."""
    num_blocks = -(-horizon // K)
    ids = _tokens(reader, place.first_block + place.num_blocks, num_blocks)[:horizon].to(lm.device)
    embeds = torch.cat([context, lm.embed(ids[None, :-1])[0]])[None]
    first = place.num_blocks * K
    half_tokens = torch.cat([positions, 2 * torch.arange(first, first + horizon - 1)])[None]
    targets = torch.full((1, embeds.shape[1]), -100, dtype=torch.int64, device=lm.device)
    targets[0, len(context) :] = ids[1:]
    with torch.inference_mode():
        nll = lm.nll(embeds, targets, positions=Positions(half_tokens), start=len(context))
    return float(nll.mean())
