"""Runs a GistNet over nodes: 32 children in, one node of the level above out. Needs no language model.

Like `window_encoder`, always in one shape, so that a node depends on its children alone, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32

from cluster.errors import ModelError
from models.gistnet import GistNet

NODE_BATCH = 8
"""Nodes of one call. More would waste work on a live context, where nodes complete one by one."""


@dataclass(frozen=True)
class EncodedNodes:
    """n nodes of one level."""

    gists: Float32[np.ndarray, "n*m D"]
    """Node by node, each node's m vectors in order."""
    keys: Float32[np.ndarray, "n D_key"]


class NodeEncoder:
    """A GistNet ready for the levels above the blocks. Works where the net's weights are; CPU is fast enough."""

    def __init__(self, gistnet: GistNet) -> None:
        self._net = gistnet.eval()

    def encode_nodes(
        self,
        child_gists: Float[np.ndarray, "n 32 m D"],
        child_keys: Float[np.ndarray, "n 32 D_key"],
        lod: int,
    ) -> EncodedNodes:
        """Encode n nodes of level `lod` >= 2, each from all of its 32 children in order.

        Raises:
            ModelError: shapes that do not fit the net, a level below 2, or output that is not finite.
        """
        if len(child_gists) != len(child_keys):
            raise ModelError(f"{len(child_gists)} nodes' child gists came with {len(child_keys)} nodes' keys")
        device = self._net.embedding_mean.device
        gists, keys = [], []
        for first in range(0, len(child_gists), NODE_BATCH):
            part = slice(first, first + NODE_BATCH)
            num_nodes = len(child_gists[part])
            with torch.inference_mode():
                output = self._net.forward_nodes(
                    torch.from_numpy(_padded(child_gists[part])).to(device),
                    torch.from_numpy(_padded(child_keys[part])).to(device),
                    lod,
                )
            gists.append(output.gists[:num_nodes].reshape(-1, self._net.dim).cpu().numpy())
            keys.append(output.keys[:num_nodes].cpu().numpy())
        nodes = EncodedNodes(
            np.concatenate(gists) if gists else np.empty((0, self._net.dim), np.float32),
            np.concatenate(keys) if keys else np.empty((0, self._net.key_dim), np.float32),
        )
        if not (np.isfinite(nodes.gists).all() and np.isfinite(nodes.keys).all()):
            raise ModelError(f"{self._net.net_id} made LOD{lod} values that are not finite; try another net")
        return nodes


def _padded(array: np.ndarray) -> np.ndarray:
    filled = np.zeros((NODE_BATCH, *array.shape[1:]), dtype=array.dtype)
    filled[: len(array)] = array
    return filled
