"""Training from the command's configuration to a net on disk, on the tiny model: killed, resumed, shared out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from actors.training.checkpoints import COMPLETE, Checkpoints, LossLog
from actors.training.fidelity import BY_TAIL
from actors.training.optimiser_state import FILE, OptimiserState
from actors.training.worker import STAGES
from cluster.config import (
    BaseLMConfig,
    CompactJob,
    CorpusConfig,
    GistNetConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    validate_sections,
)
from cluster.config_parser import parse_job, to_yaml
from cluster.environment import PROJECT_ROOT
from cluster.errors import ConfigError, CorpusError, ModelError
from cluster.ray_runtime import RaySession
from cluster.registry import with_local_nets
from cluster.training_config import ObjectiveConfig, TrainGistNetJob
from models.gistnet import GistNet
from pipelines.compact import run as compact
from pipelines.train_gistnet import run
from storage.corpus import split_of
from tests.actors.helpers import make_text
from tests.pipelines.training_jobs import NUM_STEPS, JobFactory, losses, training_job, what_counts, write_corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def make_job(root: Path, tiny_lm_config: BaseLMConfig) -> JobFactory:
    return functools.partial(training_job, root, tiny_lm_config)


@pytest.fixture(scope="module")
def undisturbed(root: Path, make_job: JobFactory, ray_cluster: RaySession) -> list[dict[str, float]]:
    run(make_job("undisturbed"))
    return losses(root, "undisturbed")


def test_a_run_leaves_a_net_a_report_and_its_checkpoints(root: Path, undisturbed: list[dict[str, float]]) -> None:
    folder = root / "runs/undisturbed"
    assert [line["step"] for line in undisturbed] == list(range(1, NUM_STEPS + 1))
    assert undisturbed[-1]["kl"] < 0.9 * undisturbed[0]["kl"]
    assert all(line["gradient_norm"] > 0 for line in undisturbed)
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["num_steps"] == NUM_STEPS
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.steps()[-2:] == [28, NUM_STEPS]
    assert report["exported_step"] in checkpoints.steps()
    net, exported = GistNet.load(folder / "gistnet"), checkpoints.path(report["exported_step"]) / "gistnet"
    assert net.digest() == GistNet.load(exported).digest() == report["digests"]["gistnet"]
    assert net.embedding_mean.any()
    card = (folder / "gistnet/README.md").read_text()
    assert net.digest() in card
    assert "training.learning_rate" in card
    assert {path.name for path in folder.glob("*.png")} == {"losses.png", "fidelity.png", "speed.png"}
    for line in undisturbed:
        assert 0 < line["mfu"] < 1.5
        assert sum(line[f"{stage}_s"] for stage in STAGES) == pytest.approx(line["step_s"], rel=0.1)
        assert line["memory_gib"] > 0.1
    assert [row["raw tail, tokens"] for row in report["validation"]] == ["0 to 31", "32 to 63", "64 to 95", "all"]


def test_the_same_command_does_nothing_twice(
    root: Path, make_job: JobFactory, undisturbed: list[dict[str, float]], ray_cluster: RaySession
) -> None:
    run(make_job("undisturbed"))
    assert losses(root, "undisturbed") == undisturbed


@pytest.fixture
def kill_worker_at() -> Iterator[Callable[[Path, int], list[int]]]:
    """Kill a training worker with -9 once a step is in a run's loss log; the pids that were killed."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def watch(folder: Path, step: int) -> list[int]:
        killed: list[int] = []

        def look() -> None:
            while not stop.wait(0.05):
                lines = LossLog(folder / "losses.jsonl").read()
                if lines and lines[-1]["step"] >= step:
                    for process in psutil.Process().children(recursive=True):  # of this session's cluster alone
                        with contextlib.suppress(psutil.NoSuchProcess):
                            if "".join(process.cmdline()[:1]).startswith("ray::RayTrainWorker"):
                                killed.append(process.pid)
                                process.kill()
                                return

        threads.append(threading.Thread(target=look, daemon=True))
        threads[-1].start()
        return killed

    yield watch
    stop.set()
    for thread in threads:
        thread.join()


