from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.config import GistNetKind
from cluster.errors import ModelError
from models.node_encoder import NODE_BATCH, NodeEncoder
from tests.models.gistnet.nets import DIM, KINDS, NUM_VECTORS, make


def stored_children(num_nodes: int, m: int, dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    gists = rng.standard_normal((num_nodes, 32, m, DIM)).astype(dtype)
    return gists, rng.standard_normal((num_nodes, 32, DIM)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("m", NUM_VECTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_depends_on_its_children_alone_bit_for_bit(kind: GistNetKind, m: int, dtype: type[np.floating]) -> None:
    net = make(kind, m, perturbed=True)
    encoder = NodeEncoder(net)
    num_nodes = NODE_BATCH + 3
    gists, keys = stored_children(num_nodes, m, dtype)
    together = encoder.encode_nodes(gists, keys, 3)
    assert together.gists.shape == (num_nodes * m, DIM)
    assert together.keys.shape == (num_nodes, DIM)
    assert together.gists.dtype == together.keys.dtype == np.float32
    for node in range(num_nodes):
        alone = encoder.encode_nodes(gists[node : node + 1], keys[node : node + 1], 3)
        assert alone.gists.tobytes() == together.gists[node * m : (node + 1) * m].tobytes()
        assert alone.keys.tobytes() == together.keys[node : node + 1].tobytes()
    with torch.inference_mode():
        direct = net.forward_nodes(torch.from_numpy(gists), torch.from_numpy(keys), 3)
    assert np.allclose(together.gists, direct.gists.flatten(0, 1).numpy(), atol=1e-4)
    assert np.allclose(together.keys, direct.keys.numpy(), atol=1e-5)


def test_no_nodes_are_no_nodes() -> None:
    gists, keys = stored_children(0, 2, np.float16)
    empty = NodeEncoder(make("windowed", 2)).encode_nodes(gists, keys, 2)
    assert (empty.gists.shape, empty.keys.shape) == ((0, DIM), (0, DIM))


def test_what_does_not_fit_is_refused() -> None:
    encoder = NodeEncoder(make("windowed", 2))
    gists, keys = stored_children(2, 2, np.float32)
    with pytest.raises(ModelError, match="2 nodes' child gists came with 1 nodes' keys"):
        encoder.encode_nodes(gists, keys[:1], 2)
    with pytest.raises(ModelError, match="child_gists of shape"):
        encoder.encode_nodes(gists[:, :, :1], keys, 2)
    with pytest.raises(ModelError, match="LOD 2 and above"):
        encoder.encode_nodes(gists, keys, 1)
    with pytest.raises(ModelError, match="not finite"):
        encoder.encode_nodes(gists * np.float32(np.inf), keys, 2)
