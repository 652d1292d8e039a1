"""`evaluate tasks` as a user runs it: on a compacted corpus, again, interrupted, and on what cannot work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines.evaluate_tasks as tasks_job
import ray_job
from cluster.cli import main
from cluster.config import BaseLMConfig, GistNetConfig, RunConfig, StoreConfig
from cluster.config_parser import to_yaml
from cluster.errors import ConfigError, ContextNotFoundError, IncompatibleTreeError
from cluster.evaluation_config import RetrievalConfig
from cluster.task_evaluation_config import EvaluateTasksJob, TaskEvaluationConfig
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context, tiny_plan

TasksJobFactory = Callable[..., EvaluateTasksJob]

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> StoreConfig:
    """A context of two documents of about 8,000 tokens."""
    root = tmp_path_factory.mktemp("store")
    plan = tiny_plan(tiny_lm_config, root)
    with open_context(root, plan) as writer:
        ingest(writer, plan, make_compactor(plan), make_documents([1200, 1100]))
        follow(writer, plan)
    return StoreConfig(root=root, context="c")


@pytest.fixture
def make_tasks_job(tmp_path: Path, tiny_lm_config: BaseLMConfig, store: StoreConfig) -> TasksJobFactory:
    """A job of few questions; keyword arguments replace fields of its evaluation."""

    def make(name: str, **evaluation: Any) -> EvaluateTasksJob:
        fields: dict[str, Any] = {
            "tasks": ["single_words", "recall_paraphrased"],
            "num_samples": 2,
            "history_tokens": [1024, 4096],
            "budgets": [600],
            "rivals": ["none", "full", "needles", "recency", "bm25"],
            "forms": ["raw"],
            "retrieval": RetrievalConfig(fusion=["bm25", "dense"]),
            "tail_tokens": 64,
            "generate": False,
            "num_workers": 1,
        }
        return EvaluateTasksJob(
            run=RunConfig(name=name, dir=tmp_path / "runs"),
            base_lm=tiny_lm_config,
            gistnet=GistNetConfig(lm_layers=2),
            store=store,
            evaluation=TaskEvaluationConfig(**{**fields, **evaluation}),
        )

    return make


def numbers(job: EvaluateTasksJob) -> Any:
    return json.loads((job.run.dir / job.run.name / "report.json").read_text())["cells"]


def samples_file(job: EvaluateTasksJob) -> Path:
    (file,) = (job.run.dir / job.run.name).glob("samples-*.jsonl")
    return file


def timeless(lines: str) -> list[Any]:
    records = sorted((json.loads(line) for line in lines.splitlines()), key=lambda record: record["place"]["number"])
    for record in records:
        for measured in record["measured"]:
            del measured["decide_s"], measured["read_s"]
    return records


def test_through_the_door(make_tasks_job: TasksJobFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_tasks_job(
        "tasks",
        tasks=["single_words", "variable_tracking"],
        history_tokens=[0],
        depth_percents=[0, 100],
        forms=["raw", "overlay"],
        rivals=["needles", "uniform", "random", "dense", "fusion", "oracle", "recency/strict@global"],
        generate=True,
    )
    recipe = tmp_path / "tasks.yaml"
    recipe.write_text(to_yaml(job))
    assert main(ray_job.JOBS, ["evaluate", "tasks", "--config", str(recipe)]) == 0
    printed = capsys.readouterr().out
    folder = job.run.dir / "tasks"
    report = (folder / "report.md").read_text()
    assert "accuracy among candidates" in printed
    assert "variable_tracking, budget 600 slots (chance: 12%)" in report
    assert "exact match" in report
    plots = {"depths-needles-600.png", "depths-oracle-overlay-600.png", "depths-recency-strict@global-600.png"}
    assert plots <= {path.name for path in folder.iterdir()}
    cells = {(cell["condition"], cell["task"]): cell for cell in numbers(job)}
    assert cells["needles", "single_words"]["recall"] == 1
    assert cells["needles", "single_words"]["num_samples"] == 4
    assert cells["oracle/raw", "variable_tracking"]["num_infeasible"] <= 4
    assert "exact" in cells["needles", "single_words"]


def test_again_and_interrupted_give_the_same_numbers(make_tasks_job: TasksJobFactory) -> None:
    whole = make_tasks_job("whole", num_workers=2)
    tasks_job.run(whole)
    lines = samples_file(whole).read_text()
    tasks_job.run(whole)
    assert samples_file(whole).read_text() == lines, "nothing is measured twice"
    full = [cell for cell in numbers(whole) if cell["condition"] == "full"]
    assert {cell["history_tokens"] for cell in full} == {1024}, "4,096 tokens are more than the model was trained for"

    cut = make_tasks_job("cut")
    folder = cut.run.dir / "cut"
    folder.mkdir()
    kept = lines.splitlines(keepends=True)
    # As a process killed in the middle of a line leaves it.
    (folder / samples_file(whole).name).write_text("".join(kept[:3]) + kept[3][:100])
    tasks_job.run(cut)
    assert timeless(samples_file(cut).read_text()) == timeless(lines)

    def untimed(job: EvaluateTasksJob) -> Any:
        return str(numbers(job))

    assert untimed(cut) == untimed(whole)
    more = make_tasks_job("whole", num_samples=3)
    tasks_job.run(more)
    assert timeless(samples_file(more).read_text())[: len(kept)] == timeless(lines), "questions are added, none changed"


def test_what_cannot_work_is_said_before_anything_starts(make_tasks_job: TasksJobFactory) -> None:
    job = make_tasks_job("wrong")
    with pytest.raises(ContextNotFoundError):
        tasks_job.run(replace(job, store=replace(job.store, context="other")))
    with pytest.raises(IncompatibleTreeError):
        tasks_job.run(replace(job, gistnet=GistNetConfig(kind="block")))
    with pytest.raises(ConfigError, match="no task 'riddle'"):
        tasks_job.run(make_tasks_job("wrong", tasks=["riddle"]))
    with pytest.raises(ConfigError, match="no rival 'rerank'"):
        tasks_job.run(make_tasks_job("wrong", rivals=["rerank"]))
    with pytest.raises(
        ConfigError, match="no form 'constant'; there are: raw, late, late_ranked, late64, overlay, strict"
    ):
        tasks_job.run(make_tasks_job("wrong", rivals=["recency/constant"]))
    with pytest.raises(ConfigError, match="rival 'needles' has neither forms nor policies"):
        tasks_job.run(make_tasks_job("wrong", rivals=["needles/raw"]))
    with pytest.raises(ConfigError, match="histories"):
        tasks_job.run(make_tasks_job("wrong", history_tokens=[1024 * 1024]))
    with pytest.raises(ConfigError, match=r"evaluation.budgets holds 200; a question"):
        tasks_job.run(make_tasks_job("wrong", budgets=[200], forms=["overlay"]))
    # 128 gists stand for 4,096 slots, whoever shows them.
    smallest = [
        refused(make_tasks_job("wrong", budgets=[150], forms=forms, rivals=named))
        for forms, named in (
            (["raw"], ["bm25"]),
            (["overlay"], ["bm25/raw"]),
            (["overlay"], ["bm25"]),
            (["raw"], ["bm25/overlay"]),
        )
    ]
    assert smallest[0] == smallest[1] < smallest[2] == smallest[3]


def refused(job: EvaluateTasksJob) -> int:
    """The budget a job says it needs."""
    with pytest.raises(ConfigError, match=r"evaluation.budgets holds 150; a question") as caught:
        tasks_job.run(job)
    return int(re.findall(r"need (\d+)\.", str(caught.value))[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"num_samples": 1}, "num_samples"),
        ({"history_tokens": []}, "at least one length"),
        ({"history_tokens": [1000]}, "multiple of 1024"),
        ({"depth_percents": [101]}, "from 0 to 100"),
        ({"tail_tokens": 40}, "multiple of 32"),
        ({"budgets": []}, "at least one budget"),
        (
            {"retrieval": RetrievalConfig(dense_query_tokens=0)},
            "evaluation.retrieval.dense_query_tokens must be from 1",
        ),
        ({"oracle_pool": 0}, "oracle_pool"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_values_that_cannot_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskEvaluationConfig(**wrong).validate()
