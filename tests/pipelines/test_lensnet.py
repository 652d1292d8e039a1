"""`label` edits of a small context, `train lensnet` on them, `evaluate focus` with the net: the whole way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.labelling.edits import PlaceLabels
from benchmarks import attention_signal
from cluster.cli import main
from cluster.config import BaseLMConfig
from cluster.ray_runtime import RaySession
from models.lensnet import FEATURES, LensNet
from pipelines.label import LABELS
from ray_job import JOBS
from storage.focus.labels import EDIT_KINDS, label_settings, read_labels, write_labels
from tests.actors.helpers import make_text

Door = Callable[..., int]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RaySession, tiny_lm_config: BaseLMConfig) -> Path:
    """A folder whose `store` holds context `c`: seven documents of 1,500 to 4,500 tokens of the tiny model."""
    root = tmp_path_factory.mktemp("lensnet")
    corpus = root / "corpus"
    corpus.mkdir()
    for index, words in enumerate((300, 500, 900, 700, 400, 800, 600)):
        (corpus / f"doc{index}.txt").write_text(make_text(index, words))
    words = ["compact", *models(root, tiny_lm_config), "--corpus.paths", f"[{corpus}]", "--run.name", "compact"]
    words += ["--base_lm.dtype", "float32", "--compaction.feed", "actors", "--compaction.num_compactors", "1"]
    assert main(JOBS, [*words, "--tracking.enabled", "false"]) == 0
    return root


def models(root: Path, lm: BaseLMConfig) -> list[str]:
    words = ["--store.root", str(root / "store"), "--store.context", "c", "--gistnet.lm_layers", "2"]
    words += ["--base_lm.source", "tiny", "--base_lm.cache_dir", str(lm.cache_dir)]
    return [*words, "--run.dir", str(root / "runs")]


@pytest.fixture(scope="module")
def door(root: Path, tiny_lm_config: BaseLMConfig) -> Door:
    """Run `label` with a small setting, or another; returns the exit code."""

    def run(name: str, **labels: Any) -> int:
        setting: dict[str, Any] = {
            "num_places": 6,
            "history_tokens": 1024,
            "horizon_tokens": 24,
            "budget": 256,
            "tail_tokens": 64,
            "max_blocks": 4,
            "num_single": 5,
            "num_workers": 2,
        }
        options = [word for key, value in (setting | labels).items() for word in (f"--labels.{key}", str(value))]
        common = [*models(root, tiny_lm_config), "--run.name", name, "--tracking.enabled", "false"]
        return main(JOBS, ["label", *common, *options])

    return run


def report_of(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "runs" / name / "report.json").read_text())


@pytest.fixture(scope="module")
def labels(root: Path, door: Door) -> Path:
    assert door("labels") == 0
    return root / "runs" / "labels" / LABELS


@pytest.fixture(scope="module")
def net(root: Path, labels: Path) -> Path:
    words = [
        "train",
        "lensnet",
        "--lensnet.labels",
        f"[{labels}]",
        "--run.dir",
        str(root / "runs"),
        "--run.name",
        "net",
    ]
    words += ["--lensnet.num_epochs", "2", "--lensnet.hidden_dim", "16", "--tracking.enabled", "false"]
    assert main(JOBS, words) == 0
    return root / "runs" / "net" / "lensnet"


def test_every_place_has_edits_of_every_kind(root: Path, labels: Path) -> None:
    found = read_labels(labels, list(FEATURES))
    assert [context.number for context in found] == list(range(6))
    for context in found:
        assert set(EDIT_KINDS) == {edit.kind for edit in context.edits}
        blocks = context.blocks.tolist()
        assert blocks == sorted(set(blocks))
        assert all(context.first_block <= block < context.shown_from for block in blocks)
        for edit in context.edits:
            assert set(edit.shown) | set(edit.added) | set(edit.removed) <= set(blocks)
            assert set(edit.removed) <= set(edit.shown)
            assert not set(edit.added) & set(edit.shown)
            assert all(0 < nll < 20 for nll in (*edit.before, *edit.after))
        assert sum(edit.kind == "expand one" for edit in context.edits) == 5
        assert len({edit.before for edit in context.edits if not edit.shown}) == 1, "one base, read once"
    numbers = report_of(root, "labels")
    assert numbers["num_places"] == 6
    assert numbers["kinds"]["expand one"]["num_edits"] == 30


def test_an_interrupted_run_goes_on_and_comes_to_the_same(root: Path, door: Door, labels: Path) -> None:
    (whole,) = labels.parent.glob("samples-*.jsonl")
    lines = whole.read_text().splitlines(keepends=True)
    begun = root / "runs" / "resumed"
    begun.mkdir()
    (begun / whole.name).write_text("".join(lines[:2]) + lines[2][:40])
    assert door("resumed") == 0
    (resumed,) = begun.glob("samples-*.jsonl")
    assert sorted(resumed.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    assert door("resumed", num_places=8) == 0, "more places may be asked for"
    again = read_labels(begun / LABELS, list(FEATURES))
    assert len(again) == 8


def test_labels_survive_their_json(labels: Path) -> None:
    (path,) = labels.parent.glob("samples-*.jsonl")
    record = json.loads(path.read_text().splitlines()[0])
    candidates = PlaceLabels(**record["measured"][0]).candidates()
    assert candidates.features.shape == (len(candidates), len(FEATURES))
    assert candidates.keys.shape == (len(candidates), len(candidates.query))


def test_questions_are_labelled_by_their_answers(root: Path, door: Door, labels: Path) -> None:
    assert (
        door(
            "tasks",
            tasks="[single_numbers, recall_literal]",
            num_places=5,
            history_tokens=4096,
            budget=640,
            num_single=6,
        )
        == 0
    )
    found = read_labels(root / "runs" / "tasks" / LABELS, list(FEATURES))
    assert len(found) == 5
    assert {context.uri.partition("/")[0] for context in found} == {"task:single_numbers", "task:recall_literal"}
    assert len({context.uri for context in found}) == 5
    for context in found:
        assert {"expand one", "expand several"} <= {edit.kind for edit in context.edits}
        # Words of the question stand in something that is planted, of which the tree itself knows nothing.
        assert context.features[:, list(FEATURES).index("lexical_rank")].max() == 1.0
    words = ["train", "lensnet", "--lensnet.labels", f"[{root / 'runs' / 'tasks'}, {labels}]"]
    words += ["--run.dir", str(root / "runs"), "--run.name", "both", "--lensnet.num_epochs", "1"]
    words += ["--lensnet.num_folds", "2", "--lensnet.ablate", "true", "--lensnet.hidden_dim", "8"]
    assert main(JOBS, [*words, "--tracking.enabled", "false"]) == 0
    folds = report_of(root, "both")["folds"]
    assert folds["num_sets"] == 11, "every Working Context of text and tasks once"
    assert folds["without"].keys() == {"nothing", *FEATURES, "keys", "attention"}
    text = (root / "runs" / "both" / "report.md").read_text()
    assert "Every document by a net that has not seen it: 11 Working Contexts" in text
    assert "What leaving out does" in text


def test_training_leaves_a_net_a_card_and_numbers(root: Path, net: Path) -> None:
    loaded = LensNet.load(net)
    assert loaded.spec.hidden_dim == 16
    settings = label_settings(net.parents[1] / "labels" / LABELS)
    assert loaded.trained_with == {what: settings[what] for what in ("base_lm", "tokenizer", "gistnet")}
    assert (net / "README.md").read_text().startswith("# LensNet")
    assert (net.parent / "lensnet.png").stat().st_size > 10_000
    numbers = report_of(root, "net")
    assert set(numbers["by"]) >= {"LensNet", "newest", "words (BM25)", "keys"}
    assert numbers["num_sets"] >= 1


def test_the_net_is_a_rival(root: Path, tiny_lm_config: BaseLMConfig, net: Path) -> None:
    evaluation = {
        "num_places": "4",
        "history_tokens": "1024",
        "horizon_tokens": "24",
        "places_per_history": "1",
        "budgets": "[256]",
        "rivals": "[recency/raw, lensnet/raw, lensnet/overlay]",
        "tail_tokens": "64",
        "lensnet": str(net),
        "num_workers": "1",
    }
    options = [word for key, value in evaluation.items() for word in (f"--evaluation.{key}", value)]
    common = [*models(root, tiny_lm_config), "--run.name", "rival", "--tracking.enabled", "false"]
    assert main(JOBS, ["evaluate", "focus", *common, *options]) == 0
    (path,) = (root / "runs" / "rival").glob("samples-*.jsonl")
    for line in path.read_text().splitlines():
        measured = {m["condition"]: m for m in json.loads(line)["measured"]}
        assert measured["lensnet/raw"]["slots"] == measured["recency/raw"]["slots"] == 256
        assert len(measured["lensnet/raw"]["picked"]) <= 4


@pytest.mark.parametrize("which", ["focus", "tasks"])
def test_a_net_of_another_gistnet_is_no_rival(
    root: Path, tiny_lm_config: BaseLMConfig, net: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = LensNet.load(net)
    other.trained_with = {**other.trained_with, "gistnet": "0" * 64}
    other.save(tmp_path / "other")
    common = [*models(root, tiny_lm_config), "--run.name", f"other-{which}", "--tracking.enabled", "false"]
    asked = ["--evaluation.rivals", "[lensnet]", "--evaluation.lensnet", str(tmp_path / "other")]
    assert main(JOBS, ["evaluate", which, *common, *asked]) == 4
    assert "was trained with another gistnet (000000000000)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["label", "--labels.budget", "100"], "leaves no room for a block"),
        (["label", "--labels.history_tokens", "100"], "must be a positive multiple of 32"),
        (["label", "--labels.tasks", "[single_numbers]", "--labels.history_tokens", "992"], "multiple of 1024"),
        (["train", "lensnet"], "lensnet.labels must name files"),
        (["train", "lensnet", "--lensnet.num_folds", "1"], "0, or 2 or more"),
        (["train", "lensnet", "--lensnet.ablate", "true"], "needs lensnet.num_folds"),
        (["train", "lensnet", "--lensnet.labels", "[nowhere]"], "there are no labels at"),
        (["train", "lensnet", "--lensnet.labels", "[a]", "--lensnet.leave_out", "[smell]"], "holds 'smell'"),
        (["evaluate", "focus", "--evaluation.rivals", "[lensnet]"], "rival 'lensnet' needs a net"),
    ],
)
def test_bad_input_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(JOBS, words) == 2
    assert said in capsys.readouterr().err


def test_a_budget_too_small_for_the_gists_is_refused(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    assert door("small", history_tokens=992, budget=96, tail_tokens=64) == 2
    assert "labels.budget=96 is too small" in capsys.readouterr().err


def test_the_same_documents_cannot_train_and_validate(
    root: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "lensnet", "--lensnet.labels", f"[{labels}]", "--lensnet.validation", f"[{labels}]"]
    assert main(JOBS, [*words, "--run.dir", str(root / "runs"), "--run.name", "leak"]) == 2
    assert "are in lensnet.labels and lensnet.validation" in capsys.readouterr().err


def test_labels_of_another_net_are_refused(root: Path, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = root / "other" / LABELS
    settings = {**label_settings(labels), "gistnet": "sha256:another"}
    write_labels(other, read_labels(labels, list(FEATURES)), list(FEATURES), settings)
    words = ["train", "lensnet", "--lensnet.labels", f"[{labels}, {other}]", "--run.dir", str(root / "runs")]
    assert main(JOBS, [*words, "--run.name", "mixed"]) == 2
    assert "was labelled with another gistnet" in capsys.readouterr().err


def test_attention_is_compared_with_what_blocks_were_worth(
    root: Path, labels: Path, tiny_lm_config: BaseLMConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--labels", str(labels.parent), "--store", str(root / "store"), "--newest_tokens", "16"]
    words += ["--lm", "tiny", "--cache_dir", str(tiny_lm_config.cache_dir), "--dtype", "float32"]
    assert attention_signal.main([*words, "--num_contexts", "2"]) == 2
    assert "label more places" in capsys.readouterr().err
    assert attention_signal.main(words) == 0
    printed = capsys.readouterr().out
    assert "6 Working Contexts" in printed
    assert "attention of every head" in printed


def test_correlations_see_what_is_there() -> None:
    gains = np.array([0.3, -0.1, 0.2, 0.0])
    columns = attention_signal.ranks(np.column_stack([gains * 2, -gains, np.ones(4)]))
    assert attention_signal.correlations(columns, gains).tolist() == pytest.approx([1, -1, 0])
    other = np.array([0.5, -0.5, 0.25, -0.25])
    assert attention_signal.beyond(columns[:, :1], other, gains) == pytest.approx(0, abs=1e-6)
