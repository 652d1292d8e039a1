"""From a corpus and a dictionary to a net whose keys find what questions ask for, on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import BaseLMConfig, CorpusConfig, GistNetConfig, RunConfig, TrackingConfig, validate_sections
from cluster.errors import ConfigError, CorpusError
from cluster.key_training_config import RoutingKeysConfig, TrainKeysJob
from cluster.ray_runtime import RaySession
from models.gistnet import GistNet, build_gistnet
from models.model_files import resolve_model
from pipelines.train_keys import run
from tests.pipelines.training_jobs import write_corpus
from tests.storage.corpus.wordnet_files import write_wordnet

JobFactory = Callable[..., TrainKeysJob]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_corpus(folder)
    write_wordnet(folder / "wordnet")
    return folder


@pytest.fixture(scope="module")
def make_job(root: Path, tiny_lm_config: BaseLMConfig) -> JobFactory:
    """A job; keyword arguments replace fields of its section of keys."""

    def make(name: str, **keys: Any) -> TrainKeysJob:
        fields: dict[str, Any] = {
            "dim": 16,
            "dictionary": str(root / "wordnet"),
            "num_facts": 8,
            "window_tokens": 256,
            "windows_folder": root / "windows",
            "windows_per_shard": 4,
            "facts_per_window": 1,
            "num_validation_windows": 4,
            "num_epochs": 12,
            "num_workers": 1,
            "registered_name": "",
        }
        return TrainKeysJob(
            run=RunConfig(name=name, dir=root / "runs"),
            tracking=TrackingConfig(enabled=False),
            corpus=CorpusConfig(paths=[str(root / "corpus")], split="train"),
            base_lm=tiny_lm_config,
            gistnet=GistNetConfig(lm_layers=2, key_layer=1),
            routing_keys=RoutingKeysConfig(**{**fields, **keys}),
        )

    return make


def test_a_run_leaves_a_net_with_the_gists_it_began_with(
    root: Path, make_job: JobFactory, tiny_lm_config: BaseLMConfig, ray_cluster: RaySession
) -> None:
    job = make_job("whole")
    run(job)
    folder = root / "runs/whole"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["num_facts"] == 8
    # Eight facts and a random model teach nothing of other things; of these they do.
    for kind in ("literal", "described"):
        assert report["last_step"][kind] < 0.8 * report["first_step"][kind]
        for shares in (*(found[kind] for found in report["validation"].values()), report["minilm"][kind]):
            assert 0 <= shares["recall_of_all@8"] <= shares["recall@8"] <= 1
            assert shares["recall@1"] <= shares["recall@4"] <= shares["recall@8"]
    assert set(report["validation"]) == {"before", "after"}
    net = GistNet.load(folder / "gistnet")
    assert net.digest() == report["digests"]["gistnet"]
    assert (net.key_dim, net.key_layer, net.spec.key_metric) == (16, 2, "cosine")
    begun = build_gistnet(job.gistnet, resolve_model(tiny_lm_config))
    trained = dict(net.named_parameters())
    for name, weight in begun.named_parameters():
        assert trained[name].equal(weight), name
    assert net.hidden_mean.any()  # an untrained net's are measured, and take part in no gist yet
    assert net.digest() in (folder / "gistnet/README.md").read_text()
    assert (folder / "keys.png").stat().st_size > 10_000
    assert not (folder / "states").exists()


@pytest.mark.slow
def test_what_was_read_before_a_stop_is_not_read_again(
    root: Path, make_job: JobFactory, ray_cluster: RaySession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: Any) -> Any:
        raise KeyboardInterrupt

    job = make_job("stopped")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.train_keys.start_trainer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    shards = sorted((root / "runs/stopped/states").rglob("*.safetensors"))
    written = [path.stat().st_mtime_ns for path in shards]
    assert len(shards) == 3  # two to train on, one to validate

    def look(*args: Any) -> Any:
        assert [path.stat().st_mtime_ns for path in shards] == written
        return stop(*args)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.train_keys.start_trainer", look)
        with pytest.raises(KeyboardInterrupt):
            run(job)
        # Another seed's facts stand elsewhere.
        with pytest.raises(AssertionError):
            run(replace(job, routing_keys=replace(job.routing_keys, seed=1)))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"dim": 1000}, ConfigError, "routing_keys.dim=1000"),
        ({"layer": 3}, ConfigError, "routing_keys.layer=3"),
        ({"dictionary": "/nowhere"}, CorpusError, "/nowhere is no folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    root: Path, make_job: JobFactory, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(make_job("refused", **keys))
    assert not (root / "runs/refused").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"window_tokens": 300}, "window_tokens=300"),
        ({"facts_per_window": 5}, "facts_per_window=5"),
        ({"pairs_share": 1.5}, "pairs_share"),
        ({"registered_name": "a b"}, "registered_name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_named(make_job: JobFactory, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_sections(make_job("invalid", **keys))


def test_a_corpus_without_a_split_is_refused(make_job: JobFactory) -> None:
    job = make_job("invalid")
    with pytest.raises(ConfigError, match=r"corpus\.split=train"):
        validate_sections(replace(job, corpus=replace(job.corpus, split="all")))
