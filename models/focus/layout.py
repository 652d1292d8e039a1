"""Position policies: from true places on the timeline to those the language model is given.

All are int64 half tokens (see `models.positions`). A policy sees the rows of one assembled Working Context, oldest
first, and the tokens that follow it continue from `next_half_token`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from cluster.errors import FocusError

Policy = Literal["global", "compact", "anchored"]
POLICIES: tuple[Policy, ...] = ("global", "compact", "anchored")

NEAR_TOKENS = 1024
"""`anchored`: up to this distance from the anchor distances are true."""

FAR_SCALE_TOKENS = 512
"""`anchored`: beyond, they grow by this much for every factor e; 10 M tokens come out as about 6,100."""


def policy_for(num_tokens: int, trained_context: int) -> Policy:
    """What reads best at a length: true places where they are in the model's trained range, else `compact`.

    At 104 places of code and prose all policies read alike inside it; at 64k slots of history `global` lost 2 to 6
    nats a token with anything that is not recent, `compact` and `anchored` were equal (docs/headroom.md).
    """
    return "global" if num_tokens <= trained_context else "compact"


@dataclass(frozen=True)
class Layout:
    """Where rows stand."""

    half_tokens: Int64[np.ndarray, " rows"]
    next_half_token: int
    """Place of the first token after the Working Context."""


def lay_out(policy: Policy, half_tokens: Int64[np.ndarray, " rows"], num_tokens: int, anchor: int = -1) -> Layout:
    """Positions of rows.

    Args:
        policy: `global`: true places, for histories within the model's trained range. `compact`: rows one after the
            other, a gist taking one place. `anchored`: true distances near the anchor, compressed ones far away; a run
            of consecutive tokens keeps its spacing, measured from its newest one: squeezed, a block is unreadable.
        half_tokens: true places of the rows (a token t at 2t, a gist at its span's centre).
        num_tokens: real tokens of the whole history; the next token's true index.
        anchor: `anchored` only: the token distances are measured from, frozen between refocuses; default the end.

    Raises:
        FocusError: an unknown policy.
    """
    if policy == "global":
        return Layout(half_tokens, 2 * num_tokens)
    if policy == "compact":
        return Layout(2 * np.arange(len(half_tokens), dtype=np.int64), 2 * len(half_tokens))
    if policy != "anchored":
        raise FocusError(f"there is no position policy {policy!r}; use one of {', '.join(POLICIES)}")
    anchor_half = 2 * (num_tokens if anchor < 0 else anchor)
    # Depends on the anchor alone, so that places stay while tokens come. A far run may begin below 0: only distances
    # between places matter.
    origin = 2 * round(float(compressed_distance(np.array([anchor_half / 2]))[0]))
    newest = _newest_of_run(half_tokens)
    distance = (anchor_half - newest) / 2
    # Beyond the anchor distances stay true, so that decoding goes on without moving what was read.
    ends = origin - 2 * np.where(distance > 0, compressed_distance(distance), distance)
    places = np.round(ends).astype(np.int64) - (newest - half_tokens)
    return Layout(places, origin + 2 * num_tokens - anchor_half)


def runs_of_neighbours(ranked: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Blocks `(block, source)` in runs that stand side by side, each in timeline order, the runs by their best one.

    Args:
        ranked: each block once, the best first.
    """
    rank = {name: number for number, name in enumerate(ranked)}
    runs: list[list[tuple[int, int]]] = []
    for block, source in sorted(ranked, key=lambda name: (name[1], name[0])):
        if not runs or runs[-1][-1] != (block - 1, source):
            runs.append([])
        runs[-1].append((block, source))
    return sorted(runs, key=lambda run: min(rank[name] for name in run))


def found_before_turn(
    row_of_entry: Int64[np.ndarray, " n_plus_1"], found: Sequence[int], num_turn_rows: int
) -> Int64[np.ndarray, " rows"]:
    """An order of rows in which some entries stand together before the newest `num_turn_rows`.

    What changes with every question then stands behind what does not: an edit leaves all before it as it was read.

    Args:
        row_of_entry: of an assembled Working Context.
        found: entries that are moved, in the order in which they shall stand.
        num_turn_rows: newest rows that stay last, those moved not counted.

    Returns:
        For each place the row that stands there.
    """
    moved = [np.arange(row_of_entry[entry], row_of_entry[entry + 1]) for entry in found]
    others = np.setdiff1d(np.arange(row_of_entry[-1]), np.concatenate(moved) if moved else [])
    place = max(0, len(others) - num_turn_rows)
    return np.concatenate([others[:place], *moved, others[place:]]).astype(np.int64)


def _newest_of_run(half_tokens: np.ndarray) -> np.ndarray:
    """For every row the true place of the last row of its run of consecutive tokens."""
    if len(half_tokens) == 0:
        return half_tokens
    breaks = np.flatnonzero(np.diff(half_tokens) != 2)
    last_rows = np.append(breaks, len(half_tokens) - 1)
    return half_tokens[last_rows][np.searchsorted(last_rows, np.arange(len(half_tokens)))]


def compressed_distance(tokens: np.ndarray) -> np.ndarray:
    """Distance d in tokens as `anchored` gives it: d up to NEAR, then NEAR + FAR·ln(1 + (d - NEAR) / FAR).

    Continuous with a continuous slope, and strictly increasing.
    """
    beyond = np.maximum(np.asarray(tokens, np.float64) - NEAR_TOKENS, 0.0)
    return np.minimum(tokens, NEAR_TOKENS) + FAR_SCALE_TOKENS * np.log1p(beyond / FAR_SCALE_TOKENS)
