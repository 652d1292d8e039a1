"""train gistnet: distil a GistNet from the frozen language model.

    corpus, or a stored context -> tokenised windows on disk -> Ray Data, a feed a worker -> Ray Train workers
        -> DeepSpeed -> checkpoints -> the trained net: safetensors, config, model card; and an adapter, if asked for

Run it again after any interruption: it goes on from the newest checkpoint, to the same losses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from actors.plan import explicit_dtype
from actors.training.feed import FeedSpec
from actors.training.fit import fit
from actors.training.order import ReadingOrder
from actors.training.recipe import BEGUN_NET, CONTEXT_VERSION, begun_with, recipe_of, require_same_recipe
from actors.training.sources import ContextWindows, CorpusWindows, WindowSource
from actors.training.windows import prepare_windows, windows_folder
from actors.training.worker import ADAPTER, GISTNET, TrainerSpec
from cluster.config import BaseLMConfig, CorpusSplit
from cluster.environment import absolute_paths
from cluster.errors import ConfigError, CorpusError
from cluster.ray_runtime import ray_session
from cluster.run import JobRun, write_atomically
from cluster.training_config import TrainGistNetJob
from models.adapter import SavedAdapter, fresh_adapter
from models.base_lm import choose_dtype
from models.gistnet import GistNet, build_gistnet
from models.model_files import resolve_model
from models.tokenizer import Tokenizer
from pipelines.training_report import (
    model_card,
    plot_fidelity,
    plot_losses,
    plot_speed,
    training_numbers,
    training_tables,
)
from storage.corpus import open_corpus
from storage.token_windows import read_manifest


def run(job: TrainGistNetJob) -> None:
    """Cut the text, train, export, report."""
    files = resolve_model(job.base_lm)
    tokenizer = Tokenizer.load(job.base_lm)
    gistnet = build_gistnet(job.gistnet, files)
    adapter = fresh_adapter(files, job.adapter)
    if job.windows.window_tokens > files.trained_context:
        raise ConfigError(
            f"windows.window_tokens={job.windows.window_tokens} is more than the {files.trained_context} tokens that "
            f"{files.model_id} was trained for"
        )
    if max(job.objective.states_layers, default=0) > files.num_layers:
        raise ConfigError(
            f"objective.states_layers={job.objective.states_layers} goes beyond the {files.num_layers} layers of "
            f"{files.model_id}"
        )
    job = absolute_paths(job)
    source = open_text(job, job.corpus.split, tokenizer)
    validation = open_text(job, "dev", tokenizer) if job.corpus.split == "train" else None
    version = {CONTEXT_VERSION: source.version} if isinstance(source, ContextWindows) else {}
    with JobRun.start("train gistnet", job) as job_run:
        digests = {"base_lm": files.digest, "tokenizer": tokenizer.digest, "text": source.digest()}
        job_run.log_digests(digests)
        base_lm = _with_dtype(job.base_lm, job_run)
        recipe = version | recipe_of(replace(job, base_lm=base_lm), {**digests, BEGUN_NET: gistnet.digest()})
        require_same_recipe(job_run.folder, recipe)
        with ray_session(job.ray) as session:
            folder = _prepared(job, source, tokenizer, "cutting the text", job_run)
            held_back = None
            if validation is not None:
                held_back = _prepared(job, validation, tokenizer, "cutting validation text", job_run)
                if read_manifest(held_back).num_windows < 2:
                    raise CorpusError(
                        f"{validation.describe()} fills one window; validation needs two, for shuffled gists are "
                        "another's. Give more text, lower windows.window_tokens, or train on corpus.split=all, which "
                        "does without"
                    )
            num_cpus = session.resources["CPU"]
            spec = _spec(job, base_lm, folder, held_back, num_cpus, job_run.folder)
            training = job.training
            order = ReadingOrder(read_manifest(folder).num_windows, training.windows_per_step, training.seed)
            feed = FeedSpec(folder, order, training.windows_per_pass, training.num_steps)
            if spec.checkpoints.newest_step() < job.training.num_steps:
                fit(spec, gistnet, adapter, feed, num_cpus, job_run)
        step = spec.best_step() or spec.checkpoints.newest_step()
        exported = job_run.folder / GISTNET
        GistNet.load(spec.checkpoints.path(step) / GISTNET).save(exported, getattr(torch, training.export_dtype))
        net = GistNet.load(exported)
        job_run.log_digests({"gistnet": net.digest()})
        if adapter is not None:
            adapter = SavedAdapter.load(spec.checkpoints.path(step) / ADAPTER)
            adapter.save(job_run.folder / ADAPTER)
            job_run.log_digests({"adapter": adapter.digest()})
        card = model_card(net, adapter, files.model_id, recipe, spec.fidelity_log.read(), step)
        write_atomically(exported / "README.md", card)
        registered = ""
        if name := job.training.registered_name:
            registered = job_run.register_model(exported, name, net.digest())
        report(spec, net, step, registered, job_run)


def open_text(job: TrainGistNetJob, split: CorpusSplit, tokenizer: Tokenizer) -> WindowSource:
    """The corpus, or without paths the stored context.

    Raises:
        CorpusError, ConfigError: see `open_corpus`.
        ContextNotFoundError, IncompatibleTreeError: see `ContextWindows`.
    """
    if job.corpus.names_text:
        return CorpusWindows(open_corpus(replace(job.corpus, split=split)), job.base_lm)
    # A run goes on with the version it was begun with, whatever was written since.
    version = begun_with(job.run.dir / (job.run.name or "train-gistnet"), CONTEXT_VERSION)
    return ContextWindows(job.store.root, job.store.context, tokenizer, split, version)


def _with_dtype(base_lm: BaseLMConfig, job_run: JobRun) -> BaseLMConfig:
    """What the frozen model computes in, decided once for all workers and said."""
    if base_lm.dtype != "auto":
        return base_lm
    choice = choose_dtype(base_lm)
    job_run.log.info("%s computes in %s", base_lm.source, choice)
    return explicit_dtype(base_lm, choice.dtype)


def _prepared(job: TrainGistNetJob, source: WindowSource, tokenizer: Tokenizer, label: str, job_run: JobRun) -> Path:
    """The folder of a text's windows."""
    size = job.windows.window_tokens
    folder = windows_folder(job.windows.folder, source, tokenizer, size)
    windows = prepare_windows(source, tokenizer, folder, size, label)
    job_run.log.info(
        "%s windows of %s tokens: %.0f%% of the %s tokens of %s documents",
        f"{len(windows):,}",
        f"{size:,}",
        100 * windows.manifest.kept_share,
        f"{windows.manifest.num_tokens:,}",
        f"{windows.manifest.num_documents:,}",
    )
    return folder


