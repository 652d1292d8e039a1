from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from models import base_lm
from models.base_lm import BaseLM, choose_dtype
from models.positions import Positions
from models.tokenizer import Tokenizer

IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))


def next_ids(ids: torch.Tensor) -> torch.Tensor:
    """The token after each; after the last there is none to score."""
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)


def stock_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.double().transpose(1, 2), next_ids(ids), reduction="none")


def check_against_stock(lm: BaseLM, stock: Any, ids: torch.Tensor) -> None:
    """Raw tokens as embeddings at their own positions are the stock model, however positions are given."""
    index = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    with torch.inference_mode():
        expected = stock(input_ids=ids).logits
        expected_nll = stock_nll(expected, ids)
        embeds = lm.embed(ids)
        assert torch.equal(lm.logits(embeds), expected)
        assert (lm.nll(embeds, next_ids(ids)) - expected_nll).abs().max() < 1e-5
        for start in (0, 5000, 2**24, 10**9):
            positions = Positions.of_tokens(index + start)
            assert (lm.logits(embeds, positions=index + start) - expected).abs().max() < 1e-3
            nll = lm.nll(embeds, next_ids(ids), positions=positions)
            assert (nll - expected_nll).abs().max() < 1e-4
            assert abs(float(nll.mean() - expected_nll.mean())) < 1e-5


def test_raw_tokens_reproduce_the_stock_model(tiny_lm: BaseLM, tiny_stock: PreTrainedModel) -> None:
    check_against_stock(tiny_lm, tiny_stock, IDS)


@pytest.mark.real_model
def test_raw_tokens_reproduce_the_real_stock_model(real_lm: BaseLM, real_config: BaseLMConfig) -> None:
    stock = AutoModelForCausalLM.from_pretrained(real_lm.files.folder, dtype=torch.float32).eval()
    ids = Tokenizer.load(real_config).encode(Path(json.__file__).read_text())[:64].astype("int64")
    check_against_stock(real_lm, stock, torch.from_numpy(ids)[None])


def test_what_it_knows_of_itself(tiny_lm: BaseLM, tiny_config: BaseLMConfig) -> None:
    assert (tiny_lm.model_id, tiny_lm.hidden_size, tiny_lm.num_layers) == ("tiny", 64, 4)
    assert (tiny_lm.vocab_size, tiny_lm.trained_context) == (320, 2048)
    assert (tiny_lm.dtype, tiny_lm.device.type) == (torch.float32, "cpu")
    assert len(tiny_lm.digest) == len(tiny_lm.tokenizer_digest) == 64
    assert not any(p.requires_grad or p.grad is not None for p in tiny_lm._model.parameters())
    assert not tiny_lm._model.training
    assert tiny_lm.dtype_choice is None


def test_positions_matter_and_halves_lie_between(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS[:1, :3])

    def at(*half_tokens: int) -> torch.Tensor:
        return tiny_lm.logits(embeds, positions=Positions(torch.tensor([half_tokens])))[0, -1]

    near, between, far = at(0, 30, 32), at(0, 30, 33), at(0, 30, 34)
    assert (near - between).abs().max() > 1e-4
    assert (between - far).abs().max() > 1e-4
    assert torch.equal(at(0, 30, 32), tiny_lm.logits(embeds, positions=torch.tensor([[0, 15, 16]]))[0, -1])


def test_jumps_in_positions_hide_nothing(tiny_lm: BaseLM) -> None:
    # transformers reads a jump in position_ids as a new sequence; entries before it must stay visible.
    embeds = tiny_lm.embed(IDS[:1, :10])
    changed = embeds.clone()
    changed[:, 0] += 1
    positions = torch.tensor([[0, 1, 2, 3, 4, 100, 101, 102, 103, 104]])
    before, after = (tiny_lm.logits(e, positions=positions)[:, -1] for e in (embeds, changed))
    assert (before - after).abs().max() > 1e-3


def test_rows_have_starts_of_their_own(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS)
    starts = torch.tensor([[7], [10**9]])
    together = tiny_lm.logits(embeds, positions=torch.arange(48) + starts)
    assert (together - tiny_lm.logits(embeds)).abs().max() < 1e-3


