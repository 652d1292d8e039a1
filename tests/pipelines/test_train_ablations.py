"""Many trainings side by side: what is planned, what is refused, and the whole way on the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.training.checkpoints import LossLog
from cluster.ablations_config import AblationsConfig, TrainAblationsJob
from cluster.config import BaseLMConfig, RunConfig, TrackingConfig, validate_sections
from cluster.config_parser import parse_job
from cluster.environment import absolute_paths
from cluster.errors import ConfigError
from cluster.ray_runtime import RaySession
from pipelines.train_ablations import planned, run
from tests.actors.helpers import make_text

COMMON = {
    "base_lm.source": "tiny",
    "base_lm.dtype": "float32",
    "base_lm.device": "cpu",
    "gistnet.lm_layers": 2,
    "gistnet.key_layer": 1,
    "windows.window_tokens": 256,
    "windows.num_validation": 6,
    "objective.max_tail_blocks": 3,
    "training.num_steps": 3,
    "training.windows_per_step": 2,
    "training.threads_per_worker": 1,
    "training.validate_every_steps": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Path:
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "corpus").mkdir()
    for index in range(24):
        (folder / "corpus" / f"doc{index}.txt").write_text(make_text(index, 250))
    (folder / "recipe.yaml").write_text(
        f"corpus:\n  paths: [{folder / 'corpus'}]\n  split: train\n"
        f"windows:\n  folder: {folder / 'windows'}\nbase_lm:\n  cache_dir: {tiny_lm_config.cache_dir}\n"
    )
    return folder


def ablations(root: Path, groups: dict[str, dict[str, dict[str, Any]]], **fields: Any) -> TrainAblationsJob:
    config = AblationsConfig(**{"recipe": str(root / "recipe.yaml"), "common": COMMON, "groups": groups, **fields})
    return TrainAblationsJob(
        run=RunConfig(name="answer", dir=root / "runs"),
        tracking=TrackingConfig(enabled=False),
        ablations=config,
    )


def validate_and_run(job: TrainAblationsJob) -> int:
    """As the command line does."""
    validate_sections(job)
    return run(job)


def test_the_recipe_that_comes_along_can_be_trained(tmp_path: Path) -> None:
    words = ["--config", "configs/ablations.yaml", "--run.dir", str(tmp_path)]
    words += ["--ablations.overrides", "{training.num_steps: 7, training.warmup_steps: 2}"]
    words += ["--ablations.seeds", "[0, 3]"]
    job = absolute_paths(parse_job(TrainAblationsJob, words))
    validate_sections(job)
    variants = planned(job)
    assert [(v.name, v.seed) for v in variants[:2]] == [("default", 0), ("nll", 0)]
    assert len(variants) == 2 * len({v.name for v in variants})
    assert {v.job.training.num_steps for v in variants if "training.num_steps" not in v.changes} == {7}
    assert {v.job.training.warmup_steps for v in variants} == {2}
    assert {v.job.windows.num_validation for v in variants} == {64}, "what is common stays"
    for variant in variants:
        assert variant.job.training.seed == variant.job.gistnet.seed == variant.seed
        assert variant.job.training.registered_name == ""
        assert variant.job.run.dir == tmp_path / "ablations"
    assert len({v.job.run.name for v in variants}) == len(variants)


def test_nets_come_before_what_begins_with_them(root: Path) -> None:
    groups = {
        "one": {"later": {"gistnet.path": "variant:sooner"}, "third": {"objective.kl_share": 0.5}},
        "two": {"sooner": {"objective.repeat_share": 1.0}},
    }
    variants = planned(ablations(root, groups))
    assert [v.name for v in variants] == ["default", "sooner", "later", "third"]
    assert variants[1].job.objective.repeat_share == 1
    assert Path(variants[2].job.gistnet.path) == variants[1].folder / "gistnet"
    only = replace(ablations(root, groups).ablations, only=["later"])
    assert [v.name for v in planned(replace(ablations(root, groups), ablations=only))] == ["default", "sooner", "later"]


@pytest.mark.parametrize(
    ("groups", "fields", "message"),
    [
        (
            {"g": {"a": {"objective.kl_shar": 0}}},
            {},
            "'a': unknown key 'objective.kl_shar'; did you mean 'objective.kl_",
        ),
        ({"g": {"a": {"objective.kl_share": 2}}}, {}, "'a': objective.kl_share must be from 0 to 1"),
        ({"g": {"a": {"objective.kl_share": "much"}}}, {}, "'a': objective.kl_share=much does not fit: .*a number"),
        ({"g": {"a": {"run.dir": "x"}}}, {}, "'a' sets run.dir; give these to the ablations as a whole"),
        ({"g": {"a": {"corpus.split": "all"}}}, {}, "'a': corpus.split must be train"),
        ({"g": {"a": {"gistnet.path": "variant:b"}}}, {}, "'a' begins with 'b', which is none of .*default, a"),
        (
            {"g": {"a": {"gistnet.path": "variant:b"}, "b": {"gistnet.path": "variant:a"}}},
            {},
            "begin with each other: a <- b <- a",
        ),
        ({"g": {"a": {"training": {"num_steps": 1}}}}, {}, "'training' holds the mapping .*write dotted keys"),
        ({"g": {"a": {}}, "h": {"a": {}}}, {}, "names 'a' twice"),
        ({"g": {"default": {}}}, {}, "names 'default' twice"),
        ({"g": {"a b": {}}}, {}, "holds 'a b'; letters"),
        ({"g": {"inner": {}}}, {"only": ["iner"]}, "only names 'iner'; did you mean 'inner'"),
        ({}, {}, "groups is empty"),
        ({"g": {"a": {}}}, {"seeds": []}, "at least one seed"),
        ({"g": {"a": {}}}, {"recipe": "nowhere.yaml"}, "nowhere.yaml is no file"),
        ({"g": {"a": {}}}, {"common": {"trainin.num_steps": 3}}, "unknown key 'trainin.num_steps'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    root: Path, groups: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_and_run(ablations(root, groups, **fields))
    assert not (root / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_variants_are_trained_compared_and_not_trained_again(
    root: Path, ray_cluster: RaySession, capsys: pytest.CaptureFixture[str]
) -> None:
    groups: dict[str, dict[str, dict[str, Any]]] = {
        "inner": {"inner-1": {"objective.inner_steps": 1, "objective.inner_share": 1.0}},
        "odd": {
            "deep": {"objective.states_share": 1.0, "objective.states_layers": [99]},
            "behind-it": {"gistnet.path": "variant:deep"},
            "other-tails": {"objective.max_tail_blocks": 2},
        },
        "warm": {"goes-on": {"gistnet.path": "variant:inner-1"}},
    }
    job = ablations(root, groups)
    assert run(job) == 2, "the code of the first that failed"
    folder = root / "runs/answer"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    found = {entry["variant"]: entry for entry in report["variants"]}
    assert list(found) == ["default", "inner-1", "deep", "behind-it", "other-tails", "goes-on"]
    assert "beyond the 4 layers" in found["deep"]["failure"]
    assert found["behind-it"]["failure"] == "it begins with 'deep', which failed"
    for name in ("default", "inner-1", "other-tails", "goes-on"):
        assert found[name]["failure"] == ""
        line = LossLog(folder / f"{name}-seed0/fidelity.jsonl").read()[-1]
        content = (line["shuffled"][0] - line["own"][0], found[name]["content_nats"]["0 to 31"]["mean"])
        assert content[0] == pytest.approx(content[1], abs=1e-9)
        assert found[name]["num_parameters"] > 1000
    assert found["goes-on"]["num_steps_before"] == 3
    over = {name: "content_nats_over_default" in entry for name, entry in found.items()}
    assert [name for name, is_compared in over.items() if is_compared] == ["inner-1", "goes-on"]
    difference = found["inner-1"]["gap_to_full_over_default"]["all"]
    means = [found[name]["gap_to_full"]["all"]["mean"] for name in ("inner-1", "default")]
    assert difference["mean"] == pytest.approx(means[0] - means[1])
    # Paired, the error is far below that of either.
    assert 0 < difference["standard_error"] < 0.5 * found["default"]["gap_to_full"]["all"]["standard_error"]
    assert all(line["inner"] > 0 for line in LossLog(folder / "inner-1-seed0/losses.jsonl").read())
    assert "inner" not in LossLog(folder / "default-seed0/losses.jsonl").read()[0]
    text = (folder / "report.md").read_text()
    assert "objective.inner_steps=1, objective.inner_share=1.0" in text
    assert "behind other raw tails" in text
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"curves-inner.png", "curves-odd.png", "curves-warm.png", "differences.png"}
    assert capsys.readouterr().err.count("[2/6] inner-1, seed 0") == 1

    # Another seed: what is there is read, what is not is trained.
    times = {name: (folder / f"{name}-seed0/report.json").stat().st_mtime_ns for name in ("default", "inner-1")}
    run(ablations(root, {"inner": groups["inner"]}, seeds=[0, 1]))
    assert times == {name: (folder / f"{name}-seed0/report.json").stat().st_mtime_ns for name in times}
    report = json.loads((folder / "report.json").read_text())
    assert [(e["variant"], e["seed"]) for e in report["variants"]] == [
        ("default", 0),
        ("inner-1", 0),
        ("default", 1),
        ("inner-1", 1),
    ]
    assert "mean of all seeds" in (folder / "report.md").read_text()
    # Another number of steps under the same name is another run.
    longer = ablations(root, {"inner": groups["inner"]}, common={**COMMON, "training.num_steps": 4})
    assert run(longer) == 2
    report = json.loads((folder / "report.json").read_text())
    assert all("training.num_steps: 3 then, 4 now" in entry["failure"] for entry in report["variants"])
