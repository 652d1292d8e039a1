from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.kv_cache import KVCache
from models.positions import Positions

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
CPU = torch.device("cpu")


def read(cache: KVCache, num_entries: int = 1) -> None:
    """As if one layer had read entries."""
    entries = torch.zeros(2, 1, num_entries, 4)
    cache.layers.update(entries, entries, 0)


def test_the_origin_is_settled_by_the_first_entries() -> None:
    cache = KVCache(DynamicCache())
    early = Positions.of_tokens(torch.tensor([[50, 51], [50, 51]]))
    assert cache.origin(early, 2, CPU).tolist() == [100, 100]  # a call that failed before it read anything
    first = Positions.of_tokens(torch.tensor([[100, 101], [7, 5]]))
    assert cache.origin(first, 2, CPU).tolist() == [200, 10]
    read(cache)
    assert cache.origin(early, 2, CPU).tolist() == [200, 10]
    with pytest.raises(ModelError, match="begun with explicit positions"):
        cache.origin(None, 2, CPU)
    cache.truncate(0)
    assert cache.origin(None, 2, CPU).tolist() == [0, 0]


def test_default_positions_start_at_token_zero() -> None:
    cache = KVCache(DynamicCache())
    assert cache.origin(None, 2, CPU).tolist() == [0, 0]
    read(cache)
    assert cache.origin(Positions.of_tokens(torch.tensor([[9], [9]])), 2, CPU).tolist() == [0, 0]


@pytest.mark.parametrize("start", [None, 0, 2**24, 10**9])
def test_incremental_calls_equal_one_full_call(tiny_lm: BaseLM, start: int | None) -> None:
    embeds = tiny_lm.embed(IDS)
    full = tiny_lm.logits(embeds)
    cache = tiny_lm.new_cache()
    parts = []
    for part in (slice(0, 17), slice(17, 18), slice(18, 40)):
        positions = None if start is None else (torch.arange(40)[part] + start).expand(2, -1)
        parts.append(tiny_lm.logits(embeds[:, part], positions=positions, cache=cache))
    assert cache.num_entries == 40
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-3


def test_explicit_positions_continue_a_default_start(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS)
    cache = tiny_lm.new_cache()
    tiny_lm.logits(embeds[:, :30], cache=cache)
    rest = tiny_lm.logits(embeds[:, 30:], positions=torch.arange(30, 40).expand(2, -1), cache=cache)
    assert (rest - tiny_lm.logits(embeds)[:, 30:]).abs().max() < 1e-3


@pytest.mark.parametrize("kept", [0, 12])
def test_truncating_keeps_what_came_before(tiny_lm: BaseLM, kept: int) -> None:
    embeds = tiny_lm.embed(IDS)
    cache = tiny_lm.new_cache()
    tiny_lm.logits(embeds[:, :20], cache=cache)
    cache.truncate(kept)
    assert cache.num_entries == kept
    edited = torch.cat((embeds[:, :kept], embeds[:, 25:35]), dim=1)
    continued = tiny_lm.logits(edited[:, kept:], cache=cache)
    assert (continued - tiny_lm.logits(edited)[:, kept:]).abs().max() < 1e-3


@pytest.mark.parametrize("kept", [-1, 5])
def test_more_than_there_is_cannot_be_kept(tiny_lm: BaseLM, kept: int) -> None:
    cache = tiny_lm.new_cache()
    tiny_lm.logits(tiny_lm.embed(IDS[:, :4]), cache=cache)
    with pytest.raises(ModelError, match="cannot keep"):
        cache.truncate(kept)


def test_joined_caches_are_entries_that_did_not_see_each_other(tiny_lm: BaseLM) -> None:
    """Two blocks read side by side, as rows of a batch, then seen together: against one call with a mask."""
    sizes, starts = {"prefix": 5, "first": 8, "second": 8, "last": 6}, (0, 40, 90, 200)
    ids = torch.randint(0, 256, (1, sum(sizes.values())), generator=torch.Generator().manual_seed(4))
    embeds = dict(zip(sizes, tiny_lm.embed(ids).split(list(sizes.values()), dim=1), strict=True))
    places = {name: (torch.arange(sizes[name]) + at)[None] for name, at in zip(sizes, starts, strict=True)}

    owner = [name for name, size in sizes.items() for _ in range(size)]
    order = torch.arange(len(owner))
    sees = torch.tensor([[(mine, other) != ("second", "first") for other in owner] for mine in owner])
    full = tiny_lm.logits(
        torch.cat(list(embeds.values()), dim=1),
        positions=torch.cat(list(places.values()), dim=1),
        attention_mask=(sees & (order <= order[:, None]))[None, None],
    )

    prefix = tiny_lm.new_cache(origin_half_tokens=0)
    tiny_lm.logits(embeds["prefix"], positions=places["prefix"], cache=prefix)
    blocks = KVCache.joined([prefix]).repeated(2)
    both = [torch.cat([part["first"], part["second"]]) for part in (embeds, places)]
    tiny_lm.logits(both[0], positions=both[1], cache=blocks)
    together = KVCache.joined([prefix, *(blocks.row(number).since(5) for number in range(2))])
    assert (prefix.num_entries, together.num_entries, together.num_rows) == (5, 21, 1)
    last = tiny_lm.logits(embeds["last"], positions=places["last"], cache=together)
    torch.testing.assert_close(last, full[:, -6:], atol=1e-4, rtol=0)


def test_caches_of_different_origins_are_not_joined(tiny_lm: BaseLM) -> None:
    caches = [tiny_lm.new_cache(origin) for origin in (0, 2, None)]
    for cache in caches:
        tiny_lm.logits(tiny_lm.embed(IDS[:1]), positions=torch.arange(40)[None] + 7, cache=cache)
    for pair in (caches[:2], caches[1:]):
        with pytest.raises(ModelError, match="one explicit origin"):
            KVCache.joined(pair)
