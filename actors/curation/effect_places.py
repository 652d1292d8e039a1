"""Where two versions of a context are compared: held positions, and questions about what is kept or pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int8, Int64

from actors.curation.plan import CurationPlan
from actors.evaluation.places import Place, blocks_of_highest_node, choose_places, stops_with_tokens
from actors.evaluation.states import CuratedReader, has_tokens, states_of
from actors.evaluation.task_places import TASK_DEPTH, TaskPlace, block_sizes, needle_places
from actors.tasks.sample import Draws, NumberedTask
from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.curation_effect_config import CurationEffectConfig
from cluster.errors import ConfigError
from storage.contract import BlockState, TreeReader

Where = Literal["kept", "pruned"]
WHERE: tuple[Where, ...] = ("kept", "pruned")

MOST_PLACES = 1_000_000
"""More than any context is asked at."""


@dataclass(frozen=True)
class EffectQuestion:
    """One question, whose answer stands in what the later version keeps or in what it has pruned."""

    number: int
    task: str
    sample: int
    where: Where
    first_block: int
    stop_block: int
    """The history is `[first_block, stop_block)`, whole super-blocks; the question stands behind it."""

    def as_task_place(self) -> TaskPlace:
        """As the evaluation on tasks knows it."""
        slots = (self.stop_block - self.first_block) * K
        return TaskPlace(self.number, self.task, self.sample, slots, TASK_DEPTH, self.first_block, self.stop_block)


def foreseen_states(reader: TreeReader, plan: CurationPlan) -> Int8[np.ndarray, " blocks"]:
    """`BlockState` of every block of the version a plan was made of, as the plan would leave them.

    What it would bring back stays pruned: only applying it knows whether the tokens are kept anywhere.
    """
    states = states_of(reader, 0, reader.version.num_blocks)
    for span in plan.spans:
        if span.action != "restore":
            state = BlockState.TOMBSTONED if span.action == "delete" else BlockState.GIST_ONLY
            states[span.first_block : span.first_block + span.num_blocks] = state
    return states


@dataclass(frozen=True)
class Sides:
    """A context before and after."""

    before: TreeReader
    after: TreeReader

    @classmethod
    def of(cls, before: TreeReader, after: TreeReader | CurationPlan) -> Sides:
        """Args: `after` is a plan that was made of the version before, where it is not applied yet.

        Raises:
            ConfigError: the versions are of two branches or encodings, or nothing was pruned between them.
        """
        if isinstance(after, CurationPlan):
            after = CuratedReader(before, foreseen_states(before, after))
        one, two = before.version, after.version
        if (one.branch_id, one.encoding) != (two.branch_id, two.encoding):
            raise ConfigError(
                f"versions {one.seq} and {two.seq} of context {one.context!r} are of two branches, or of two GistNets; "
                "compare versions of one branch between which no gists were rebuilt"
            )
        sides = cls(before, after)
        if not sides.pruned.any():
            raise ConfigError(
                f"nothing that version {one.seq} of context {one.context!r} has in detail is pruned in what it is "
                f"compared with ({two.seq}): there is no effect to measure"
            )
        return sides

    @cached_property
    def pruned(self) -> Bool[np.ndarray, " blocks"]:
        """Blocks that have their tokens before and not after, of those that both have."""
        size = min(self.before.version.num_blocks, self.after.version.num_blocks)
        return has_tokens(self.before)[:size] & ~has_tokens(self.after)[:size]

    @cached_property
    def kept(self) -> Bool[np.ndarray, " blocks"]:
        """Blocks that have their tokens in both."""
        size = len(self.pruned)
        return has_tokens(self.before)[:size] & has_tokens(self.after)[:size]

    def super_blocks(self, where: Where) -> Int64[np.ndarray, " n"]:
        """Super-blocks that are kept, or pruned, as a whole."""
        mask = self.kept if where == "kept" else self.pruned
        size = len(mask) // BLOCKS_PER_SUPER_BLOCK
        return np.flatnonzero(mask[: size * BLOCKS_PER_SUPER_BLOCK].reshape(size, -1).all(axis=1))


def choose_held_positions(sides: Sides, config: CurationEffectConfig) -> list[Place]:
    """Places whose raw tail and horizon both versions have: where a reader of either could go on.

    Raises:
        ConfigError: fewer than two.
    """
    num_horizon = -(-config.horizon_tokens // K)
    longest = max((sides.before, sides.after), key=lambda reader: reader.version.num_blocks)
    places = choose_places(
        longest,
        MOST_PLACES,
        config.history_tokens,
        config.horizon_tokens,
        within_document=False,
        max_per_document=config.max_per_document,
        begin_blocks=blocks_of_highest_node(config.history_tokens),
        may_stand=stops_with_tokens([sides.before, sides.after], config.tail_tokens // K, num_horizon),
        seed=config.seed,
    )
    return places[: config.num_places]


def choose_questions(
    sides: Sides, tasks: Mapping[str, NumberedTask], config: CurationEffectConfig
) -> list[EffectQuestion]:
    """Questions of every task and sample, in turn about what is kept and what is pruned.

    A sample has one history for both, wherever there is one whose raw tail both versions have and that can take a
    needle of either kind; and its tasks share it. More samples only add questions behind the others.

    Raises:
        ConfigError: nowhere can a needle be put into what is pruned.
    """
    size = config.history_tokens // K
    tail_super_blocks = -(-config.tail_tokens // (BLOCKS_PER_SUPER_BLOCK * K))
    whole = stops_with_tokens([sides.before, sides.after], tail_super_blocks * BLOCKS_PER_SUPER_BLOCK, 0)
    sizes = block_sizes(sides.before)
    stops: dict[Where, list[int]] = {where: [] for where in WHERE}
    pools = {where: sides.super_blocks(where) for where in WHERE}
    for stop in range(size, len(sides.pruned) + 1, BLOCKS_PER_SUPER_BLOCK):
        if whole[stop]:
            free = needle_places(sizes, stop - size, stop, config.tail_tokens)
            for where in WHERE:
                if np.isin(free, pools[where]).any():
                    stops[where].append(stop)
    both = sorted(set(stops["kept"]) & set(stops["pruned"]))
    if both:
        stops = dict.fromkeys(WHERE, both)
    if not stops["pruned"]:
        raise ConfigError(
            f"no history of {config.history_tokens:,} slots ends in text that both versions have and holds a pruned "
            "super-block that could take a needle. Choose longer histories (evaluation.history_tokens)"
        )
    questions: list[EffectQuestion] = []
    for sample in range(config.num_questions):
        for task in tasks:
            for where in WHERE:
                if stops[where]:
                    stop = Draws("effect question", config.seed, sample).pick(stops[where])
                    questions.append(EffectQuestion(len(questions), task, sample, where, stop - size, stop))
    return questions
