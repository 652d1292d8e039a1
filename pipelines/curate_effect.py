"""curate effect: what curation costs the model, by a plan that is not applied yet or between two stored versions.

The same held positions are predicted, and the same planted answers asked for, in the version before and in the version
after. Nothing is written to the tree. Interrupted, the same command goes on with what is missing.
"""

from __future__ import annotations

from typing import Any

from actors.curation.effect_evaluator import HeldPositionsSpec, RecallSpec, SidesSpec
from actors.curation.effect_places import choose_held_positions, choose_questions
from actors.curation.effect_results import AnsweredFile, EffectResults, PredictedFile
from actors.curation.plan import CurationPlan
from actors.evaluation import rivals
from actors.evaluation.samples import sample_file_name
from actors.evaluation.task_evaluator import tasks_of
from actors.plan import check_encoding, plan_models
from cluster.curation_effect_config import CurateEffectJob
from cluster.errors import ConfigError
from cluster.run import JobRun
from pipelines.curation_effect_report import effect_tables, plot_effect, sides_numbers, sides_table
from pipelines.evaluate_focus import check_budgets
from pipelines.evaluate_tasks import check_question_budgets
from pipelines.evaluation import depends_on, measure_missing, with_lensnet
from storage.store import Store
from storage.versions.history import History

CHOOSERS = (rivals.RECENCY, rivals.UNIFORM, rivals.RANDOM, *rivals.SEARCHERS, rivals.FUSION, rivals.LENSNET)
"""Rivals that need no token of what is pruned."""
FORMS = ("raw", "overlay", "strict")

NOT_IN_NUMBERS = ("num_places", "num_questions")
"""How many there are changes none of them."""


def run(job: CurateEffectJob) -> None:
    """Choose places and questions, measure both versions, report.

    Raises:
        ConfigError: a plan or versions that cannot be compared, or that differ in nothing.
        StorageError: a version is not kept any more.
    """
    tasks = tasks_of(job.evaluation.tasks)
    rivals.conditions(job.evaluation.rivals, job.evaluation.forms, CHOOSERS, FORMS)
    which = _sides(job)
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    check_encoding(plan, job.store)
    config = with_lensnet(job.evaluation, plan)
    with which.opened() as sides, JobRun.start("curate effect", job) as job_run:
        places = choose_held_positions(sides, config)
        questions = choose_questions(sides, tasks, config)
        check_budgets(config.focus(), plan, sides.before, places)
        parts = [question.as_task_place() for question in questions]
        check_question_budgets(config.questions(), plan, sides.before, parts, tasks)
        job_run.log_digests(plan.digests())
        after = f"{which.before} as planned" if isinstance(which.after, CurationPlan) else str(which.after)
        numbers = {"version_before": which.before, "version_after": after, **sides_numbers(sides, places)}
        job_run.log.info(
            "%d held positions and %d questions, in version %d and in %s",
            len(places),
            len(questions),
            which.before,
            after,
        )
        predicting = HeldPositionsSpec(plan.base_lm, which, config)
        compactor = plan.compactor_spec(config.threads_per_worker, 1)
        asking = RecallSpec(plan.base_lm, compactor, which, config)
        depended = depends_on(plan, job.store, which.before, config, but=NOT_IN_NUMBERS) | {"after": which.after}
        name = sample_file_name(depended)
        shared: tuple[Any, ...] = ([plan.gistnet], job.ray, config)
        with (
            PredictedFile(job_run.folder / f"predictions-{name}") as predicted,
            AnsweredFile(job_run.folder / f"answers-{name}") as answered,
        ):
            measure_missing(job_run, predicted, places, _alone, predicting, *shared, label="predicting")
            measure_missing(job_run, answered, questions, _by_sample, asking, *shared, unit="questions", label="asking")
            results = EffectResults.of(predicted.of(places), answered.of(questions))
        tables = [sides_table(numbers, len(places)), *effect_tables(results)]
        for table in tables:
            table.show()
        plot_effect(results, job_run.folder / "effect.png")
        job_run.finish({**numbers, **results.as_report()}, tables)
        print(f"report    {job_run.folder / 'report.md'}")


def _sides(job: CurateEffectJob) -> SidesSpec:
    store = Store(job.store.root)
    history = History(store.folder(job.store.context), job.store.context)
    if not job.before:
        made = CurationPlan.read(job.plan)
        if made.context != job.store.context:
            raise ConfigError(f"{job.plan} is a plan for context {made.context!r}; give --store.context {made.context}")
        return SidesSpec(job.store, made.version, made)
    return SidesSpec(job.store, history.resolve(job.before), history.resolve(job.store.version))


def _alone(places: list[Any]) -> list[list[Any]]:
    return [[place] for place in places]


def _by_sample(questions: list[Any]) -> list[list[Any]]:
    """A worker has all questions of a sample, which share a history's keys."""
    groups: dict[int, list[Any]] = {}
    for question in questions:
        groups.setdefault(question.sample, []).append(question)
    return list(groups.values())
