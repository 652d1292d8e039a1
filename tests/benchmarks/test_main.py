"""The programs run at tiny sizes and write the report; what their ratios are is not tested here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.registry import BENCHMARKS
from cluster.environment import PROJECT_ROOT
from cluster.errors import ConfigError

NAMES = [benchmark.name for benchmark in BENCHMARKS]
TAKES_LONG = {
    "concurrent_readers", "feed_actors", "feed_ray_data", "ingest_memory", "lens_service", "open_time",
    "training_stack",
}  # fmt: skip
"""Start Ray, or many processes of their own: a minute rather than seconds."""

CAN_BE_NOTHING = {"curation_missed"}
"""Count what went wrong."""


def run(*arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=timeout_s)


def measure(name: str, folder: Path, timeout_s: float = 120.0) -> tuple[dict, str]:
    """Run one benchmark; its row of the report, and what it printed."""
    report = folder / "report.json"
    options = ["--quick", "--only", name, "--out", str(report), "--cache", str(folder / "cache")]
    done = run(*options, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(report.read_text())}
    return rows[name], done.stdout


def check_row(row: dict) -> None:
    benchmark = BENCHMARKS[NAMES.index(row["name"])]
    assert math.isfinite(row["value"])
    assert row["spread"][0] <= row["value"] <= row["spread"][1]
    assert (row["budget"], row["rival"]) == (benchmark.budget, benchmark.rival)
    assert row["holds"] == (row["value"] <= row["budget"])
    assert row["quick"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAKES_LONG])
def test_runs_and_reports(name: str, tmp_path: Path) -> None:
    row, printed = measure(name, tmp_path)
    check_row(row)
    assert row["value"] > 0 or name in CAN_BE_NOTHING
    assert name in printed
    assert "<=" in printed
    assert not list((tmp_path / "cache").glob("run-*"))  # what was written for the measurement is gone


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TAKES_LONG))
def test_runs_with_many_processes(name: str, tmp_path: Path) -> None:
    row, printed = measure(name, tmp_path, timeout_s=280.0)
    check_row(row)
    assert name in printed
    assert row["detail"]


def test_only_replaces_its_own_entry(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    other = {"name": "of_another_program", "value": 1.0}
    report.write_text(json.dumps([other, {"name": "sealed_size", "value": -1.0}]))
    row, _ = measure("sealed_size", tmp_path)
    assert 1.0 < row["value"] < 1.05
    assert json.loads(report.read_text()) == [row, other]


def test_one_simulation_serves_both_benchmarks_of_curation(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    names = ["curation_bytes", "curation_missed"]
    done = run("--quick", "--only", ",".join(names), "--out", str(report), "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    first, second = json.loads(report.read_text())
    assert [first["name"], second["name"]] == names
    assert first["detail"] == second["detail"]
    assert first["took_s"] > 10 * second["took_s"]


def test_a_file_that_is_no_report_is_left_alone(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"not": "a list"}')
    done = run("--quick", "--only", "sealed_size", "--out", str(report), "--cache", str(tmp_path))
    assert done.returncode != 0
    assert str(report) in done.stderr
    assert report.read_text() == '{"not": "a list"}'


@pytest.mark.parametrize("only", ["no_such_benchmark", "sealed_size,no_such_benchmark"])
def test_unknown_name_lists_the_valid_ones(only: str) -> None:
    done = run("--only", only)
    assert done.returncode == ConfigError.exit_code
    assert all(name in done.stderr for name in NAMES)


def test_lists_every_name() -> None:
    done = run("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


def test_readme_has_a_line_for_each() -> None:
    lines = (PROJECT_ROOT / "benchmarks" / "README.md").read_text().splitlines()
    for benchmark in BENCHMARKS:
        (line,) = [line for line in lines if line.startswith(f"| `{benchmark.name}` |")]
        assert f"≤ {benchmark.budget:g}" in line.replace("1.10", "1.1").replace("1.50", "1.5").replace("0.50", "0.5")