def test_the_override_ends_with_its_call(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS)
    before = tiny_lm.logits(embeds)
    tiny_lm.logits(embeds, positions=torch.arange(48).expand(2, -1) * 3)
    tiny_lm.hidden_states(embeds, [2], positions=torch.arange(48).expand(2, -1) * 3)
    assert torch.equal(tiny_lm.logits(embeds), before)


def test_last_only_is_the_last(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS)
    last = tiny_lm.logits(embeds, last_only=True)
    assert last.shape == (2, 1, 320)
    assert torch.allclose(last, tiny_lm.logits(embeds)[:, -1:], atol=1e-5)


def test_nll_is_per_target_in_chunks_and_skips_what_is_ignored(
    tiny_lm: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds, targets = tiny_lm.embed(IDS), next_ids(IDS)
    expected = stock_nll(tiny_lm.logits(embeds), IDS).float()
    targets[0, 5] = -100
    expected[0, 5] = 0
    monkeypatch.setattr(base_lm, "HEAD_CHUNK_ENTRIES", 7)
    nll = tiny_lm.nll(embeds, targets)
    assert nll.dtype == torch.float32
    assert torch.allclose(nll, expected, atol=1e-5)
    assert torch.equal(tiny_lm.nll(embeds, targets, start=20), nll[:, 20:])
    assert tiny_lm.nll(embeds, targets, start=48).shape == (2, 0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk", [5, 4096])
def test_nll_spends_the_head_on_scored_targets_alone(
    tiny_lm: BaseLM, share: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few targets among many that are ignored, rows without any, whole chunks without any."""
    monkeypatch.setattr(base_lm, "HEAD_CHUNK_ENTRIES", chunk)
    embeds = tiny_lm.embed(IDS)
    scored = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < share
    scored[1, 10:] = False
    targets = IDS.roll(-1, 1).masked_fill(~scored, -100)
    with torch.inference_mode():
        dense = F.cross_entropy(tiny_lm.logits(embeds).double().transpose(1, 2), IDS.roll(-1, 1), reduction="none")
        nll = tiny_lm.nll(embeds, targets)
    assert torch.allclose(nll, (dense * scored).float(), atol=1e-5)
    assert torch.equal(nll[~scored], torch.zeros(int((~scored).sum())))

    went_through: list[int] = []
    head = tiny_lm._require_head()
    handle = head.register_forward_pre_hook(lambda _, args: went_through.append(args[0][..., 0].numel()))
    try:
        tiny_lm.nll(embeds, targets)
    finally:
        handle.remove()
    assert sum(went_through) == int(scored.sum())


def test_gradients_reach_the_embeddings_only(tiny_lm: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_lm, "HEAD_CHUNK_ENTRIES", 16)
    embeds = tiny_lm.embed(IDS[:, :-1]).requires_grad_()
    tiny_lm.nll(embeds, IDS[:, 1:]).sum().backward()
    assert embeds.grad is not None
    reference = tiny_lm.embed(IDS[:, :-1]).requires_grad_()
    F.cross_entropy(tiny_lm.logits(reference).transpose(1, 2), IDS[:, 1:], reduction="sum").backward()
    assert reference.grad is not None
    assert torch.allclose(embeds.grad, reference.grad, atol=1e-4)
    assert all(p.grad is None for p in tiny_lm._model.parameters())
    # Of few targets as of all; before the first there is nothing to learn but the past.
    few = torch.full_like(IDS[:, 1:], -100)
    few[:, 20], few[0, 31] = IDS[:, 21], IDS[0, 32]
    (found,) = torch.autograd.grad(tiny_lm.nll(embeds, few).sum(), embeds)
    dense = F.cross_entropy(tiny_lm.logits(reference).transpose(1, 2), few, reduction="sum")
    assert torch.allclose(found, torch.autograd.grad(dense, reference)[0], atol=1e-4)
    assert not found[1, 21:].any()


def test_hidden_states_are_the_stock_models(tiny_lm: BaseLM, tiny_stock: PreTrainedModel) -> None:
    with torch.inference_mode():
        expected = tiny_stock(input_ids=IDS, output_hidden_states=True).hidden_states
        states = tiny_lm.hidden_states(tiny_lm.embed(IDS), [0, 1, 3])
    assert sorted(states) == [0, 1, 3]
    for num_layers, state in states.items():
        assert torch.equal(state, expected[num_layers])


def test_the_forward_pass_stops_after_the_last_layer_needed(tiny_lm: BaseLM) -> None:
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(tiny_lm._layers)
    ]
    try:
        tiny_lm.hidden_states(tiny_lm.embed(IDS), [2, 1])
        assert ran == [0, 1]
        ran.clear()
        tiny_lm.hidden_states(tiny_lm.embed(IDS), [0])
        assert ran == []
        tiny_lm.logits(tiny_lm.embed(IDS))
        assert ran == [0, 1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()
    assert all(len(layer._forward_hooks) == 0 for layer in tiny_lm._layers)


def test_a_truncated_model_has_the_same_lower_layers(tiny_config: BaseLMConfig, tiny_lm: BaseLM) -> None:
    lower = BaseLM.load(tiny_config, num_layers=2)
    assert (lower.num_layers, lower.has_head, lower.digest) == (2, False, tiny_lm.digest)
    expected = tiny_lm.hidden_states(tiny_lm.embed(IDS), [1, 2])
    for num_layers, state in lower.hidden_states(lower.embed(IDS), [1, 2]).items():
        assert torch.equal(state, expected[num_layers])
    with pytest.raises(ModelError, match="2 of 4 layers"):
        lower.hidden_states(lower.embed(IDS), [3])
    with pytest.raises(ModelError, match="predicts nothing"):
        lower.logits(lower.embed(IDS))
    embeddings_only = BaseLM.load(tiny_config, num_layers=0)
    assert embeddings_only.num_layers == 0
    assert torch.equal(embeddings_only.embed(IDS), tiny_lm.embed(IDS))
    with pytest.raises(ModelError, match="has 4 layers; 5"):
        BaseLM.load(tiny_config, num_layers=5)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_blocks_separates_them(tiny_lm: BaseLM, additive: bool) -> None:
    embeds = tiny_lm.embed(IDS[:1])
    block = torch.arange(48) // 24
    mask: torch.Tensor = (block[:, None] == block) & (torch.arange(48)[:, None] >= torch.arange(48))
    mask = mask[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    masked = tiny_lm.logits(embeds, attention_mask=mask)
    separate = torch.cat([tiny_lm.logits(embeds[:, :24]), tiny_lm.logits(embeds[:, 24:])], dim=1)
    assert (masked - separate).abs().max() < 1e-4
    assert (masked - tiny_lm.logits(embeds)).abs().max() > 1e-2


def test_a_mask_works_with_a_cache(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS[:1])
    mask = torch.ones(48, 48).tril().bool()[None, None]
    mask[..., 5] = False
    mask[..., 5, 5] = True  # a row must see something
    full = tiny_lm.logits(embeds, attention_mask=mask)
    cache = tiny_lm.new_cache()
    tiny_lm.logits(embeds[:, :30], attention_mask=mask[:, :, :30, :30], cache=cache)
    rest = tiny_lm.logits(embeds[:, 30:], attention_mask=mask[:, :, 30:], cache=cache)
    assert (rest - full[:, 30:]).abs().max() < 1e-3


def test_padding_is_not_seen(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS)
    padding = torch.ones(2, 48, dtype=torch.int64)
    padding[:, :8] = 0
    garbage = embeds.clone()
    garbage[:, :8] = 7.0
    positions = torch.arange(48).expand(2, -1)
    a, b = (tiny_lm.logits(e, attention_mask=padding, positions=positions)[:, 8:] for e in (embeds, garbage))
    assert torch.equal(a, b)
    assert (a - tiny_lm.logits(embeds[:, 8:])).abs().max() < 1e-3


def test_shapes_that_do_not_fit_are_refused(tiny_lm: BaseLM) -> None:
    embeds = tiny_lm.embed(IDS)
    with pytest.raises(ModelError, match="embeds must be"):
        tiny_lm.logits(embeds[..., :32])
    with pytest.raises(ModelError, match="positions"):
        tiny_lm.logits(embeds, positions=torch.arange(47).expand(2, -1))
    with pytest.raises(ModelError, match="attention_mask"):
        tiny_lm.logits(embeds, attention_mask=torch.ones(2, 47))
    with pytest.raises(ModelError, match="targets"):
        tiny_lm.nll(embeds, IDS[:, 1:])
    with pytest.raises(ModelError, match="hidden states after layers"):
        tiny_lm.hidden_states(embeds, [])


def test_bfloat16_loaded_and_cast_are_the_same_and_close(
    tiny_config: BaseLMConfig, tiny_bf16_config: BaseLMConfig, tiny_lm: BaseLM
) -> None:
    loaded, cast = BaseLM.load(tiny_bf16_config), BaseLM.load(tiny_config)
    cast.cast_parameters(torch.bfloat16)
    assert loaded.dtype == cast.dtype == torch.bfloat16
    embeds = loaded.embed(IDS)
    positions = torch.arange(48).expand(2, -1) + 2**24
    for given in (None, positions):
        assert torch.equal(loaded.logits(embeds, positions=given), cast.logits(embeds, positions=given))
    exact = tiny_lm.logits(tiny_lm.embed(IDS)).log_softmax(-1)
    rounded = loaded.logits(embeds).float().log_softmax(-1)
    assert float((exact.exp() * (exact - rounded)).sum(-1).mean()) < 0.01


def test_auto_measures_and_says_so(tiny_config: BaseLMConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="megacontext.models"):
        lm = BaseLM.load(dataclasses.replace(tiny_config, dtype="auto"))
    choice = lm.dtype_choice
    assert choice is not None
    assert lm.dtype == {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice.dtype]
    assert str(choice) in caplog.text
    exact = BaseLM.load(dataclasses.replace(tiny_config, dtype=choice.dtype))
    assert torch.equal(lm.logits(lm.embed(IDS)), exact.logits(exact.embed(IDS)))


def test_a_driver_can_choose_for_its_workers(tiny_config: BaseLMConfig) -> None:
    choice = choose_dtype(tiny_config, num_layers=2)
    assert choice.kl_nats is None
    assert choice.speedup > 0
    assert 0 < choice.relative_error < 0.1


@pytest.mark.real_model
def test_bfloat16_is_close_on_the_real_model(real_config: BaseLMConfig) -> None:
    choice = choose_dtype(real_config)
    assert choice.kl_nats is not None
    assert 0 < choice.kl_nats < 0.01


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_devices_that_are_not_there_are_refused(tiny_config: BaseLMConfig, device: str) -> None:
    with pytest.raises(ModelError, match=r"base_lm\.device"):
        BaseLM.load(dataclasses.replace(tiny_config, device=device))


def test_broken_weights_name_the_folder(tiny_lm: BaseLM, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_lm.files.folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00torn")
    with pytest.raises(ModelError, match="cannot be loaded"):
        BaseLM.load(BaseLMConfig(source=str(tmp_path), dtype="float32", cache_dir=tmp_path / "cache"))


COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def saved(config: Any, folder: Path) -> BaseLMConfig:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return BaseLMConfig(source=str(folder), dtype="float32", device="cpu", cache_dir=folder / "cache")


@pytest.mark.parametrize("kind", [Qwen2Config, GPTNeoXConfig])
def test_other_llama_like_models_work(kind: Any, tmp_path: Path) -> None:
    lm_config = saved(kind(**COMMON), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    check_against_stock(BaseLM.load(lm_config), stock, IDS)
    lower = BaseLM.load(lm_config, num_layers=1)
    with torch.inference_mode():
        expected = stock(input_ids=IDS, output_hidden_states=True).hidden_states[1]
        assert torch.equal(lower.hidden_states(lower.embed(IDS), [1])[1], expected)


def test_models_that_change_their_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="straight from its head"):
        BaseLM.load(saved(GraniteConfig(**COMMON, logits_scaling=8.0), tmp_path))


def test_only_explicit_positions_need_a_fixed_rotary(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    lm = BaseLM.load(saved(LlamaConfig(**COMMON, rope_parameters=rope), tmp_path))
    embeds = lm.embed(IDS)
    assert lm.logits(embeds).shape == (2, 48, 256)
    with pytest.raises(ModelError, match="cannot take explicit positions"):
        lm.logits(embeds, positions=torch.arange(48).expand(2, -1))
