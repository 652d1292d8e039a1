"""evaluate focus: who chooses best what a Working Context shows in detail, at equal slots, on a stored context.

Every rival predicts the same horizons of the same places with the same frozen model. Interrupted, the same command
goes on with the places that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.evaluation import rivals
from actors.evaluation.focus_evaluator import FocusEvaluatorActor, FocusEvaluatorSpec, Measured
from actors.evaluation.places import Place, choose_places
from actors.evaluation.results import FocusResults, SampleFile
from actors.lexical_indexer import LexicalIndexer, LexicalIndexerSpec
from actors.plan import CompactionPlan, check_encoding, plan_models
from cluster.errors import ConfigError
from cluster.evaluation_config import EvaluateFocusJob
from cluster.ray_calls import CALL_TIMEOUT_S, check_resources, get_or_raise, wait_for_actors
from cluster.ray_runtime import ray_session
from cluster.run import JobRun
from models.focus.history import History
from models.focus.working_context import smallest_budget
from pipelines.focus_report import focus_tables, plot_ages, plot_gains
from storage.contract import TreeReader
from storage.store import Store

HISTORIES_IN_FLIGHT = 2
"""Histories that wait at a worker, so that it never does."""

Histories = list[list[Place]]


def run(job: EvaluateFocusJob) -> None:
    """Choose places, measure every rival at each, report."""
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    check_encoding(plan, job.store)
    config = job.evaluation
    rivals.conditions(config.rivals, config.forms)
    store = Store(job.store.root)
    with store.open_reader(job.store.context) as reader, JobRun.start("evaluate focus", job) as job_run:
        places = choose_places(
            reader,
            config.num_places,
            config.history_tokens,
            config.horizon_tokens,
            within_document=config.within_document,
            max_per_document=config.max_per_document,
            places_per_history=config.places_per_history,
            seed=config.seed,
        )
        _check_budgets(job, plan, reader, places)
        job_run.log_digests(plan.digests())
        job_run.log.info(
            "%d places in %d documents, %d slots of history each",
            len(places),
            len({place.uri for place in places}),
            config.history_tokens,
        )
        indexer = LexicalIndexer(LexicalIndexerSpec(job.store, plan.base_lm), plan.tokenizer)
        try:
            if num_indexed := indexer.advance():
                job_run.log.info("indexed the text of %s blocks", f"{num_indexed:,}")
        finally:
            indexer.close()
        spec = FocusEvaluatorSpec(plan.base_lm, job.store, reader.version.seq, config)
        name = f"samples-{_digest(plan, spec)[:12]}.jsonl"
        with SampleFile(job_run.folder / name) as samples:
            measure(job, plan, spec, places, samples, job_run)
            results = FocusResults.of(samples.samples)
        report(results, job_run)


def _check_budgets(job: EvaluateFocusJob, plan: CompactionPlan, reader: TreeReader, places: list[Place]) -> None:
    """Refuse a budget that cannot hold a Working Context somewhere, before any resource is asked for."""
    if job.evaluation.forms == ["raw"]:
        return
    vectors = plan.gistnet.num_vectors
    histories = (History.of(reader, p.first_block, p.stop_block, vectors_per_node=vectors) for p in places)
    needed = max(smallest_budget([history]) for history in histories) + job.evaluation.tail_tokens
    if needed > min(job.evaluation.budgets):
        raise ConfigError(
            f"evaluation.budgets holds {min(job.evaluation.budgets)}; gists of the whole history and a raw tail of "
            f"{job.evaluation.tail_tokens} tokens need up to {needed}. Raise the budget or shorten the tail."
        )


def _digest(plan: CompactionPlan, spec: FocusEvaluatorSpec) -> str:
    """Of everything the numbers depend on, but not of how the work is shared out."""
    config = asdict(spec.evaluation)
    for name in ("num_places", "num_workers"):
        del config[name]
    parts = {"evaluation": config, "seq": spec.seq, "context": str(spec.store.context), **plan.digests()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def measure(
    job: EvaluateFocusJob,
    plan: CompactionPlan,
    spec: FocusEvaluatorSpec,
    places: list[Place],
    samples: SampleFile,
    job_run: JobRun,
) -> None:
    """Measure the places that are not in the file yet; workers take whole histories, which they read once."""
    done = {place.number for place, _ in samples.samples}
    if strangers := {place for place, _ in samples.samples} - set(places):
        raise ConfigError(
            f"{samples.path} holds {len(strangers)} places of another choice; remove it or rename the run"
        )
    missing = _by_history([place for place in places if place.number not in done])
    if not missing:
        return
    with ray_session(job.ray) as session:
        config = job.evaluation
        count = min(config.num_workers or max(1, int(session.resources["CPU"])), len(missing))
        requested = {"CPU": min(float(config.threads_per_worker), session.resources["CPU"] / count)}
        check_resources([requested] * count, "the evaluators")
        remote: Any = ray.remote(FocusEvaluatorActor).options(
            num_cpus=requested["CPU"], max_restarts=-1, max_task_retries=-1
        )
        workers = [remote.remote(spec) for _ in range(count)]
        wait_for_actors(workers, requested, job.ray.resource_timeout_s, "evaluators")
        gistnet_refs = [ray.put(plan.gistnet)]
        get_or_raise([w.ready.remote(gistnet_refs) for w in workers], CALL_TIMEOUT_S, "loading the models")
        with job_run.progress(len(places), "places", "measuring", initial=len(done)) as progress:
            for place, measured in _in_turns(workers, missing, gistnet_refs):
                samples.append(place, [Measured(**m) for m in measured])
                progress.advance()


def _by_history(places: list[Place]) -> Histories:
    histories: dict[int, list[Place]] = {}
    for place in places:
        histories.setdefault(place.first_block, []).append(place)
    return list(histories.values())


def _in_turns(workers: list[Any], histories: Histories, gistnet_refs: list[Any]) -> Any:
    """Results as they come; each worker has a bounded number of histories, one after the other."""
    waiting = deque(histories)
    calls: dict[Any, Any] = {}

    def hand_out(worker: Any) -> None:
        if waiting:
            for place in waiting.popleft():
                calls[worker.evaluate.remote(place, gistnet_refs)] = worker

    for worker in workers:
        for _ in range(HISTORIES_IN_FLIGHT):
            hand_out(worker)
    while calls:
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=CALL_TIMEOUT_S)
        if not ready:
            raise ConfigError(f"no worker answered within {CALL_TIMEOUT_S:.0f} s; see the run's job.log")
        worker = calls.pop(ready[0])
        yield get_or_raise(ready[0], CALL_TIMEOUT_S, "measuring a place")
        # One history left at this worker: give it another before it runs dry.
        if sum(1 for other in calls.values() if other is worker) <= len(histories[0]):
            hand_out(worker)


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
    print(f"samples   {_latest(job_run.folder)}")


def _latest(folder: Path) -> Path:
    return max(folder.glob("samples-*.jsonl"), key=lambda path: path.stat().st_mtime)
