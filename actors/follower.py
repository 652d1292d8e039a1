"""The follower: LOD2 and above, made behind the commits as sibling groups complete.

It keeps no state of its own. What is missing follows from the levels' counts, so it goes on wherever it, or the job,
was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.ray_calls import CALL_TIMEOUT_S, get_or_raise
from models.gistnet import GistNet
from models.node_encoder import NodeEncoder
from storage.codec import encode_arrays
from storage.contract import Ack, Version
from storage.schema import GISTS, KEYS
from storage.tree.reader import ContextReader
from storage.tree.writer import MAIN_BRANCH

GROUPS_AT_A_TIME = 64
"""Sibling groups read and written at once: about 5 MB at d = 576 with keys."""

PutNodes = Callable[[int, int, Mapping[str, np.ndarray]], Ack]


def next_missing(version: Version) -> tuple[int, int, int] | None:
    """`(lod, first, count)` of the lowest level whose children are complete and that is not; None when all are."""
    lod = 2
    while version.num_nodes(lod - 1) >= K:
        have, possible = version.num_nodes(lod), version.num_nodes(lod - 1) // K
        if have < possible:
            return lod, have, possible - have
        lod += 1
    return None


@dataclass(frozen=True)
class FollowerSpec:
    """Whose levels are followed."""

    folder: Path
    context: str
    num_threads: int
    encoding_id: int | None = None
    """An encoding under construction; None follows the branch's own."""
    branch: str = MAIN_BRANCH


class LevelFollower:
    """Plain class; `FollowerActor` hosts it on the store's machine, where it reads the context directly."""

    def __init__(self, spec: FollowerSpec, gistnet: GistNet, put_nodes: PutNodes) -> None:
        """Follow a context; `put_nodes` hands nodes to its writer and returns when they are durable."""
        torch.set_num_threads(spec.num_threads)
        self._spec = spec
        self._encoder = NodeEncoder(gistnet)
        self._put_nodes = put_nodes

    def advance(self) -> int:
        """Make every node that can be made now; returns how many."""
        made = 0
        while True:
            # A fresh pin for every round: new blocks and new levels become visible.
            spec = self._spec
            with ContextReader(spec.folder, spec.context, spec.branch, encoding_id=spec.encoding_id) as reader:
                missing = next_missing(reader.version)
                if missing is None:
                    return made
                lod, first, count = missing
                for start in range(first, first + count, GROUPS_AT_A_TIME):
                    size = min(GROUPS_AT_A_TIME, first + count - start)
                    self._put_nodes(lod, start, encode_groups(self._encoder, reader, lod, start, size))
                    made += size


def encode_groups(
    encoder: NodeEncoder, reader: ContextReader, lod: int, first: int, count: int
) -> dict[str, np.ndarray]:
    """Nodes `[first, first + count)` of level `lod` >= 2 from their children, as stored bytes."""
    # Group by group: a group that is not sealed yet is one row of the journal, read once instead of 32 times.
    gists, keys = (
        torch.stack([reader.read_group(name, lod - 1, group) for group in range(first, first + count)]).float()
        for name in (GISTS, KEYS)
    )
    nodes = encoder.encode_nodes(gists.numpy(), keys.flatten(2).numpy(), lod)
    return encode_arrays(reader.version.encoding.arrays, {GISTS: nodes.gists, KEYS: nodes.keys}, count)


class FollowerActor:
    """Hosts a follower that writes through the store's actor; references as in `CompactorActor`."""

    def __init__(self, spec: FollowerSpec) -> None:
        self._spec = spec
        self._follower: LevelFollower | None = None

    def advance(self, gistnet_refs: list[Any], store: Any) -> int:
        """As `LevelFollower.advance`."""

        def put_nodes(lod: int, first: int, arrays: Mapping[str, np.ndarray]) -> Ack:
            return get_or_raise(store.put_nodes.remote(lod, first, arrays), CALL_TIMEOUT_S, f"storing LOD{lod} nodes")

        if self._follower is None:
            self._follower = LevelFollower(self._spec, ray.get(gistnet_refs[0]), put_nodes)
        return self._follower.advance()
