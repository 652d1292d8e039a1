"""Rows after a shared past get what each would get after a copy of it."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.kv_cache import KVCache
from models.shared_past import SharedPast

IDS = torch.randint(0, 256, (4, 30), generator=torch.Generator().manual_seed(5))


def places(start: int, count: int, num_rows: int = 1) -> torch.Tensor:
    return (torch.arange(count) + start).expand(num_rows, -1)


def read(lm: BaseLM, ids: torch.Tensor, start: int) -> KVCache:
    cache = lm.new_cache(origin_half_tokens=0)
    lm.read(lm.embed(ids), positions=places(start, ids.shape[1], len(ids)), cache=cache)
    return cache


@pytest.mark.parametrize("shared_entries", [0, 9])
@pytest.mark.parametrize("with_own", [False, True])
def test_rows_are_those_of_separate_calls(tiny_lm: BaseLM, shared_entries: int, with_own: bool) -> None:
    shared = tiny_lm.new_cache(0)
    if shared_entries:
        shared = read(tiny_lm, IDS[:1, :shared_entries], 3)
    own = [read(tiny_lm, IDS[row : row + 1, 9:16], 20 + 10 * row) for row in range(3)] if with_own else []
    embeds, targets = tiny_lm.embed(IDS[1:, 16:29]), IDS[1:, 17:30]
    past = SharedPast(shared, KVCache.stacked(own) if own else None)
    found = tiny_lm.nll(embeds, targets, positions=places(100, 13, 3), cache=past)
    for row in range(3):
        cache = KVCache.joined([shared, *own[row : row + 1]])
        expected = tiny_lm.nll(embeds[row : row + 1], targets[row : row + 1], positions=places(100, 13), cache=cache)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=0)
    assert shared.num_entries == shared_entries


def test_the_model_attends_as_before_afterwards(tiny_lm: BaseLM) -> None:
    before = tiny_lm.logits(tiny_lm.embed(IDS))
    past = SharedPast(read(tiny_lm, IDS[:1], 0))
    tiny_lm.nll(tiny_lm.embed(IDS[:2, :-1]), IDS[:2, 1:], positions=places(30, 29, 2), cache=past)
    assert torch.equal(tiny_lm.logits(tiny_lm.embed(IDS)), before)


def test_what_does_not_fit_is_refused(tiny_lm: BaseLM) -> None:
    with pytest.raises(ModelError, match="one row"):
        SharedPast(read(tiny_lm, IDS, 0))
    with pytest.raises(ModelError, match="one explicit origin"):
        SharedPast(read(tiny_lm, IDS[:1], 0), tiny_lm.new_cache(8))
    past = SharedPast(read(tiny_lm, IDS[:1], 0), read(tiny_lm, IDS, 30))
    with pytest.raises(ModelError, match="4 rows, the call 2"):
        tiny_lm.nll(tiny_lm.embed(IDS[:2]), IDS[:2], positions=places(60, 30, 2), cache=past)
    with pytest.raises(ModelError, match="need positions"):
        tiny_lm.nll(tiny_lm.embed(IDS), IDS, cache=past)
    with pytest.raises(ModelError, match="explicit origin"):
        SharedPast(tiny_lm.new_cache()).origin(1, torch.device("cpu"))
