"""Runs a GistNet over windows of a document, bit for bit reproducibly.

A window is read in chunks of CHUNK_TOKENS, each after the keys and values of those before it. Chunk i has one shape
whatever there is to do: window_batch rows, its queries against (i + 1) * CHUNK_TOKENS keys. A matrix product of
another shape may round differently; of the same shape, a row's result does not depend on the other rows. So a gist
depends only on its window's tokens up to its block's end: not on later text, on what shares its batch, on the
document's place in the timeline, or on whether the window came at once or grew. It holds for equal dtype, device and
number of torch threads. The price is that a short document costs a whole chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8, UInt32
from torch import Tensor

from cluster.config import SLOTS_PER_SUPER_BLOCK, TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.gistnet import GistNet, GistOutput
from models.gistnet.build import check_fits
from models.gistnet.lead_in import LeadIn
from models.kv_cache import KVCache

WINDOW_TOKENS = SLOTS_PER_SUPER_BLOCK
"""A window is a document's next 1,024 tokens, counted from the document's start."""

CHUNK_TOKENS = 256
"""Of one pass through the LM's lower layers; divides a window."""

BLOCKS_PER_WINDOW = WINDOW_TOKENS // TOKENS_PER_BLOCK
PADDING_ID = 0


@dataclass(frozen=True)
class EncodedWindow:
    """The blocks of one window, of which there are ceil(num_tokens / 32), or its newest."""

    num_tokens: UInt8[np.ndarray, " blocks"]
    """Real tokens of each block; 32 but for a document's last."""
    gists: Float32[np.ndarray, "blocks*m D"]
    """Block by block, each block's m vectors in order."""
    keys: Float32[np.ndarray, "blocks D_key"]


@dataclass(frozen=True)
class _Prefix:
    """A window's first chunks, as the LM's lower layers have read them."""

    tokens: UInt32[np.ndarray, " num_tokens"]
    """Whole chunks."""
    cache: KVCache
    """Of `window_batch` rows, of which the first is the window's."""
    last_block: dict[int, Float[Tensor, "window_batch K D"]]
    """States of the newest 32 tokens by layer, for routing keys that reach back to them."""


