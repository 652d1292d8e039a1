"""What the evaluation jobs share: text that can be searched, a name for what was measured, and the measuring itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.evaluation.samples import Numbered, SampleLog
from actors.evaluation.workers import EvaluatorSpec, measure_groups
from actors.lexical_indexer import LexicalIndexer, LexicalIndexerSpec, has_index
from actors.plan import CompactionPlan
from cluster.config import RayConfig, StoreConfig
from cluster.environment import base_folder
from cluster.run import JobRun
from models.gistnet import GistNet
from models.lensnet import LensNet
from models.lensnet.net import require_models

PlaceT = TypeVar("PlaceT", bound=Numbered)
MeasuredT = TypeVar("MeasuredT")


class Sharing(Protocol):
    """How the work of an evaluation is shared out."""

    @property
    def num_workers(self) -> int: ...
    @property
    def threads_per_worker(self) -> int: ...


def index_text(store: StoreConfig, plan: CompactionPlan, job_run: JobRun) -> None:
    """Bring the context's lexical index up to date, where what is read has one."""
    if not has_index(store):
        job_run.log.info("version %s has no lexical index: its text is searched in the tree", store.version)
        return
    indexer = LexicalIndexer.patient(LexicalIndexerSpec(store, plan.base_lm), plan.tokenizer)
    try:
        if num_indexed := indexer.advance():
            job_run.log.info("indexed the text of %s blocks", f"{num_indexed:,}")
    finally:
        indexer.close()


EvaluationT = TypeVar("EvaluationT", bound="AsksLensNet")


class AsksLensNet(Protocol):
    """An evaluation that may have LensNet among its rivals."""

    @property
    def lensnet(self) -> str: ...


def with_lensnet(evaluation: EvaluationT, plan: CompactionPlan) -> EvaluationT:
    """The evaluation, its LensNet's folder as workers find it, which may work in another folder.

    Raises:
        ModelError: there is no net there, or one that was trained with other models than the context's.
    """
    if not evaluation.lensnet:
        return evaluation
    folder = base_folder() / Path(evaluation.lensnet).expanduser()
    require_models(LensNet.load(folder), folder, plan.digests(), plan.gistnet.key_dim)
    return replace(evaluation, lensnet=str(folder))  # type: ignore[type-var]


def depends_on(
    plan: CompactionPlan, store: StoreConfig, seq: int, evaluation: Any, *, but: Sequence[str]
) -> dict[str, Any]:
    """Everything the numbers depend on; not how the work is shared out, nor `but`, which places there are."""
    config = asdict(evaluation)
    for name in (*but, "num_workers"):
        del config[name]
    digests = plan.digests()
    if config.get("lensnet"):
        # Another net in the same folder is another rival.
        config["lensnet"] = LensNet.load(config["lensnet"]).digest()
    return {"evaluation": config, "context": str(store.context), "seq": seq, "dtype": plan.base_lm.dtype, **digests}


def measure_missing(
    job_run: JobRun,
    samples: SampleLog[PlaceT, MeasuredT],
    places: Sequence[PlaceT],
    grouped: Callable[[list[PlaceT]], Sequence[Sequence[PlaceT]]],
    spec: EvaluatorSpec,
    gistnets: list[GistNet],
    ray_config: RayConfig,
    sharing: Sharing,
    *,
    unit: str = "places",
    label: str = "measuring",
) -> None:
    """Measure the places that are not in the file yet, and keep each as it comes.

    Args:
        grouped: into groups that one worker measures in turn, because they share something it reads once.
    """
    missing = samples.missing(places)
    with job_run.progress(len(places), unit, label, initial=len(places) - len(missing)) as progress:

        def keep(place: PlaceT, measured: Sequence[MeasuredT]) -> None:
            samples.append(place, measured)
            progress.advance()

        measure_groups(
            spec,
            gistnets,
            grouped(missing),
            ray_config,
            num_workers=sharing.num_workers,
            threads_per_worker=sharing.threads_per_worker,
            keep=keep,
        )
