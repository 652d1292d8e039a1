"""Questions put into histories: needles planted over a stored tree, and what is asked behind it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from actors.compactor import Compactor
from actors.evaluation.planted import PlantedReader, PlantedSuperBlock, encode_replacements, plant_encoded
from actors.evaluation.task_places import TASK_DEPTH, TaskPlace, block_sizes, move_needles, needle_places
from actors.tasks.planting import choose_places, plant
from actors.tasks.sample import NumberedTask, TaskSample
from cluster.config import BLOCKS_PER_SUPER_BLOCK
from models.node_encoder import NodeEncoder
from models.tokenizer import Tokenizer
from storage.contract import TreeReader

KEPT_SUPER_BLOCKS = 256
"""Encoded super-blocks that are kept for the next questions: 75 KB each at 576 dimensions in 16 bits."""


@dataclass(frozen=True, eq=False)
class Question:
    """A sample whose needles stand in a history."""

    sample: TaskSample
    reader: TreeReader
    replaced: Mapping[int, PlantedSuperBlock]
    """What is planted, by super-block."""
    needed: np.ndarray
    """Blocks that hold tokens of needles the answer depends on: int64, ascending."""
    query: np.ndarray
    """Ids behind the history, int64. They are in no tree: every rival reads them raw, and they count as slots."""
    candidates: list[np.ndarray]
    """Ids of the answers to choose from."""
    right: int
    """Which of them is the answer."""

    @property
    def planted_blocks(self) -> np.ndarray:
        """Blocks whose text is planted: int64, ascending."""
        first = np.array(sorted(self.replaced), np.int64)[:, None] * BLOCKS_PER_SUPER_BLOCK
        return (first + np.arange(BLOCKS_PER_SUPER_BLOCK)).reshape(-1)

    @property
    def cluster(self) -> str:
        """Questions that are not independent share it: a sample at all its depths and lengths, or a session."""
        return str(self.sample.meta.get("session", self.sample.sample_id))


class TaskPlanter:
    """Makes questions of places; keeps what it encoded."""

    def __init__(
        self,
        reader: TreeReader,
        tokenizer: Tokenizer,
        compactor: Compactor,
        node_encoder: NodeEncoder,
        tasks: Mapping[str, NumberedTask],
        *,
        tail_tokens: int,
        seed: int,
    ) -> None:
        """Args as of `task_places.choose_task_places`; the nets are those that made the tree."""
        self._reader = reader
        self._tokenizer = tokenizer
        self._compactor = compactor
        self._node_encoder = node_encoder
        self._tasks = tasks
        self._tail_tokens = tail_tokens
        self._seed = seed
        self._sizes = block_sizes(reader)
        self._encoded: OrderedDict[bytes, PlantedSuperBlock] = OrderedDict()

    def question(self, place: TaskPlace, among: np.ndarray | None = None) -> Question:
        """The question of a place, its needles planted; in some of `among` alone, super-blocks, where that is given."""
        free = needle_places(self._sizes, place.first_block, place.stop_block, self._tail_tokens)
        if among is not None:
            free = np.intersect1d(free, among)
        sample = self._tasks[place.task].sample(self._seed, place.sample, num_needle_places=len(free))
        needles = sample.needles
        if place.depth_percent != TASK_DEPTH:
            needles = move_needles(needles, place.depth_percent / 100)
        chosen = choose_places(free, [needle.depth for needle in needles])
        replacements: dict[int, np.ndarray] = {}
        needed: list[int] = []
        for index, (needle, super_block) in enumerate(zip(needles, chosen.tolist(), strict=True)):
            first = super_block * BLOCKS_PER_SUPER_BLOCK
            tokens, counts = self._reader.tokens(first, BLOCKS_PER_SUPER_BLOCK)
            planted = plant(tokens, counts, needle.text, self._tokenizer, f"{sample.sample_id} {index}")
            replacements[super_block] = planted.tokens
            if needle.needed:
                needed += range(first + planted.first_block, first + planted.stop_block)
        encoded = self._encode(replacements)
        answers = self._tokenizer.encode_batch([f" {candidate}" for candidate in sample.candidates])
        return Question(
            sample,
            self.over(self._reader, encoded),
            encoded,
            np.array(sorted(needed), np.int64),
            self._tokenizer.encode(sample.query).astype(np.int64),
            [ids.astype(np.int64) for ids in answers],
            sample.candidates.index(sample.answer),
        )

    def over(self, reader: TreeReader, replaced: Mapping[int, PlantedSuperBlock]) -> PlantedReader:
        """The same planted over another version of the tree."""
        return plant_encoded(reader, self._node_encoder, replaced)

    def _encode(self, replacements: Mapping[int, np.ndarray]) -> dict[int, PlantedSuperBlock]:
        """What is encoded depends on the text alone, not on its place: each text goes through the net once."""
        keys = {index: hashlib.sha256(tokens.tobytes()).digest() for index, tokens in replacements.items()}
        fresh = {index: tokens for index, tokens in replacements.items() if keys[index] not in self._encoded}
        found = encode_replacements(self._reader, self._compactor, fresh)
        encoded = {index: found[index] if index in found else self._encoded[key] for index, key in keys.items()}
        for index, key in keys.items():
            self._encoded[key] = encoded[index]
            self._encoded.move_to_end(key)
        while len(self._encoded) > KEPT_SUPER_BLOCKS:
            self._encoded.popitem(last=False)
        return encoded
