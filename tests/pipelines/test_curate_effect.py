"""`curate effect` as a user runs it: foreseen by a plan, then measured on what was applied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_job
from cluster.cli import main
from cluster.config import BaseLMConfig
from storage.focus.events import FocusEvent, FocusEventLog
from storage.store import Store
from storage.versions.history import History
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context, tiny_plan

pytestmark = pytest.mark.usefixtures("ray_cluster")

Door = Callable[..., int]

POLICY = ["--policy.min_age_days", "0", "--policy.storing_uses", "0"]
"""What is not used may go at once."""

CONDITIONS = ["recency/overlay", "uniform/overlay", "bm25/overlay", "fusion/overlay", "bm25/raw", "recency/strict"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Path:
    """A folder whose `store` holds context `c`: six documents of about 5,000 tokens, of which every other one is used,
    and one more that the plan's version has not."""
    root = tmp_path_factory.mktemp("effect")
    plan = tiny_plan(tiny_lm_config, root / "store")
    documents = make_documents([900] * 6)
    with open_context(root / "store", plan) as writer:
        ingest(writer, plan, make_compactor(plan), documents)
        follow(writer, plan)
        with writer.reader() as reader:
            spans = [range(d.first_block, d.first_block + d.num_blocks) for d in reader.documents()]
    used = [(block, 0) for of in spans[1::2] for block in of]
    log = FocusEventLog(root / "store" / "c")
    shown = dict.fromkeys(used, 1.0)
    log.add(FocusEvent("s", 0, "question", "{}", [("c", 1)], 0, 0, 0, [], shown, used, [], used, [], 0))
    log.flush()
    common = ["--store.root", str(root / "store"), "--store.context", "c", "--run.dir", str(root / "runs")]
    common += ["--tracking.enabled", "false"]
    assert main(ray_job.JOBS, ["curate", "plan", *common, *POLICY]) == 0
    return root


@pytest.fixture(scope="module")
def door(root: Path, tiny_lm_config: BaseLMConfig) -> Door:
    """Run `curate effect` with a small setting, or another; returns the exit code."""

    def run(name: str, *words: str, **evaluation: Any) -> int:
        setting: dict[str, Any] = {
            "num_places": 8,
            "horizon_tokens": 32,
            "history_tokens": 4096,
            "num_questions": 3,
            "budget": 640,
            "rivals": ["recency", "uniform", "bm25", "fusion", "bm25/raw", "recency/strict"],
            "tail_tokens": 64,
            "max_blocks": 8,
            "num_workers": 1,
        }
        given = ["curate", "effect", "--store.root", str(root / "store"), "--store.context", "c"]
        given += ["--gistnet.lm_layers", "2", "--base_lm.source", "tiny"]
        given += ["--base_lm.cache_dir", str(tiny_lm_config.cache_dir)]
        given += ["--run.dir", str(root / "runs"), "--run.name", name, "--tracking.enabled", "false"]
        for key, value in (setting | evaluation).items():
            given += [f"--evaluation.{key}", value if isinstance(value, str) else json.dumps(value)]
        return main(ray_job.JOBS, [*given, *words])

    return run


def plan_of(root: Path) -> str:
    return str(root / "runs" / "curate-plan" / "plan.json")


def samples(root: Path, name: str, kind: str) -> list[dict[str, Any]]:
    (path,) = (root / "runs" / name).glob(f"{kind}-*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda record: record["place"]["number"])


def report(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "runs" / name / "report.json").read_text())


@pytest.fixture(scope="module")
def foreseen(root: Path, door: Door) -> str:
    """Name of a run by the plan, before it is applied."""
    assert door("foreseen", "--plan", plan_of(root)) == 0
    return "foreseen"


def test_the_effect_is_foreseen_and_then_measured(root: Path, door: Door, foreseen: str) -> None:
    with Store(root / "store").open_reader("c") as reader:
        assert not reader.block_states(0, reader.version.num_blocks).any(), "nothing is applied by asking"
        before = str(reader.version.seq)
    common = ["--store.root", str(root / "store"), "--store.context", "c", "--run.dir", str(root / "runs")]
    given = ["curate", "apply", *common, "--tracking.enabled", "false", "--plan", plan_of(root), "--apply", "true"]
    # In more commits than one: a version between them has some spans pruned.
    assert main(ray_job.JOBS, [*given, "--pace.spans_per_commit", "2"]) == 0
    assert door("measured", "--before", before) == 0
    for kind in ("predictions", "answers"):
        assert samples(root, "measured", kind) == samples(root, foreseen, kind), "the plan said what came"
    found = report(root, "measured")
    history = History(root / "store" / "c", "c")
    assert (found["version_before"], found["version_after"]) == (int(before), str(history.resolve("main")))
    assert found["blocks_pruned"] > 150
    # Also from a version in which some are pruned already, but not from the newest: there is nothing in between.
    assert door("after", "--before", str(int(before) + 1), num_places=2, num_questions=2) == 0
    assert report(root, "after")["blocks_pruned"] < found["blocks_pruned"]
    assert door("same", "--before", "main", num_places=2, num_questions=2) == 2


