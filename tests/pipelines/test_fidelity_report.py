"""Runs of `evaluate gist` as one page: what is reached, what is missed, and what is only a look."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from actors.evaluation.fidelity import BARS, CASES, Case, FidelityRun, measured, together
from actors.evaluation.gist_evaluator import FULL, MEAN_GIST, NONE, OWN, RECENCY, SHUFFLED, Measured
from actors.evaluation.gist_results import GistSampleFile
from actors.evaluation.gist_sources import TREE
from actors.evaluation.places import Place
from cluster.errors import ConfigError
from pipelines.fidelity_report import Runs, bars_table, case_tables, plot_cases
from pipelines.packed_runs import pack, with_tables

PRACTICAL = CASES[0]
LOSSES = {FULL: 2.0, NONE: 2.4, RECENCY: 2.25, OWN: 2.2, SHUFFLED: 2.26, MEAN_GIST: 2.3}
"""Nats a token: own gists carry 0.06, and beat recent tokens by 0.05."""


def write_run(folder: Path, case: Case, num_places: int, noise: float = 0.001, first: int = 0) -> Path:
    """A run's folder, two places a document."""
    folder.mkdir(parents=True)
    lod, tail = case.setting.lod, case.setting.tail_tokens
    (folder / "config.yaml").write_text(
        "store:\n  context: some\n"
        f"evaluation:\n  history_tokens: {case.history_tokens}\n  lods: [{lod}]\n  tail_tokens: [{tail}]\n"
    )
    rng = np.random.default_rng(first)

    def of(name: str, kind: str, lod: int, tail: int) -> Measured:
        nll = (LOSSES[kind] + noise * rng.standard_normal(63)).tolist()
        return Measured(name, lod, tail, 78, nll, 0.5)

    with GistSampleFile(folder / "samples-0123456789ab.jsonl") as samples:
        for number in range(first, first + num_places):
            own = [of(f"{TREE}/{kind}", kind, lod, tail) for kind in (OWN, SHUFFLED, MEAN_GIST)]
            others = [of(FULL, FULL, 0, 0), of(NONE, NONE, 0, tail), of(RECENCY, RECENCY, lod, tail)]
            place = Place(number, f"doc{number // 2}", 16 * number, 16 * number + 16)
            samples.append(place, [*others, *own])
    return folder


def read(folder: Path, case: Case, kind: str = "code") -> FidelityRun:
    return FidelityRun.read(kind, folder, case)


def verdicts(runs: Runs) -> dict[tuple[str, str], str]:
    return {(bar.case, bar.measure): str(row[""]) for bar, row in zip(BARS, bars_table(runs).rows, strict=True)}


def test_measures_are_those_of_the_numbers(tmp_path: Path) -> None:
    results = read(write_run(tmp_path / "run", PRACTICAL, 6), PRACTICAL).results
    expected = {"content_nats": 0.06, "over_recency": 0.05, "recovered": 0.5, "delta_nll": 0.2}
    for name, value in expected.items():
        assert measured(results, PRACTICAL.setting, name).mean == pytest.approx(value, abs=0.002)  # type: ignore[arg-type]


def test_a_run_with_nothing_but_raw_tails_has_a_report(tmp_path: Path) -> None:
    report = read(write_run(tmp_path / "run", PRACTICAL, 6), PRACTICAL).results.as_report()
    recovered = {entry["condition"]: entry.get("recovered_fraction") for entry in report}
    assert recovered.pop(FULL) is None
    assert recovered.pop(NONE) is None
    assert recovered[f"{TREE}/{OWN}"] == pytest.approx(0.5, abs=0.01)
    assert set(recovered) == {RECENCY, f"{TREE}/{OWN}", f"{TREE}/{SHUFFLED}", f"{TREE}/{MEAN_GIST}"}


