"""label: what edits of real Working Contexts are worth, measured with the frozen model; LensNet is trained on it.

    a stored context -> places -> candidates and their signals -> edits, each read before and after -> labels.parquet

Places of running text; or, with `labels.tasks`, questions about what is planted in it.

Interrupted, the same command goes on with the places that are missing; more places may be asked for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.evaluation.places import Place, blocks_of_highest_node, choose_places
from actors.evaluation.samples import SampleLog, sample_file_name
from actors.evaluation.statistics import clustered_mean
from actors.evaluation.task_evaluator import tasks_of
from actors.evaluation.task_places import TaskPlace, choose_task_places, in_groups, num_turns
from actors.evaluation.workers import EvaluatorSpec
from actors.labelling.edits import PlaceLabels
from actors.labelling.label_maker import LabelMakerSpec
from actors.labelling.task_label_maker import TaskLabelMakerSpec
from actors.plan import CompactionPlan, check_encoding, plan_models
from cluster.config import BLOCKS_PER_SUPER_BLOCK, TOKENS_PER_BLOCK
from cluster.errors import ConfigError
from cluster.label_config import LabelConfig, LabelJob
from cluster.run import JobRun
from cluster.tables import Table
from models.focus.history import History
from models.focus.working_context import smallest_budget
from models.lensnet.features import FEATURES
from pipelines.evaluation import depends_on, index_text, measure_missing
from storage.contract import TreeReader
from storage.focus.labels import EDIT_KINDS, LabelledContext, LabelledEdit, write_labels
from storage.store import Store

LABELS = "labels.parquet"
"""Of a run."""


def run(job: LabelJob) -> None:
    """Choose places, measure edits at each, write the labels down."""
    plan = plan_models(job.base_lm, job.gistnet, job.store)
    check_encoding(plan, job.store)
    tasks_of(job.labels.tasks)
    with (
        Store(job.store.root).open_reader(job.store.context, job.store.version) as reader,
        JobRun.start("label", job) as job_run,
    ):
        of = _of_tasks(job, plan, reader) if job.labels.tasks else _of_text(job, plan, reader)
        job_run.log_digests(plan.digests())
        job_run.log.info("%d places in %d documents", len(of.places), len({of.uri(place) for place in of.places}))
        index_text(job.store, plan, job_run)
        seq = reader.version.seq
        depended = depends_on(plan, job.store, seq, job.labels, but=("num_places", "threads_per_worker"))
        with SampleLog(job_run.folder / sample_file_name(depended), of.place_type, PlaceLabels) as samples:
            measure_missing(
                job_run, samples, of.places, of.grouped, of.spec, [plan.gistnet], job.ray, job.labels, label="labelling"
            )
            found = sorted(samples.of(of.places), key=lambda sample: sample[0].number)
        labelled = [
            labelled_context(str(job.store.context), seq, place, of.uri(place), labels[0]) for place, labels in found
        ]
        path = job_run.folder / LABELS
        write_labels(path, labelled, list(FEATURES), depended)
        tables, numbers = label_tables(labelled)
        for table in tables:
            table.show()
        job_run.finish(numbers, tables)
        print(f"labels    {path}")
        print(f"report    {job_run.folder / 'report.md'}")


@dataclass(frozen=True)
class _Labelling:
    """What is labelled: running text, or questions."""

    places: Sequence[Any]
    place_type: type
    spec: EvaluatorSpec
    grouped: Callable[[list[Any]], Sequence[Sequence[Any]]]
    """Places that one worker measures in turn."""
    uri: Callable[[Any], str]
    """Places that share it are not independent."""


def _of_text(job: LabelJob, plan: CompactionPlan, reader: TreeReader) -> _Labelling:
    config = job.labels
    places = choose_places(
        reader,
        config.num_places,
        config.history_tokens,
        config.horizon_tokens,
        within_document=False,
        max_per_document=config.max_per_document,
        align_blocks=BLOCKS_PER_SUPER_BLOCK if config.form != "raw" else 1,
        begin_blocks=blocks_of_highest_node(config.history_tokens),
        seed=config.seed,
    )
    _check_budget(config, plan, reader, places)
    spec = LabelMakerSpec(plan.base_lm, job.store, reader.version.seq, config)
    return _Labelling(places, Place, spec, lambda missing: [[place] for place in missing], lambda place: place.uri)


def _of_tasks(job: LabelJob, plan: CompactionPlan, reader: TreeReader) -> _Labelling:
    config = job.labels
    tasks = tasks_of(config.tasks)
    places = choose_task_places(
        reader,
        tasks,
        -(-config.num_places // len(tasks)),
        [config.history_tokens],
        [],
        tail_tokens=config.tail_tokens,
        seed=config.seed,
    )[: config.num_places]
    queries = [tasks[place.task].sample(config.seed, place.sample, num_needle_places=1).query for place in places]
    longest = max(map(len, plan.tokenizer.encode_batch(queries)))
    _check_budget(config, plan, reader, places, longest)
    compactor = plan.compactor_spec(config.threads_per_worker, 1)
    spec = TaskLabelMakerSpec(plan.base_lm, compactor, job.store, reader.version.seq, config)

    def uri(place: TaskPlace) -> str:
        return f"task:{place.task}/{place.sample // num_turns(tasks[place.task])}"

    return _Labelling(places, TaskPlace, spec, lambda missing: in_groups(missing, tasks), uri)


def _check_budget(
    config: LabelConfig,
    plan: CompactionPlan,
    reader: TreeReader,
    places: Sequence[Place | TaskPlace],
    query_tokens: int = 0,
) -> None:
    """Refuse a budget that leaves no room for a block somewhere, before any resource is asked for."""
    vectors, gists = plan.gistnet.num_vectors, 0
    if config.form != "raw":
        parts = {(place.first_block, place.stop_block) for place in places}
        gists = max(smallest_budget([History.of(reader, *part, vectors_per_node=vectors)]) for part in parts)
    needed = gists + query_tokens + config.tail_tokens + TOKENS_PER_BLOCK
    if needed > config.budget:
        asked = f", a question of up to {query_tokens}" if query_tokens else ""
        raise ConfigError(
            f"labels.budget={config.budget} is too small: gists of the whole history, a raw tail of "
            f"{config.tail_tokens} tokens{asked} and one block need up to {needed}"
        )


def labelled_context(
    context: str, version: int, place: Place | TaskPlace, uri: str, labels: PlaceLabels
) -> LabelledContext:
    """What was measured at a place, as it is stored."""
    candidates = labels.candidates()
    return LabelledContext(
        context,
        version,
        place.number,
        uri,
        place.first_block,
        place.stop_block,
        labels.shown_from,
        candidates.blocks,
        candidates.features,
        candidates.keys.astype(np.float16),
        candidates.query.astype(np.float16),
        tuple(
            LabelledEdit(tuple(shown), tuple(added), tuple(removed), (a, b), (c, d))
            for shown, added, removed, a, b, c, d in labels.edits
        ),
    )


def label_tables(labelled: list[LabelledContext]) -> tuple[list[Table], dict[str, Any]]:
    """How many edits of each kind, what they are worth, and how much of a label is noise.

    Labels of both halves of a horizon have what is really there in common: their correlation r is that share of a
    half's variance, and 2r / (1 + r) that of the mean of both (Spearman 1910 and Brown 1910).
    """
    rows: list[dict[str, Any]] = []
    numbers: dict[str, Any] = {"num_places": len(labelled), "kinds": {}}
    for kind in EDIT_KINDS:
        gains = list(_gains(labelled, kind))
        if not gains:
            continue
        halves = np.array([halves for halves, _ in gains])
        mean = halves.mean(axis=1)
        estimate = clustered_mean(mean, [uri for _, uri in gains])
        r = float(np.corrcoef(halves.T)[0, 1]) if len(gains) > 2 and halves.std(axis=0).min() > 0 else float("nan")
        reliability = 2 * r / (1 + r)
        rows.append(
            {
                "edit": kind,
                "edits": len(gains),
                "gain, nats a token": str(estimate),
                "spread": float(mean.std()),
                "positive": f"{(mean > 0).mean():.0%}",
                "r of halves": r,
                "reliability": reliability,
            }
        )
        numbers["kinds"][kind] = {
            "num_edits": len(gains),
            "gain": estimate.mean,
            "gain_standard_error": estimate.standard_error,
            "gain_spread": float(mean.std()),
            "share_positive": float((mean > 0).mean()),
            "split_half_correlation": r,
            "reliability": reliability,
        }
    return [Table(rows, "What edits are worth")], numbers


def _gains(labelled: list[LabelledContext], kind: str) -> Iterator[tuple[tuple[float, float], str]]:
    for context in labelled:
        for edit in context.edits:
            if edit.kind == kind:
                yield edit.gains, context.uri
