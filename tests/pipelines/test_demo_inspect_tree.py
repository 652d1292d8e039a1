"""The other jobs on what compact made: reading back, looking, verifying, rebuilding."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

import pipelines.compact as compact_job
import pipelines.demo as demo_job
import pipelines.inspect as inspect_job
import pipelines.tree_rebuild as rebuild_job
import pipelines.tree_verify as verify_job
from cluster.config import InspectJob, ReadBackConfig, TreeRebuildGistsJob, TreeVerifyJob
from cluster.demo_config import DemoFocusConfig, DemoJob
from cluster.errors import ConfigError, ContextNotFoundError, CorruptTreeError, IncompatibleTreeError
from storage.store import Store
from tests.actors.helpers import assert_same_tree
from tests.pipelines.conftest import JobFactory

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_demo_reads_back_and_resumes(make_job: JobFactory, capsys: pytest.CaptureFixture[str]) -> None:
    compact = make_job("demo", "demo")
    job = DemoJob(
        **{field.name: getattr(compact, field.name) for field in fields(compact)},
        read_back=ReadBackConfig(num_samples=4, history_tokens=256, horizon_tokens=32),
        focus=DemoFocusConfig(num_places=4, history_tokens=1024, budget=128),
        question="Which words stand in the corpus?",
    )
    demo_job.run(job)
    folder = job.run.dir / "demo"
    report = json.loads((folder / "report.json").read_text())
    assert report["nll_none"] > 0
    assert report["gistnet_trained"] is False
    assert {"tree.png", "read_back.png", "focus.png", "focus.html"} <= {path.name for path in folder.iterdir()}
    assert report["question"] == job.question
    compared = {entry["condition"] for entry in report["focus"]}
    assert set(job.focus.rivals) == compared
    printed = capsys.readouterr().out
    assert f"> {job.question}\n{report['answer'][:20]}" in printed
    assert f"--reads '[{job.store.context}]'" in printed
    assert "UNTRAINED" in printed
    assert "mlflow ui" in printed
    demo_job.run(job)
    again = json.loads((folder / "report.json").read_text())
    assert again["new_tokens"] == 0
    assert again["nll_gists"] == report["nll_gists"]


@pytest.mark.slow
def test_demo_says_when_documents_are_too_short(make_job: JobFactory) -> None:
    compact = make_job("short", "short")
    job = DemoJob(
        **{field.name: getattr(compact, field.name) for field in fields(compact)},
        read_back=ReadBackConfig(history_tokens=65536),
    )
    with pytest.raises(ConfigError, match=r"read_back\.history_tokens"):
        demo_job.run(job)


def test_inspect_shows_store_context_and_node(make_job: JobFactory, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job()
    compact_job.run(job)
    capsys.readouterr()
    look = InspectJob(store=job.store, base_lm=job.base_lm, json=True)

    inspect_job.run(replace(look, all=True))
    assert [row["context"] for row in json.loads(capsys.readouterr().out)["contexts"]] == ["c"]

    inspect_job.run(look)
    shown = json.loads(capsys.readouterr().out)
    assert shown["num_documents"] == 7
    assert shown["nodes_by_lod"][0] * 32 >= shown["num_tokens"]

    inspect_job.run(replace(look, node="1:0"))
    node = json.loads(capsys.readouterr().out)
    assert node["documents"][0]["meta"]["uri"] == "corpus/doc0.txt"
    text = (Path(job.corpus.paths[0]) / "doc0.txt").read_text()
    assert text.startswith(node["text"])
    assert node["text"]

    inspect_job.run(replace(look, json=False, node="2:0"))
    assert "corpus/doc0.txt" in capsys.readouterr().out

    for wrong in ("9:0", "1:99999999", "top"):
        with pytest.raises(ConfigError, match="node"):
            inspect_job.run(replace(look, node=wrong))
    with pytest.raises(ContextNotFoundError, match="it has: c"):
        inspect_job.run(replace(look, store=replace(job.store, context="other")))


def test_verify_finds_damage(make_job: JobFactory, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job()
    compact_job.run(job)
    verify_job.run(TreeVerifyJob(store=job.store))
    shard = next(Store(job.store.root).folder("c").glob("segments/*/lod1/gists/c.0.0"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    with pytest.raises(CorruptTreeError, match="problem"):
        verify_job.run(TreeVerifyJob(store=job.store, json=True))
    assert "lod1/gists" in json.loads(capsys.readouterr().out)["problems"][0]


def test_rebuild_gives_what_compacting_with_the_other_net_gives(make_job: JobFactory) -> None:
    job = make_job()
    compact_job.run(job)
    other = replace(job.gistnet, kind="block", num_vectors=2)
    fresh = replace(make_job("fresh", "fresh"), gistnet=other)
    compact_job.run(fresh)

    store = Store(job.store.root)
    with store.open_reader("c") as pinned:
        old = pinned.read("gists", 1, [0, 5])
        rebuild = TreeRebuildGistsJob(
            run=replace(job.run, name="rebuild"),
            base_lm=job.base_lm,
            gistnet=other,
            store=job.store,
            compaction=job.compaction,
        )
        rebuild_job.run(rebuild)
        assert pinned.read("gists", 1, [0, 5]).equal(old)
        assert pinned.version.encoding.gistnet_id == "windowed-m1-l2"
    with store.open_reader("c") as new, store.open_reader("fresh") as expected:
        assert new.version.encoding.gistnet_id == "block-m2"
        assert_same_tree(new, expected)
    verify_job.run(TreeVerifyJob(store=job.store))
    # From now on the context takes documents of the new net, and of no other.
    with pytest.raises(IncompatibleTreeError):
        compact_job.run(job)
    compact_job.run(replace(fresh, store=job.store))
