"""train ablations: the same training in many variants, one switch at a time, on the same windows.

    recipe + common keys -> the default -> a run of `train gistnet` for each variant and seed
        -> what every run came to, beside the default of its seed, pair by pair of validation windows

Every variant is a run of its own in `runs/<name>/<variant>-seed<n>/`. Run it again after any interruption: what is
finished is read, what was begun goes on. A variant that fails is reported with its reason; the others are trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.training.measured_run import MeasuredRun
from actors.training.worker import GISTNET
from cluster.ablations_config import DEFAULT, TrainAblationsJob
from cluster.config import RunConfig, validate_sections
from cluster.config_parser import parse_job
from cluster.environment import absolute_paths
from cluster.errors import ConfigError, MegaContextError
from cluster.registry import tracking_uri, with_local_nets
from cluster.run import JobRun, is_finished
from cluster.training_config import TrainGistNetJob
from pipelines import train_gistnet
from pipelines.ablations_report import Outcome, ablation_numbers, ablation_tables, plot_curves, plot_differences

BEGINS = "variant:"
"""Before the name of the variant whose net `gistnet.path` means."""

OWN_SECTIONS = ("run", "ray", "tracking")
"""Of `train gistnet`, those that are the ablations' own."""

LONGEST_REASON = 500


@dataclass(frozen=True)
class Variant:
    """One run that is to be."""

    group: str
    """The question it answers; empty for the default."""
    name: str
    seed: int
    changes: Mapping[str, Any]
    """Keys in which it differs from the default."""
    begins_with: str
    """The variant whose net it begins with, or empty."""
    job: TrainGistNetJob
    """All of its configuration."""

    @property
    def folder(self) -> Path:
        """Of its run."""
        return self.job.run.dir / self.job.run.name


def run(job: TrainAblationsJob) -> int:
    """Train what is not trained yet, compare, report; the exit code of the first variant that failed, or 0."""
    job = absolute_paths(job)
    variants = planned(job)
    codes: list[int] = []
    outcomes: list[Outcome] = []
    with JobRun.start("train ablations", job) as job_run:
        for number, variant in enumerate(variants, start=1):
            job_run.log.info("[%s/%s] %s, seed %s", number, len(variants), variant.name, variant.seed)
            measured, failure = None, ""
            try:
                _train(variant, outcomes, job_run)
                measured = MeasuredRun.read(variant.folder)
            except Exception as error:  # whatever it is, it is this variant's
                codes.append(error.exit_code if isinstance(error, MegaContextError) else 1)
                failure = _reason(error)
                job_run.log.warning("%s, seed %s, failed: %s", variant.name, variant.seed, failure)
            outcomes.append(_outcome(variant, measured, failure, outcomes))
            # What is known so far is reported also when the job is stopped.
            job_run.finish(ablation_numbers(outcomes), ablation_tables(outcomes))
        report(outcomes, job_run)
    return codes[0] if codes else 0


def planned(job: TrainAblationsJob) -> list[Variant]:
    """All runs, in the order they are trained in: seed by seed, the default first, nets before what begins with them.

    Raises:
        ConfigError: naming the variant and what is wrong with it, before anything is trained.
    """
    config = job.ablations
    if not Path(config.recipe).is_file():
        raise ConfigError(f"ablations.recipe={config.recipe} is no file; give a recipe of train gistnet")
    groups = {"": {DEFAULT: {}}, **config.groups}
    group_of = {name: group for group, variants in groups.items() for name in variants}
    changes_of = {name: changes for variants in groups.values() for name, changes in variants.items()}
    chosen: list[str] = []

    def choose(name: str, behind: tuple[str, ...]) -> None:
        if name in behind:
            raise ConfigError(f"ablations: variants begin with each other: {' <- '.join((*behind, name))}")
        before = _begins_with(changes_of[name])
        if before and before not in changes_of:
            raise ConfigError(
                f"ablations: {name!r} begins with {before!r}, which is none of the variants {', '.join(changes_of)}"
            )
        if before:
            choose(before, (*behind, name))
        if name not in chosen:
            chosen.append(name)

    for name, group in group_of.items():
        if name == DEFAULT or not config.only or {name, group} & set(config.only):
            choose(name, ())
    return [_variant(job, group_of[name], name, changes_of[name], seed) for seed in config.seeds for name in chosen]


