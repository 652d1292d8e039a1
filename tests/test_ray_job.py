from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ray_job
from cluster.config_parser import parse_job

ROOT = Path(__file__).parents[1]


def door(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "ray_job.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_job_is_there_and_accepts_its_configuration() -> None:
    assert [job.command for job in ray_job.JOBS] == [
        "demo",
        "chat",
        "compact",
        "inspect",
        "evaluate gist",
        "evaluate focus",
        "evaluate headroom",
        "evaluate retrieval",
        "evaluate tasks",
        "label",
        "train gistnet",
        "train keys",
        "train lensnet",
        "train ablations",
        "paper 0",
        "store start",
        "store status",
        "store stop",
        "tree verify",
        "tree repair",
        "tree rebuild-gists",
        "tree export",
        "tree import",
        "tree log",
        "tree show",
        "tree branch",
        "tree tag",
        "tree diff",
        "tree rollback",
        "tree gc",
        "tree backup",
        "curate report",
        "curate plan",
        "curate apply",
        "curate effect",
        "curate restore",
        "curate watch",
        "tree delete",
    ]
    for job in ray_job.JOBS:
        module, _, function = job.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert isinstance(parse_job(job.config_type, []), job.config_type)
        assert "\n" not in job.summary
        assert len(job.summary) > 20


def test_help_lists_the_jobs_quickly_and_without_heavy_imports() -> None:
    started = time.monotonic()
    shown = door("--help")
    assert time.monotonic() - started < 5, "seconds, on a busy machine; 0.15 on an idle one"
    assert shown.returncode == 0
    for job in ray_job.JOBS:
        assert f"  {job.command:<18}  {job.summary}" in shown.stdout
    code = (
        "import sys, ray_job; from cluster.cli import main\n"
        "main(ray_job.JOBS, ['compact', '--help'])\n"
        "print([name for name in ('ray', 'torch', 'mlflow', 'transformers', 'zarr') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert loaded.stdout.splitlines()[-1] == "[]", loaded.stderr


def test_an_unknown_key_fails_with_code_2_and_one_line() -> None:
    refused = door("compact", "--corpus.pathz", "a")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: unknown key 'corpus.pathz'; did you mean 'corpus.paths'?")
    assert "Traceback" not in refused.stderr


def test_a_missing_corpus_fails_before_anything_is_started(tmp_path: Path) -> None:
    refused = door("compact", "--run.dir", str(tmp_path / "runs"))
    assert refused.returncode == 2
    assert "corpus.paths is empty" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_print_config_of_a_recipe() -> None:
    printed = door("compact", "--config", "configs/tiny.yaml", "--print_config")
    assert printed.returncode == 0
    assert "source: tiny" in printed.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_exits_with_130(tmp_path: Path) -> None:
    script = tmp_path / "door.py"
    script.write_text(
        "import os, signal, sys\n"
        "from cluster.cli import Job, main\n"
        "from cluster.config import TreeVerifyJob\n"
        "def run(job): os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main([Job('stop', TreeVerifyJob, '__main__:run')], ['stop']))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    stopped = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 130
    assert "the same command resumes: ray_job.py stop" in stopped.stderr
