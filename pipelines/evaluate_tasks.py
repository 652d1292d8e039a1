"""evaluate tasks: answers planted in a stored context, asked for behind it, and who shows the model what it needs.

Every rival answers the same questions with the same frozen model at equal slots, the question's own included. The
tree is not written to. Interrupted, the same command goes on with the questions that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.evaluation import rivals
from actors.evaluation.samples import sample_file_name
from actors.evaluation.task_evaluator import TaskEvaluatorSpec, task_conditions, tasks_of
from actors.evaluation.task_places import TaskPlace, choose_task_places, in_groups
from actors.evaluation.task_results import TaskResults, TaskSampleFile
from actors.plan import CompactionPlan, check_encoding, plan_models
from actors.tasks.sample import NumberedTask
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from cluster.run import JobRun
from cluster.task_evaluation_config import EvaluateTasksJob, TaskEvaluationConfig
from models.focus.history import History
from models.focus.working_context import smallest_budget
from pipelines.evaluation import depends_on, index_text, measure_missing, with_lensnet
from pipelines.task_report import overview_tables, plot_depths, task_tables
from storage.contract import TreeReader
from storage.store import Store


def run(job: EvaluateTasksJob) -> None:
    """Choose places, ask every question of every rival, report."""
    tasks = tasks_of(job.evaluation.tasks)
    task_conditions(job.evaluation)
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    config = with_lensnet(job.evaluation, plan)
    check_encoding(plan, job.store)
    store = Store(job.store.root)
    with (
        store.open_reader(job.store.context, job.store.version) as reader,
        JobRun.start("evaluate tasks", job) as job_run,
    ):
        places = choose_task_places(
            reader,
            tasks,
            config.num_samples,
            config.history_tokens,
            config.depth_percents,
            tail_tokens=config.tail_tokens,
            seed=config.seed,
        )
        check_question_budgets(job.evaluation, plan, reader, places, tasks)
        job_run.log_digests(plan.digests())
        job_run.log.info(
            "%d questions of %d tasks at histories of %s slots",
            len(places),
            len(tasks),
            ", ".join(f"{length:,}" for length in sorted({place.history_tokens for place in places})),
        )
        index_text(job.store, plan, job_run)
        compactor = plan.compactor_spec(config.threads_per_worker, 1)
        spec = TaskEvaluatorSpec(plan.base_lm, compactor, job.store, reader.version.seq, config)
        depended = depends_on(plan, job.store, spec.seq, config, but=("num_samples",))
        with TaskSampleFile(job_run.folder / sample_file_name(depended)) as samples:
            measure_missing(
                job_run,
                samples,
                places,
                lambda missing: in_groups(missing, tasks),
                spec,
                [plan.gistnet],
                job.ray,
                config,
                unit="questions",
                label="asking",
            )
            results = TaskResults.of(samples.of(places))
        report(results, job_run)
        print(f"samples   {samples.path}")


def check_question_budgets(
    config: TaskEvaluationConfig,
    plan: CompactionPlan,
    reader: TreeReader,
    places: list[TaskPlace],
    tasks: Mapping[str, NumberedTask],
) -> None:
    """Refuse a budget that cannot hold a question and what stands before it, before any resource is asked for."""
    # What is asked does not depend on how many places the history has for needles.
    asked = {(place.task, place.sample) for place in places}
    queries = [tasks[name].sample(config.seed, sample, num_needle_places=1).query for name, sample in sorted(asked)]
    longest = max(map(len, plan.tokenizer.encode_batch(queries)))
    smallest = 0
    if any(condition.form not in {"", *rivals.RAW_FORMS} for condition in task_conditions(config)):
        vectors = plan.gistnet.num_vectors
        parts = {(place.first_block, place.stop_block) for place in places}
        smallest = max(smallest_budget([History.of(reader, *part, vectors_per_node=vectors)]) for part in parts)
    needed = longest + smallest + config.tail_tokens + K
    if needed > min(config.budgets):
        raise ConfigError(
            f"evaluation.budgets holds {min(config.budgets)}; a question of up to {longest} tokens, {smallest} gists "
            f"of the whole history, a raw tail of {config.tail_tokens} tokens and one block need {needed}. Raise the "
            "budget or shorten the tail."
        )


def report(results: TaskResults, job_run: JobRun) -> None:
    """Tables, heat maps, report."""
    overview = overview_tables(results)
    for table in overview:
        table.show()
    for budget in results.budgets:
        for condition in results.conditions(budget):
            name = condition.replace("/", "-")
            plot_depths(results, condition, budget, job_run.folder / f"depths-{name}-{budget}.png")
    numbers: dict[str, Any] = {"num_questions": len(results.samples), "cells": results.as_report()}
    job_run.finish(numbers, [*overview, *task_tables(results)])
    print(f"report    {job_run.folder / 'report.md'}")
