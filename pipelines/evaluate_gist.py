"""evaluate gist: what gists are worth in place of the history they were made of, beside the controls that tell content
from a mere soft prompt.

Every condition predicts the same horizons of the same places with the same frozen model. With `base_lm.adapter` it
reads all but `full` with that adapter. Interrupted, the same command goes on with the places that are missing.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from actors.evaluation.gist_evaluator import GistEvaluatorSpec, strangers
from actors.evaluation.gist_results import GistResults, GistSampleFile
from actors.evaluation.gist_sources import TREE
from actors.evaluation.places import Place, choose_places
from actors.evaluation.samples import sample_file_name
from actors.plan import CompactionPlan, plan_models
from cluster.config import BLOCKS_PER_SUPER_BLOCK, BaseLMConfig, GistNetConfig, GistNetKind
from cluster.environment import base_folder
from cluster.errors import ConfigError
from cluster.gist_evaluation_config import EvaluateGistJob, GistEvaluationConfig
from cluster.run import JobRun
from models.adapter import SavedAdapter
from models.gistnet import GistNet, build_gistnet
from pipelines.evaluation import measure_missing
from pipelines.gist_report import collapsed, gist_tables, plot_content, plot_curves
from storage.contract import TreeReader
from storage.store import Store

PLACES_PER_GROUP = 4
"""Neighbours go to one worker: a place's shuffled gists are mostly the own gists of the place before it."""

CONTROLS = ("last_token", "mean", "rescaled_mean")
"""Kinds that have nothing to train."""


def run(job: EvaluateGistJob) -> None:
    """Choose places, measure every condition at each, report."""
    # Stored gists are read, not made: which net stands in the plan says nothing, and a control fits any model.
    plan = plan_models(_absolute(job.base_lm), GistNetConfig(kind="last_token", path=""), job.store)
    nets = build_nets(job.evaluation.gistnets, job.gistnet, plan)
    adapter = load_adapter(plan)
    with (
        Store(job.store.root).open_reader(job.store.context, job.store.version) as reader,
        JobRun.start("evaluate gist", job) as job_run,
    ):
        places = choose(reader, job.evaluation)
        digests = {**plan.digests(), "gistnet": reader.version.encoding.gistnet_digest}
        if adapter is not None:
            digests["adapter"] = adapter.digest()
        job_run.log_digests(digests)
        job_run.log.info("%d places in %d documents", len(places), len({place.uri for place in places}))
        if note := adapter_note(plan.base_lm.adapter, adapter):
            job_run.log.info("%s", note)
        spec = GistEvaluatorSpec(
            plan.base_lm, job.store, reader.version.seq, job.evaluation, tuple(places), tuple(nets)
        )
        name = sample_file_name({**_numbers_depend_on(spec, list(nets.values())), **digests})
        with GistSampleFile(job_run.folder / name) as samples:
            measure_missing(
                job_run, samples, spec.places, _in_groups, spec, list(nets.values()), job.ray, job.evaluation
            )
            results = GistResults.of(samples.of(spec.places))
        report(results, job.evaluation.horizon_tokens, job_run, note)
        sys.stdout.write(f"samples   {samples.path}\n")


def _absolute(base_lm: BaseLMConfig) -> BaseLMConfig:
    """The adapter's folder is read by workers, too, which may work in another folder than the driver."""
    if not base_lm.adapter:
        return base_lm
    return replace(base_lm, adapter=str(base_folder() / Path(base_lm.adapter).expanduser()))


def load_adapter(plan: CompactionPlan) -> SavedAdapter | None:
    """The adapter that the plan's model is to read with, if any, for the driver to know: workers load their own.

    Raises:
        ModelError: it is missing, damaged, or another model's.
    """
    if not plan.base_lm.adapter:
        return None
    adapter = SavedAdapter.load(plan.base_lm.adapter)
    adapter.check_fits(plan.files)
    return adapter


