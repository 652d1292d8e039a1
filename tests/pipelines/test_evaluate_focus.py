"""`compact` a corpus, `evaluate focus` on it: every rival, once; interrupted, resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation.focus_evaluator import Measured
from actors.evaluation.places import Place
from actors.evaluation.results import FocusResults, SampleFile
from actors.evaluation.rivals import CHOOSERS, FORMS, LENSNET, MINILM, RAW_FORMS
from cluster.cli import main
from cluster.config import BaseLMConfig
from cluster.ray_runtime import RaySession
from pipelines.focus_report import focus_tables, plot_ages, plot_gains
from ray_job import JOBS
from tests.actors.helpers import make_text

Door = Callable[..., int]

BUDGETS = [128, 192]
RIVALS = [chooser for chooser in CHOOSERS if chooser not in {MINILM, LENSNET}]
"""All that need no packaged or trained model."""
ALL_RIVALS = ["none", "full", *RIVALS, "recency/raw@compact"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_cluster: RaySession, tiny_lm_config: BaseLMConfig) -> Path:
    """A folder whose `store` holds context `c`: five documents of 1,500 to 4,500 tokens of the tiny model."""
    root = tmp_path_factory.mktemp("focus")
    corpus = root / "corpus"
    corpus.mkdir()
    for index, words in enumerate((300, 500, 900, 700, 400)):
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
    """Run `evaluate focus` with a small setting, or another; returns the exit code."""

    def run(name: str, *words: str, **evaluation: Any) -> int:
        setting: dict[str, Any] = {
            "num_places": 6,
            "history_tokens": 512,
            "horizon_tokens": 24,
            "places_per_history": 2,
            "budgets": BUDGETS,
            "rivals": ALL_RIVALS,
            "forms": list(FORMS),
            "tail_tokens": 64,
            "max_blocks": 2,
            "oracle_blocks": 2,
            "shortlist_blocks": 8,
            "oracle_readings": 3,
            "retrieval.fusion": ["bm25", "dense"],
            "num_workers": 2,
        }
        setting |= evaluation
        options = []
        for key, value in setting.items():
            options += [f"--evaluation.{key}", value if isinstance(value, str) else json.dumps(value)]
        common = [*models(root, tiny_lm_config), "--run.name", name, "--tracking.enabled", "false"]
        return main(JOBS, ["evaluate", "focus", *common, *options, *words])

    return run


def report_of(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "runs" / name / "report.json").read_text())


def samples_of(root: Path, name: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Places in order, and what was measured there without the seconds it took."""
    (path,) = (root / "runs" / name).glob("samples-*.jsonl")
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        timeless = [{k: v for k, v in m.items() if not k.endswith("_s")} for m in record["measured"]]
        found.append((record["place"], timeless))
    return sorted(found, key=lambda sample: sample[0]["number"])


@pytest.fixture(scope="module")
def undisturbed(door: Door) -> str:
    """Name of a run that nothing disturbed."""
    assert door("calm") == 0
    return "calm"


def no_ray(*_: object) -> None:
    raise AssertionError("Ray was asked for")


# -- the whole job -------------------------------------------------------------------------------------------------


def test_every_rival_is_measured_at_every_place(root: Path, undisturbed: str) -> None:
    samples = samples_of(root, undisturbed)
    assert [place["number"] for place, _ in samples] == list(range(6))
    expected = {("none", 0), ("full", 0)}
    for budget in BUDGETS:
        expected |= {(f"{chooser}/{form}", budget) for chooser in RIVALS for form in FORMS}
        expected -= {(f"uniform/{form}", budget) for form in RAW_FORMS}
        expected.add(("recency/raw@compact", budget))
    for place, measured in samples:
        # Whole super-blocks of 1,024 slots from the start of the timeline on, as a session would have read it.
        assert place["first_block"] % 32 == 0
        assert {(m["condition"], m["budget"]) for m in measured} == expected
        assert {m["slots"] for m in measured if m["condition"] == "bm25/raw"} == set(BUDGETS)
        assert all(m["slots"] <= m["budget"] for m in measured if m["budget"])
        found = {(m["condition"], m["budget"]): m for m in measured}
        for budget in BUDGETS:
            # Raw tokens alone, one after the other, stand the same by either policy.
            compact, plain = (found[f"recency/raw{policy}", budget] for policy in ("@compact", ""))
            for half in ("nll_choosing", "nll_scoring"):
                assert compact[half] == pytest.approx(plain[half], abs=1e-4)
            gains = found["exhaustive/raw", budget]["single_gains"]
            assert len(gains) == place["stop_block"] - place["first_block"] - (2 if budget == 128 else 3)
            assert found["oracle/raw", budget]["single_gains"] == []
        # Of two places that share a history, the first has 256 slots less; a short block holds fewer tokens.
        slots = 512 if place["number"] % 2 else 256
        assert place["stop_block"] - place["first_block"] == slots // 32
        (full,) = [m["slots"] for m in measured if m["condition"] == "full"]
        assert slots - 32 < full <= slots


