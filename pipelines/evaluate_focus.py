"""evaluate focus: who chooses best what a Working Context shows in detail, at equal slots, on a stored context.

Every rival predicts the same horizons of the same places with the same frozen model. Interrupted, the same command
goes on with the places that are missing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actors.evaluation import rivals
from actors.evaluation.focus_evaluator import FocusEvaluatorSpec
from actors.evaluation.places import Place, blocks_of_highest_node, choose_places
from actors.evaluation.results import FocusResults, SampleFile
from actors.evaluation.samples import sample_file_name
from actors.plan import CompactionPlan, check_encoding, plan_models
from cluster.config import BLOCKS_PER_SUPER_BLOCK
from cluster.errors import ConfigError
from cluster.evaluation_config import EvaluateFocusJob, FocusEvaluationConfig
from cluster.run import JobRun
from models.focus.history import History
from models.focus.working_context import smallest_budget
from pipelines.evaluation import depends_on, index_text, measure_missing, with_lensnet
from pipelines.focus_report import focus_tables, plot_ages, plot_gains
from pipelines.focus_strips import draw_strips, drawn_condition
from pipelines.session_report import PAGE
from storage.contract import TreeReader
from storage.store import Store

Histories = list[list[Place]]


def run(job: EvaluateFocusJob) -> None:
    """Choose places, measure every rival at each, report."""
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    check_encoding(plan, job.store)
    config, left_out = what_fits(with_lensnet(job.evaluation, plan), plan)
    rivals.conditions(config.rivals, config.forms)
    store = Store(job.store.root)
    with (
        store.open_reader(job.store.context, job.store.version) as reader,
        JobRun.start("evaluate focus", job) as job_run,
    ):
        places = choose_focus_places(reader, config)
        check_budgets(config, plan, reader, places)
        if left_out:
            job_run.log.warning(left_out)
        _warn_of_long_histories(config, plan, job_run)
        job_run.log_digests(plan.digests())
        job_run.log.info(
            "%d places in %d documents, %d slots of history each",
            len(places),
            len({place.uri for place in places}),
            config.history_tokens,
        )
        index_text(job.store, plan, job_run)
        spec = FocusEvaluatorSpec(plan.base_lm, job.store, reader.version.seq, config)
        depended = depends_on(plan, job.store, spec.seq, config, but=("num_places", "first_place"))
        with SampleFile(job_run.folder / sample_file_name(depended)) as samples:
            measure_missing(job_run, samples, places, _by_history, spec, [plan.gistnet], job.ray, config)
            results = FocusResults.of(samples.of(places))
        report(results, job_run)
        if (drawn := drawn_condition(rivals.conditions(config.rivals, config.forms))) is not None:
            budget, vectors = max(results.budgets), plan.gistnet.num_vectors
            draw_strips(results, job_run.folder, drawn, budget, config, reader, vectors)
            print(f"shown     {job_run.folder / PAGE} ({drawn.name}, {budget} slots)")
        print(f"samples   {samples.path}")


def choose_focus_places(reader: TreeReader, config: FocusEvaluationConfig) -> list[Place]:
    """Where rivals are compared.

    Raises:
        ConfigError: the context has fewer than two such places.
    """
    found = choose_places(
        reader,
        config.num_places,
        config.history_tokens,
        config.horizon_tokens,
        within_document=config.within_document,
        max_per_document=config.max_per_document,
        places_per_history=config.places_per_history,
        align_blocks=1 if config.within_document else BLOCKS_PER_SUPER_BLOCK,
        begin_blocks=1 if config.within_document else blocks_of_highest_node(config.history_tokens),
        seed=config.seed,
    )
    places = found[config.first_place :]
    if len(places) < 2:
        raise ConfigError(
            f"context {reader.version.context!r} has {len(found)} such places, and evaluation.first_place="
            f"{config.first_place} leaves fewer than two of them"
        )
    return places


def what_fits(config: FocusEvaluationConfig, plan: CompactionPlan) -> tuple[FocusEvaluationConfig, str]:
    """Without `full` where the model cannot read the whole history, and what to say of it.

    Raises:
        ConfigError: `exhaustive` there: it reads all blocks in a row, too.
    """
    reach, trained = config.history_tokens + config.horizon_tokens, plan.files.trained_context
    if reach <= trained:
        return config, ""
    beyond = f"histories and horizons reach {reach:,} tokens, {plan.files.model_id} was trained for {trained:,}"
    if any(c.chooser == rivals.EXHAUSTIVE for c in rivals.conditions(config.rivals, config.forms)):
        raise ConfigError(f"rival 'exhaustive' reads all blocks of a history in a row; {beyond}: leave it out")
    if rivals.FULL not in config.rivals:
        return config, ""
    rest = replace(config, rivals=[name for name in config.rivals if name != rivals.FULL])
    return rest, f"{beyond}: rival full is left out"


def check_budgets(config: FocusEvaluationConfig, plan: CompactionPlan, reader: TreeReader, places: list[Place]) -> None:
    """Refuse a budget that cannot hold a Working Context somewhere, before any resource is asked for."""
    # Those that measure candidates read them after the gists, whatever the form.
    conditions = rivals.conditions(config.rivals, config.forms)
    measuring = {c.chooser for c in conditions} & {rivals.RERANK, *rivals.ORACLES, rivals.EXHAUSTIVE}
    if all(c.form in {"", *rivals.RAW_FORMS} for c in conditions) and not measuring:
        return
    vectors = plan.gistnet.num_vectors
    histories = (History.of(reader, p.first_block, p.stop_block, vectors_per_node=vectors) for p in places)
    needed = max(smallest_budget([history]) for history in histories) + config.tail_tokens
    if needed > min(config.budgets):
        raise ConfigError(
            f"evaluation.budgets holds {min(config.budgets)}; gists of the whole history and a raw tail of "
            f"{config.tail_tokens} tokens need up to {needed}. Raise the budget or shorten the tail."
        )


def _warn_of_long_histories(config: FocusEvaluationConfig, plan: CompactionPlan, job_run: JobRun) -> None:
    """Say when the model is asked for more than it was trained for: what it then predicts is no reference."""
    reach, trained = config.history_tokens + config.horizon_tokens, plan.files.trained_context
    beyond = [f"rival {name}" for name in config.rivals if name.endswith("@global")]
    beyond += [f"evaluation.positional={config.positional}"] if config.positional == "global" else []
    if reach > trained and beyond:
        job_run.log.warning(
            "histories and horizons reach %s tokens, %s was trained for %s: do not trust %s",
            f"{reach:,}",
            plan.files.model_id,
            f"{trained:,}",
            " nor ".join(beyond),
        )


def _by_history(places: list[Place]) -> Histories:
    histories: dict[int, list[Place]] = {}
    for place in places:
        histories.setdefault(place.first_block, []).append(place)
    return list(histories.values())


def report(results: FocusResults, job_run: JobRun) -> None:
    """Tables, plots, report."""
    tables = focus_tables(results)
    for table in tables:
        table.show()
    for budget in results.budgets:
        plot_gains(results, budget, job_run.folder / f"gains-{budget}.png")
        if results.has("oracle/overlay", budget) or results.has("oracle/raw", budget):
            plot_ages(results, budget, job_run.folder / f"ages-{budget}.png")
    numbers: dict[str, Any] = {"num_places": len(results.samples), "conditions": results.as_report()}
    job_run.finish(numbers, tables)
    print(f"report    {job_run.folder / 'report.md'}")
