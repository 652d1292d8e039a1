"""Answers from one cache against one exact pass each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.evaluation.contents import Contents
from actors.evaluation.scorer import Scorer
from actors.evaluation.task_scorer import AnswerScorer, end_ids, until_end
from cluster.config import BaseLMConfig
from models.base_lm import BaseLM
from models.focus.layout import Policy, lay_out
from models.positions import Positions
from models.tokenizer import Tokenizer


def contents_of(lm: BaseLM, num_rows: int, spacing: int) -> Contents:
    ids = torch.from_numpy(np.random.default_rng(num_rows).integers(0, 256, num_rows))[None]
    return Contents(lm.embed(ids)[0], 2 * spacing * np.arange(num_rows))


@pytest.mark.parametrize(("num_rows", "num_tokens", "policy"), [(0, 900, "global"), (120, 5000, "anchored")])
@pytest.mark.parametrize("question_tokens", [1, 30])
def test_candidates_and_greedy_answers_are_those_of_exact_passes(
    tiny_lm_config: BaseLMConfig, num_rows: int, num_tokens: int, policy: Policy, question_tokens: int
) -> None:
    lm = BaseLM.load(tiny_lm_config)
    rng = np.random.default_rng(0)
    contents = contents_of(lm, num_rows, 30)
    question = rng.integers(0, 256, question_tokens)
    candidates = [rng.integers(0, 256, size) for size in (1, 5, 5, 12)]
    answers = AnswerScorer(lm).answer(contents, question, candidates, num_tokens, policy, num_generated=6)
    exact = Scorer(lm, policy)
    for candidate, nll in zip(candidates, answers.nll, strict=True):
        expected = exact.nll(contents, np.concatenate([question, candidate]), num_tokens)[-len(candidate) :]
        np.testing.assert_allclose(nll, expected, atol=1e-4)
    generated: list[int] = []
    for _ in range(6):
        behind = np.concatenate([question, np.array(generated, np.int64)])
        rows = torch.cat([contents.embeds, lm.embed(torch.from_numpy(behind)[None])[0]])[None]
        layout = lay_out(policy, contents.half_tokens, num_tokens)
        places = np.concatenate([layout.half_tokens, layout.next_half_token + 2 * np.arange(len(behind))])
        logits = lm.logits(rows, positions=Positions(torch.from_numpy(places)[None]))
        generated.append(int(logits[0, -1].argmax()))
    assert answers.generated.tolist() == generated


def test_an_answer_ends_with_the_turn(tiny_lm_config: BaseLMConfig) -> None:
    tokenizer = Tokenizer.load(tiny_lm_config)
    ends = end_ids(tokenizer)
    assert all(tokenizer.decode([token]).startswith("<") for token in ends)
    assert until_end(np.array([5, 6, 7, 8]), frozenset({7, 8})).tolist() == [5, 6]
    assert until_end(np.array([5, 6]), frozenset()).tolist() == [5, 6]
