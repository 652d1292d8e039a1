"""Where a language model is asked to read on: a history inside a tree, and the horizon that really came after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from actors.evaluation.states import has_tokens
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from storage.contract import DocumentInfo, TreeReader

SPACING_BLOCKS = 8
"""Between places that share a history's beginning."""


@dataclass(frozen=True)
class Place:
    """A history of whole blocks, and the horizon behind it."""

    number: int
    uri: str
    """Of the document that holds the horizon; places of one document are not independent."""
    first_block: int
    stop_block: int
    """The history is `[first_block, stop_block)`; the horizon begins there."""


def blocks_of_highest_node(history_tokens: int) -> int:
    """Blocks of the largest node that so many slots hold whole; 1 where they hold no LOD2 node."""
    size = 1
    while size * K * K <= history_tokens:
        size *= K
    return size


def stops_with_tokens(readers: Sequence[TreeReader], num_before: int, num_behind: int) -> Bool[np.ndarray, " stops"]:
    """At which blocks a history may stop so that the blocks just before and behind have their tokens in all readers.

    Args:
        readers: of versions of one branch; what the shortest has not is nowhere.
        num_before, num_behind: blocks.

    Returns:
        `(num_blocks + 1,)` of the longest version.
    """
    num_blocks = max(reader.version.num_blocks for reader in readers)
    have = np.ones(num_blocks, bool)
    for reader in readers:
        mine = has_tokens(reader)
        have[: len(mine)] &= mine
        have[len(mine) :] = False
    missing = np.concatenate([[0], np.cumsum(~have)])
    stops = np.arange(num_blocks + 1)
    begin, end = stops - num_before, stops + num_behind
    inside = (begin >= 0) & (end <= num_blocks)
    return inside & (missing[end.clip(max=num_blocks)] == missing[begin.clip(min=0)])


def choose_places(
    reader: TreeReader,
    num_places: int,
    history_tokens: int,
    horizon_tokens: int,
    *,
    within_document: bool,
    max_per_document: int,
    places_per_history: int = 1,
    align_blocks: int = 1,
    begin_blocks: int = 1,
    may_stand: Bool[np.ndarray, " stops"] | None = None,
    seed: int,
) -> list[Place]:
    """Random places, the same for a seed, horizons never overlapping.

    Args:
        reader: the tree.
        num_places: how many; fewer where the tree has no more.
        history_tokens: slots of the history, a multiple of 32.
        horizon_tokens: tokens behind it, all of one document.
        within_document: the history is of the horizon's document alone. Otherwise it is whatever the timeline holds
            before it, as a session would have read it.
        max_per_document: histories that end in one document, spread evenly over it.
        places_per_history: places that share a history's beginning, 8 blocks apart, the last with all of it. A model
            reads the part they share once.
        align_blocks: histories begin at multiples of it on the timeline: 32 where whole super-blocks are needed.
        begin_blocks: histories begin at multiples of it, too, and are longer by what that takes, if only by what they
            begin with: as a context that was read from its start has whole nodes of the highest level.
        may_stand: by block a history may stop before: whether it may, `(num_blocks + 1,)`; default, where curation left
            the horizon's tokens (`stops_with_tokens`).
        seed: of the choice.

    Raises:
        ConfigError: the context has fewer than two such places, or a history is too short for those that share it.
    """
    num_history, num_horizon = history_tokens // K, -(-horizon_tokens // K)
    spacing = max(SPACING_BLOCKS, num_horizon)
    shared = spacing * (places_per_history - 1)
    if shared >= num_history:
        raise ConfigError(
            f"{places_per_history} places that share a history lie {spacing * K} tokens apart, so its {history_tokens} "
            "tokens leave nothing before the first; lower evaluation.places_per_history or evaluation.horizon_tokens"
        )
    if may_stand is None:
        may_stand = stops_with_tokens([reader], 0, num_horizon)
    rng = np.random.Generator(np.random.PCG64(seed))
    candidates: list[tuple[DocumentInfo, int]] = []
    for document in reader.documents():
        # A document's very beginning says little about focus, and a history must hold all its places' own.
        first = document.first_block + (num_history if within_document else 1 + shared)
        first = max(first, num_history)
        # The last block may be short, so the horizon ends before it.
        last = document.first_block + document.num_blocks - 1 - num_horizon
        first += -(first - num_history) % align_blocks
        stops = np.arange(first, last + 1, math.lcm(spacing * places_per_history, align_blocks))
        stops = stops[np.all([may_stand[stops - back * spacing] for back in range(places_per_history)], axis=0)]
        if len(stops) > max_per_document:
            parts = np.array_split(stops, max_per_document)
            stops = np.array([part[rng.integers(len(part))] for part in parts])
        candidates += [(document, int(stop)) for stop in stops]
    if len(candidates) * places_per_history < 2:
        raise ConfigError(
            f"context {reader.version.context!r} has {len(candidates)} place(s) with {history_tokens} + "
            f"{horizon_tokens} tokens{' in one document' if within_document else ''}; two are needed. Lower "
            "evaluation.history_tokens or compact longer documents."
        )
    places: list[Place] = []
    for position in rng.permutation(len(candidates)).tolist():
        document, stop = candidates[position]
        for back in range(places_per_history - 1, -1, -1):
            if len(places) < num_places:
                begin = (stop - num_history) // begin_blocks * begin_blocks
                place = Place(len(places), document.meta.uri, begin, stop - back * spacing)
                places.append(place)
    return places