def test_what_is_pruned_is_shown_before_and_by_its_gist_after(root: Path, foreseen: str) -> None:
    answers = samples(root, foreseen, "answers")
    assert [record["place"]["where"] for record in answers] == ["kept", "pruned"] * 6
    found = {
        (where, side): np.array(
            [
                m["shown"]
                for record in answers
                for m in record["measured"]
                if (record["place"]["where"], m["side"], m["condition"]) == (where, side, "bm25/overlay")
            ]
        )
        for where in ("kept", "pruned")
        for side in ("before", "after")
    }
    assert found["kept", "before"].mean() > 0.5
    assert found["kept", "after"].mean() > found["kept", "before"].mean() - 0.1
    assert found["pruned", "before"].mean() > 0.5
    assert (found["pruned", "after"] == 0).all()
    for record in answers:
        conditions = [(m["side"], m["condition"]) for m in record["measured"]]
        assert conditions == [(side, name) for side in ("before", "after") for name in CONDITIONS]
        assert all(m["slots"] <= 640 for m in record["measured"])


def test_positions_are_where_both_versions_go_on_and_only_what_is_pruned_matters(root: Path, foreseen: str) -> None:
    predictions = samples(root, foreseen, "predictions")
    assert len(predictions) == 8
    pruned = np.zeros(10_000, bool)
    for span in json.loads(Path(plan_of(root)).read_text())["spans"]:
        pruned[span["first_block"] : span["first_block"] + span["num_blocks"]] = True
    differ = 0
    for record in predictions:
        stop = record["place"]["stop_block"]
        assert not pruned[stop - 2 : stop + 1].any()
        sides: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
        for m in record["measured"]:
            sides[m["side"]][m["condition"]] = m
        # 640 slots from the newest back: what recency shows in raw is pruned or it is not.
        for name in ("recency/overlay", "recency/strict"):
            before, after = sides["before"][name], sides["after"][name]
            if not pruned[stop - 20 : stop].any():
                assert before["nll"] == after["nll"]
            else:
                assert before["nll"] != after["nll"]
        differ += sides["before"]["bm25/raw"]["nll"] != sides["after"]["bm25/raw"]["nll"]
        num_whole = int((~pruned[record["place"]["first_block"] : stop]).sum())
        # Other blocks fill what pruned ones leave, where there are any; a document's last one is short.
        assert min(640, 32 * (num_whole - 1)) <= sides["after"]["bm25/raw"]["slots"] <= 640
    assert differ > 0


def test_the_run_leaves_a_report(root: Path, foreseen: str) -> None:
    found = report(root, foreseen)
    assert (found["status"], found["num_places"], found["num_questions"]) == ("finished", 8, 12)
    assert [entry["condition"] for entry in found["predictions"]] == CONDITIONS
    assert {(entry["condition"], entry["where"]) for entry in found["answers"]} == {
        (name, where) for name in CONDITIONS for where in ("kept", "pruned")
    }
    predictions = samples(root, foreseen, "predictions")
    for entry in found["predictions"]:
        sides = [
            np.array(
                [m["nll"] for r in predictions for m in r["measured"] if (m["side"], m["condition"]) == (side, name)]
            )
            for side in ("before", "after")
            for name in [entry["condition"]]
        ]
        assert entry["nll_change"] == pytest.approx((sides[1] - sides[0]).mean())
    folder = root / "runs" / foreseen
    assert (folder / "effect.png").stat().st_size > 1000
    text = (folder / "report.md").read_text()
    assert "held positions" in text
    assert "answers planted in what is pruned (guessing: " in text


def test_interrupted_it_goes_on_with_what_is_missing(root: Path, door: Door, foreseen: str) -> None:
    for kind in ("predictions", "answers"):
        (path,) = (root / "runs" / foreseen).glob(f"{kind}-*.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        other = root / "runs" / "cut" / path.name
        other.parent.mkdir(exist_ok=True)
        # As a process killed in the middle of a line leaves it.
        other.write_text("".join(lines[:3]) + lines[3][:50])
    assert door("cut", "--plan", plan_of(root)) == 0
    for kind in ("predictions", "answers"):
        assert samples(root, "cut", kind) == samples(root, foreseen, kind)


@pytest.mark.parametrize(
    ("words", "evaluation", "message"),
    [
        ((), {}, "give either plan"),
        (("--plan", "nowhere.json"), {}, "cannot be read"),
        (("--before", "main"), {}, "there is no effect to measure"),
        (("--before", "99999"), {}, "99999"),
        (("--before", "1"), {"rivals": ["oracle"]}, "there is no rival 'oracle'; there are: recency, uniform"),
        (("--before", "1"), {"forms": ["late"]}, "there is no form 'late'; there are: raw, overlay, strict"),
        (("--before", "1"), {"tasks": ["riddle"]}, "no task 'riddle'"),
        (("--before", "1"), {"history_tokens": 1000}, "multiple of 1024"),
        (("--before", "1"), {"num_questions": 1}, "num_questions must be at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(
    door: Door, words: tuple[str, ...], evaluation: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door("refused", *words, **evaluation) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
