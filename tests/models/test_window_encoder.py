from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cluster.config import BaseLMConfig, ComputeDtype, GistNetConfig, GistNetKind
from cluster.errors import ModelError
from models.base_lm import BaseLM
from models.gistnet import build_gistnet
from models.model_files import resolve_model
from models.positions import global_positions
from models.tokenizer import Tokenizer
from models.training.key_contrast import with_key_head
from models.window_encoder import WINDOW_TOKENS, EncodedWindow, WindowEncoder
from tests.models.gistnet.nets import KINDS, perturb

DTYPES: tuple[ComputeDtype, ...] = ("float32", "bfloat16")
KEY = tuple[GistNetKind, int, int, ComputeDtype]
VARIANTS: list[tuple[GistNetKind, int, int]] = [
    *((k, 1, 1) for k in KINDS),
    ("windowed", 2, 3),
    ("block", 4, 2),
]
"""kind, m, window_batch; nets of two vectors have keys of a layer of their own"""


def encoder_for(config: BaseLMConfig, net_config: GistNetConfig, window_batch: int) -> WindowEncoder:
    # An untrained net would only test its residual.
    net = perturb(build_gistnet(net_config, resolve_model(config)), 0.05)
    return WindowEncoder(BaseLM.load(config, num_layers=net.lm_layer or 0), net, window_batch)


@pytest.fixture(scope="module")
def encoders(tiny_config: BaseLMConfig) -> dict[KEY, WindowEncoder]:
    made: dict[KEY, WindowEncoder] = {}
    for dtype in DTYPES:
        lm_config = dataclasses.replace(tiny_config, dtype=dtype)
        for kind, num_vectors, batch in VARIANTS:
            key_layer = 2 if num_vectors == 2 else 3
            net_config = GistNetConfig(kind=kind, num_vectors=num_vectors, lm_layers=3, key_layer=key_layer)
            made[kind, num_vectors, batch, dtype] = encoder_for(lm_config, net_config, batch)
    return made


def text(num_tokens: int, seed: int = 0, vocab: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, num_tokens).astype(np.uint32)


def assert_same(a: EncodedWindow, b: EncodedWindow, num_blocks: int | None = None, m: int = 1) -> None:
    """Bit for bit, the first blocks or all."""
    gists = None if num_blocks is None else num_blocks * m
    assert np.array_equal(a.num_tokens[:num_blocks], b.num_tokens[:num_blocks])
    assert a.gists[:gists].tobytes() == b.gists[:gists].tobytes()
    assert a.keys[:num_blocks].tobytes() == b.keys[:num_blocks].tobytes()


def check_reproducible(
    encoder: WindowEncoder, window: np.ndarray, others: list[np.ndarray], prefixes: set[int]
) -> None:
    """Later text, what else is in the batch, and the place in it change no bit of a finished block."""
    m, length = encoder.gistnet.num_vectors, len(window)
    [alone] = encoder.encode_windows([window])
    assert alone.num_tokens.tolist() == [32] * (length // 32) + ([length % 32] if length % 32 else [])
    assert alone.gists.shape == (len(alone.num_tokens) * m, encoder.base_lm.hidden_size)
    assert alone.gists.dtype == alone.keys.dtype == np.float32
    for place in range(len(others) + 1):
        mixed = encoder.encode_windows([*others[:place], window, *others[place:]])
        assert_same(mixed[place], alone)
    for num_blocks in prefixes:
        [prefix] = encoder.encode_windows([window[: num_blocks * 32]])
        assert_same(prefix, alone, num_blocks, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "m", "batch"), VARIANTS)