def _spec(
    job: TrainGistNetJob, base_lm: BaseLMConfig, folder: Path, validation: Path | None, num_cpus: float, run: Path
) -> TrainerSpec:
    training = job.training
    return TrainerSpec(
        base_lm=base_lm,
        objective=job.objective,
        training=training,
        window_tokens=job.windows.window_tokens,
        windows=folder,
        validation=validation,
        num_validation=job.windows.num_validation,
        folder=run,
        num_threads=training.threads_per_worker or max(1, int(num_cpus / training.num_workers)),
    )


def report(spec: TrainerSpec, net: GistNet, step: int, registered: str, job_run: JobRun) -> None:
    """Tables, plots, report of the exported net; `registered` is its name in MLflow's registry, or empty."""
    losses, fidelity = spec.loss_log.read(), spec.fidelity_log.read()
    plot_losses(losses, job_run.folder / "losses.png")
    plot_speed(losses, job_run.folder / "speed.png")
    if fidelity:
        plot_fidelity(fidelity, job_run.folder / "fidelity.png")
    tables = training_tables(losses, fidelity)
    for table in tables:
        table.show()
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    numbers = {**training_numbers(losses, fidelity, step), "num_parameters": num_parameters, "registered": registered}
    job_run.finish(numbers, tables)
    print(f"net       {job_run.folder / GISTNET} (after {step:,} steps)")
    if (adapter := job_run.folder / ADAPTER).is_dir():
        print(f"adapter   {adapter}")
    if registered:
        print(f"by name   --gistnet.path {registered}")
    print(f"report    {job_run.folder / 'report.md'}")
