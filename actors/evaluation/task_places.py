"""Which question is asked of which part of a context: a grid of task × sample × length × depth, the same for a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from actors.evaluation.states import has_tokens
from actors.tasks.planting import plantable_super_blocks
from actors.tasks.sample import Draws, Needle, NumberedTask
from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from storage.contract import TreeReader

TASK_DEPTH = -1
"""`TaskPlace.depth_percent` of samples whose needles stay where the task puts them."""


@dataclass(frozen=True)
class TaskPlace:
    """One question behind one history."""

    number: int
    task: str
    sample: int
    """Of the task and the evaluation's seed."""
    history_tokens: int
    """Slots of the history."""
    depth_percent: int
    """Where the needles that are needed are moved to, or `TASK_DEPTH`."""
    first_block: int
    stop_block: int
    """The history is `[first_block, stop_block)`, whole super-blocks; the question stands behind it."""


def choose_task_places(
    reader: TreeReader,
    tasks: Mapping[str, NumberedTask],
    num_samples: int,
    history_tokens: Sequence[int],
    depth_percents: Sequence[int],
    *,
    tail_tokens: int,
    seed: int,
) -> list[TaskPlace]:
    """The grid. More samples only add places behind it.

    A sample of any task has the same history of a length, at every depth: a random part of the context that has at
    least half as many super-blocks that can take a needle as the best part. Turns of a session share theirs.

    Args:
        reader: the context.
        tasks: by name.
        num_samples: of each task, length and depth.
        history_tokens: slots, multiples of 1,024; 0: all full super-blocks of the context.
        depth_percents: none for the task's own depths.
        tail_tokens: newest tokens that are shown raw, where nothing is planted (see `needle_places`).
        seed: of samples and histories.

    Raises:
        ConfigError: a length the context does not have, or at which nothing can be planted anywhere.
    """
    counts = block_sizes(reader)
    most = len(counts) // BLOCKS_PER_SUPER_BLOCK * SLOTS_PER_SUPER_BLOCK
    lengths = sorted({length or most for length in history_tokens})
    if not most or lengths[-1] > most:
        raise ConfigError(
            f"evaluation.history_tokens holds {lengths[-1]:,}, and context {reader.version.context!r} has {most:,} "
            "slots in full super-blocks; choose shorter histories or compact more text"
        )
    stops = {length: _stops(counts, length, tail_tokens) for length in lengths}
    places: list[TaskPlace] = []
    grid = product(range(num_samples), tasks.items(), lengths, depth_percents or [TASK_DEPTH])
    for sample, (name, task), length, depth in grid:
        draws = Draws("task place", seed, length, sample // num_turns(task))
        stop = draws.pick(stops[length]) * BLOCKS_PER_SUPER_BLOCK
        places.append(TaskPlace(len(places), name, sample, length, depth, stop - length // K, stop))
    return places


def num_turns(task: NumberedTask) -> int:
    """Samples in a row that ask about one history with the same needles: those of a session, else 1."""
    return getattr(task, "num_turns", 1)


def in_groups(places: Sequence[TaskPlace], tasks: Mapping[str, NumberedTask]) -> list[list[TaskPlace]]:
    """Places that share most of what is planted: a worker encodes a text once for all of them."""
    groups: dict[tuple[str, int, int], list[TaskPlace]] = {}
    for place in places:
        session = place.sample // num_turns(tasks[place.task])
        groups.setdefault((place.task, session, place.history_tokens), []).append(place)
    return list(groups.values())


def block_sizes(reader: TreeReader) -> np.ndarray:
    """Real tokens of every block of the version, int64; 0 where they were pruned and nothing can be planted."""
    return np.diff(reader.tokens_before(np.arange(reader.version.num_blocks + 1))) * has_tokens(reader)


def needle_places(counts: np.ndarray, first_block: int, stop_block: int, tail_tokens: int) -> np.ndarray:
    """Super-blocks of a history that can take a needle, ascending.

    Those of the raw tail are left out, unless there are no others: in a history of one super-block what is needed may
    be shown by everybody.

    Args:
        counts: `block_sizes` of the whole version.
        first_block, stop_block: the history, whole super-blocks.
        tail_tokens: newest tokens that are shown raw.
    """
    places = first_block // BLOCKS_PER_SUPER_BLOCK + plantable_super_blocks(counts[first_block:stop_block])
    before_tail = places[(places + 1) * BLOCKS_PER_SUPER_BLOCK <= stop_block - tail_tokens // K]
    return before_tail if len(before_tail) else places


def move_needles(needles: Sequence[Needle], depth: float) -> tuple[Needle, ...]:
    """Needles in the same order, those that are needed standing at a depth on average.

    What lies before and behind them is squeezed or stretched with them: order is part of what many tasks ask for.
    """
    middle = float(np.mean([needle.depth for needle in needles if needle.needed]))

    def moved(old: float) -> float:
        if old <= middle:
            return old / middle * depth if middle else depth
        return depth + (old - middle) * (1 - depth) / (1 - middle)

    return tuple(replace(needle, depth=moved(needle.depth)) for needle in needles)


def _stops(counts: np.ndarray, length: int, tail_tokens: int) -> list[int]:
    """Super-blocks at which histories of a length can end."""
    size = length // SLOTS_PER_SUPER_BLOCK
    num_super_blocks = len(counts) // BLOCKS_PER_SUPER_BLOCK
    plantable = np.zeros(num_super_blocks + 1, np.int64)
    plantable[plantable_super_blocks(counts) + 1] = 1
    before = np.cumsum(plantable)
    stops = np.arange(size, num_super_blocks + 1)
    in_tail = min(-(-tail_tokens // SLOTS_PER_SUPER_BLOCK), size - 1)
    found = before[stops - in_tail] - before[stops - size]
    if not found.any():
        raise ConfigError(
            f"no history of {length:,} slots has a full super-block that could take a needle: documents are too "
            "short there. Choose longer histories or compact longer documents"
        )
    return stops[2 * found >= found.max()].tolist()
