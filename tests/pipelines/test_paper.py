"""The whole chain with the tiny model, twice; and the notebook on what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from cluster.cli import main
from cluster.config import BaseLMConfig
from cluster.environment import PROJECT_ROOT
from cluster.ray_runtime import RaySession
from ray_job import JOBS
from tests.actors.helpers import make_text

STAGES = {"compact-a", "compact-a-labels", "label-a", "lensnet", "gists-only-a", "focus-a"}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RaySession, tiny_lm_config: BaseLMConfig) -> list[str]:
    """The command."""
    del ray_cluster
    root = tmp_path_factory.mktemp("paper")
    (root / "a").mkdir()
    for index, size in enumerate((300, 500, 900, 700, 400, 800)):
        (root / "a" / f"doc{index}.txt").write_text(make_text(index, size))
    settings = {
        "run.name": "p",
        "run.dir": root / "runs",
        "store.root": root / "store",
        "base_lm.source": "tiny",
        "base_lm.dtype": "float32",
        "base_lm.cache_dir": tiny_lm_config.cache_dir,
        "gistnet.path": "",
        "gistnet.lm_layers": 2,
        "tracking.enabled": "false",
        "paper.texts": f"[a={root / 'a'}]",
        "paper.label_split": "all",
        "paper.evaluation_split": "all",
        "paper.label_places": 5,
        "paper.num_places": 6,
        "paper.gist_cases": "[gists-only]",
        "paper.history_tokens": 1024,
        "paper.budget": 320,
        "paper.rivals": "[full, recency/raw, bm25/raw, lensnet/raw, oracle/raw, lensnet/overlay]",
        "paper.latency_tokens": "[64, 256]",
        "paper.latency_repeats": 2,
        "session.budget": 320,
        "session.compact_tokens": 64,
        "session.tail_tokens": 64,
    }
    return ["paper", "0", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


@pytest.fixture(scope="module")
def folder(words: list[str]) -> Path:
    """Of the run."""
    assert main(JOBS, words) == 0
    return Path(words[words.index("--run.dir") + 1]) / "p"


@pytest.mark.slow
def test_the_chain_leaves_a_paper(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert set(report["stage_seconds"]) == STAGES
    assert report["fidelity"]["gists-only"].keys() == {"a"}
    (cell,) = report["focus"]
    assert cell["num_places"] == 6
    assert {"full", "bm25/raw", "lensnet/raw", "oracle/raw"} <= cell["conditions"].keys()
    assert {"LensNet", "newest", "words (BM25)", "keys"} <= report["lensnet"]["by"].keys()
    assert {(of["tokens"], of["focused"]) for of in report["latency"]} == {
        (n, way) for n in (64, 256) for way in (False, True)
    }
    assert {"base_lm", "gistnet", "lensnet"} <= report["digests"].keys()
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"fidelity.png", "gaps.png", "chosen.png", "long-context.png", "latency.png"} <= pictures
    text = (folder / "paper.md").read_text()
    assert "6 places are a look" in text
    for name in pictures:
        assert f"]({name})" in text
    for heading in ("Substitutability", "Focus", "LensNet", "Cost", "What eight GPUs would change", "Digests"):
        assert heading in text


@pytest.mark.slow
def test_a_second_run_measures_nothing(folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((folder / "report.json").read_text())

    def not_again(*_: object) -> None:
        raise AssertionError("a finished stage was run again")

    for stage in ("compact", "label", "train_lensnet", "evaluate_gist", "evaluate_focus"):
        monkeypatch.setattr(f"pipelines.paper.{stage}.run", not_again)
    monkeypatch.setattr("pipelines.paper.measure_latency", not_again)
    assert main(JOBS, words) == 0
    after = json.loads((folder / "report.json").read_text())
    for name in ("fidelity", "focus", "lensnet", "latency"):
        assert after[name] == before[name]


@pytest.mark.slow
def test_the_notebook_draws_its_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((PROJECT_ROOT / "docs/notebooks/paper0.ipynb").read_text(encoding="utf-8"))
    monkeypatch.setenv("MEGACONTEXT_PAPER", str(folder))
    plt.switch_backend("agg")
    plt.close("all")
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "kept without outputs: they are of some run"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(plt.get_fignums()) == 4
    for number in plt.get_fignums():
        for axes in plt.figure(number).axes:
            assert axes.has_data()
    plt.close("all")


@pytest.mark.slow
def test_another_configuration_needs_another_name(
    folder: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.exists()
    assert main(JOBS, [*words, "--paper.label_places", "9"]) == 2
    assert "another run.name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paper.gist_cases": "[nonsense]"}, "there are: practical, gists-only"),
        ({"paper.texts": "[code]"}, "write kind=path"),
        ({"paper.texts": "[a=/nowhere/at/all]"}, "/nowhere/at/all"),
        ({"paper.rivals": "[nobody]"}, "there is no rival 'nobody'"),
        ({"paper.rivals": "[full, oracle/raw]"}, "must hold recency/raw"),
        ({"paper.lensnet": "/no/net"}, "there is no LensNet at"),
        ({"paper.latency_tokens": "[90000]"}, "was trained for"),
        ({"paper.texts": "[a=docs]", "paper.budget": "100"}, "leaves no room for a block"),
        ({"paper.gistnet_recipe": "/no/recipe.yaml"}, "/no/recipe.yaml"),
        ({"paper.texts": "[a=x, a=y]"}, "names a kind twice"),
        ({"paper.label_split": "dev", "paper.evaluation_split": "dev"}, "was trained on"),
        ({"paper.latency_tokens": "[512, 256]"}, "ascending"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "paper.texts" not in changes:
        changes = {**changes, "paper.texts": "[a=docs]"}
    options = [word for key, value in changes.items() for word in (f"--{key}", value)]
    assert main(JOBS, ["paper", "0", "--run.dir", str(tmp_path / "runs"), *options]) in {2, 3, 4}
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
