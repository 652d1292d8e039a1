"""Banded attention against the same model under a mask over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ModelError
from models.banded_attention import BandedMask
from models.base_lm import BaseLM
from models.positions import Positions
from models.training.sight import Sight, random_sight


def entries(lm: BaseLM, sight: Sight, num_vectors: int) -> tuple[Tensor, Positions]:
    num_summaries = (sight.num_nodes + sight.num_blocks) * num_vectors
    shape = (len(sight.gist), num_summaries + (sight.num_blocks - 1) * K, lm.hidden_size)
    embeds = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(5))
    places = torch.sort(torch.randint(0, 500, shape[:2], generator=torch.Generator().manual_seed(6))).values
    return embeds, Positions.of_tokens(places)


def sights() -> dict[str, Sight]:
    def drawn(num_rows: int, num_blocks: int, tail: int) -> Sight:
        return random_sight(num_rows, num_blocks, np.random.default_rng(3), max_tail_blocks=tail)

    far = drawn(1, 6, 1)
    far.raw[0, 5, 2] = True  # a block that was expanded, the ones between are not
    none = Sight(np.tril(np.ones((1, 3, 3), bool), -1), np.zeros((1, 3, 3), bool))
    return {"chunks": drawn(2, 8, 3), "nodes": drawn(1, 64, 2), "expanded": far, "gists alone": none}


@pytest.mark.parametrize("name", sights())
@pytest.mark.parametrize("num_vectors", [1, 2])
def test_states_and_gradients_are_those_of_a_mask_over_all_pairs(tiny_lm: BaseLM, name: str, num_vectors: int) -> None:
    sight = sights()[name]
    embeds, positions = entries(tiny_lm, sight, num_vectors)
    found = []
    for mask in (sight.banded_mask(num_vectors), sight.mask(num_vectors)):
        leaf = embeds.clone().requires_grad_()
        final, _ = tiny_lm.final_states(leaf, positions=positions, attention_mask=mask)
        (final * torch.linspace(-1, 1, final.shape[-1])).sum().backward()
        assert leaf.grad is not None
        found.append((final.detach(), leaf.grad))
    for banded, full in zip(*found, strict=True):
        torch.testing.assert_close(banded, full, rtol=1e-3, atol=1e-3)  # gradients reach 5


def test_a_band_says_the_same_as_the_whole_mask() -> None:
    sight = sights()["chunks"]
    of_blocks = sight.banded_mask(1).of_blocks()
    whole = sight.mask(1)[:, 0]
    # Every pair that sees each other is in the band, once.
    assert of_blocks.sum(dim=(2, 3)).tolist() == whole[:, 8:].unflatten(1, (7, K)).sum(dim=(2, 3)).tolist()
    assert sight.reach == 2


def test_blocks_before_the_first_are_never_seen() -> None:
    mask = BandedMask(
        torch.ones(1, 1, 1, dtype=torch.bool),
        torch.ones(1, 2, 1, dtype=torch.bool),
        torch.ones(1, 2, 3, dtype=torch.bool),
        4,
    )
    assert mask.of_blocks()[0, :, 3].sum(dim=1).tolist() == [1 + 4, 1 + 2 * 4]


def test_masks_that_do_not_fit_are_refused(tiny_lm: BaseLM) -> None:
    sight = sights()["chunks"]
    mask = sight.banded_mask(1)
    embeds, positions = entries(tiny_lm, sight, 1)
    with pytest.raises(ModelError, match="is not of embeds"):
        tiny_lm.final_states(embeds[:, 1:], positions=None, attention_mask=mask)
    with pytest.raises(ModelError, match="takes no cache"):
        tiny_lm.logits(embeds, positions=positions, attention_mask=mask, cache=tiny_lm.new_cache(0))
    with pytest.raises(ModelError, match="does not fit together"):
        BandedMask(mask.summaries, mask.to_summaries[:, 1:], mask.back, K)
    with pytest.raises(ModelError, match="at least itself"):
        BandedMask(torch.zeros_like(mask.summaries), mask.to_summaries, mask.back, K)


def test_the_usual_attention_is_back_behind_a_pass_also_one_that_ends_early(tiny_lm: BaseLM) -> None:
    embeds, positions = entries(tiny_lm, sights()["chunks"], 1)
    usual, _ = tiny_lm.final_states(embeds, positions=positions)
    mask = sights()["chunks"].banded_mask(1)
    within, _ = tiny_lm.final_states(embeds, positions=positions, attention_mask=mask)
    early = tiny_lm.hidden_states(embeds, [1], positions=positions, attention_mask=mask)[1]
    again, _ = tiny_lm.final_states(embeds, positions=positions)
    assert torch.equal(usual, again)
    assert not torch.allclose(usual, within, atol=1e-3)
    assert early.shape == within.shape