def test_encoding_is_bit_for_bit_reproducible(
    encoders: dict[KEY, WindowEncoder], kind: GistNetKind, m: int, batch: int, dtype: ComputeDtype
) -> None:
    encoder = encoders[kind, m, batch, dtype]

    @settings(max_examples=8, deadline=None)
    @given(length=st.integers(1, WINDOW_TOKENS), seed=st.integers(0, 10**6))
    def check(length: int, seed: int) -> None:
        others = [text(700, seed + 1), text(1, seed + 2), text(WINDOW_TOKENS, seed + 3)]
        prefixes = {n for n in (1, length // 64, length // 32) if 0 < n <= length // 32}
        check_reproducible(encoder, text(length, seed), others[:batch], prefixes)

    check()


@pytest.mark.real_model
@pytest.mark.parametrize(("dtype", "num_threads"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_the_real_model_is_bit_for_bit_reproducible(
    real_config: BaseLMConfig, dtype: ComputeDtype, num_threads: int
) -> None:
    config = dataclasses.replace(real_config, dtype=dtype)
    ids = Tokenizer.load(config).encode(Path(json.__file__).read_text())
    encoder = encoder_for(config, GistNetConfig(), window_batch=2)
    torch.set_num_threads(num_threads)
    try:
        check_reproducible(encoder, ids[:1000], [ids[1000:1900]], prefixes={17})
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("key_layer", [1, 2, 3])
def test_gists_are_the_nets_on_the_lms_states(tiny_config: BaseLMConfig, tiny_lm: BaseLM, key_layer: int) -> None:
    encoder = encoder_for(tiny_config, GistNetConfig(lm_layers=3, key_layer=key_layer, num_vectors=2), 1)
    window = text(100)
    [encoded] = encoder.encode_windows([window])
    ids = torch.from_numpy(np.pad(window, (0, 28)).astype(np.int64))[None]
    with torch.inference_mode():
        embeddings = tiny_lm.embed(ids)
        states = tiny_lm.hidden_states(embeddings, [key_layer, 3])
        hidden, key_states = states[3].reshape(4, 32, -1), states[key_layer].reshape(4, 32, -1)
        direct = encoder.gistnet.forward_tokens(
            embeddings.reshape(4, 32, -1), torch.tensor([32, 32, 32, 4]), hidden, key_states
        )
        mean = encoder.gistnet.own_key_mean if key_layer < 3 else encoder.gistnet.hidden_mean
        last = key_states[3, :4]
        by_hand = (last / last.square().mean(-1, keepdim=True).sqrt() - mean).mean(0)
    assert encoded.num_tokens.tolist() == [32, 32, 32, 4]
    assert np.allclose(encoded.gists, direct.gists.flatten(0, 1).numpy(), atol=1e-4)
    assert np.allclose(encoded.keys, direct.keys.numpy(), atol=1e-4)
    assert np.allclose(encoded.keys[3], (by_hand / by_hand.norm()).numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["windowed", "block"])
def test_keys_reach_into_the_block_before_them_in_their_window(tiny_lm: BaseLM, kind: GistNetKind) -> None:
    plain = build_gistnet(GistNetConfig(kind=kind, lm_layers=2, key_layer=2), tiny_lm)
    reaching = with_key_head(plain, key_dim=16, key_layer=None, key_reach=8)
    windows = [text(100), text(70)]
    encoded = WindowEncoder(tiny_lm, reaching, window_batch=2).encode_windows(windows)
    for window, found in zip(windows, encoded, strict=True):
        with torch.inference_mode():
            states = tiny_lm.embed(torch.from_numpy(window.astype(np.int64))[None])
            if kind == "windowed":
                states = tiny_lm.hidden_states(states, [2])[2]
            for block in range(len(found.keys)):
                part = states[:, max(0, block * 32 - 8) : (block + 1) * 32]
                rows = reaching.key_rows(part, torch.ones(part.shape[:2], dtype=torch.bool))
                expected = F.normalize(rows.sum(dim=1), dim=-1)[0]
                assert np.allclose(found.keys[block], expected.numpy(), atol=1e-4)
    without = WindowEncoder(tiny_lm, with_key_head(plain, 16, None), window_batch=2).encode_windows(windows)
    assert np.array_equal(without[0].gists, encoded[0].gists)
    assert np.array_equal(without[0].keys[0], encoded[0].keys[0])
    assert not np.allclose(without[0].keys[1:], encoded[0].keys[1:], atol=1e-2)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "windowed"])
def test_nets_without_an_lm_layer_cause_no_lm_pass(tiny_config: BaseLMConfig, kind: GistNetKind) -> None:
    lm = BaseLM.load(tiny_config)
    ran: list[int] = []
    for layer in lm._layers:
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
    WindowEncoder(lm, build_gistnet(GistNetConfig(kind=kind), lm)).encode_windows([text(40)])
    assert not ran
    WindowEncoder(lm, build_gistnet(GistNetConfig(lm_layers=2), lm)).encode_windows([text(40)])
    assert len(ran) == 2


def test_windows_that_cannot_be_are_refused(tiny_lm: BaseLM) -> None:
    encoder = WindowEncoder(tiny_lm, build_gistnet(GistNetConfig(lm_layers=2), tiny_lm))
    assert encoder.encode_windows([]) == []
    for bad in (text(0), text(WINDOW_TOKENS + 1), text(64).reshape(2, 32)):
        with pytest.raises(ModelError, match="1 to 1024 token ids"):
            encoder.encode_windows([bad])
    with pytest.raises(ModelError, match="outside the vocabulary.*another tokenizer"):
        encoder.encode_windows([np.array([320], dtype=np.uint32)])
    with pytest.raises(ModelError, match="window_batch"):
        WindowEncoder(tiny_lm, encoder.gistnet, 0)


def test_nets_that_do_not_fit_are_refused(tiny_config: BaseLMConfig, tiny_lm: BaseLM) -> None:
    net = build_gistnet(GistNetConfig(lm_layers=3), tiny_lm)
    with pytest.raises(ModelError, match="after 3 layers"):
        WindowEncoder(BaseLM.load(tiny_config, num_layers=2), net)
    wide = build_gistnet(GistNetConfig(kind="mean"), dataclasses.replace(tiny_lm.files, hidden_size=128))
    with pytest.raises(ModelError, match="size 128"):
        WindowEncoder(tiny_lm, wide)


def test_values_that_are_not_finite_are_never_handed_out(tiny_lm: BaseLM) -> None:
    net = build_gistnet(GistNetConfig(kind="constant"), tiny_lm)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float("inf"))
    encoder = WindowEncoder(tiny_lm, net)
    with pytest.raises(ModelError, match="not finite"):
        encoder.encode_windows([text(32)])


@pytest.mark.real_model
def test_untrained_gists_hurt_less_than_mean_gists(real_config: BaseLMConfig, real_lm: BaseLM) -> None:
    """The real model reads 8 gists (at their spans' centres) and then predicts the next 32 tokens."""
    tokens = Tokenizer.load(real_config).encode(Path(json.__file__).read_text())
    starts = range(0, 2400, 300)
    nll: dict[str, float] = {}
    kinds: tuple[GistNetKind, ...] = ("windowed", "mean")
    for kind in kinds:
        encoder = WindowEncoder(real_lm, build_gistnet(GistNetConfig(kind=kind, lm_layers=0), real_lm))
        history = encoder.encode_windows([tokens[s : s + 256] for s in starts])
        gists = torch.from_numpy(np.stack([window.gists for window in history]))
        horizon = torch.from_numpy(np.stack([tokens[s + 256 : s + 289] for s in starts]).astype(np.int64))
        first = torch.cat((torch.arange(8) * 32, torch.arange(256, 288))).expand(len(starts), -1)
        length = torch.cat((torch.full((8,), 32), torch.ones(32, dtype=torch.int64))).expand(len(starts), -1)
        targets = torch.cat((torch.full((len(starts), 8), -100), horizon[:, 1:]), dim=1)
        with torch.inference_mode():
            embeds = torch.cat((gists, real_lm.embed(horizon[:, :-1])), dim=1)
            scored = real_lm.nll(embeds, targets, positions=global_positions(first, length), start=8)
        nll[kind] = float(scored.mean())
    assert nll["windowed"] < nll["mean"] - 0.1, nll
