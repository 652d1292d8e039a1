"""Gists that are not what the net makes of the tokens, though every checksum is right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import pipelines.tree_verify as verify_job
from actors.compactor import Compactor
from actors.gist_check import check_gists
from actors.gist_maker import GistMaker
from actors.packing import Packer, batched_windows
from actors.plan import CompactionPlan
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig, TreeVerifyJob
from cluster.errors import CorruptTreeError, IncompatibleTreeError
from storage.check import check_context
from storage.contract import SpanWrite
from storage.store import Store
from storage.versions.curation import prune
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context, tiny_plan

LENGTHS = [900, 40, 1200, 3]


def ingest_wrong(root: Path, plan: CompactionPlan, compactor: Compactor, wrong_span: int) -> None:
    """A context in which one span has the gists of its blocks the other way round."""
    writer = open_context(root, plan)
    windows = batched_windows(Packer(plan.tokenizer, writer.marks).pack(make_documents(LENGTHS)), 4, lambda _: None)
    spans: list[SpanWrite] = [span for batch in windows for span in compactor.encode(batch)]
    span = spans[wrong_span]
    turned = {name: np.ascontiguousarray(np.asarray(values)[::-1]) for name, values in span.arrays.items()}
    spans[wrong_span] = dataclasses.replace(span, arrays=turned)
    writer.append(spans)
    writer.flush()
    follow(writer, plan)
    writer.close()


def test_what_was_compacted_is_made_again_bit_for_bit(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    with open_context(tmp_path, plan) as writer:
        ingest(writer, plan, make_compactor(plan), make_documents(LENGTHS))
        follow(writer, plan)
    with Store(tmp_path).open_reader("c") as reader:
        seen: list[int] = []
        checks = check_gists(reader, GistMaker(plan, 1), 1_000, 0, lambda: seen.append(1))
        assert [check.lod for check in checks] == [1, 2]
        assert [check.num_nodes for check in checks] == [reader.version.num_nodes(lod) for lod in (1, 2)]
        assert len(seen) == -(-reader.version.num_nodes(1) // 32) + 1
        one = check_gists(reader, GistMaker(plan, 1), 1, 0)
        assert one[0].num_nodes <= 32
    for check in checks:
        assert check.num_equal == check.num_nodes
        assert check.worst_error == 0.0
        assert not check.problems


def test_what_cannot_be_made_again_for_want_of_tokens_is_left_out(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    with open_context(tmp_path, plan) as writer:
        ingest(writer, plan, make_compactor(plan), make_documents([40, 2000]))
        follow(writer, plan)
        num_groups = -(-writer.version().num_blocks // 32)
        assert num_groups > 4
        # The second document begins inside the first group, so windows lie across groups.
        prune(writer, [(70, 1)], keep_until=1e12)
        with writer.reader() as reader:
            lowest, upper = check_gists(reader, GistMaker(plan, 1), 1_000, 0)
            expected = reader.version.num_nodes(1) - 3 * 32
    assert lowest.num_nodes == lowest.num_equal == expected
    assert (lowest.num_left_out, upper.num_left_out) == (3 * 32, 0)
    assert upper.num_equal == upper.num_nodes > 0
    assert not lowest.problems


def test_gists_of_other_tokens_are_found(
    tmp_path: Path, tiny_lm_config: BaseLMConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny_plan(tiny_lm_config, tmp_path)
    ingest_wrong(tmp_path, plan, make_compactor(plan), wrong_span=1)
    assert not check_context(Store(tmp_path), "c").problems, "every byte is as it was written"
    job = TreeVerifyJob(
        store=StoreConfig(root=tmp_path, context="c"),
        base_lm=tiny_lm_config,
        gistnet=GistNetConfig(lm_layers=2),
        gists=1_000,
        json=True,
    )
    with pytest.raises(CorruptTreeError, match="its net does not make of its tokens"):
        verify_job.run(job)
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    (problem,) = report["problems"]
    assert "of LOD1 nodes 32-63, the first is 32: not what the net makes of their tokens" in problem
    lowest, upper = report["gists"]
    assert 0 < lowest["num_nodes"] - lowest["num_equal"] <= 32
    assert upper["num_equal"] == upper["num_nodes"], "they are made of the gists that are there"

    verify_job.run(dataclasses.replace(job, gists=0))
    with pytest.raises(IncompatibleTreeError, match="Give the net that made it"):
        verify_job.run(dataclasses.replace(job, gistnet=GistNetConfig(kind="block")))
