"""`evaluate retrieval` on samples with a planted needle: what it reports, leaves behind, and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.results import SampleFile
from cluster.cli import main
from cluster.config import BaseLMConfig
from cluster.config_parser import parse_job
from cluster.evaluation_config import EvaluateFocusJob
from cluster.provenance import flatten
from ray_job import JOBS
from tests.actors.evaluation.support import stored, text_with_needle
from tests.actors.evaluation.test_retrieval_tuning import END, NEEDLE_BLOCK, STOP, WordEncoder, exhaustive, gains_at

Door = Callable[..., int]

GRID = {
    "bm25_k1": [1.2],
    "bm25_b": [0.0, 0.75],
    "bm25_query_tokens": [16, 64],
    "dense_query_tokens": [8],
    "minilm_query_tokens": [16, 64],
}


@dataclass(frozen=True)
class Setup:
    root: Path
    samples: Path
    lm: BaseLMConfig


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[Setup]:
    """Context `c` of two documents, each with a needle that its end asks for, and measured gains of their blocks."""
    root = tmp_path_factory.mktemp("evaluate-retrieval")
    texts = [text_with_needle(STOP, NEEDLE_BLOCK, end=END, seed=seed) + "x" * 320 for seed in range(2)]
    with stored(tiny_lm_config, root, texts) as tree:
        samples = root / "runs" / "measured" / "samples-0123456789ab.jsonl"
        samples.parent.mkdir(parents=True)
        with SampleFile(samples) as file:
            for number, document in enumerate(tree.reader.documents()):
                gains = gains_at(number, uri=document.meta.uri)
                shift = document.first_block
                place = Place(number, document.meta.uri, 1 + shift, STOP + shift)
                rows = [(b + shift, c, s) for b, c, s in exhaustive(gains).single_gains]
                bare = Measured("none", 0, 0, 2.0, 2.0)
                file.append(place, [bare, Measured("exhaustive/raw", 512, 512, 1.0, 1.0, single_gains=rows)])
    num_threads = torch.get_num_threads()
    yield Setup(root, samples, tiny_lm_config)
    torch.set_num_threads(num_threads)


@pytest.fixture
def door(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Door:
    """Run `evaluate retrieval`; returns the exit code. Ray is not asked for, and a stub embeds sentences."""

    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr("actors.evaluation.workers.ray_session", no_ray)
    monkeypatch.setattr("pipelines.evaluate_retrieval.SentenceEncoder.load", WordEncoder)

    def run(name: str, *words: str, **tuning: Any) -> int:
        options = ["--tuning.samples", str(tuning.pop("samples", setup.samples))]
        for key, value in {**GRID, **tuning}.items():
            options += [f"--tuning.{key}", json.dumps(value)]
        common = ["--store.root", str(setup.root), "--store.context", "c", "--gistnet.lm_layers", "2"]
        common += ["--base_lm.source", "tiny", "--base_lm.cache_dir", str(setup.lm.cache_dir)]
        common += ["--base_lm.dtype", "float32", "--run.dir", str(setup.root / "runs"), "--run.name", name]
        return main(JOBS, ["evaluate", "retrieval", *common, "--tracking.enabled", "false", *options, *words])

    return run


def report_of(setup: Setup, name: str) -> dict[str, Any]:
    return json.loads((setup.root / "runs" / name / "report.json").read_text())


def test_the_run_leaves_a_report_and_a_recipe(setup: Setup, door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    before = setup.samples.read_bytes()
    # A run's folder is as good as its file.
    assert door("tuned", samples=setup.samples.parent) == 0
    assert setup.samples.read_bytes() == before
    out = capsys.readouterr().out
    folder = setup.root / "runs" / "tuned"
    report = report_of(setup, "tuned")
    assert report["status"] == "finished"
    assert (report["num_places"], report["num_documents"], report["budget"], report["picks"]) == (2, 2, 512, 4)
    assert report["digests"].keys() == {"base_lm", "tokenizer", "gistnet"}
    assert {name: len(rows) for name, rows in report["searchers"].items()} == {
        "bm25": 4, "dense": 5, "minilm": 2, "fusion": len(report["searchers"]["fusion"]),
    }  # fmt: skip
    by_tokens = {(row["query tokens"], row["b"]): row for row in report["searchers"]["bm25"]}
    assert by_tokens[64, 0.75]["gain_at_1"] == pytest.approx(0.4)
    assert by_tokens[64, 0.75]["hit_at_1"] == by_tokens[64, 0.75]["best_rank"] == 1
    assert by_tokens[16, 0.75]["hit_at_1"] == 0
    assert by_tokens[16, 0.75]["gain_at_1_over_default"] == pytest.approx(by_tokens[16, 0.75]["gain_at_1"] - 0.4)
    assert report["references"]["best_measured"]["gain_at_1"] == pytest.approx(0.4)
    assert report["references"]["best_split_half"]["gain_at_1"] == pytest.approx(0.4)
    assert report["references"]["best_split_half"]["hit_at_1"] is None
    assert report["winners"]["bm25_query_tokens"] == 64
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in flatten(report["references"])), "MLflow takes no others"
    for name in report["searchers"]:
        assert (folder / f"{name}.png").stat().st_size > 1000
    text = (folder / "report.md").read_text()
    for shown in (
        "over the default",
        "the default",
        "newest",
        "rank of the best",
        "## fusion: ",
        "```yaml\nevaluation:",
    ):
        assert shown in text
    assert "nan" not in text
    recipe = (folder / "retrieval.yaml").read_text()
    assert recipe in out
    assert recipe in text
    job = parse_job(EvaluateFocusJob, ["--config", str(folder / "retrieval.yaml")])
    job.evaluation.validate()
    for key, value in report["winners"].items():
        assert getattr(job.evaluation.retrieval, key) == value
    assert job.evaluation.num_places == EvaluateFocusJob().evaluation.num_places


def test_the_same_again_says_the_same(setup: Setup, door: Door) -> None:
    assert door("once") == door("twice") == 0
    once, twice = report_of(setup, "once"), report_of(setup, "twice")
    for part in ("searchers", "references", "winners"):
        assert once[part] == twice[part]


def test_one_searcher_alone_is_tuned_without_the_others(
    setup: Setup, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise AssertionError("nobody asked for sentence embeddings")

    monkeypatch.setattr("pipelines.evaluate_retrieval.SentenceEncoder.load", missing)
    assert door("alone", minilm_query_tokens=[], dense_query_tokens=[], picks=1) == 0
    report = report_of(setup, "alone")
    assert report["searchers"].keys() == {"bm25"}
    assert report["winners"].keys() == {"bm25_k1", "bm25_b", "bm25_query_tokens"}
    for row in report["searchers"]["bm25"]:
        assert row["gain_at_k"] == row["gain_at_1"]


def test_a_long_table_shows_the_best_the_default_and_the_worst(setup: Setup, door: Door) -> None:
    queries = list(range(5, 65))
    assert door("long", bm25_query_tokens=[64], dense_query_tokens=[], minilm_query_tokens=queries) == 0
    rows = report_of(setup, "long")["searchers"]["minilm"]
    assert len(rows) == 60
    text = (setup.root / "runs" / "long" / "report.md").read_text()
    table = text.split("## minilm")[1].split("##")[0].strip().splitlines()[4:]
    shown = [int(line.split("|")[1]) for line in table]
    assert shown[:12] == list(range(1, 13))
    default = next(number for number, row in enumerate(rows, start=1) if row["default"])
    assert shown[12:] == sorted({default, 60} - set(range(13)))
    assert sum("the default" in line for line in table) == 1


@pytest.mark.parametrize(
    ("words", "tuning", "code", "message"),
    [
        ((), {"samples": "/no/such/run"}, 2, "there are no samples at /no/such/run"),
        ((), {"budget": 256}, 2, "no gains within tuning.budget=256; there are: 512"),
        ((), {"picks": 0}, 2, "tuning.picks must be at least 1"),
        (
            (),
            {"bm25_query_tokens": [64, 1000]},
            2,
            "tuning.bm25_query_tokens holds [64, 1000]; all must be from 1 to 512",
        ),
        ((), {"bm25_b": [2.0]}, 2, "tuning.bm25_b holds [2.0]"),
        ((), {"bm25_k1": []}, 2, "tuning.bm25_k1 is empty"),
        ((), {"dense_match": ["best"]}, 2, "tuning.dense_match"),
        ((), {"bm25_query_tokens": [], "dense_query_tokens": [], "minilm_query_tokens": []}, 2, "must hold a number"),
        (("--store.context", "elsewhere"), {}, 5, "elsewhere"),
        (("--gistnet.lm_layers", "1"), {}, 5, "Use the GistNet it was made with"),
    ],
)
def test_bad_input_is_refused(
    door: Door,
    words: tuple[str, ...],
    tuning: dict[str, Any],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert door("refused", *words, **tuning) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_samples_of_another_context_are_refused(
    setup: Setup, door: Door, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "samples-1.jsonl"
    other.write_text(setup.samples.read_text().replace('"uri": "', '"uri": "other-'))
    assert door("refused", samples=other) == 2
    assert "was measured on another context than 'c'" in capsys.readouterr().err
    assert not (setup.root / "runs" / "refused").exists()