def adapter_note(folder: str, adapter: SavedAdapter | None) -> str:
    """One sentence on how the model read; empty of one without an adapter."""
    if adapter is None:
        return ""
    return (
        f"Everything but `full` was read with the adapter {folder} (rank {adapter.rank}, sha256 "
        f"{adapter.digest()[:12]}), `full` by the stock model."
    )


def build_nets(names: list[str], sizes: GistNetConfig, plan: CompactionPlan) -> dict[str, GistNet]:
    """Nets by the name they have in the report: a kind, or the last part of a folder where that is enough.

    Raises:
        ModelError: a folder that holds no net, or a net that does not fit the model.
    """
    labels = {name: _label(name) for name in names}
    taken = Counter([TREE, *labels.values()])
    nets: dict[str, GistNet] = {}
    for name in names:
        is_kind = name in GistNet.kinds
        config = replace(sizes, kind=cast(GistNetKind, name), path="") if is_kind else replace(sizes, path=name)
        nets[labels[name] if taken[labels[name]] == 1 else name] = build_gistnet(config, plan.files)
    return nets


def _label(name: str) -> str:
    if name in GistNet.kinds:
        return name if name in CONTROLS else f"untrained_{name}"
    return Path(name).expanduser().name


def choose(reader: TreeReader, config: GistEvaluationConfig) -> list[Place]:
    """Places whose histories lie in one document; with LOD2 they begin at a super-block, so they are fewer.

    Raises:
        ConfigError: fewer than two, all of one document, or nodes that are not made yet.
    """
    needs_super_blocks = 2 in config.lods
    places = choose_places(
        reader,
        config.num_places,
        config.history_tokens,
        config.horizon_tokens,
        within_document=True,
        max_per_document=config.max_per_document,
        align_blocks=BLOCKS_PER_SUPER_BLOCK if needs_super_blocks else 1,
        seed=config.seed,
    )
    strangers(places)
    last = max(place.stop_block for place in places) // BLOCKS_PER_SUPER_BLOCK
    if needs_super_blocks and last > reader.version.num_nodes(2):
        raise ConfigError(
            f"context {reader.version.context!r} has {reader.version.num_nodes(2)} nodes of LOD2, {last} are needed; "
            "run `compact` on it again, which makes what is missing, or set evaluation.lods to '[1]'"
        )
    return places


def _numbers_depend_on(spec: GistEvaluatorSpec, nets: list[GistNet]) -> dict[str, Any]:
    """Of the specification what changes numbers, but not how many there are or how the work is shared out."""
    config = asdict(spec.evaluation)
    for name in ("num_places", "num_workers"):
        del config[name]
    return {
        "evaluation": config,
        "context": spec.store.context,
        "seq": spec.seq,
        "compute_dtype": spec.base_lm.dtype,
        "nets": {name: net.digest() for name, net in zip(spec.net_names, nets, strict=True)},
    }


def _in_groups(places: list[Place]) -> list[list[Place]]:
    return [places[at : at + PLACES_PER_GROUP] for at in range(0, len(places), PLACES_PER_GROUP)]


def report(results: GistResults, horizon_tokens: int, job_run: JobRun, note: str) -> None:
    """Tables, plots, warnings, report; `note` says what the tables do not, or is empty."""
    tables = gist_tables(results, horizon_tokens)
    for table in tables:
        table.show()
    for setting in results.settings:
        name = f"lod{setting.lod}-tail{setting.tail_tokens}"
        plot_curves(results, setting, job_run.folder / f"curve-{name}.png")
        plot_content(results, setting, job_run.folder / f"content-{name}.png")
    for warning in (warnings := collapsed(results)):
        job_run.log.warning("%s", warning)
    numbers: dict[str, Any] = {
        "num_places": len(results.samples),
        "num_documents": len(set(results.documents)),
        "conditions": results.as_report(),
        "collapsed": warnings,
        **({"adapter": note} if note else {}),
    }
    job_run.finish(numbers, [*([note] if note else []), *warnings, *tables])
    sys.stdout.write(f"report    {job_run.folder / 'report.md'}\n")
