"""The dense pass against plain passes over each Working Context it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistNetConfig
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.positions import Positions
from models.training.dense_pass import DensePass, Gists, ReadWindows
from models.training.sight import Sight, random_sight
from models.window_encoder import WindowEncoder

NUM_BLOCKS = 6


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def dense_pass(lm: BaseLM, num_vectors: int = 1, kind: str = "windowed") -> DensePass:
    config = GistNetConfig(kind=kind, num_vectors=num_vectors, lm_layers=2, key_layer=1)  # type: ignore[arg-type]
    net = build_gistnet(config, lm).train()
    with torch.no_grad():  # or an untrained net's own part would be zero
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return DensePass(lm, net)


def some_ids(lm: BaseLM, num_rows: int = 2, num_blocks: int = NUM_BLOCKS) -> Tensor:
    return torch.randint(0, lm.vocab_size, (num_rows, num_blocks * K), generator=torch.Generator().manual_seed(1))


def seen_alone(dense: DensePass, windows: ReadWindows, gists: Gists, sight: Sight, row: int, block: int) -> Tensor:
    """States of one block's tokens, from a pass over nothing but what they see and themselves."""
    m = gists.blocks.shape[2]
    parts = [
        (gists.blocks[row, other], torch.full((m,), 2 * K * other + K - 1))
        for other in range(block)
        if sight.gist[row, block, other]
    ]
    for other in range(block + 1):
        if other == block or sight.raw[row, block, other]:
            tokens = torch.arange(other * K, (other + 1) * K)
            parts.append((windows.embeddings[row, tokens], 2 * tokens))
    entries = torch.cat([rows for rows, _ in parts])[None]
    places = torch.cat([place for _, place in parts])[None]
    final, _ = dense.lm.final_states(entries, positions=Positions(places))
    return final[0, -K:]


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_every_block_predicts_as_from_its_own_working_context(tiny_lm: BaseLM, num_vectors: int) -> None:
    """Gists of the chunks before, and the chunk's own tokens so far."""
    dense = dense_pass(tiny_lm, num_vectors)
    windows = dense.read(some_ids(tiny_lm))
    sight = random_sight(2, NUM_BLOCKS, np.random.default_rng(2), max_tail_blocks=3)
    with torch.no_grad():
        gists = dense.gists(windows)
        states = dense.student(windows, gists, sight).unflatten(1, (NUM_BLOCKS - 1, K))
        for row in range(2):
            for block in range(1, NUM_BLOCKS):
                expected = seen_alone(dense, windows, gists, sight, row, block)
                close(states[row, block - 1], expected)


def test_blocks_that_are_shown_stand_as_their_own_chunk_read_them(tiny_lm: BaseLM) -> None:
    """A block of one chunk, shown to the next: read after the gists before it, as when it is shown alone."""
    n = 4
    gist = np.tril(np.ones((1, n, n), bool), -1)
    raw = np.zeros((1, n, n), bool)
    raw[0, 3, 1] = True
    dense = dense_pass(tiny_lm)
    windows = dense.read(some_ids(tiny_lm, 1, n))
    with torch.no_grad():
        gists = dense.gists(windows)
        found = dense.student(windows, gists, Sight(gist, raw))[0, -K:]
        shut = dense.student(windows, gists, Sight(gist, np.zeros_like(raw)))[0, -K:]
        # The shown block was read after the one gist before it, and does not see the two behind.
        places = torch.tensor([K - 1, *(2 * K * j + K - 1 for j in (1, 2))])
        mask = torch.ones(1, 1, 3 + 2 * K, 3 + 2 * K, dtype=torch.bool).tril()
        mask[0, 0, 3 : 3 + K, 1:3] = False
        tokens = torch.cat((torch.arange(K, 2 * K), torch.arange(3 * K, 4 * K)))
        entries = torch.cat((gists.blocks[0, :3, 0], windows.embeddings[0, tokens]))[None]
        expected, _ = tiny_lm.final_states(
            entries, positions=Positions(torch.cat((places, 2 * tokens))[None]), attention_mask=mask
        )
    close(found, expected[0, -K:])
    assert (found - shut).abs().max() > 1e-3


def test_a_sight_of_raw_tokens_alone_equals_the_teacher_but_for_the_first_block(tiny_lm: BaseLM) -> None:
    n = NUM_BLOCKS
    raw = np.tril(np.ones((1, n, n), bool), -1)
    raw[:, :, 0] = False
    gist = np.zeros((1, n, n), bool)
    dense = dense_pass(tiny_lm)
    ids = some_ids(tiny_lm, 1)
    windows = dense.read(ids)
    with torch.no_grad():
        gists = dense.gists(windows)
        states = dense.student(windows, gists, Sight(gist, raw))
        expected, _ = tiny_lm.final_states(tiny_lm.embed(ids[:, K:]), positions=torch.arange(K, n * K)[None])
    close(states, expected)
    whole, _ = tiny_lm.final_states(tiny_lm.embed(ids))
    assert windows.teacher is not None
    close(windows.teacher, whole[:, K:])
    assert windows.targets.shape == windows.teacher.shape[:2]
    assert (windows.targets[:, :-1] == ids[:, K + 1 :]).all()


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_long_windows_are_seen_as_nodes_and_the_newest_blocks(tiny_lm: BaseLM, num_vectors: int) -> None:
    """Super-blocks before as LOD2 gists, blocks of the own one as gists, then the chunk: against a pass of its own."""
    n, per_node, m = 64, 32, num_vectors
    dense = dense_pass(tiny_lm, m)
    windows = dense.read(some_ids(tiny_lm, 1, n))
    before = np.tril(np.ones((1, n, n), bool), -1)
    super_block = np.arange(n) // per_node
    node = (super_block[:, None] > np.arange(2)[None])[None]
    sight = Sight(before & (super_block[:, None] == super_block[None])[None], np.zeros((1, n, n), bool), node)
    with torch.no_grad():
        gists = dense.gists(windows)
        assert gists.nodes is not None
        assert gists.nodes.shape == (1, 2, m, tiny_lm.hidden_size)
        found = dense.student(windows, gists, sight).unflatten(1, (n - 1, K))
        for block in (5, 32, 40, 63):
            old, first = super_block[block], super_block[block] * per_node
            tokens = torch.arange(block * K, (block + 1) * K)
            entries = (gists.nodes[0, :old].flatten(0, 1), gists.blocks[0, first:block].flatten(0, 1))
            places = torch.cat(
                (
                    (2 * 1024 * torch.arange(int(old)) + 1023).repeat_interleave(m),
                    (2 * K * torch.arange(int(first), block) + K - 1).repeat_interleave(m),
                    2 * tokens,
                )
            )
            expected, _ = tiny_lm.final_states(
                torch.cat((*entries, windows.embeddings[0, tokens]))[None], positions=Positions(places[None])
            )
            close(found[0, block - 1], expected[0, -K:])


