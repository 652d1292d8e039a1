"""The compaction worker: windows of tokens in, spans of blocks with gists and keys out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from actors.packing import Window
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, GistDtype
from cluster.errors import ModelError
from cluster.heap import keep_freed_memory
from models.base_lm import BaseLM
from models.gistnet import GistNet
from models.window_encoder import OpenWindow, WindowEncoder
from storage.codec import encode_arrays
from storage.contract import SpanWrite
from storage.geometry import NO_TOKEN
from storage.schema import GISTS, KEYS, ArraySpec, Encoding


def encoding_of(gistnet: GistNet, compute_dtype: str, gist_dtype: GistDtype) -> Encoding:
    """What a tree records about a GistNet's output: its identity, and the arrays of a level."""
    arrays = (
        ArraySpec(GISTS, gistnet.dim, gistnet.num_vectors, gist_dtype),
        ArraySpec(KEYS, gistnet.key_dim, 1, gist_dtype),
    )
    return Encoding(gistnet.net_id, gistnet.digest(), compute_dtype, arrays)


@dataclass(frozen=True)
class CompactorSpec:
    """Everything a worker needs to become the same encoder anywhere."""

    base_lm: BaseLMConfig
    """With an explicit dtype: workers do not choose."""
    base_lm_digest: str
    encoding: Encoding
    num_threads: int
    window_batch: int = 1


class Compactor:
    """A GistNet on its LM's lower layers. Plain class; `CompactorActor` hosts it."""

    def __init__(self, spec: CompactorSpec, gistnet: GistNet, base_lm: BaseLM | None = None) -> None:
        """Load what the net needs of the LM, or share one that is loaded already.

        Raises:
            ModelError: this machine's copy of the LM is another one than the driver's.
        """
        torch.set_num_threads(spec.num_threads)
        keep_freed_memory()
        self._specs = spec.encoding.arrays
        base_lm = base_lm or BaseLM.load(spec.base_lm, num_layers=gistnet.lm_layer or 0)
        if base_lm.digest != spec.base_lm_digest:
            raise ModelError(
                f"{spec.base_lm.source} on this machine has digest {base_lm.digest[:12]}, the job's driver has "
                f"{spec.base_lm_digest[:12]}; install the same model on every machine"
            )
        self._encoder = WindowEncoder(base_lm, gistnet, spec.window_batch)

    def encode(self, windows: Sequence[Window]) -> list[SpanWrite]:
        """Spans for windows, in order, their arrays already in stored bytes."""
        encoded = self._encoder.encode_windows([window.tokens for window in windows])
        return [
            span_of(window, result.num_tokens, {GISTS: result.gists, KEYS: result.keys}, self._specs)
            for window, result in zip(windows, encoded, strict=True)
        ]

    def encode_grown(self, window: Window, first_block: int, kept: OpenWindow) -> SpanWrite:
        """The span of a growing window's blocks from number `first_block` on, with the bits of `encode`.

        Args:
            window: with all its tokens so far.
            first_block: counted from the window's beginning.
            kept: the window's own; what it holds is not read again.
        """
        result = self._encoder.encode_grown(window.tokens, first_block, kept)
        new = dataclasses.replace(
            window, first_block=window.first_block + first_block, tokens=window.tokens[first_block * K :]
        )
        return span_of(new, result.num_tokens, {GISTS: result.gists, KEYS: result.keys}, self._specs)


def span_of(
    window: Window,
    num_tokens: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    specs: tuple[ArraySpec, ...],
) -> SpanWrite:
    """The span a window's gists and keys make."""
    num_blocks = len(num_tokens)
    slots = np.full(num_blocks * K, NO_TOKEN, np.uint32)
    slots[: len(window.tokens)] = window.tokens
    stored = encode_arrays(specs, dict(arrays), num_blocks)
    return SpanWrite(window.document, window.first_block, slots.reshape(num_blocks, K), num_tokens, stored, window.last)


def explicit_dtype(config: BaseLMConfig, dtype: torch.dtype | str) -> BaseLMConfig:
    """The configuration with the compute dtype decided."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in {"float32", "bfloat16"}:
        raise ModelError(f"compute dtype {name} is not supported; use float32 or bfloat16")
    return dataclasses.replace(config, dtype=name)  # type: ignore[arg-type]


class CompactorActor:
    """Hosts a compactor.

    The net comes with every call, as a reference in a list that is followed once in a process's life. Constructors
    get no references: a restarted actor may find them gone, and Ray prints an error for every one that could.
    """

    def __init__(self, spec: CompactorSpec) -> None:
        self._spec = spec
        self._compactor: Compactor | None = None

    def load(self, gistnet_refs: list[Any]) -> Compactor:
        """The compactor, made when first needed."""
        if self._compactor is None:
            self._compactor = Compactor(self._spec, ray.get(gistnet_refs[0]))
        return self._compactor

    def ready(self, gistnet_refs: list[Any]) -> int:
        """Answers with its process id once the models are loaded."""
        self.load(gistnet_refs)
        return os.getpid()

    def encode(self, windows: Sequence[Window], gistnet_refs: list[Any]) -> list[SpanWrite]:
        """As `Compactor.encode`."""
        return self.load(gistnet_refs).encode(windows)
