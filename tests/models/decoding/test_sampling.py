"""Tokens are those of Hugging Face's `generate` with the same options and seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from cluster.errors import ConfigError
from cluster.session_config import SamplingConfig
from models.base_lm import BaseLM
from models.decoding.focused_cache import FocusedCache
from models.decoding.sampling import Sampler

NUM_TOKENS = 24
PROMPT = np.random.default_rng(5).integers(0, 250, 12)


def draw(lm: BaseLM, config: SamplingConfig) -> list[int]:
    cache, sampler = FocusedCache(lm), Sampler(config, lm.device)
    cache.append(PROMPT)
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        answer.append(sampler.draw(answer, cache.logits()))
        cache.append(np.array(answer[-1:]))
    return answer


def generate(stock: PreTrainedModel, **options: object) -> list[int]:
    torch.manual_seed(7)
    ids = torch.from_numpy(PROMPT)[None]
    found = stock.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return found[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.2, "top_p": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "top_p": 1.0, "typical_p": 0.5},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "typical_p": 0.9},
    ],
    ids=str,
)
def test_draws_are_those_of_generate(tiny_lm: BaseLM, tiny_stock: PreTrainedModel, options: dict[str, float]) -> None:
    theirs = generate(tiny_stock, do_sample=True, **{"top_k": 0, **options})
    assert draw(tiny_lm, SamplingConfig(seed=7, **options)) == theirs  # type: ignore[arg-type]


def test_the_likeliest_is_that_of_generate(tiny_lm: BaseLM, tiny_stock: PreTrainedModel) -> None:
    assert draw(tiny_lm, SamplingConfig(do_sample=False)) == generate(tiny_stock, do_sample=False)


def test_a_seed_is_an_answer(tiny_lm: BaseLM) -> None:
    config = SamplingConfig(temperature=1.5, top_p=1.0, seed=1)
    assert draw(tiny_lm, config) == draw(tiny_lm, config)
    assert draw(tiny_lm, config) != draw(tiny_lm, SamplingConfig(temperature=1.5, top_p=1.0, seed=2))


def test_runs_of_tokens_come_once(tiny_lm: BaseLM) -> None:
    sampler = Sampler(SamplingConfig(do_sample=False, no_repeat_ngram_size=2), tiny_lm.device)
    logits = torch.tensor([1.0, 2.0, 3.0])
    answer: list[int] = []
    for _ in range(6):
        answer.append(sampler.draw(answer, logits))
    assert answer == [2, 2, 1, 2, 0, 2]


def test_repeated_tokens_become_less_likely(tiny_lm: BaseLM) -> None:
    sampler = Sampler(SamplingConfig(do_sample=False, repetition_penalty=10.0), tiny_lm.device)
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert sampler.draw([], logits) == 2
    assert sampler.draw([2], logits) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("min_p", 2.0),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("stop_strings", [""]),
    ],
)
def test_what_has_no_meaning_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{key}"):
        SamplingConfig(**{key: value}).validate()  # type: ignore[arg-type]
