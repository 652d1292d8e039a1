"""What an evaluation of focus can be asked for, and what it refuses before anything is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.config_parser import parse_job
from cluster.errors import ConfigError
from cluster.evaluation_config import EvaluateFocusJob, FocusEvaluationConfig, RetrievalConfig
from cluster.gist_evaluation_config import EvaluateGistJob


def test_the_defaults_can_work() -> None:
    RetrievalConfig().validate()
    FocusEvaluationConfig().validate()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bm25_k1": -0.1}, "evaluation.retrieval.bm25_k1 must be 0 or more"),
        ({"bm25_b": -0.1}, "evaluation.retrieval.bm25_b must be from 0 to 1"),
        ({"bm25_b": 1.1}, "evaluation.retrieval.bm25_b must be from 0 to 1"),
        ({"bm25_query_tokens": 0}, "evaluation.retrieval.bm25_query_tokens must be from 1 to 512"),
        ({"dense_query_tokens": 513}, "evaluation.retrieval.dense_query_tokens must be from 1 to 512"),
        ({"minilm_query_tokens": -1}, "evaluation.retrieval.minilm_query_tokens must be from 1 to 512"),
        ({"rerank_query_tokens": 1000}, "evaluation.retrieval.rerank_query_tokens must be from 1 to 512"),
        ({"fusion": []}, "evaluation.retrieval.fusion must name at least one searcher"),
        ({"fusion_constant": -1.0}, "evaluation.retrieval.fusion_constant must be 0 or more"),
    ],
)
def test_retrieval_that_cannot_work(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetrievalConfig(**wrong).validate()
    with pytest.raises(ConfigError, match=message):
        FocusEvaluationConfig(retrieval=RetrievalConfig(**wrong)).validate()


@pytest.mark.parametrize(
    ("rivals", "fusion", "num_lists"),
    [
        (["recency", "bm25", "dense", "minilm", "fusion", "exhaustive"], ["bm25", "dense", "minilm"], 0),
        (["oracle"], ["bm25", "dense"], 3),
        (["rerank/raw"], ["bm25"], 2),
        (["oracle_greedy/overlay@compact"], ["bm25", "dense", "minilm"], 4),
        (["oracle@global", "minilm/raw@compact"], ["bm25", "dense"], 4),
        (["oracle", "minilm"], ["minilm"], 2),
    ],
)
def test_a_shortlist_must_hold_the_picks_of_every_rival_that_searches(
    rivals: list[str], fusion: list[Any], num_lists: int
) -> None:
    """However rivals are written; of fusion, too, and of what it is made of."""
    config = FocusEvaluationConfig(
        rivals=rivals,
        retrieval=RetrievalConfig(fusion=fusion),
        max_blocks=5,
        oracle_blocks=12,
        shortlist_blocks=max(1, 5 * num_lists),
    )
    config.validate()
    if num_lists:
        with pytest.raises(ConfigError, match=f"cannot hold 5 picks of each of {num_lists} rivals"):
            replace(config, shortlist_blocks=5 * num_lists - 1).validate()


def test_an_oracle_may_choose_no_fewer_blocks_than_a_rival() -> None:
    FocusEvaluationConfig(max_blocks=6, oracle_blocks=6, shortlist_blocks=24).validate()
    with pytest.raises(ConfigError, match="evaluation.oracle_blocks=6 must be at least max_blocks=7"):
        FocusEvaluationConfig(max_blocks=7, oracle_blocks=6, shortlist_blocks=28).validate()


def test_an_oracle_reads_something() -> None:
    with pytest.raises(ConfigError, match="evaluation.oracle_readings=-1 must be 0 or more"):
        FocusEvaluationConfig(oracle_readings=-1).validate()


def test_values_come_from_the_command_line() -> None:
    words = ["--evaluation.retrieval.fusion", "[minilm]", "--evaluation.retrieval.bm25_k1", "2"]
    job = parse_job(EvaluateFocusJob, words)
    assert job.evaluation.retrieval == RetrievalConfig(fusion=["minilm"], bm25_k1=2.0)
    assert job.evaluation.positional == "auto"
    with pytest.raises(ConfigError, match="bm26"):
        parse_job(EvaluateFocusJob, ["--evaluation.retrieval.fusion", "[bm26]"])
    with pytest.raises(ConfigError, match=r"unknown key 'evaluation.query_tokens'"):
        parse_job(EvaluateFocusJob, ["--evaluation.query_tokens", "64"])
    # Gists are compared at their true places or where they are told to stand, the same at any length.
    assert parse_job(EvaluateGistJob, []).evaluation.positional == "global"
    with pytest.raises(ConfigError, match="positional"):
        parse_job(EvaluateGistJob, ["--evaluation.positional", "auto"])
