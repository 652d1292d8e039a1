"""Ray Train: workers, their feeds, and what happens when one of them is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from actors.training.feed import DATASET, FEED_CPUS, FeedSpec, StepsConfig
from actors.training.fidelity import OVER_ALL
from actors.training.worker import TrainerSpec, resumed, train
from cluster.errors import MegaContextError, ModelError, ResourceError
from cluster.ray_calls import check_resources
from cluster.run import JobRun
from models.adapter import SavedAdapter
from models.gistnet import GistNet

LOOK_EVERY_S = 2.0
"""Between two looks at the loss log."""


def worker_resources(num_workers: int, gpus_per_worker: float, num_cpus: float) -> dict[str, float]:
    """What a worker asks Ray for: the CPUs shared out, less what the feeds need."""
    share = num_cpus / num_workers
    resources = {"CPU": max(0.5, share - 2 * FEED_CPUS)}
    return {**resources, "GPU": gpus_per_worker} if gpus_per_worker else resources


def fit(
    spec: TrainerSpec,
    gistnet: GistNet,
    adapter: SavedAdapter | None,
    feed: FeedSpec,
    num_cpus: float,
    job_run: JobRun,
) -> None:
    """Train from the newest checkpoint to the end.

    Args:
        spec: what every worker needs.
        gistnet: the net that the run begins with.
        adapter: the reader's, to begin with; None: the model reads as it is.
        feed: what the workers read.
        num_cpus: of the cluster.
        job_run: shows progress.

    Raises:
        ResourceError: the cluster cannot hold the workers; they were lost too often; or memory ran out.
        ModelError: the loss is no longer finite.
        MegaContextError: as raised in a worker.
    """
    config = spec.training
    resources = worker_resources(config.num_workers, config.gpus_per_worker, num_cpus)
    check_resources([resources] * config.num_workers, "training")
    if newest := spec.checkpoints.newest_step():
        # Every worker would find out, and Ray Train would try it again.
        resumed(spec.checkpoints.path(newest), gistnet, adapter)
    spec.divergence.forget()
    trainer = TorchTrainer(
        train,
        train_loop_config={"spec": spec, "begun_ref": ray.put((gistnet, adapter))},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        datasets={DATASET: ray.data.from_items([{"step": 0}])},
        dataset_config=StepsConfig(feed, spec.checkpoints),
        run_config=RunConfig(
            name=spec.folder.name,
            storage_path=str(spec.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    with _watched(spec, job_run):
        try:
            trainer.fit()
        except (RayError, TrainingFailedError) as error:
            raise _explained(error, spec) from error
    diverged_at = spec.divergence.step()
    if diverged_at is not None:
        newest = spec.checkpoints.newest_step()
        good = f"the last good checkpoint is {spec.checkpoints.path(newest)}" if newest else "no checkpoint was made"
        raise ModelError(
            f"the loss is no longer finite at step {diverged_at}; {good}. Lower training.learning_rate or "
            "training.clip_norm and give the run another --run.name"
        )


def _explained(error: BaseException, spec: TrainerSpec) -> MegaContextError:
    """The first error of ours among the causes; otherwise what can be done about it."""
    seen: list[BaseException] = []
    queue: list[Any] = [error]
    while queue:
        cause = queue.pop()
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        if isinstance(cause, MegaContextError):
            return cause
        failures = getattr(cause, "worker_failures", None)
        queue += list(failures.values()) if isinstance(failures, dict) else []
        queue += [getattr(cause, "cause", None), cause.__cause__]
    text = " ".join(str(error).split())
    if "OutOfMemory" in text or "out of memory" in text or "can't allocate memory" in text:
        return ResourceError(
            f"memory ran out ({text[-300:]}); lower training.windows_per_pass or windows.window_tokens, or take fewer "
            "workers a machine"
        )
    return ResourceError(
        f"training stopped: {text[-500:]}. The same command goes on from step {spec.checkpoints.newest_step()}"
    )


@contextmanager
def _watched(spec: TrainerSpec, job_run: JobRun) -> Iterator[None]:
    """Meanwhile, show progress and hand losses to MLflow, as the loss log grows."""
    stop = threading.Event()
    first = spec.checkpoints.newest_step()
    with job_run.progress(spec.training.num_steps, "steps", "training", initial=first) as progress:

        def look() -> None:
            done = validated = first
            while True:
                last_look = stop.wait(LOOK_EVERY_S)
                for line in spec.loss_log.read():
                    if line["step"] > done:
                        done = line["step"]
                        progress.advance(1, loss=line["loss"])
                        job_run.log_metrics({f"train.{k}": v for k, v in line.items() if k != "step"}, done)
                for line in spec.fidelity_log.read():
                    if line["step"] > validated:
                        validated = line["step"]
                        own, shuffled = (np.average(line[k], weights=line["num_tokens"]) for k in ("own", "shuffled"))
                        values = {"nll": float(own), "content_nats": float(shuffled - own)}
                        values |= {name: line[name] for name in OVER_ALL if name in line}
                        job_run.log_metrics({f"validation.{k}": v for k, v in values.items()}, validated)
                if last_look:
                    return

        watcher = threading.Thread(target=look, name="losses", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
