"""The job that reads runs of `evaluate focus` together, from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import ray_job
from actors.evaluation.headroom import FocusRun, cells_of
from cluster.cli import main
from pipelines.headroom_report import headroom_tables
from tests.actors.evaluation.test_headroom import write_run


def headroom(tmp_path: Path, *runs: str) -> int:
    return main(
        ray_job.JOBS,
        [
            *("evaluate", "headroom"),
            *("--headroom.runs", f"[{', '.join(runs)}]"),
            *("--run.dir", str(tmp_path / "runs"), "--run.name", "answer"),
            *("--tracking.enabled", "false"),
        ],
    )


def test_tables_plots_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, prose = write_run(tmp_path / "code", 1), write_run(tmp_path / "prose", 2, num_places=10)
    assert headroom(tmp_path, f"code={code}", f"prose={prose}") == 0
    folder = tmp_path / "runs/answer"
    cells = json.loads((folder / "report.json").read_text())["cells"]
    assert [(cell["kind"], cell["num_places"], cell["is_claim"]) for cell in cells] == [
        ("code", 6, False),
        ("prose", 10, False),
        ("all", 16, False),
    ]
    conditions = cells[0]["conditions"]
    assert conditions["recency/raw"]["gain"] == 0
    assert conditions["oracle/raw"]["to_oracle"] == 0
    gain, rest = conditions["bm25/raw"]["gain"], conditions["bm25/raw"]["to_oracle"]
    assert gain + rest == pytest.approx(conditions["oracle/raw"]["gain"])
    printed = capsys.readouterr().out
    assert f"{conditions['oracle/raw']['gain']:+.3f}" in printed
    by_readings = (folder / "report.md").read_text().partition("oracle/raw by readings")[2].partition("##")[0]
    assert f"{conditions['oracle/raw']['gain']:+.3f}" in by_readings.splitlines()[4].split("|")[-2]
    assert f"{conditions['oracle/raw']['gain'] - 0.1:+.3f}" in by_readings.splitlines()[4].split("|")[3]
    assert {path.name for path in folder.glob("*.png")} == {"gaps.png", "chosen.png", "long-context.png"}


def test_policies_are_compared_with_the_first(tmp_path: Path) -> None:
    run = FocusRun.read("code", write_run(tmp_path / "code", 1))
    samples = []
    for place, measured in run.samples:
        raw = next(m for m in measured if m.condition == "recency/raw")
        at = {"global": 0.0, "anchored": -0.25}
        samples.append(
            (
                place,
                [replace(raw, condition=f"recency/raw@{p}", nll_scoring=raw.nll_scoring + d) for p, d in at.items()],
            )
        )
    cells = cells_of([replace(run, samples=samples)])
    (table,) = (t for t in headroom_tables(cells, "recency/raw", "oracle/raw") if "Position policies" in t.title)
    assert table.rows == [
        {
            "text, history / budget": "code, 4,096 / 512",
            "places": 6,
            "shown": "recency/raw",
            "anchored": "+0.250 ± 0.000*",
        }
    ]


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in ((str(tmp_path), "write kind=folder"), (f"code={tmp_path}", "no config.yaml")):
        assert headroom(tmp_path, given) != 0
        assert message in capsys.readouterr().err
    assert headroom(tmp_path) != 0
    assert "must name at least one run" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