def test_a_killed_worker_changes_nothing(
    root: Path,
    make_job: JobFactory,
    undisturbed: list[dict[str, float]],
    kill_worker_at: Callable[[Path, int], list[int]],
    ray_cluster: RaySession,
) -> None:
    killed = kill_worker_at(root / "runs/killed-worker", 11)
    run(make_job("killed-worker"))
    assert len(killed) == 1
    assert what_counts(losses(root, "killed-worker")) == what_counts(undisturbed)
    nets = [GistNet.load(root / "runs" / name / "gistnet").digest() for name in ("undisturbed", "killed-worker")]
    assert nets[0] == nets[1]


@pytest.mark.slow
def test_a_killed_driver_changes_nothing(
    root: Path, make_job: JobFactory, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    """The whole command with its cluster, killed with -9 in mid-run; then the same command again."""
    recipe = tmp_path / "job.yaml"
    recipe.write_text(to_yaml(make_job("killed-driver")))
    command = [sys.executable, "ray_job.py", "train", "gistnet", "--config", str(recipe), "--ray.num_cpus", "4"]
    first = subprocess.Popen(command, cwd=PROJECT_ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    log = LossLog(root / "runs/killed-driver/losses.jsonl")
    deadline = time.monotonic() + 240
    while not (lines := log.read()) or lines[-1]["step"] < 12:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(first.pid).children(recursive=True)
    os.killpg(first.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its session
            child.kill()
    first.wait()
    stopped_at = log.read()[-1]["step"]
    assert stopped_at < NUM_STEPS
    subprocess.run(command, cwd=PROJECT_ROOT, check=True, capture_output=True, timeout=280)
    assert what_counts(log.read()) == what_counts(undisturbed)


@pytest.fixture(scope="module")
def two_workers(root: Path, make_job: JobFactory, ray_cluster: RaySession) -> list[dict[str, float]]:
    run(make_job("two-workers", num_workers=2))
    return losses(root, "two-workers")


def test_workers_share_a_run_without_changing_it(
    root: Path, undisturbed: list[dict[str, float]], two_workers: list[dict[str, float]]
) -> None:
    assert two_workers[0]["loss"] == pytest.approx(undisturbed[0]["loss"], rel=1e-6)
    for line, alone in zip(two_workers, undisturbed, strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], rel=2e-4)  # sums in another order, 30 steps long
        assert line["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-2)
    names = ("undisturbed", "two-workers")
    one, two = (LossLog(root / "runs" / name / "fidelity.jsonl").read() for name in names)
    assert [line["step"] for line in one] == [10, 20, 30]
    for line, other in zip(one, two, strict=True):
        assert line["num_tokens"] == other["num_tokens"]
        for name in (*BY_TAIL, "repeat_own", "repeat_shuffled"):
            assert other[name] == pytest.approx(line[name], rel=1e-3), name
    pairs, shared = (LossLog(root / "runs" / name / "fidelity_pairs.jsonl").read()[-1] for name in names)
    assert pairs["windows"] == shared["windows"]
    assert len(pairs["own"]) == len(pairs["windows"]) == 2
    for name in BY_TAIL:
        assert np.average(pairs[name], axis=0, weights=pairs["num_tokens"]) == pytest.approx(one[-1][name])
        assert np.array(shared[name]) == pytest.approx(np.array(pairs[name]), rel=1e-3)


@pytest.mark.slow
def test_one_of_two_workers_killed_changes_nothing(
    root: Path,
    make_job: JobFactory,
    two_workers: list[dict[str, float]],
    kill_worker_at: Callable[[Path, int], list[int]],
    ray_cluster: RaySession,
) -> None:
    killed = kill_worker_at(root / "runs/killed-of-two", 11)
    run(make_job("killed-of-two", num_workers=2))
    assert len(killed) == 1
    for line, other in zip(losses(root, "killed-of-two"), two_workers, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_goes_on_with_other_workers_and_another_stage(
    root: Path, make_job: JobFactory, undisturbed: list[dict[str, float]], ray_cluster: RaySession, stage: int
) -> None:
    name = f"moved-{stage}"
    folder = root / "runs" / name
    shutil.copytree(root / "runs/undisturbed", folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    (checkpoints.path(NUM_STEPS) / COMPLETE).unlink()
    run(make_job(name, num_workers=2, zero_stage=stage))
    assert checkpoints.newest_step() == NUM_STEPS
    moved = losses(root, name)
    assert what_counts(moved[:28]) == what_counts(undisturbed[:28])
    for line, alone in zip(moved[28:], undisturbed[28:], strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    root: Path, make_job: JobFactory, ray_cluster: RaySession
) -> None:
    job = make_job("diverged", learning_rate=1e30, warmup_steps=10, clip_norm=1e30, checkpoint_every_steps=1)
    with pytest.raises(ModelError, match=r"no longer finite at step \d+; .*(step-0000|no checkpoint)"):
        run(job)


def test_another_recipe_under_the_same_name_is_refused(
    root: Path, make_job: JobFactory, undisturbed: list[dict[str, float]]
) -> None:
    job = make_job("undisturbed")
    for other, what in (
        (
            make_job("undisturbed", num_steps=NUM_STEPS + 1),
            f"training.num_steps: {NUM_STEPS} then, {NUM_STEPS + 1} now",
        ),
        (replace(job, gistnet=GistNetConfig(lm_layers=2, key_layer=1, num_vectors=2)), "digest of untrained gistnet"),
        (replace(job, objective=ObjectiveConfig(max_tail_blocks=2)), "objective.max_tail_blocks: 3 then, 2 now"),
        (replace(job, corpus=replace(job.corpus, include=["doc1*"])), "digest of text"),
    ):
        with pytest.raises(ConfigError, match=f"was begun otherwise .*{what}.* another --run.name"):
            run(other)
    assert losses(root, "undisturbed") == undisturbed


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: (path / FILE).write_bytes(b"nothing"), rf"{FILE} cannot be read .*delete the folder"),
        (
            lambda path: OptimiserState(28, {"another/exp_avg": torch.ones(3)}).save(path),
            "step-00000028 does not fit this run: .*'another/exp_avg'.* delete it",
        ),
        (lambda path: (path / "gistnet/model.safetensors").write_bytes(b"nothing"), "delete .*step-00000028 to go on"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    root: Path,
    make_job: JobFactory,
    undisturbed: list[dict[str, float]],
    ray_cluster: RaySession,
    spoil: Callable[[Path], object],
    why: str,
) -> None:
    name = f"spoilt-{hashlib.sha256(why.encode()).hexdigest()[:8]}"
    shutil.copytree(root / "runs/undisturbed", root / "runs" / name)
    checkpoints = Checkpoints(root / "runs" / name / "checkpoints")
    (checkpoints.path(NUM_STEPS) / COMPLETE).unlink()
    spoil(checkpoints.path(28))
    with pytest.raises(ModelError, match=why):
        run(make_job(name))


def test_one_window_of_validation_text_is_refused(
    root: Path, make_job: JobFactory, tmp_path: Path, ray_cluster: RaySession
) -> None:
    texts = [make_text(seed, 60) for seed in range(60)]
    dev = [text for text in texts if split_of(hashlib.sha256(text.encode()).hexdigest()) == "dev"]
    train = [text for text in texts if split_of(hashlib.sha256(text.encode()).hexdigest()) == "train"]
    for number, text in enumerate([dev[0], *train[:12]]):
        (tmp_path / f"doc{number}.txt").write_text(text)
    job = make_job("one-window")
    corpus = replace(job.corpus, paths=[str(tmp_path)])
    with pytest.raises(CorpusError, match="fills one window; validation needs two"):
        run(replace(job, corpus=corpus))


@pytest.mark.slow
def test_a_stored_context_is_trained_on(
    root: Path, make_job: JobFactory, tmp_path: Path, ray_cluster: RaySession
) -> None:
    """The same documents, the same run."""
    job = make_job("from-context", num_steps=3)
    store = StoreConfig(root=tmp_path / "store")
    compact(
        CompactJob(
            run=RunConfig(dir=root / "runs"),
            tracking=job.tracking,
            corpus=replace(job.corpus, split="all"),
            base_lm=job.base_lm,
            gistnet=GistNetConfig(kind="last_token"),
            store=store,
        )
    )
    from_context = replace(job, corpus=CorpusConfig(split="train"), store=store)
    run(from_context)
    run(make_job("from-corpus", num_steps=3))
    assert what_counts(losses(root, "from-context")) == what_counts(losses(root, "from-corpus"))
    # A context that has grown since is another text, to another run: this one goes on.
    (tmp_path / "more").mkdir()
    (tmp_path / "more/doc.txt").write_text(make_text(77, 900))
    compact(
        CompactJob(
            run=RunConfig(name="more", dir=root / "runs"),
            tracking=job.tracking,
            corpus=CorpusConfig(paths=[str(tmp_path / "more")]),
            base_lm=job.base_lm,
            gistnet=GistNetConfig(kind="last_token"),
            store=store,
        )
    )
    run(from_context)
    with pytest.raises(ConfigError, match="training.seed: 0 then, 1 now"):
        run(replace(from_context, training=replace(job.training, seed=1)))


@pytest.mark.slow
def test_a_net_is_found_by_the_name_it_was_registered_by(
    root: Path, make_job: JobFactory, ray_cluster: RaySession
) -> None:
    """Of a run that only repeats; a run that begins from it knows it by name."""
    job = make_job("repeats", num_steps=2)
    job = replace(job, objective=ObjectiveConfig(repeat_share=1.0), tracking=TrackingConfig())
    run(job)
    report = json.loads((root / "runs/repeats/report.json").read_text())
    assert report["registered"] == "models:/gistnet/1"
    assert {"loss", "repeat", "spread"} < set(report["last_step"])
    assert not {"kl", "nll"} & set(report["last_step"])
    goes_on = replace(make_job("goes-on", num_steps=2), tracking=TrackingConfig())
    goes_on = with_local_nets(replace(goes_on, gistnet=GistNetConfig(path="models:/gistnet/latest")))
    assert GistNet.load(goes_on.gistnet.path).digest() == report["digests"]["gistnet"]
    run(goes_on)
    again = json.loads((root / "runs/goes-on/report.json").read_text())
    assert again["registered"] == "models:/gistnet/2"


@pytest.mark.slow
def test_the_learned_constant_is_trained_by_three_workers_in_shards(
    root: Path, make_job: JobFactory, ray_cluster: RaySession
) -> None:
    """A net that begins at zero; and fewer pairs of validation windows than workers."""
    job = make_job("constant", num_steps=2, windows_per_step=3, num_workers=3, zero_stage=3)
    every = ObjectiveConfig(
        repeat_share=0.5, states_share=0.5, states_layers=[1, 3], scored_share=0.5, inner_steps=1, inner_share=0.5
    )
    run(replace(job, gistnet=GistNetConfig(kind="constant"), objective=every))
    lines = losses(root, "constant")
    assert lines[0]["spread"] == 0
    assert {"kl", "nll", "states", "repeat", "inner"} < set(lines[0])


@pytest.mark.slow
def test_the_recipe_for_eight_gpus_runs_on_a_tiny_model_and_two_workers(
    root: Path, tiny_lm_config: BaseLMConfig, tmp_path: Path, ray_cluster: RaySession
) -> None:
    """Everything of it but the sizes and the devices."""
    for index in range(24):
        (tmp_path / f"doc{index}.txt").write_text(make_text(index, 900))
    job = parse_job(TrainGistNetJob, ["--config", "configs/train_gistnet_8gpu.yaml"], "dry run")
    validate_sections(job)
    assert (job.training.num_workers, job.training.gpus_per_worker, job.base_lm.device) == (8, 1, "cuda")
    few = {"num_workers": 2, "gpus_per_worker": 0, "windows_per_step": 4, "num_steps": 2, "threads_per_worker": 1}
    job = replace(
        job,
        run=RunConfig(name="eight-gpus", dir=root / "runs"),
        tracking=TrackingConfig(enabled=False),
        corpus=replace(job.corpus, paths=[str(tmp_path)]),
        base_lm=tiny_lm_config,
        gistnet=replace(job.gistnet, lm_layers=2, key_layer=1),
        windows=replace(job.windows, window_tokens=2048, folder=root / "windows", num_validation=2),
        training=replace(job.training, **few),
    )
    run(job)
    assert [line["step"] for line in losses(root, "eight-gpus")] == [1, 2]
    report = json.loads((root / "runs/eight-gpus/report.json").read_text())
    assert report["node_content_nats"] != 0


def test_bad_input_is_refused_before_ray_is_asked(root: Path, make_job: JobFactory, ray_cluster: RaySession) -> None:
    job = make_job("refused")
    with pytest.raises(CorpusError):
        run(replace(job, corpus=CorpusConfig(paths=[str(root / "nothing-here")])))
    with pytest.raises(ConfigError, match="windows_per_step"):
        run(replace(job, training=replace(job.training, windows_per_step=4000)))
    with pytest.raises(ConfigError, match="beyond the 4 layers"):
        run(replace(job, objective=ObjectiveConfig(states_share=0.5, states_layers=[2, 5])))
