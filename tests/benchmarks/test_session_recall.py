"""Asking sessions for facts, on the tiny model, which answers noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import session_recall
from benchmarks.session_recall import ALONE, Asked, make_facts, tables, with_facts
from cluster.config import BaseLMConfig
from cluster.errors import ConfigError
from tests.actors.helpers import make_text, tiny_plan


def test_facts_are_read_asked_and_counted(
    tmp_path: Path, tiny_lm_config: BaseLMConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(make_text(number, 60) for number in range(40)), encoding="utf-8")
    given = ["--texts", str(text), "--split", "all", "--tokens", "2000", "--facts", "4", "--rounds", "1"]
    tiny_plan(tiny_lm_config, tmp_path).gistnet.save(tmp_path / "gistnet")
    models = ["--lm", "tiny", "--dtype", "float32", "--cache_dir", str(tiny_lm_config.cache_dir)]
    models += ["--gistnet", str(tmp_path / "gistnet")]
    only = ["the newest tokens", "words and keys", ALONE]
    assert session_recall.main([*given, *models, "--answer_tokens", "36", "--only", *only]) == 0
    said = capsys.readouterr()
    assert "4 questions about 2,000 tokens, 512 slots" in said.out
    for name in only:
        assert f"round 1: {name}: " in said.err
    alone = next(line for line in said.out.splitlines() if ALONE in line)
    assert alone.count("100% ± 0%") >= 2, "what is needed is shown, and nearest"
    assert session_recall.main([*given, *models, "--tokens", "200000"]) == 2
    assert "tokens too few" in capsys.readouterr().err


def test_facts_are_as_far_apart_as_each_other() -> None:
    facts = make_facts(4, seed=3)
    assert [fact.by_description for fact in facts] == [False, True, False, True]
    assert len({fact.code for fact in facts}) == 4
    lines = [f"line {number}" for number in range(100)]
    text = with_facts(lines, facts).splitlines()
    at = [text.index(fact.sentence) for fact in facts]
    assert at == [22, 45, 68, 91]
    assert [line for line in text if line.startswith("line")] == lines
    for fact in facts:
        assert (fact.key in fact.question) != fact.by_description
    with pytest.raises(ConfigError, match="too short for 4 facts"):
        with_facts(lines[:3], facts)
    with pytest.raises(ConfigError, match="must be from 2"):
        make_facts(1, seed=0)


def test_scorers_are_compared_question_by_question() -> None:
    yes, no = Asked(True, True, True, True), Asked(True, False, False, False, is_cut=True)
    shares, pairs = tables({"a": [yes, no, no, no], "b": [yes, no, yes, yes]}, make_facts(4, seed=0), 1_000)
    assert [row["right"] for row in shares.rows] == ["25% ± 25%", "75% ± 25%"]
    assert [row["of those a border cuts"] for row in shares.rows] == ["100% ± 0%", "too few"]
    assert [row["by name"] for row in shares.rows] == ["50% ± 50%", "100% ± 0%"]
    assert pairs.rows == [
        {
            "scored by": "b",
            "over": "a",
            "right, points": "+50.0 ± 28.9",
            "by name": "+50.0 ± 50.0",
            "by description": "+50.0 ± 50.0",
        }
    ]
