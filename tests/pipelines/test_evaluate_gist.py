"""`evaluate gist` as a user runs it: on a compacted corpus, again, after a kill, and on what cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.evaluate_gist as gist_job
import ray_job
from actors.evaluation.gist_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.samples import read_samples
from cluster.cli import main
from cluster.config import BaseLMConfig, GistNetConfig, RunConfig, StoreConfig, validate_sections
from cluster.config_parser import to_yaml
from cluster.errors import ConfigError, ContextNotFoundError, ModelError
from cluster.gist_evaluation_config import EvaluateGistJob, GistEvaluationConfig
from cluster.training_config import AdapterConfig
from models.adapter import SavedAdapter, fresh_adapter
from models.gistnet import ConstantGistNet, GistNetSpec
from models.model_files import resolve_model
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context, tiny_plan

ROOT = Path(__file__).parents[2]

GistJobFactory = Callable[..., EvaluateGistJob]

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> StoreConfig:
    """A context of four documents of 4,000 to 12,000 tokens, only one of which has more than 6,000."""
    root = tmp_path_factory.mktemp("store")
    plan = tiny_plan(tiny_lm_config, root)
    with open_context(root, plan) as writer:
        ingest(writer, plan, make_compactor(plan), make_documents([700, 550, 1600, 620]))
        follow(writer, plan)
    return StoreConfig(root=root, context="c")


@pytest.fixture
def make_gist_job(tmp_path: Path, tiny_lm_config: BaseLMConfig, store: StoreConfig) -> GistJobFactory:
    """A job of few places; keyword arguments replace fields of its evaluation."""

    def make(name: str, **evaluation: Any) -> EvaluateGistJob:
        fields: dict[str, Any] = {
            "num_places": 4,
            "horizon_tokens": 32,
            "max_per_document": 2,
            "gistnets": ["mean", "constant"],
            "num_workers": 2,
        }
        return EvaluateGistJob(
            run=RunConfig(name=name, dir=tmp_path / "runs"),
            base_lm=tiny_lm_config,
            gistnet=GistNetConfig(lm_layers=2),
            store=store,
            evaluation=GistEvaluationConfig(**{**fields, **evaluation}),
        )

    return make


def numbers(job: EvaluateGistJob) -> Any:
    return json.loads((job.run.dir / job.run.name / "report.json").read_text())["conditions"]


def samples_file(job: EvaluateGistJob) -> Path:
    (file,) = (job.run.dir / job.run.name).glob("samples-*.jsonl")
    return file


def test_through_the_door(make_gist_job: GistJobFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = ConstantGistNet(GistNetSpec("constant", dim=64, num_vectors=1))
    net.block_constant.data.normal_()
    net.save(tmp_path / "nets" / "learned")
    job = make_gist_job("gists", gistnets=["last_token", str(tmp_path / "nets" / "learned")])
    recipe = tmp_path / "gists.yaml"
    recipe.write_text(to_yaml(job))
    assert main(ray_job.JOBS, ["evaluate", "gist", "--config", str(recipe)]) == 0
    printed = capsys.readouterr().out
    folder = job.run.dir / "gists"
    report = (folder / "report.md").read_text()
    for table in (printed, report):
        assert "content_nats" in table
        assert "learned: own gists" in table
    assert "LOD1 gists of learned have collapsed" in report
    assert {"curve-lod1-tail64.png", "content-lod2-tail0.png"} <= {path.name for path in folder.iterdir()}
    by_name = {(entry["condition"], entry["lod"], entry["tail_tokens"]): entry for entry in numbers(job)}
    assert by_name["learned/own", 1, 0]["content_nats"] == 0
    assert by_name["full", 0, 0]["delta_nll"] == 0
    assert "recovered_fraction" not in by_name["none", 0, 0]
    assert len(by_name["tree/own", 1, 64]["delta_nll_by_position"]) == 31


def test_again_and_interrupted_give_the_same_numbers(make_gist_job: GistJobFactory) -> None:
    whole = make_gist_job("whole", num_places=6, gistnets=["mean"])
    gist_job.run(whole)
    lines = samples_file(whole).read_text()
    gist_job.run(whole)
    assert samples_file(whole).read_text() == lines, "nothing is measured twice"

    # As a process killed in the middle of a line leaves it, and with another number of workers.
    cut = make_gist_job("cut", num_places=6, gistnets=["mean"], num_workers=1)
    folder = cut.run.dir / "cut"
    folder.mkdir()
    kept = lines.splitlines(keepends=True)
    (folder / samples_file(whole).name).write_text("".join(kept[:2]) + kept[2][:100])
    gist_job.run(cut)
    assert numbers(cut) == numbers(whole)
    assert sorted(samples_file(cut).read_text().splitlines()) == sorted(lines.splitlines())

    more = make_gist_job("whole", num_places=8, gistnets=["mean"])
    gist_job.run(more)
    assert set(lines.splitlines()) < set(samples_file(more).read_text().splitlines()), "places are added, none changed"


@pytest.mark.slow
def test_with_an_adapter_all_but_the_full_text_is_read_otherwise(
    make_gist_job: GistJobFactory, tiny_lm_config: BaseLMConfig, tmp_path: Path
) -> None:
    fresh = fresh_adapter(resolve_model(tiny_lm_config), AdapterConfig(rank=2))
    assert fresh is not None
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        weights = {name: 0.2 * torch.randn(w.shape, generator=generator) for name, w in fresh.weights.items()}
        replace(fresh, weights=weights).save(folder)
    plain = make_gist_job("plain", num_workers=1)
    adapted = make_gist_job("adapted", num_workers=1)
    adapted = replace(adapted, base_lm=replace(adapted.base_lm, adapter=str(folders[0])))
    validate_sections(adapted)
    for job in (plain, adapted):
        gist_job.run(job)
    assert samples_file(plain).name != samples_file(adapted).name
    both = [read_measured(samples_file(job)) for job in (plain, adapted)]
    assert both[0].keys() == both[1].keys()
    for (number, name, lod, tail), nll in both[0].items():
        assert (both[1][number, name, lod, tail] == nll) == (name == "full"), (name, lod, tail)
    digest = SavedAdapter.load(folders[0]).digest()
    report = json.loads((adapted.run.dir / "adapted/report.json").read_text())
    assert report["digests"]["adapter"] == digest
    said = f"Everything but `full` was read with the adapter {folders[0]} (rank 2, sha256 {digest[:12]})"
    for page in ("report.md", "job.log"):
        assert said in (adapted.run.dir / "adapted" / page).read_text()
        assert "was read with the adapter" not in (plain.run.dir / "plain" / page).read_text()
    # Another adapter's numbers are other numbers.
    gist_job.run(replace(adapted, base_lm=replace(adapted.base_lm, adapter=str(folders[1]))))
    assert len(list((adapted.run.dir / "adapted").glob("samples-*.jsonl"))) == 2
    (folders[1] / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read .*again"):
        gist_job.run(replace(adapted, base_lm=replace(adapted.base_lm, adapter=str(folders[1]))))


def read_measured(path: Path) -> dict[tuple[int, str, int, int], list[float]]:
    """NLL by place and condition."""
    found = {}
    for place, measured in read_samples(path, Place, Measured):
        found |= {(place.number, one.name, one.lod, one.tail_tokens): one.nll for one in measured}
    return found


def test_jobs_that_have_no_use_for_an_adapter_refuse_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["compact", "--corpus.paths", "[docs]"], ["evaluate", "focus"], ["tree", "rebuild-gists"]):
        assert main(ray_job.JOBS, [*words, "--base_lm.adapter", "runs/x/adapter"]) == ConfigError.exit_code
        assert "base_lm.adapter='runs/x/adapter' would do nothing here" in capsys.readouterr().err


@pytest.mark.slow
def test_resumes_after_a_kill(make_gist_job: GistJobFactory, tmp_path: Path) -> None:
    whole = make_gist_job("whole", num_places=6)
    gist_job.run(whole)
    killed = make_gist_job("killed", num_places=6, num_workers=1)
    killed = replace(killed, ray=replace(killed.ray, address="local", num_cpus=1, object_store_memory_mb=100))
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(to_yaml(killed))
    process = subprocess.Popen(
        [sys.executable, "ray_job.py", "evaluate", "gist", "--config", str(recipe)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    folder = killed.run.dir / "killed"
    while time.monotonic() < deadline and not any(path.stat().st_size for path in folder.glob("samples-*.jsonl")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert samples_file(killed).read_text()
    gist_job.run(replace(killed, ray=whole.ray))
    assert numbers(killed) == numbers(whole)


def test_what_cannot_work_is_said_before_anything_starts(make_gist_job: GistJobFactory, tmp_path: Path) -> None:
    job = make_gist_job("wrong")
    with pytest.raises(ContextNotFoundError):
        gist_job.run(replace(job, store=replace(job.store, context="other")))
    with pytest.raises(ModelError, match="no GistNet at"):
        gist_job.run(make_gist_job("wrong", gistnets=[str(tmp_path / "nothing")]))
    with pytest.raises(ConfigError, match=r"history_tokens"):
        gist_job.run(make_gist_job("long", history_tokens=32768))
    with pytest.raises(ConfigError, match="another document"):
        gist_job.run(make_gist_job("one", history_tokens=6144))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lods": [3]}, "must hold 1, 2"),
        ({"history_tokens": 512}, "at least 1024"),
        ({"history_tokens": 1040}, "multiple of 32"),
        ({"history_tokens": 48, "lods": [1]}, "multiple of 32"),
        ({"tail_tokens": [40]}, "multiple of 32"),
        ({"tail_tokens": []}, "at least one"),
        ({"gistnets": ["mean", "mean"]}, "different"),
        ({"num_places": 1}, "num_places"),
    ],
)
def test_values_that_cannot_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GistEvaluationConfig(**wrong).validate()


def test_nets_are_named_so_that_they_are_told_apart(
    tmp_path: Path, tiny_lm_config: BaseLMConfig, store: StoreConfig
) -> None:
    plan = tiny_plan(tiny_lm_config, store.root)
    folders = [tmp_path / "a" / "net", tmp_path / "b" / "net", tmp_path / "tree"]
    for folder in folders:
        plan.gistnet.save(folder)
    names = ["mean", "windowed", *map(str, folders)]
    nets = gist_job.build_nets(names, GistNetConfig(lm_layers=2), plan)
    assert list(nets) == ["mean", "untrained_windowed", *map(str, folders)]
    assert nets["untrained_windowed"].digest() == nets[str(folders[0])].digest() == plan.gistnet.digest()