class OpenWindow:
    """What is kept of a window that grows, for `encode_grown`: new in front of every window, empty until its first
    chunk is full.

    At most a window's keys and values in the layers the net reads: 12.6 MB for 8 layers of SmolLM2-135M in float32.
    """

    def __init__(self) -> None:
        self._prefix: _Prefix | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be read again."""
        return 0 if self._prefix is None else len(self._prefix.tokens)

    def keep(self, prefix: _Prefix | None) -> None:
        """What the next call goes on from."""
        self._prefix = prefix

    def take(self, tokens: UInt32[np.ndarray, " num_tokens"]) -> _Prefix | None:
        """What is kept, where it begins `tokens`. It is kept no longer: a call extends it, and may be interrupted."""
        prefix, self._prefix = self._prefix, None
        if prefix is None or not np.array_equal(prefix.tokens, tokens[: len(prefix.tokens)]):
            return None
        return prefix


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

    def encode_grown(
        self, window: UInt32[np.ndarray, " num_tokens"], first_block: int, kept: OpenWindow
    ) -> EncodedWindow:
        """Encode the blocks from number `first_block` on of a window that grows: bit for bit those of `encode_windows`.

        Args:
            window: all its tokens so far.
            first_block: the ones before it are not wanted.
            kept: the window's own, of this encoder. What it holds of the window's beginning is not read again; where
                it holds nothing of it, as after a restart, all is.

        Raises:
            ModelError: as `encode_windows`, or there is no such block.
        """
        self._check_window(window)
        if not 0 <= first_block * TOKENS_PER_BLOCK < len(window):
            raise ModelError(f"a window of {len(window)} tokens has no block {first_block}")
        [encoded] = self._encode_batch([window], first_block, kept)
        return encoded

    def _check_window(self, window: np.ndarray) -> None:
        if window.ndim != 1 or not 1 <= len(window) <= WINDOW_TOKENS:
            raise ModelError(f"a window is 1 to {WINDOW_TOKENS} token ids, not an array of shape {window.shape}")
        if int(window.max()) >= self.base_lm.vocab_size:
            raise ModelError(
                f"token id {int(window.max())} is outside the vocabulary of {self.base_lm.model_id} "
                f"({self.base_lm.vocab_size} ids); were these tokens made by another tokenizer?"
            )

    def _encode_batch(
        self, windows: Sequence[np.ndarray], first_block: int = 0, kept: OpenWindow | None = None
    ) -> list[EncodedWindow]:
        """The windows' blocks from `first_block` on; `kept` is of a window that comes alone."""
        ids = np.full((self.window_batch, WINDOW_TOKENS), PADDING_ID, dtype=np.int64)
        num_tokens = np.zeros(self.window_batch, dtype=np.int64)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = window
            num_tokens[row] = len(window)
        starts = np.arange(0, WINDOW_TOKENS, TOKENS_PER_BLOCK)
        lengths = np.clip(num_tokens[:, None] - starts, 0, TOKENS_PER_BLOCK)  # (window_batch, 32)

        with torch.inference_mode():
            embeddings = self.base_lm.embed(self._to_device(ids))  # (window_batch, 1024, D)
            prefix = None if kept is None else kept.take(windows[0][: first_block * TOKENS_PER_BLOCK])
            states, cache = self._read(embeddings, int(num_tokens.max()), prefix)
            output = self._make(embeddings, self._to_device(lengths.reshape(-1)), states)
            gists, keys = self._to_host(output)
            if kept is not None:
                kept.keep(self._prefix_of(windows[0], states, cache))
        gists = gists.reshape(self.window_batch, BLOCKS_PER_WINDOW, *gists.shape[1:])
        keys = keys.reshape(self.window_batch, BLOCKS_PER_WINDOW, -1)

        encoded = []
        for row in range(len(windows)):
            blocks = slice(first_block, -(-int(num_tokens[row]) // TOKENS_PER_BLOCK))
            window_gists = gists[row, blocks].reshape(-1, self.gistnet.dim)
            self._require_finite(window_gists, keys[row, blocks])
            encoded.append(
                EncodedWindow(
                    num_tokens=lengths[row, blocks].astype(np.uint8),
                    gists=window_gists.copy(),  # a view would keep the whole batch, pinned on GPUs
                    keys=keys[row, blocks].copy(),
                )
            )
        return encoded

    def _read(self, embeddings: Tensor, num_tokens: int, prefix: _Prefix | None) -> tuple[dict[int, Tensor], KVCache]:
        """States by layer, (window_batch, 1024, D): those of the chunks behind the prefix and of its last block, zero
        elsewhere; and the cache they leave."""
        layers = self.gistnet.lm_layers
        states = {layer: torch.zeros_like(embeddings) for layer in layers}
        start, cache = 0, self.base_lm.new_cache()
        if not layers:
            return states, cache
        if prefix is not None:
            start, cache = len(prefix.tokens), prefix.cache
            for layer, block in prefix.last_block.items():
                states[layer][:, start - TOKENS_PER_BLOCK : start] = block
        for first in range(start, num_tokens, CHUNK_TOKENS):
            # Padding follows the text, where causality hides it.
            chunk = slice(first, first + CHUNK_TOKENS)
            for layer, read in self.base_lm.hidden_states(embeddings[:, chunk], layers, cache=cache).items():
                states[layer][:, chunk] = read
        return states, cache

    def _prefix_of(self, window: np.ndarray, states: dict[int, Tensor], cache: KVCache) -> _Prefix | None:
        """The window's full chunks: one that is not full yet is read again when it has grown. None where there is none
        or nothing can follow."""
        num_tokens = len(window) // CHUNK_TOKENS * CHUNK_TOKENS
        if num_tokens in {0, WINDOW_TOKENS}:
            return None
        if cache.num_entries > num_tokens:
            cache.truncate(num_tokens)
        last_block = slice(num_tokens - TOKENS_PER_BLOCK, num_tokens)
        return _Prefix(
            window[:num_tokens].copy(), cache, {layer: state[:, last_block].clone() for layer, state in states.items()}
        )

    def _make(self, embeddings: Tensor, lengths: Tensor, states: dict[int, Tensor]) -> GistOutput:
        """Gists and keys of all blocks of the windows, in the shape of a whole one: it costs little beside the LM."""
        net = self.gistnet
        blocks = (self.window_batch * BLOCKS_PER_WINDOW, TOKENS_PER_BLOCK, net.dim)
        if net.lm_layer is None:
            before = LeadIn.of(embeddings, net.spec.key_reach)
            return net.forward_tokens(embeddings.reshape(blocks), lengths, before=before)
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
