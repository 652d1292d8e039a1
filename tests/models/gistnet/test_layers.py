from __future__ import annotations

import torch
from torch.nn import functional as F

from models.gistnet.layers import INITIAL_GAIN, Adapter, AttentionPool, EncoderLayer


def test_heads_start_on_parts_of_their_own_in_order() -> None:
    pool = AttentionPool(num_heads=4, feature_dim=8, num_entries=32)
    weights = pool.anchors.softmax(dim=-1)
    for head in range(4):
        own = slice(8 * head, 8 * (head + 1))
        assert weights[head, own].sum() > 1.5 / 4
        assert weights[:, own].sum(dim=-1).argmax() == head


def test_pooling_is_a_mean_over_real_entries() -> None:
    pool = AttentionPool(num_heads=3, feature_dim=8, num_entries=32)
    x = torch.randn(2, 32, 8)
    mask = torch.arange(32) < torch.tensor([[32], [6]])
    assert torch.allclose(pool(torch.ones_like(x), mask), torch.ones(2, 3, 8), atol=1e-5)
    scores = torch.einsum("hf,tf->ht", pool.queries, x[1, :6]) * 8**-0.5 + pool.anchors[:, :6]
    assert torch.allclose(pool(x, mask)[1], scores.softmax(-1) @ x[1, :6], atol=1e-5)


def test_the_adapter_starts_at_zero_and_its_gain_scales_it() -> None:
    adapter = Adapter(num_inputs=3, feature_dim=8, hidden_dim=16, num_vectors=2, dim=5)
    x = torch.randn(4, 3, 8)
    assert torch.equal(adapter(x), torch.zeros(4, 2, 5))
    with torch.no_grad():
        adapter.linear.weight.normal_()
        adapter.project.weight.normal_()
        once = adapter(x)
        assert torch.allclose(adapter.gain, torch.full((2, 1), INITIAL_GAIN))
        adapter.gain[1] *= 3
    assert torch.equal(adapter(x)[:, 0], once[:, 0])
    assert torch.allclose(adapter(x)[:, 1], 3 * once[:, 1], atol=1e-5)


def test_attention_is_the_standard_one() -> None:
    layer = EncoderLayer(width=16, num_heads=4)
    x = torch.randn(2, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    queries, keys, values = layer.qkv(layer.attention_norm(x)).chunk(3, dim=-1)
    split = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in (queries, keys, values)]
    mixed = F.scaled_dot_product_attention(*split, attn_mask=mask[:, None, None])
    expected = x + layer.output(mixed.transpose(1, 2).flatten(-2))
    expected = expected + layer.mlp(layer.mlp_norm(expected))
    assert torch.allclose(layer(x, mask), expected, atol=1e-5)
