"""Runs read from their files, and compared pair by pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.training.fidelity import BY_TAIL, FidelityTable
from actors.training.measured_run import MeasuredRun
from cluster.errors import ConfigError
from models.training.distillation import Fidelity

NUM_PAIRS, NUM_TAILS = 8, 3


def write_run(folder: Path, own: np.ndarray, shuffled: np.ndarray, **changes: Any) -> MeasuredRun:
    """A run's folder, validated once; every pair has other counts of tokens by tail."""
    counts = np.random.default_rng(0).integers(1, 50, (NUM_PAIRS, NUM_TAILS)).astype(float)
    rows: dict[str, Any] = {"windows": [[2 * n, 2 * n + 1] for n in range(NUM_PAIRS)], "num_tokens": counts.tolist()}
    rows |= {"full": np.full(counts.shape, 1.5).tolist(), "own": own.tolist(), "shuffled": shuffled.tolist()}
    rows |= changes
    means = {name: np.average(rows[name], axis=0, weights=counts).tolist() for name in ("full", "own", "shuffled")}
    line = {"step": 6, "num_tokens": counts.sum(axis=0).tolist(), **means}
    folder.mkdir()
    (folder / "fidelity.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "fidelity_pairs.jsonl").write_text(json.dumps({"step": 6, **rows}) + "\n")
    (folder / "losses.jsonl").write_text(json.dumps({"step": 6, "spread": 0.5}) + "\n")
    (folder / "report.json").write_text("{}")
    return MeasuredRun.read(folder)


def noise(seed: int, scale: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, scale, (NUM_PAIRS, NUM_TAILS))


def test_means_are_over_tokens_as_in_the_runs_own_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", noise(1, 0.5), noise(2, 0.5))
    steps, values = run.curve("content_nats")
    assert steps == [6]
    assert run.estimate("content_nats").mean == pytest.approx(values[0])
    assert run.estimate("gap_to_full").mean == pytest.approx(run.curve("gap_to_full")[1][0])
    line = run.fidelity[-1]
    for tail in range(NUM_TAILS):
        content = line["shuffled"][tail] - line["own"][tail]
        assert run.estimate("content_nats", tail).mean == pytest.approx(content)
    assert run.tails == ["0 to 31", "32 to 63", "64 to 95"]


def test_a_difference_is_paired(tmp_path: Path) -> None:
    """What all texts have in common between two runs is no error of their difference."""
    own, shuffled = noise(1, 0.5), noise(2, 0.5)
    default = write_run(tmp_path / "a", own, shuffled)
    better = write_run(tmp_path / "b", own - 0.1, shuffled)
    found = better.estimate("content_nats", over=default)
    assert found.mean == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    assert better.estimate("gap_to_full", 1, default).mean == pytest.approx(-0.1)
    assert better.estimate("content_nats").standard_error > 0.05
    # Of a pair that differs by itself there is an error, as large as of its own mean.
    moved = own.copy()
    moved[0] -= 1.0
    counts = np.array(default.pairs["num_tokens"]).sum(axis=1)
    found = write_run(tmp_path / "c", moved, shuffled).estimate("content_nats", over=default)
    share = counts[0] / counts.sum()
    assert found.mean == pytest.approx(share)
    gains = counts * ((np.arange(NUM_PAIRS) == 0) - share) / counts.mean()
    expected = np.sqrt((gains**2).sum() / NUM_PAIRS**2 * NUM_PAIRS / (NUM_PAIRS - 1))
    assert found.standard_error == pytest.approx(expected)


def test_other_tokens_another_text_or_model_are_not_compared(tmp_path: Path) -> None:
    own, shuffled = noise(1, 0.5), noise(2, 0.5)
    default = write_run(tmp_path / "a", own, shuffled)
    assert write_run(tmp_path / "b", own + 1, shuffled).is_comparable(default)
    others: list[dict[str, Any]] = [
        {"windows": [[n, n + 1] for n in range(NUM_PAIRS)]},
        {"num_tokens": np.ones((NUM_PAIRS, NUM_TAILS)).tolist()},
        {"full": np.full((NUM_PAIRS, NUM_TAILS), 1.6).tolist()},
    ]
    for number, changes in enumerate(others):
        assert not write_run(tmp_path / str(number), own, shuffled, **changes).is_comparable(default)


def test_a_run_without_pairs_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", noise(1, 0.5), noise(2, 0.5))
    (tmp_path / "a/fidelity_pairs.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds no validation pair by pair"):
        MeasuredRun.read(tmp_path / "a")


def test_the_table_of_pairs_has_the_means_of_its_rows() -> None:
    table, rng = FidelityTable(4, 2, torch.device("cpu")), np.random.default_rng(0)
    measured = []
    for pair in range(4):
        values = {name: rng.random(2).tolist() for name in BY_TAIL}
        counts = [10 * pair, 5 + pair]  # the first pair has no token with a short tail
        if not pair:
            values = {name: [float("nan"), value[1]] for name, value in values.items()}
        measured.append(Fidelity(counts, **values, repeat_own=float(pair), repeat_shuffled=2.0))
        table.add(pair, measured[-1])
    means, rows = table.means(), table.rows()
    assert means["num_tokens"] == [60, 26]
    assert means["repeat_own"] == 1.5
    assert "node_content" not in means
    assert rows["own"][0] == [0.0, pytest.approx(measured[0].own[1])]
    assert rows["num_tokens"] == [list(map(float, found.num_tokens)) for found in measured]
    for name in BY_TAIL:
        kept = np.average(rows[name], axis=0, weights=rows["num_tokens"])
        assert kept.tolist() == pytest.approx(means[name])
