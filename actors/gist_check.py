"""Whether a tree's gists are what its net makes of its tokens.

Checksums say that bytes are those that were written. That they were the right ones is seen only by making them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from actors.evaluation.states import has_tokens
from actors.gist_maker import GistMaker
from cluster.config import TOKENS_PER_BLOCK as K
from storage.codec import decode_array
from storage.tree.reader import ContextReader

LARGEST_ERROR = 0.1
"""Relative L2 error of a node. Other threads, batches or machines round otherwise, up to hundredths in bfloat16; gists
of other tokens differ by about 1."""


@dataclass
class LevelCheck:
    """Nodes of one level that were made anew."""

    lod: int
    num_nodes: int = 0
    num_left_out: int = 0
    """Nodes that cannot be made anew: they, or what their windows reach into, have no tokens any more."""
    num_equal: int = 0
    """Nodes that are the same bit for bit."""
    worst_error: float = 0.0
    """Largest relative L2 error of a vector."""
    problems: list[str] = field(default_factory=list)


def check_gists(
    reader: ContextReader,
    maker: GistMaker,
    num_groups: int,
    seed: int,
    on_group: Callable[[], None] = lambda: None,
) -> list[LevelCheck]:
    """Make groups of 32 nodes of every level anew and compare them. Groups of LOD1 beside pruned tokens are left out.

    Args:
        reader: of a version whose bytes are sound.
        maker: the net of its encoding.
        num_groups: of each level, drawn at random; all where there are fewer.
        seed: of the draw.
        on_group: called after each.

    Raises:
        CorruptTreeError: tokens or children that cannot be read.
    """
    rng = np.random.default_rng(seed)
    checks = []
    for lod, groups in enumerate(_groups(reader), start=1):
        num_nodes = reader.version.num_nodes(lod)
        makeable = int(np.minimum(K, num_nodes - groups * K).sum())
        check = LevelCheck(lod, num_left_out=num_nodes - makeable)
        for group in np.sort(rng.permutation(groups)[:num_groups]).tolist():
            first = group * K
            count = min(K, num_nodes - first)
            _compare(reader, maker, check, first, count)
            on_group()
        checks.append(check)
    return checks


def _groups(reader: ContextReader) -> list[np.ndarray]:
    """By level from LOD1, groups that can be made."""
    version = reader.version
    tokens = has_tokens(reader)
    padded = np.ones((2 + -(-len(tokens) // K)) * K, bool)
    padded[K : K + len(tokens)] = tokens
    whole = padded.reshape(-1, K).min(axis=1)
    # The windows that a group's gists are made of reach into the groups beside it.
    lowest = np.flatnonzero(whole[:-2] & whole[1:-1] & whole[2:])
    return [lowest, *(np.arange(-(-version.num_nodes(lod) // K)) for lod in range(2, version.max_lod + 1))]


def _compare(reader: ContextReader, maker: GistMaker, check: LevelCheck, first: int, count: int) -> None:
    stored = reader.stored_arrays(check.lod, first, count)
    made = maker.nodes(reader, check.lod, first, count)
    equal = np.ones(count, bool)
    errors = np.zeros(count)
    for spec in reader.version.encoding.arrays:
        names = [array.name for array in spec.stored()]
        for name in names:
            equal &= (stored[name].reshape(count, -1) == made[name].reshape(count, -1)).all(axis=1)
        held, anew = (
            decode_array(spec, {name: of[name].copy() for name in names}).float().reshape(count, -1)
            for of in (stored, made)
        )
        norm = torch.linalg.vector_norm(anew, dim=1).clamp(min=1e-6)
        errors = np.maximum(errors, (torch.linalg.vector_norm(held - anew, dim=1) / norm).numpy())
    check.num_nodes += count
    check.num_equal += int(equal.sum())
    check.worst_error = max(check.worst_error, float(errors.max()))
    wrong = np.flatnonzero(errors > LARGEST_ERROR)
    if len(wrong):
        made_of = "tokens" if check.lod == 1 else "children"
        check.problems.append(
            f"{len(wrong)} of LOD{check.lod} nodes {first}-{first + count - 1}, the first is {first + int(wrong[0])}: "
            f"not what the net makes of their {made_of} (relative error up to {errors.max():.2f})"
        )