def _variant(job: TrainAblationsJob, group: str, name: str, changes: Mapping[str, Any], seed: int) -> Variant:
    folder = job.run.dir / (job.run.name or "train-ablations")
    # Dozens of nets that are made to be compared do not belong into the registry, unless somebody says so.
    keys = {"training.registered_name": "", **job.ablations.common, **job.ablations.overrides}
    keys |= {"training.seed": seed, "gistnet.seed": seed, **changes}
    if own := [key for key in keys if key.partition(".")[0] in OWN_SECTIONS]:
        raise ConfigError(f"ablations: {name!r} sets {', '.join(own)}; give these to the ablations as a whole")
    before = _begins_with(keys)
    if before:
        keys["gistnet.path"] = str(folder / _run_name(before, seed) / GISTNET)
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
    try:
        trained = parse_job(TrainGistNetJob, ["--config", job.ablations.recipe, *words])
        trained = replace(
            trained,
            run=RunConfig(_run_name(name, seed), folder),
            ray=job.ray,
            tracking=replace(job.tracking, uri=tracking_uri(job.tracking, job.run.dir)),
        )
        validate_sections(trained)
        trained = with_local_nets(absolute_paths(trained))
    except ConfigError as error:
        raise ConfigError(f"ablations: {name!r}: {error}") from error
    if trained.corpus.split != "train":
        raise ConfigError(f"ablations: {name!r}: corpus.split must be train: the dev split is what is measured on")
    return Variant(group, name, seed, changes, before, trained)


def _run_name(name: str, seed: int) -> str:
    return f"{name}-seed{seed}"


def _begins_with(keys: Mapping[str, Any]) -> str:
    path = str(keys.get("gistnet.path", ""))
    return path.removeprefix(BEGINS) if path.startswith(BEGINS) else ""


def _train(variant: Variant, outcomes: Sequence[Outcome], job_run: JobRun) -> None:
    """Unless it was."""
    if variant.begins_with and _before(variant, outcomes).measured is None:
        raise ConfigError(f"it begins with {variant.begins_with!r}, which failed")
    if is_finished(variant.folder, variant.job):
        job_run.log.info("it is finished: %s", variant.folder)
        return
    train_gistnet.run(variant.job)


def _before(variant: Variant, outcomes: Sequence[Outcome]) -> Outcome:
    """What came of the variant it begins with."""
    return next(o for o in outcomes if (o.name, o.seed) == (variant.begins_with, variant.seed))


def _outcome(variant: Variant, measured: MeasuredRun | None, failure: str, outcomes: Sequence[Outcome]) -> Outcome:
    before = _before(variant, outcomes) if variant.begins_with else None
    return Outcome(
        variant.group,
        variant.name,
        variant.seed,
        variant.changes,
        num_steps=variant.job.training.num_steps,
        num_steps_before=before.num_steps + before.num_steps_before if before else 0,
        measured=measured,
        failure=failure,
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:LONGEST_REASON]
    return text if isinstance(error, MegaContextError) else f"{type(error).__name__}: {text}"


def report(outcomes: Sequence[Outcome], job_run: JobRun) -> None:
    """Tables, plots."""
    for table in ablation_tables(outcomes):
        table.show()
    for earlier in job_run.folder.glob("*.png"):  # of variants that may not be asked for now
        earlier.unlink()
    for group in dict.fromkeys(o.group for o in outcomes if o.group and o.measured):
        plot_curves(group, outcomes, job_run.folder / f"curves-{group}.png")
    plot_differences(outcomes, job_run.folder / "differences.png")
    print(f"report    {job_run.folder / 'report.md'}")