def test_the_run_leaves_a_report(root: Path, undisturbed: str) -> None:
    report = report_of(root, undisturbed)
    assert report["status"] == "finished"
    assert report["job"] == "evaluate focus"
    assert report["num_places"] == 6
    assert report["digests"].keys() == {"base_lm", "tokenizer", "gistnet"}
    folder = root / "runs" / undisturbed
    for budget in BUDGETS:
        assert (folder / f"gains-{budget}.png").exists()
        assert (folder / f"ages-{budget}.png").exists()
    # What the oracle showed, place by place.
    assert (folder / "focus.png").exists()
    page = (folder / "focus.html").read_text()
    assert page.count('"title"') == 6
    assert "file:///" in page or "pkg:" in page or ".txt" in page
    text = (folder / "report.md").read_text()
    assert "share of the oracle's gain" in text
    with SampleFile(next(folder.glob("samples-*.jsonl"))) as file:
        results = FocusResults.of(file.samples)
    for entry in report["conditions"]:
        name, budget = entry["condition"], entry["budget"]
        assert entry["nll_scoring"] == pytest.approx(results.nll(name, budget, "scoring").mean())
    oracle, bm25 = (results.nll(f"{name}/raw", 192, "choosing") for name in ("oracle", "bm25"))
    assert (oracle <= bm25 + 1e-6).all()
    assert oracle.mean() < bm25.mean()


