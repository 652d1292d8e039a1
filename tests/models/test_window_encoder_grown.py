"""A window that grows is encoded as one that comes at once, bit for bit, and costs what is new in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, ComputeDtype, GistNetConfig, GistNetKind
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.model_files import resolve_model
from models.tokenizer import Tokenizer
from models.training.key_contrast import with_key_head
from models.window_encoder import CHUNK_TOKENS, WINDOW_TOKENS, EncodedWindow, OpenWindow, WindowEncoder
from tests.models.gistnet.nets import perturb

DTYPES: tuple[ComputeDtype, ...] = ("float32", "bfloat16")
VARIANTS: list[tuple[GistNetKind, int, int, int]] = [
    ("windowed", 1, 0, 1),
    ("windowed", 2, 8, 3),
    ("block", 1, 8, 1),
]
"""kind, m, key_reach, window_batch"""


def encoder_for(
    config: BaseLMConfig, kind: GistNetKind = "windowed", m: int = 1, key_reach: int = 0, batch: int = 1
) -> WindowEncoder:
    # An untrained net would only test its residual.
    net_config = GistNetConfig(kind=kind, num_vectors=m, lm_layers=3, key_layer=2)
    net = perturb(build_gistnet(net_config, resolve_model(config)), 0.05)
    if key_reach:
        net = with_key_head(net, key_dim=16, key_layer=2 if kind == "windowed" else None, key_reach=key_reach)
    return WindowEncoder(BaseLM.load(config, num_layers=net.lm_layer or 0), net, batch)


def text(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_tokens).astype(np.uint32)


class Growth:
    """A window that is encoded as far as its blocks are full, whenever it is told how far it has come."""

    def __init__(self, encoder: WindowEncoder, window: np.ndarray) -> None:
        self.encoder = encoder
        self.window = window
        self.kept = OpenWindow()
        self.num_blocks = 0
        self.parts: list[EncodedWindow] = []

    def to(self, num_tokens: int) -> None:
        blocks = -(-num_tokens // K) if num_tokens == len(self.window) else num_tokens // K
        if blocks > self.num_blocks:
            part = self.encoder.encode_grown(self.window[: min(blocks * K, num_tokens)], self.num_blocks, self.kept)
            self.parts.append(part)
            self.num_blocks += len(part.num_tokens)

    def check(self) -> None:
        self.to(len(self.window))
        [whole] = self.encoder.encode_windows([self.window])
        for name in ("num_tokens", "gists", "keys"):
            grown = np.concatenate([getattr(part, name) for part in self.parts])
            assert grown.dtype == getattr(whole, name).dtype
            assert grown.tobytes() == getattr(whole, name).tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "m", "key_reach", "batch"), VARIANTS)
def test_a_window_that_grows_has_the_bits_of_one_that_comes_at_once(
    tiny_config: BaseLMConfig, kind: GistNetKind, m: int, key_reach: int, batch: int, dtype: ComputeDtype
) -> None:
    encoder = encoder_for(dataclasses.replace(tiny_config, dtype=dtype), kind, m, key_reach, batch)

    @settings(max_examples=8, deadline=None)
    @given(
        length=st.integers(1, WINDOW_TOKENS),
        steps=st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=8),
        seed=st.integers(0, 10**6),
    )
    def check(length: int, steps: Sequence[tuple[float, bool]], seed: int) -> None:
        growth = Growth(encoder, text(length, seed))
        for share, restarted in sorted(steps):
            if restarted:
                growth.kept = OpenWindow()
            growth.to(int(share * length))
        growth.check()

    check()


@pytest.mark.real_model
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_it_is_with_the_real_model(real_config: BaseLMConfig, dtype: ComputeDtype) -> None:
    config = dataclasses.replace(real_config, dtype=dtype)
    net = build_gistnet(GistNetConfig(lm_layers=3, key_layer=2), resolve_model(config))
    encoder = WindowEncoder(BaseLM.load(config, num_layers=3), net)
    growth = Growth(encoder, Tokenizer.load(config).encode(Path(json.__file__).read_text())[:1000])
    for num_tokens in (128, 200, 512, 650, 768, 800):
        if num_tokens == 650:
            growth.kept = OpenWindow()
        growth.to(num_tokens)
    growth.check()


def test_windows_that_grow_by_turns_do_not_meet(tiny_config: BaseLMConfig) -> None:
    encoder = encoder_for(tiny_config)
    growths = [Growth(encoder, text(1000, 1)), Growth(encoder, text(1000, 2))]
    for num_tokens in range(150, 1000, 150):
        for growth in growths:
            growth.to(num_tokens)
            encoder.encode_windows([text(300, 3)])
    for growth in growths:
        growth.check()


def test_what_is_kept_is_what_is_read_once(tiny_config: BaseLMConfig) -> None:
    encoder = encoder_for(tiny_config, batch=2)
    read: list[int] = []
    encoder.base_lm._layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    growth = Growth(encoder, text(WINDOW_TOKENS))
    config = encoder.base_lm._stack.config
    for num_tokens in range(128, WINDOW_TOKENS + 1, 128):
        growth.to(num_tokens)
        assert read == [CHUNK_TOKENS], "the lower layers read nothing but the chunk that grew"
        read.clear()
        full = num_tokens // CHUNK_TOKENS * CHUNK_TOKENS
        prefix = growth.kept._prefix
        if full in {0, WINDOW_TOKENS}:
            assert growth.kept.num_tokens == 0
            assert prefix is None
            continue
        assert prefix is not None
        assert growth.kept.num_tokens == prefix.cache.num_entries == full
        assert len(prefix.cache.layers.layers) == 3
        shape = (2, config.num_key_value_heads, full, config.hidden_size // config.num_attention_heads)
        for layer in range(3):
            for kept in prefix.cache.layer(layer):
                assert tuple(kept.shape) == shape
                assert kept.untyped_storage().nbytes() <= kept.nbytes // full * (full + CHUNK_TOKENS)
        for state in prefix.last_block.values():
            assert state.untyped_storage().nbytes() == state.nbytes
    growth.check()


def test_a_short_window_costs_its_chunks(tiny_config: BaseLMConfig) -> None:
    encoder = encoder_for(tiny_config, batch=2)
    read: list[int] = []
    encoder.base_lm._layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    encoder.encode_windows([text(CHUNK_TOKENS + 1), text(3)])
    assert read == [CHUNK_TOKENS] * 2


def test_what_is_kept_of_another_text_is_not_used(tiny_config: BaseLMConfig) -> None:
    encoder = encoder_for(tiny_config)
    other, growth = Growth(encoder, text(900, 1)), Growth(encoder, text(900, 2))
    other.to(700)
    growth.to(300)
    growth.kept = other.kept
    growth.check()


def test_an_interrupted_call_leaves_nothing_behind(tiny_config: BaseLMConfig) -> None:
    encoder = encoder_for(tiny_config)
    growth = Growth(encoder, text(900))
    growth.to(300)
    assert growth.kept.num_tokens == CHUNK_TOKENS

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = encoder.base_lm._layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        growth.to(600)
    handle.remove()
    growth.check()


def test_blocks_that_are_not_there_are_refused(tiny_config: BaseLMConfig) -> None:
    encoder = encoder_for(tiny_config)
    for first_block in (-1, 2):
        with pytest.raises(ModelError, match=f"64 tokens has no block {first_block}"):
            encoder.encode_grown(text(64), first_block, OpenWindow())
    with pytest.raises(ModelError, match="1 to 1024 token ids"):
        encoder.encode_grown(text(0), 0, OpenWindow())


def test_the_lower_layers_read_on_from_a_cache(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(torch.from_numpy(text(96).astype(np.int64)).view(2, 48))
    whole = tiny_lm.hidden_states(embeds, [1, 2])
    cache = tiny_lm.new_cache()
    pieces = [tiny_lm.hidden_states(piece, [1, 2], cache=cache) for piece in embeds.split(16, dim=1)]
    assert (cache.num_entries, len(cache.layers.layers)) == (48, 2)
    for layer, states in whole.items():
        assert torch.allclose(torch.cat([piece[layer] for piece in pieces], dim=1), states, atol=1e-4)
