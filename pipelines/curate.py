"""curate report, plan, apply, restore, watch: keep in detail what is used, and be able to undo the rest.

They start no cluster: a context's catalogue and focus events say all there is to know, and the work is small commits
between those of others, by the store's service where one runs. `watch` is made to be submitted as a job of its own and
left alone for days.
"""

from __future__ import annotations

import fnmatch
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from actors.curation.apply import Applied, apply_plan
from actors.curation.curator import Curator, curating
from actors.curation.plan import CurationPlan, make_plan
from actors.curation.usage import DAY_S, Usage, measure_usage
from actors.curation.work import bring_back, collect
from cluster.config import StoreConfig
from cluster.curation_config import (
    CurateApplyJob,
    CuratePlanJob,
    CurateReportJob,
    CurateRestoreJob,
    CurateWatchJob,
    CurationPolicy,
)
from cluster.errors import ConfigError, MegaContextError, WriterConflictError
from cluster.log import get_logger
from cluster.run import JobRun, write_atomically
from cluster.tables import Table
from pipelines.curation_report import (
    actions_table,
    applied_table,
    kept_table,
    plot_usage,
    spans_table,
    state_numbers,
    states_table,
    usage_numbers,
)
from pipelines.tree_versions import emit
from storage.contract import DocumentInfo, Version
from storage.store import Store
from storage.tree.states import PRUNED, as_spans

logger = get_logger("curate")

PLAN_FILE = "plan.json"


def report(job: CurateReportJob) -> None:
    """What of a context is used, and what there is of it."""
    with JobRun.start("curate report", job) as job_run:
        version, _, usage = _look(job.store, job.policy, time.time())
        states = state_numbers(Store(job.store.root), job.store)
        tables = [states_table(states), spans_table(usage, job.policy)]
        for table in tables:
            table.show()
        plot_usage(usage, job.policy, time.time(), job_run.folder / "usage.png")
        numbers = {"version": version.seq, **states, **usage_numbers(usage, job.policy)}
        job_run.finish(numbers, [*tables, "![Usage of spans](usage.png)"])
        print(f"report    {job_run.folder / 'report.md'}")


def plan(job: CuratePlanJob) -> None:
    """Write down what a policy would do."""
    with JobRun.start("curate plan", job) as job_run:
        now = time.time()
        version, documents, usage = _look(job.store, job.policy, now)
        made = make_plan(version, documents, usage, job.policy, now=now)
        path = job_run.folder / PLAN_FILE
        made.write(path)
        states = state_numbers(Store(job.store.root), job.store)
        tables = [actions_table(made), kept_table(made), states_table(states)]
        for table in tables:
            table.show()
        plot_usage(usage, job.policy, now, job_run.folder / "usage.png", made)
        numbers = {"version": version.seq, **states, **_plan_numbers(made)}
        job_run.finish(numbers, [*tables, "![Usage of spans](usage.png)"])
        print(f"plan      {path}")
        print(f"effect    python ray_job.py curate effect --plan {path} {_where(job.store)}")
        print(f"apply     python ray_job.py curate apply --plan {path} {_where(job.store)} --apply true")


def apply(job: CurateApplyJob) -> None:
    """Carry out a plan.

    Raises:
        ConfigError: the plan is none, or of another context or branch.
    """
    made = CurationPlan.read(job.plan)
    if (made.context, made.branch) != (job.store.context, job.store.version):
        raise ConfigError(
            f"{job.plan} is a plan for branch {made.branch!r} of context {made.context!r}; give "
            f"--store.context {made.context} --store.version {made.branch}"
        )
    if not job.apply:
        for table in (actions_table(made), kept_table(made)):
            table.show()
        print("nothing was changed; add --apply true to do it")
        return
    with JobRun.start("curate apply", job) as job_run:
        store = Store(job.store.root)
        before = state_numbers(store, job.store)
        with store.open_reader(job.store.context, job.store.version) as reader:
            seq = reader.version.seq
        with (
            job_run.progress(len(made.spans), "spans", "curating") as progress,
            _curator(job, job_run.name) as curator,
            _stop_signals() as stopping,
        ):
            applied = apply_plan(
                made, curator, job.pace, now=time.time(), on_progress=progress.advance, stopping=stopping
            )
        after = state_numbers(store, job.store)
        tables = [applied_table(applied), states_table(before, after)]
        for table in tables:
            table.show()
        numbers = {"version_before": seq, "before": before, "after": after, **_applied_numbers(applied)}
        job_run.finish(numbers, tables)
        print(f"effect    python ray_job.py curate effect --before {seq} {_where(job.store)}")
        print(f"undo      python ray_job.py curate restore {_where(job.store)} --apply true")


def restore_(job: CurateRestoreJob) -> None:
    """Bring pruned tokens back.

    Raises:
        ConfigError: a glob fits no document.
        StorageError: some are kept nowhere any more; nothing was restored.
    """
    store = Store(job.store.root)
    with store.open_reader(job.store.context, job.store.version) as reader:
        num_blocks = reader.version.num_blocks
        wanted = np.zeros(num_blocks, bool)
        for first, stop in _asked(job, reader.documents(), num_blocks):
            wanted[first:stop] = True
        pruned = np.isin(reader.block_states(0, num_blocks), PRUNED)
        spans = as_spans(wanted & pruned)
        rows = [
            {"first block": n, "blocks": count, "document": reader.document_at(n).meta.uri} for n, count in spans[:20]
        ]
    found: dict[str, Any] = {"spans": spans, "blocks": sum(count for _, count in spans), "applied": job.apply}
    tables = [Table(rows, f"{'To restore' if not job.apply else 'Restored'}: {found['blocks']:,} blocks")]
    if job.apply and spans:
        with _curator(job, "curate restore") as curator:
            done = curator.run(bring_back, spans, "curate restore")
        found |= {"version": done.version.seq, "from_archive": done.from_archive}
        row = {"version": str(done.version.seq), "blocks": done.blocks, "from archives": done.from_archive}
        tables.append(Table([row], "Done"))
    emit(job.json, found, *tables)