def test_a_second_run_measures_nothing_and_says_the_same(
    root: Path, door: Door, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, samples = report_of(root, undisturbed), samples_of(root, undisturbed)
    monkeypatch.setattr("actors.evaluation.workers.ray_session", no_ray)
    # How the work is shared out changes no number.
    assert door(undisturbed, num_workers=1) == 0
    after = report_of(root, undisturbed)
    assert after["conditions"] == before["conditions"]
    assert after["num_places"] == before["num_places"]
    assert samples_of(root, undisturbed) == samples


def test_interrupted_and_resumed_equals_undisturbed(
    root: Path, door: Door, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = SampleFile.append

    def interrupted(self: SampleFile, place: Place, measured: list[Measured]) -> None:
        if len(self.samples) == 3:
            with self.path.open("a") as file:
                file.write('{"place": {"number": 4, "uri')
            raise KeyboardInterrupt
        append(self, place, measured)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFile, "append", interrupted)
        assert door("stopped", num_workers=1) == 130
    assert report_of(root, "stopped")["status"] == "interrupted"
    assert door("stopped", num_workers=1) == 0
    assert report_of(root, "stopped")["num_places"] == 6
    for (place, mine), (other, theirs) in zip(samples_of(root, "stopped"), samples_of(root, undisturbed), strict=True):
        assert place == other
        for left, right in zip(mine, theirs, strict=True):
            if left["condition"] == "full":
                # Read on from a place before, or at once: the same up to rounding.
                for half in ("nll_choosing", "nll_scoring"):
                    assert left.pop(half) == pytest.approx(right.pop(half), abs=1e-4)
            assert left == right


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "evaluation", "code", "message"),
    [
        ((), {"rivals": ["recency", "oracel"]}, 2, "there is no rival 'oracel'; there are: recency, uniform"),
        (
            (),
            {"forms": ["raw", "stric"]},
            2,
            "there is no form 'stric'; there are: raw, late, late_ranked, late64, overlay, strict, constant",
        ),
        (
            (),
            {"rivals": ["bm25/stric"]},
            2,
            "there is no form 'stric'; there are: raw, late, late_ranked, late64, overlay, strict, constant",
        ),
        ((), {"rivals": ["bm25/raw@gaussian"]}, 2, "no position policy 'gaussian'; there are: global, compact"),
        ((), {"rivals": ["full/raw"]}, 2, "rival 'full' has neither forms nor policies; write 'full'"),
        (
            (),
            {"rivals": ["oracle@compact"], "max_blocks": 3, "oracle_blocks": 3},
            2,
            "shortlist_blocks=8 cannot hold 3 picks of each of 3",
        ),
        ((), {"oracle_blocks": 1}, 2, "evaluation.oracle_blocks=1 must be at least max_blocks=2"),
        (("--evaluation.retrieval.bm25_b", "1.5"), {}, 2, "evaluation.retrieval.bm25_b must be from 0 to 1"),
        (("--evaluation.retrieval.fusion", "[bm26]"), {}, 2, "evaluation.retrieval.fusion"),
        (("--evaluation.query_tokens", "9"), {}, 2, "unknown key 'evaluation.query_tokens'"),
        ((), {"rivals": ["uniform"], "forms": ["raw"]}, 2, "nothing to compare"),
        ((), {"budgets": [64]}, 2, "which the tail of 64 tokens fills already"),
        ((), {"budgets": [192, 70]}, 2, "evaluation.budgets holds 70;"),
        ((), {"budgets": [70], "forms": ["raw"], "rivals": ["oracle"]}, 2, "evaluation.budgets holds 70;"),
        ((), {"budgets": [70], "forms": ["raw"], "rivals": ["exhaustive"]}, 2, "evaluation.budgets holds 70;"),
        ((), {"budgets": [70], "forms": ["raw"], "rivals": ["recency/constant"]}, 2, "evaluation.budgets holds 70;"),
        ((), {"history_tokens": 32768, "rivals": ["recency"]}, 2, "Lower evaluation.history_tokens or compact"),
        ((), {"history_tokens": 1024, "horizon_tokens": 512, "places_per_history": 3}, 2, "places_per_history"),
        ((), {"history_tokens": 4096, "rivals": ["exhaustive"]}, 2, "in a row; histories and horizons reach 4,"),
        ((), {"history_tokens": 4096, "rivals": ["full"]}, 2, "nothing to compare"),
        (("--gistnet.lm_layers", "1"), {}, 5, "Use the GistNet it was made with"),
        (("--store.context", "elsewhere"), {}, 5, "elsewhere"),
        (("--base_lm.source", "/no/such/model"), {}, 4, "/no/such/model"),
    ],
)
def test_bad_input_is_refused_before_ray_is_asked(
    door: Door,
    words: tuple[str, ...],
    evaluation: dict[str, Any],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("actors.evaluation.workers.ray_session", no_ray)
    assert door("refused", *words, **evaluation) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_histories_beyond_the_trained_range_are_warned_of(
    door: Door, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("actors.evaluation.workers.ray_session", no_ray)
    for evaluation, message in (
        (
            {"history_tokens": 4096, "positional": "global", "rivals": ["recency", "bm25/overlay@global"]},
            "trained for 2,048: do not trust rival bm25/overlay@global nor evaluation.positional=global\n",
        ),
        # Of its own accord the evaluation puts rows where the model knows the distances.
        ({"history_tokens": 4096, "rivals": ["recency"]}, ""),
        ({"history_tokens": 4096, "rivals": ["recency", "full"]}, "trained for 2,048: rival full is left out\n"),
        (
            {"history_tokens": 4096, "rivals": ["recency", "bm25/raw@global"]},
            "trained for 2,048: do not trust rival bm25/raw@global\n",
        ),
        ({"history_tokens": 4096, "positional": "anchored", "rivals": ["recency"]}, ""),
        ({}, ""),
    ):
        with pytest.raises(AssertionError, match="Ray was asked for"):
            door("long", **evaluation)
        error = capsys.readouterr().err
        assert message in error
        assert bool(message) == ("trained for" in error)


def test_samples_of_another_choice_are_refused(
    root: Path, door: Door, undisturbed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("actors.evaluation.workers.ray_session", no_ray)
    (path,) = (root / "runs" / undisturbed).glob("samples-*.jsonl")
    other = root / "runs" / "strangers" / path.name
    other.parent.mkdir()
    other.write_text(path.read_text().replace('"uri": "', '"uri": "other-'))
    assert door("strangers") == 2
    assert "6 places of another choice" in capsys.readouterr().err


# -- the report of any selection of rivals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["none"],
        ["bm25/overlay"],
        ["none", "bm25/overlay"],
        ["full", "recency/strict", "oracle/strict"],
        ["none", "full", "recency/raw", "oracle/raw", "bm25/raw"],
    ],
)
def test_tables_and_plots_of_any_rivals(names: list[str], tmp_path: Path) -> None:
    def measured(name: str, number: int) -> Measured:
        return Measured(name, 128 if "/" in name else 0, 100, 2.0 + number, 3.0, [number], 0.1, 0.1)

    samples = [(Place(n, f"doc{n // 2}", 0, 16), [measured(name, n) for name in names]) for n in range(6)]
    results = FocusResults.of(samples)
    tables = focus_tables(results)
    assert len(tables) >= (3 if names != ["none"] else 0)
    for table in tables:
        assert "nan" not in table.markdown().replace("± nan", "")
    for budget in results.budgets:
        plot_gains(results, budget, tmp_path / "gains.png")
        plot_ages(results, budget, tmp_path / "ages.png")
        assert (tmp_path / "gains.png").stat().st_size > 1000
