"""Levels above the blocks: complete, in any order of work, and from any point of interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.follower import FollowerSpec, LevelFollower, next_missing
from cluster.config import BaseLMConfig
from cluster.errors import DiskFullError
from storage.contract import Ack, DocumentMeta, SpanWrite, Version
from tests.actors.helpers import (
    assert_same_tree,
    follow,
    ingest,
    make_compactor,
    make_documents,
    open_context,
    tiny_plan,
)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((), None),
        ((31,), None),
        ((32,), (2, 0, 1)),
        ((100, 2), (2, 2, 1)),
        ((1024, 32), (3, 0, 1)),
        ((1024, 32, 1), None),
        ((32768, 1024, 32), (4, 0, 1)),
    ],
)
def test_what_is_missing(
    tiny_lm_config: BaseLMConfig, tmp_path: Path, counts: tuple[int, ...], expected: object
) -> None:
    encoding = tiny_plan(tiny_lm_config, tmp_path).encoding
    assert next_missing(Version("c", "main", 1, encoding, 0, counts)) == expected


def test_levels_grow_without_a_maximum(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path, "last_token")
    writer = open_context(tmp_path, plan)
    num_blocks, dim = 33 * 1024, plan.gistnet.dim
    generator = torch.Generator().manual_seed(0)
    span = SpanWrite(
        DocumentMeta("long", "long"),
        0,
        np.zeros((num_blocks, 32), np.uint32),
        np.full(num_blocks, 32, np.uint8),
        {name: torch.randn(num_blocks, dim, generator=generator) for name in ("gists", "keys")},
        last=True,
    )
    writer.append([span])
    made = follow(writer, plan)
    counts = writer.version().level_counts
    assert len(counts) == 4
    assert counts[1:] == tuple(counts[0] // 32**n for n in range(1, len(counts)))
    assert made == sum(counts[1:])
    # At the last-token control, a node's gist is its last child's: down to the last token of its span.
    reader = writer.reader()
    top = reader.version.max_lod
    last_block = 32 ** (top - 1) - 1
    np.testing.assert_allclose(
        reader.read_node("gists", top, 0).float(), reader.read_node("gists", 1, last_block).float(), atol=1e-3
    )
    writer.close()


def test_an_interrupted_follower_goes_on(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    compactor = make_compactor(plan)
    documents = make_documents([6000])
    whole, broken = open_context(tmp_path / "whole", plan), open_context(tmp_path / "broken", plan)
    for writer in (whole, broken):
        ingest(writer, plan, compactor, documents, batch=16)
    follow(whole, plan)

    calls = 0

    def failing(lod: int, first: int, arrays: Mapping[str, np.ndarray]) -> Ack:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise DiskFullError("no space")
        return broken.put_nodes(lod, first, arrays)

    follower = LevelFollower(FollowerSpec(broken.folder, "c", 1), plan.gistnet, failing)
    with pytest.raises(DiskFullError):
        follower.advance()
    follower.advance()
    assert follower.advance() == 0
    assert_same_tree(whole.reader(), broken.reader())
    whole.close()
    broken.close()