def test_bars_are_reached_missed_or_not_measured(tmp_path: Path) -> None:
    code, prose = (read(write_run(tmp_path / kind, PRACTICAL, 200), PRACTICAL, kind) for kind in ("code", "prose"))
    found = verdicts({"practical": together([code, prose])})
    assert found["practical", "content_nats"] == "reached"
    assert found["practical", "over_recency"] == "reached"
    assert found["gists-only", "content_nats"] == "not measured"
    # The same numbers in the place of other cases.
    quarter = next(case for case in CASES if case.name == "quarter")
    alone = read(write_run(tmp_path / "quarter", quarter, 6), quarter)
    assert verdicts({"quarter": [alone]})["quarter", "delta_nll"] == "missed, a look"


def test_more_than_nothing_needs_three_standard_errors(tmp_path: Path) -> None:
    noisy = read(write_run(tmp_path / "noisy", PRACTICAL, 8, noise=3.0), PRACTICAL)
    assert verdicts({"practical": [noisy]})["practical", "over_recency"] == "missed, a look"


def test_documents_of_two_corpora_are_not_one(tmp_path: Path) -> None:
    runs = together([read(write_run(tmp_path / k, PRACTICAL, 6), PRACTICAL, k) for k in ("code", "prose")])
    assert [run.kind for run in runs] == ["code", "prose", "all"]
    assert len(set(runs[-1].results.documents)) == 6
    (table,) = case_tables({"practical": runs})
    assert [(row["text"], row["places"], row["documents"]) for row in table.rows] == [
        ("code", 6, 3),
        ("prose", 6, 3),
        ("all", 12, 6),
    ]
    plot_cases({"practical": runs}, tmp_path / "lost.png")
    assert (tmp_path / "lost.png").stat().st_size > 10_000


def test_a_run_of_another_case_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRACTICAL, 2)
    with pytest.raises(ConfigError, match=r"history_tokens=512; the case 'gists-only' is measured with 256"):
        read(folder, CASES[1])
    with pytest.raises(ConfigError, match="no run of `evaluate gist`"):
        read(tmp_path / "nowhere", PRACTICAL)


def test_packing_adds_places_and_keeps_what_was_measured(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", PRACTICAL, 4), write_run(tmp_path / "b", PRACTICAL, 4, first=2)
    target = tmp_path / "fidelity/practical/code"
    pack(first, target)
    assert read(target, PRACTICAL).results.samples == read(first, PRACTICAL).results.samples
    pack(second, target)
    packed = read(target, PRACTICAL).results
    assert [place.number for place, _ in packed.samples] == [0, 1, 2, 3, 4, 5]
    assert packed.samples[2:] == read(second, PRACTICAL).results.samples


def test_packing_adds_conditions_to_the_same_places_and_to_no_others(tmp_path: Path) -> None:
    run, target = write_run(tmp_path / "a", PRACTICAL, 2), tmp_path / "fidelity/practical/code"
    pack(run, target)
    (samples,) = run.glob("samples-*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        line["measured"] = [{**line["measured"][0], "name": "another"}]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = read(target, PRACTICAL).results.samples
    pack(run, target)
    after = read(target, PRACTICAL).results.samples
    assert [(place, found[:-1]) for place, found in after] == before
    assert [found[-1].name for _, found in after] == ["another", "another"]
    lines[1]["place"]["first_block"] += 1
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match="was measured at other places"):
        pack(run, target)


def test_tables_stand_between_their_marks(tmp_path: Path) -> None:
    tables = [bars_table({})]
    page = "above\n<!-- bars: written by me.py -->old<!-- bars: to here -->\nbelow"
    once = with_tables(page, "me.py", "bars", tables)
    assert once.startswith("above\n")
    assert once.endswith("\nbelow")
    assert "old" not in once
    assert "not measured" in once
    assert with_tables(once, "me.py", "bars", tables) == once
    with pytest.raises(SystemExit, match="written by me.py"):
        with_tables("nothing", "me.py", "bars", tables)
