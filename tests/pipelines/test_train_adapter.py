"""A LoRA adapter trained beside a GistNet, on the tiny model: exported, resumed, shared out, refused."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actors.training.checkpoints import COMPLETE, Checkpoints, LossLog
from cluster.config import BaseLMConfig, validate_sections
from cluster.errors import ConfigError, ModelError
from cluster.ray_runtime import RaySession
from cluster.training_config import AdapterConfig, TrainGistNetJob
from models.adapter import SavedAdapter
from models.base_lm import BaseLM
from models.gistnet import GistNet
from pipelines.train_gistnet import run
from tests.pipelines.training_jobs import JobFactory, losses, training_job, what_counts, write_corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def make_job(root: Path, tiny_lm_config: BaseLMConfig) -> JobFactory:
    return functools.partial(training_job, root, tiny_lm_config)


@pytest.fixture(scope="module")
def plain(root: Path, make_job: JobFactory, ray_cluster: RaySession) -> list[dict[str, float]]:
    """Losses of a run of 12 steps without one."""
    run(make_job("plain", num_steps=12, zero_stage=1))
    return losses(root, "plain")


@pytest.fixture(scope="module")
def adapted(root: Path, make_job: JobFactory, ray_cluster: RaySession) -> TrainGistNetJob:
    """A run of 12 steps with an adapter, done."""
    job = replace(make_job("adapted", num_steps=12, zero_stage=1), adapter=AdapterConfig(rank=2))
    run(job)
    return job


def goes_on(root: Path, job: TrainGistNetJob, name: str) -> tuple[TrainGistNetJob, Path]:
    """A copy of a run of 12 steps as it was after 7, and that checkpoint."""
    shutil.copytree(root / "runs" / job.run.name, root / "runs" / name)
    checkpoints = Checkpoints(root / "runs" / name / "checkpoints")
    (checkpoints.path(12) / COMPLETE).unlink()
    return replace(job, run=replace(job.run, name=name)), checkpoints.path(7)


@pytest.mark.slow
def test_an_adapter_is_trained_beside_the_net_and_exported_apart_from_it(
    root: Path, adapted: TrainGistNetJob, plain: list[dict[str, float]]
) -> None:
    folder, lines = root / "runs/adapted", losses(root, "adapted")
    assert lines[0]["loss"] == plain[0]["loss"], "untrained, it changes nothing"
    assert lines[0]["gradient_norm"] > plain[0]["gradient_norm"]
    assert [line["step"] for line in lines] == list(range(1, 13))
    validated, stock = (LossLog(root / "runs" / name / "fidelity.jsonl").read()[0] for name in ("adapted", "plain"))
    assert validated["full"] == stock["full"]
    assert validated["own"] != stock["own"]
    report = json.loads((folder / "report.json").read_text())
    exported = SavedAdapter.load(folder / "adapter")
    kept = SavedAdapter.load(folder / f"checkpoints/step-{report['exported_step']:08d}/adapter")
    assert exported.digest() == kept.digest() == report["digests"]["adapter"]
    assert all(bool(weight.any()) for weight in exported.weights.values())
    card = (folder / "gistnet/README.md").read_text()
    assert exported.digest() in card
    assert "LoRA adapter of tiny, rank 2" in card
    lm = BaseLM.load(replace(adapted.base_lm, adapter=str(folder / "adapter")))
    stock_lm = AutoModelForCausalLM.from_pretrained(lm.files.folder, dtype=torch.float32).eval()
    theirs = PeftModel.from_pretrained(stock_lm, str(folder / "adapter")).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad(), lm.adapted():
        assert torch.equal(lm.logits(lm.embed(ids)), theirs(ids).logits)
    assert not (root / "runs/plain/adapter").exists()


@pytest.mark.slow
def test_a_run_with_an_adapter_goes_on_bit_for_bit(root: Path, adapted: TrainGistNetJob) -> None:
    job, _ = goes_on(root, adapted, "adapted-again")
    run(job)
    assert what_counts(losses(root, "adapted-again")) == what_counts(losses(root, "adapted"))
    for kind, load in (("adapter", SavedAdapter.load), ("gistnet", GistNet.load)):
        digests = [load(root / "runs" / name / kind).digest() for name in ("adapted", "adapted-again")]
        assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_an_adapters_checkpoint_knows_nothing_of_workers_and_stages(
    root: Path, adapted: TrainGistNetJob, stage: int
) -> None:
    job, _ = goes_on(root, adapted, f"adapted-{stage}")
    run(replace(job, training=replace(job.training, num_workers=2, zero_stage=stage)))
    moved, alone = losses(root, f"adapted-{stage}"), losses(root, "adapted")
    assert what_counts(moved[:7]) == what_counts(alone[:7])
    for line, other in zip(moved[7:], alone[7:], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    one, two = (SavedAdapter.load(root / "runs" / name / "adapter") for name in ("adapted", f"adapted-{stage}"))
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_another_adapter_or_a_damaged_one_is_refused(root: Path, adapted: TrainGistNetJob) -> None:
    job, checkpoint = goes_on(root, adapted, "adapted-spoilt")
    for other, what in (
        (AdapterConfig(), "adapter.rank: 2 then, 0 now"),
        (AdapterConfig(rank=2, alpha=4), "adapter.alpha: 16 then, 4 now"),
        (AdapterConfig(rank=2, target_modules=["k_proj"]), "adapter.target_modules"),
    ):
        with pytest.raises(ConfigError, match=f"was begun otherwise .*{what}.* another --run.name"):
            run(replace(job, adapter=other))
    shutil.copytree(checkpoint / "adapter", root / "kept-adapter")
    kept = SavedAdapter.load(root / "kept-adapter")
    replace(kept, alpha=1).save(checkpoint / "adapter")
    with pytest.raises(ModelError, match="adapter of the checkpoint .* is of another run; delete it"):
        run(job)
    (checkpoint / "adapter/adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="delete .*step-00000007 to go on"):
        run(job)


def test_an_adapter_that_cannot_be_is_refused_before_ray_is_asked(make_job: JobFactory) -> None:
    job = make_job("refused-adapter")
    with pytest.raises(ConfigError, match=r"have no query; there are down_proj, .*, v_proj"):
        run(replace(job, adapter=AdapterConfig(rank=2, target_modules=["query"])))
    assert not (job.run.dir / "refused-adapter").exists()
    sharded = replace(make_job("sharded", zero_stage=3), adapter=AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match=r"zero_stage=3 .* take stage 0, 1 or 2, or adapter\.rank=0"):
        validate_sections(sharded)
    validate_sections(replace(sharded, adapter=AdapterConfig()))
    with pytest.raises(ConfigError, match=r"base_lm\.adapter='x' would do nothing here"):
        validate_sections(replace(job, base_lm=replace(job.base_lm, adapter="x")))