def watch(job: CurateWatchJob) -> None:
    """Curate and collect at an interval, until told to stop."""
    store = Store(job.store.root)
    store.folder(job.store.context)
    with (
        JobRun.start("curate watch", job) as job_run,
        _curator(job, job_run.name) as curator,
        _stop_signals() as stopping,
    ):
        before = state_numbers(store, job.store)
        totals = Applied()
        rounds: list[dict[str, Any]] = []
        while not stopping() and not (job.rounds and len(rounds) >= job.rounds):
            begun = time.monotonic()
            rounds.append(_round(job, curator, job_run, len(rounds), totals, stopping))
            job_run.log_metrics({k: v for k, v in rounds[-1].items() if isinstance(v, int | float)}, len(rounds))
            last = job.rounds and len(rounds) >= job.rounds
            while not last and not stopping() and time.monotonic() - begun < job.every_s:
                time.sleep(min(1.0, job.every_s))
        after = state_numbers(store, job.store)
        tables = [Table(rounds[-20:], "Rounds, the newest ones"), applied_table(totals), states_table(before, after)]
        for table in tables:
            table.show()
        job_run.finish({"before": before, "after": after, "rounds": len(rounds), **_applied_numbers(totals)}, tables)


def _round(
    job: CurateWatchJob, curator: Curator, job_run: JobRun, number: int, totals: Applied, stopping: Any
) -> dict[str, Any]:
    """Plan, apply, collect. What another writer, a full disk or damage keeps from being done is said, and tried again
    in the next round."""
    now = time.time()
    row: dict[str, Any] = {"round": number + 1, "at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))}
    try:
        version, documents, usage = _look(job.store, job.policy, now)
        made = make_plan(version, documents, usage, job.policy, now=now)
        row |= {action: len(made.of(action)) for action in ("archive", "compact", "delete", "restore")}
        made.write(job_run.folder / PLAN_FILE)
        applied = apply_plan(made, curator, job.pace, now=now, stopping=stopping)
        for action, count in applied.done.items():
            totals.done[action] += count
        totals.there_already += applied.there_already
        totals.stale += applied.stale
        totals.lost += applied.lost
        totals.commits += applied.commits
        totals.waited_s += applied.waited_s
        freed = curator.run(collect, job.keep_days * DAY_S, now)
        row |= {"token bytes freed": freed.token_bytes, "archive bytes expired": freed.archive_bytes, "error": ""}
    except (WriterConflictError, MegaContextError) as error:
        row["error"] = str(error)
        logger.warning("round %d: %s", number + 1, error)
    write_atomically(job_run.folder / "round.json", json.dumps(row) + "\n")
    return row


def _curator(job: CurateApplyJob | CurateRestoreJob | CurateWatchJob, owner: str) -> AbstractContextManager[Curator]:
    def waits(seconds: float) -> None:
        logger.info("context %s is being written; waiting up to %.0f s for its writer", job.store.context, seconds)

    return curating(job.store, job.ray, f"run {owner!r}", job.pace.wait_s, waits)


def _look(config: StoreConfig, policy: CurationPolicy, now: float) -> tuple[Version, list[DocumentInfo], Usage]:
    store = Store(config.root)
    folders = [store.folder(context.name) for context in store.contexts()]
    with store.open_reader(config.context, config.version) as reader:
        documents = reader.documents()
        usage = measure_usage(reader, documents, policy, now=now, event_folders=folders)
        return reader.version, documents, usage


def _asked(job: CurateRestoreJob, documents: list[DocumentInfo], num_blocks: int) -> Iterator[tuple[int, int]]:
    """`(first, stop)` of what is to be restored."""
    low, high = job.first_block, job.first_block + job.num_blocks if job.num_blocks else num_blocks
    if not job.documents:
        yield low, high
        return
    for pattern in job.documents:
        found = [d for d in documents if d.meta.uri == pattern or fnmatch.fnmatchcase(d.meta.uri, pattern)]
        if not found:
            raise ConfigError(f"no document of context {job.store.context!r} fits {pattern!r}; `inspect` lists them")
        for document in found:
            yield max(low, document.first_block), min(high, document.first_block + document.num_blocks)


def _where(store: StoreConfig) -> str:
    return f"--store.root {store.root} --store.context {store.context} --store.version {store.version}"


def _plan_numbers(made: CurationPlan) -> dict[str, Any]:
    planned = {action: len(made.of(action)) for action in ("archive", "compact", "delete", "restore")}
    return {"planned": planned, "kept": made.kept, "saved_bytes": made.saved_bytes}


def _applied_numbers(applied: Applied) -> dict[str, Any]:
    numbers = asdict(applied)
    return {**numbers, "stale": len(applied.stale), "lost": len(applied.lost)}


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """Whether SIGTERM or Ctrl-C has come since; the second one ends the process as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _frame: object) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
