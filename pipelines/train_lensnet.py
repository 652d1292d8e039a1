"""train lensnet: learn from measured edits which blocks a Working Context should show.

    labels of `ray_job.py label` -> sets of candidates -> a small set ranker, trained -> the net: weights, config, card

Minutes of one core; interrupted, it is trained anew, to the same weights on the same machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.training.lens_data import MeasuredSet, measured_sets, split_documents
from actors.training.lens_folds import EVERYTHING, FoldedRanks, document_folds, ranks_by_fold, without_each
from actors.training.lens_metrics import usable
from actors.training.lens_trainer import LensTrainerSpec, start_lens_trainer
from cluster.environment import base_folder
from cluster.errors import ConfigError
from cluster.lens_training_config import LensNetConfig, TrainLensNetJob
from cluster.ray_calls import CALL_TIMEOUT_S, get_or_raise
from cluster.ray_runtime import ray_session
from cluster.run import JobRun, write_atomically
from models.lensnet.features import FEATURES
from models.lensnet.net import LensNet, LensNetSpec
from pipelines.label import LABELS
from pipelines.lensnet_report import folds_numbers, folds_tables, lens_card, lens_numbers, lens_tables, plot_lens
from storage.focus.labels import label_settings, read_labels

LENSNET = "lensnet"
"""Folder of the exported net."""

MODELS = ("base_lm", "tokenizer", "gistnet")
"""Digests of a label file's settings that must agree."""

HELD_BACK = 0.2
"""Share of documents that validate where no other labels do."""


def run(job: TrainLensNetJob) -> None:
    """Read labels, train, export, report."""
    config = job.lensnet
    if not config.labels:
        raise ConfigError("lensnet.labels must name files of `ray_job.py label`, or the folders of its runs")
    if unknown := [name for name in config.leave_out if name not in FEATURES]:
        raise ConfigError(f"lensnet.leave_out holds {unknown[0]!r}; the features are: {', '.join(FEATURES)}")
    files = {name: _file(name) for name in (*config.labels, *config.validation)}
    trained_with = _models(list(files.values()))
    sets = _sets([files[name] for name in config.labels])
    if config.validation:
        held_back = _sets([files[name] for name in config.validation])
        _require_other_documents(sets, held_back)
    else:
        sets, held_back = split_documents(sets, HELD_BACK, config.seed)
    if not sets or not held_back:
        raise ConfigError("the labels are of too few documents: some must be left to validate on; label more places")
    spec = _spec(config, sets)
    with JobRun.start("train lensnet", job) as job_run:
        job_run.log_digests({f"labels {path.parent.name}": _digest(path) for path in files.values()})
        job_run.log.info(
            "%s Working Contexts of %s documents to train on, %s of %s others to validate on",
            f"{len(sets):,}", f"{_documents(sets):,}", f"{len(held_back):,}", f"{_documents(held_back):,}",
        )  # fmt: skip
        with ray_session(job.ray):
            losses, net = _trained(spec, sets, job_run)
            folded, ordered = _folded(spec, [*sets, *held_back], job_run) if config.num_folds else ({}, [])
        net.trained_with = trained_with
        exported = job_run.folder / LENSNET
        net.save(exported)
        net = LensNet.load(exported)
        job_run.log_digests({"lensnet": net.digest()})
        tables = lens_tables(net, held_back)
        if folded:
            tables += folds_tables(folded, ordered)
        for table in tables:
            table.show()
        write_atomically(exported / "README.md", lens_card(net, asdict(config), tables))
        plot_lens(losses, net, held_back, job_run.folder / "lensnet.png")
        numbers = {**lens_numbers(net, held_back), "num_steps": len(losses)}
        if folded:
            numbers["folds"] = folds_numbers(folded, ordered)
        job_run.finish(numbers, tables)
        print(f"net       {exported}")
        print(f"report    {job_run.folder / 'report.md'}")


