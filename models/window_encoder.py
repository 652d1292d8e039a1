"""Runs a GistNet over windows of a document, bit for bit reproducibly.

Every call has the same shape, whatever there is to do: window_batch windows of 1,024 tokens, causally. A
matrix product of another shape may round differently; of the same shape, a row's result does not depend on the
other rows. So a gist depends only on its window's tokens up to its block's end: not on later text, on what
shares its batch, or on the document's place in the timeline. It holds for equal dtype, device and number of
torch threads. The price is that a short document costs a whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, UInt8, UInt32
from torch import Tensor

from cluster.config import SLOTS_PER_SUPER_BLOCK, TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.gistnet import GistNet, GistOutput
from models.gistnet.build import check_fits
from models.gistnet.lead_in import LeadIn

WINDOW_TOKENS = SLOTS_PER_SUPER_BLOCK
"""A window is a document's next 1,024 tokens, counted from the document's start."""

BLOCKS_PER_WINDOW = WINDOW_TOKENS // TOKENS_PER_BLOCK
PADDING_ID = 0


@dataclass(frozen=True)
class EncodedWindow:
    """The blocks of one window, of which there are ceil(num_tokens / 32)."""

    num_tokens: UInt8[np.ndarray, " blocks"]
    """Real tokens of each block; 32 but for a document's last."""
    gists: Float32[np.ndarray, "blocks*m D"]
    """Block by block, each block's m vectors in order."""
    keys: Float32[np.ndarray, "blocks D_key"]


class WindowEncoder:
    """A GistNet on its LM, ready for documents. Needs of the LM only the layers the net reads.

    Raises:
        ModelError: a net of another hidden size, more layers than are loaded, or an LM trained for less than
            a window.
    """

    def __init__(self, base_lm: BaseLM, gistnet: GistNet, window_batch: int = 1) -> None:
        check_fits(gistnet, base_lm)
        if gistnet.lm_layer and base_lm.trained_context < WINDOW_TOKENS:
            raise ModelError(
                f"{base_lm.model_id} was trained for {base_lm.trained_context} tokens; {gistnet.net_id} reads "
                f"windows of {WINDOW_TOKENS}"
            )
        if window_batch < 1:
            raise ModelError(f"window_batch={window_batch} must be at least 1")
        self.base_lm = base_lm
        self.gistnet = gistnet.to(base_lm.device).eval()
        self.window_batch = window_batch
        self._on_cuda = base_lm.device.type == "cuda"

    def encode_windows(self, windows: Sequence[UInt32[np.ndarray, " num_tokens"]]) -> list[EncodedWindow]:
        """Encode windows of 1 … 1,024 token ids, each beginning where a window of its document begins.

        Raises:
            ModelError: an empty or too long window, an id outside the vocabulary, or a net whose output is
                not finite.
        """
        for window in windows:
            self._check_window(window)
        encoded: list[EncodedWindow] = []
        for first in range(0, len(windows), self.window_batch):
            encoded += self._encode_batch(windows[first : first + self.window_batch])
        return encoded

    def _check_window(self, window: np.ndarray) -> None:
        if window.ndim != 1 or not 1 <= len(window) <= WINDOW_TOKENS:
            raise ModelError(f"a window is 1 to {WINDOW_TOKENS} token ids, not an array of shape {window.shape}")
        if int(window.max()) >= self.base_lm.vocab_size:
            raise ModelError(
                f"token id {int(window.max())} is outside the vocabulary of {self.base_lm.model_id} "
                f"({self.base_lm.vocab_size} ids); were these tokens made by another tokenizer?"
            )

    def _encode_batch(self, windows: Sequence[np.ndarray]) -> list[EncodedWindow]:
        ids = np.full((self.window_batch, WINDOW_TOKENS), PADDING_ID, dtype=np.int64)
        num_tokens = np.zeros(self.window_batch, dtype=np.int64)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = window
            num_tokens[row] = len(window)
        starts = np.arange(0, WINDOW_TOKENS, TOKENS_PER_BLOCK)
        lengths = np.clip(num_tokens[:, None] - starts, 0, TOKENS_PER_BLOCK)  # (window_batch, 32)

        with torch.inference_mode():
            output = self._forward(self._to_device(ids), self._to_device(lengths.reshape(-1)))
            gists, keys = self._to_host(output)
        gists = gists.reshape(self.window_batch, BLOCKS_PER_WINDOW, *gists.shape[1:])
        keys = keys.reshape(self.window_batch, BLOCKS_PER_WINDOW, -1)

        encoded = []
        for row in range(len(windows)):
            num_blocks = -(-int(num_tokens[row]) // TOKENS_PER_BLOCK)
            window_gists = gists[row, :num_blocks].reshape(-1, self.gistnet.dim)
            self._require_finite(window_gists, keys[row, :num_blocks])
            encoded.append(
                EncodedWindow(
                    num_tokens=lengths[row, :num_blocks].astype(np.uint8),
                    gists=window_gists.copy(),  # a view would keep the whole batch, pinned on GPUs
                    keys=keys[row, :num_blocks].copy(),
                )
            )
        return encoded

    def _forward(self, ids: Tensor, lengths: Tensor) -> GistOutput:
        embeddings = self.base_lm.embed(ids)  # (window_batch, 1024, D)
        net = self.gistnet
        blocks = (self.window_batch * BLOCKS_PER_WINDOW, TOKENS_PER_BLOCK, net.dim)
        if net.lm_layer is None:
            before = LeadIn.of(embeddings, net.spec.key_reach)
            return net.forward_tokens(embeddings.reshape(blocks), lengths, before=before)
        # Padding follows the text, where causality hides it; without a mask attention is fastest.
        states = self.base_lm.hidden_states(embeddings, net.lm_layers)
        return net.forward_tokens(
            embeddings.reshape(blocks),
            lengths,
            states[net.lm_layer].reshape(blocks),
            None if net.key_layer is None else states[net.key_layer].reshape(blocks),
            None if net.key_layer is None else LeadIn.of(states[net.key_layer], net.spec.key_reach),
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._on_cuda:
            return tensor.pin_memory().to(self.base_lm.device, non_blocking=True)
        return tensor

    def _to_host(self, output: GistOutput) -> tuple[np.ndarray, np.ndarray]:
        tensors = (output.gists.contiguous(), output.keys.contiguous())
        if self._on_cuda:
            pinned = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for host, device in zip(pinned, tensors, strict=True):
                host.copy_(device, non_blocking=True)
            torch.cuda.current_stream(self.base_lm.device).synchronize()
            tensors = pinned
        return tensors[0].numpy(), tensors[1].numpy()

    def _require_finite(self, *arrays: np.ndarray) -> None:
        if not all(np.isfinite(array).all() for array in arrays):
            raise ModelError(
                f"{self.gistnet.net_id} on {self.base_lm.model_id} ({self.base_lm.dtype}) made values that are not "
                "finite; try base_lm.dtype=float32, or another net"
            )