def test_gists_of_long_windows_are_those_of_the_compactor(tiny_lm: BaseLM) -> None:
    """A window of 1,024 tokens does not see the one before; a node is made of its 32 children."""
    dense = dense_pass(tiny_lm)
    ids = some_ids(tiny_lm, 1, 64)
    encoder = WindowEncoder(tiny_lm, dense.gistnet)
    encoded = encoder.encode_windows([ids[0, first : first + 1024].numpy().astype(np.uint32) for first in (0, 1024)])
    with torch.no_grad():
        gists = dense.gists(dense.read(ids))
        without_teacher = dense.gists(dense.read(ids, teacher=False))
    expected = torch.from_numpy(np.concatenate([window.gists for window in encoded]))
    close(gists.blocks[0, :, 0], expected)
    close(without_teacher.blocks, gists.blocks)
    keys = torch.from_numpy(np.stack([window.keys for window in encoded]))
    with torch.no_grad():
        above = dense.gistnet.forward_nodes(expected.view(2, 32, 1, -1), keys, 2).gists
    assert gists.nodes is not None
    close(gists.nodes[0], above)


@pytest.mark.parametrize("num_vectors", [1, 2])
def test_a_block_is_said_again_from_its_gist_alone(tiny_lm: BaseLM, num_vectors: int) -> None:
    dense = dense_pass(tiny_lm, num_vectors)
    windows = dense.read(some_ids(tiny_lm), teacher=False)
    assert windows.teacher is None
    with torch.no_grad():
        gists = dense.gists(windows)
        found = dense.repeat(windows, gists).unflatten(0, (2, NUM_BLOCKS))
        for row, block in ((0, 0), (1, 3)):
            tokens = windows.embeddings[row, block * K : (block + 1) * K]
            entries = torch.cat((gists.blocks[row, block], tokens))[None]
            places = torch.cat((torch.full((num_vectors,), K - 1), 2 * torch.arange(K, 2 * K)))[None]
            expected, _ = tiny_lm.final_states(entries, positions=Positions(places))
            close(found[row, block], expected[0, num_vectors - 1 : -1])
    with_teacher = dense.read(some_ids(tiny_lm))
    for layer, states in windows.states.items():
        close(states, with_teacher.states[layer])


def test_only_the_net_learns_and_by_the_true_gradient(tiny_lm: BaseLM) -> None:
    dense = dense_pass(tiny_lm)
    windows = dense.read(some_ids(tiny_lm))
    sight = random_sight(2, NUM_BLOCKS, np.random.default_rng(2), max_tail_blocks=2, shown_share=0.3)
    assert windows.teacher is not None
    probe = torch.randn(windows.teacher.shape, generator=torch.Generator().manual_seed(4))

    def loss() -> Tensor:
        gists = dense.gists(windows)
        return (dense.student(windows, gists, sight) * probe).sum()

    loss().backward()
    weights = dense.gistnet.get_parameter("block_constant")
    assert weights.grad is not None
    assert all(parameter.grad is None for parameter in tiny_lm._model.parameters())
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
    slope = float((weights.grad * direction).sum())
    with torch.no_grad():
        step = 1e-3
        weights += step * direction
        after = float(loss())
        weights -= 2 * step * direction
        before = float(loss())
    assert slope == pytest.approx((after - before) / (2 * step), rel=0.02)


def test_what_does_not_fit_is_refused(tiny_lm: BaseLM) -> None:
    dense = dense_pass(tiny_lm)
    for num_tokens in (K, 3 * K + 1):
        with pytest.raises(ModelError, match="at least two blocks"):
            dense.read(torch.zeros(1, num_tokens, dtype=torch.int64))
    for num_tokens in (1024 + K, 4096):  # the tiny model was trained for 2,048
        with pytest.raises(ModelError, match="multiple of that"):
            dense.read(torch.zeros(1, num_tokens, dtype=torch.int64))
    windows = dense.read(some_ids(tiny_lm))
    gists = dense.gists(windows)
    other = random_sight(1, NUM_BLOCKS, np.random.default_rng(0), max_tail_blocks=2)
    with pytest.raises(ModelError, match="not of windows"):
        dense.student(windows, gists, other)