def _file(name: str) -> Path:
    """A file of labels, given itself or as the folder of its run.

    Raises:
        ConfigError: it is not there.
    """
    path = base_folder() / Path(name).expanduser()
    path = path / LABELS if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"there are no labels at {path}; make them with `ray_job.py label`")
    return path


def _sets(paths: Sequence[Path]) -> list[MeasuredSet]:
    contexts = [context for path in paths for context in read_labels(path, list(FEATURES))]
    return [found for found in measured_sets(contexts) if found.measured.any() or found.edits]


def _models(paths: Sequence[Path]) -> dict[str, str]:
    """Digests of the models that all these labels were made with.

    Raises:
        ConfigError: they differ: keys of two nets do not compare, nor what two models gain.
    """
    settings = {path: label_settings(path) for path in paths}
    first = next(iter(settings))
    for path, own in settings.items():
        for what in MODELS:
            if own.get(what) != settings[first].get(what):
                raise ConfigError(
                    f"{path} was labelled with another {what} than {first}; label both with the same models"
                )
    return {what: str(settings[first][what]) for what in MODELS if what in settings[first]}


def _require_other_documents(sets: Sequence[MeasuredSet], held_back: Sequence[MeasuredSet]) -> None:
    shared = sorted({found.uri for found in sets} & {found.uri for found in held_back})
    if shared:
        raise ConfigError(
            f"{len(shared)} documents are in lensnet.labels and lensnet.validation, {shared[0]} among them; take "
            "labels of another split, or leave validation empty"
        )


def _spec(config: LensNetConfig, sets: Sequence[MeasuredSet]) -> LensTrainerSpec:
    told = tuple(name for name in FEATURES if name not in config.leave_out)
    key_dim = sets[0].candidates.keys.shape[1] if config.key_directions else 0
    net = LensNetSpec(
        told,
        key_dim,
        max(1, config.key_directions),
        config.hidden_dim,
        config.num_layers,
        config.num_heads,
        config.dropout,
        config.max_score,
    )
    return LensTrainerSpec(net, config)


def _trained(
    spec: LensTrainerSpec, sets: Sequence[MeasuredSet], job_run: JobRun
) -> tuple[list[dict[str, float]], LensNet]:
    actor = start_lens_trainer(spec, sets)

    def call(method: str) -> Any:
        return get_or_raise(getattr(actor, method).remote(), CALL_TIMEOUT_S, "training LensNet")

    losses: list[dict[str, float]] = []
    with job_run.progress(spec.config.num_epochs, "epochs", "training") as progress:
        for _ in range(spec.config.num_epochs):
            losses += (found := call("epoch"))
            _log(job_run, found)
            progress.advance(1, loss=found[-1]["loss"])
    net = call("trained")
    ray.kill(actor)
    return losses, net


def _folded(
    spec: LensTrainerSpec, sets: Sequence[MeasuredSet], job_run: JobRun
) -> tuple[dict[str, FoldedRanks], list[MeasuredSet]]:
    """Nets that have not seen what they order; and the sets, in that order."""
    config = spec.config
    folds = document_folds(sets, config.num_folds, config.seed)
    if not all(folds):
        raise ConfigError(
            f"lensnet.num_folds={config.num_folds} is more than the {_documents(sets)} documents of the labels"
        )
    if not usable(sets):
        raise ConfigError("no Working Context of the labels has two blocks measured alone; raise labels.num_single")
    variants = without_each(spec) if config.ablate else {EVERYTHING: spec}
    with job_run.progress(len(variants) * len(folds), "nets", "folds") as progress:
        folded = ranks_by_fold(variants, folds, usable, progress.advance)
    return folded, [found for fold in folds for found in usable(fold)]


def _log(job_run: JobRun, lines: Sequence[Mapping[str, float]]) -> None:
    for line in lines:
        values = {f"train.{name}": value for name, value in line.items() if name != "step"}
        job_run.log_metrics(values, int(line["step"]))


def _documents(sets: Sequence[MeasuredSet]) -> int:
    return len({found.uri for found in sets})


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
