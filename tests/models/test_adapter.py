"""LoRA on the frozen model: nothing at all while it is off, peft's own logits while it is on, and files that last."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.config import BaseLMConfig
from cluster.errors import ConfigError, ModelError
from cluster.training_config import AdapterConfig
from models.adapter import CONFIG_FILE, MODEL_KEY, PEFT_PREFIX, WEIGHTS_FILE, SavedAdapter, fresh_adapter
from models.base_lm import BaseLM
from models.model_files import resolve_model

ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fresh(config: BaseLMConfig, **fields: object) -> SavedAdapter:
    adapter = fresh_adapter(resolve_model(config), AdapterConfig(**{"rank": 2, **fields}))  # type: ignore[arg-type]
    assert adapter is not None
    return adapter


def learned(config: BaseLMConfig, **fields: object) -> SavedAdapter:
    """As if trained: no weight is zero."""
    adapter, generator = fresh(config, **fields), torch.Generator().manual_seed(5)
    weights = {name: 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in adapter.weights.items()}
    return replace(adapter, weights=weights)


def some_embeds(lm: BaseLM) -> Tensor:
    return lm.embed(torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_off_it_is_the_stock_model_and_on_peft_agrees(tiny_config: BaseLMConfig, tmp_path: Path, dtype: str) -> None:
    config = replace(tiny_config, dtype=dtype)  # type: ignore[arg-type]
    stock, lm = BaseLM.load(config), BaseLM.load(config)
    saved = learned(config, alpha=3, target_modules=ALL_MODULES)
    saved.save(tmp_path)
    lm.adapt(SavedAdapter.load(tmp_path))
    embeds, positions = some_embeds(stock), torch.arange(40).expand(2, -1)
    plain = AutoModelForCausalLM.from_pretrained(lm.files.folder, dtype=getattr(torch, dtype)).eval()
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        before = stock.logits(embeds)
        assert torch.equal(lm.logits(embeds), before)
        with lm.adapted():
            # Under a mask, both attend by the same kernel in bfloat16, too.
            everybody = torch.ones(2, 40, dtype=torch.int64)
            adapted = lm.logits(embeds, attention_mask=everybody)
            assert not torch.equal(lm.logits(embeds, positions=positions), stock.logits(embeds, positions=positions))
        assert torch.equal(adapted, theirs(inputs_embeds=embeds).logits)
        assert (adapted.float() - before.float()).abs().max() > 0.1
        assert torch.equal(lm.logits(embeds), before)
        assert torch.equal(lm.hidden_states(embeds, [2])[2], stock.hidden_states(embeds, [2])[2])
    assert lm.num_layer_weights == stock.num_layer_weights
    assert lm.adapter is not None
    assert not any(p.requires_grad for p in lm.adapter.weights.parameters())


def test_untrained_it_changes_nothing(tiny_config: BaseLMConfig) -> None:
    stock, lm = BaseLM.load(tiny_config), BaseLM.load(tiny_config)
    lm.adapt(fresh(tiny_config))
    embeds = some_embeds(lm)
    with torch.no_grad(), lm.adapted():
        assert torch.equal(lm.logits(embeds), stock.logits(embeds))
    assert fresh(tiny_config).digest() == fresh(tiny_config).digest() != fresh(tiny_config, seed=1).digest()
    assert fresh_adapter(lm.files, AdapterConfig()) is None


def test_it_is_off_again_after_an_error_and_a_pass_that_ends_early(tiny_config: BaseLMConfig) -> None:
    stock, lm = BaseLM.load(tiny_config), BaseLM.load(tiny_config)
    lm.adapt(learned(tiny_config))
    embeds = some_embeds(lm)
    with torch.no_grad():
        with lm.adapted():
            early = lm.hidden_states(embeds, [2])[2]
        assert not torch.equal(early, stock.hidden_states(embeds, [2])[2])
        with pytest.raises(ModelError, match="embeds must be"), lm.adapted():
            lm.logits(embeds[..., :3])
        assert torch.equal(lm.logits(embeds), stock.logits(embeds))


def test_the_models_dtype_is_not_the_adapters(tiny_config: BaseLMConfig) -> None:
    lm = BaseLM.load(tiny_config)
    lm.adapt(learned(tiny_config), trained=True)
    lm.cast_parameters(torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    assert lm.adapter is not None
    for _ in range(2):
        assert {p.dtype for p in lm.adapter.weights.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in lm.adapter.weights.parameters())
        with lm.adapted():
            lm.logits(some_embeds(lm))


def test_files_say_everything_and_are_read_back(tiny_config: BaseLMConfig, tmp_path: Path) -> None:
    saved = learned(tiny_config, alpha=5, target_modules=["v_proj", "down_proj"])
    saved.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    read = SavedAdapter.load(tmp_path)
    assert read.digest() == saved.digest()
    assert read.is_like(saved)
    assert (read.rank, read.alpha, read.target_modules) == (2, 5, ("down_proj", "v_proj"))
    assert all(torch.equal(weight, saved.weights[name]) for name, weight in read.weights.items())
    assert not fresh(tiny_config, rank=3).is_like(saved)
    assert learned(tiny_config, alpha=6, target_modules=["v_proj", "down_proj"]).digest() != saved.digest()

    loaded = BaseLM.load(replace(tiny_config, adapter=str(tmp_path)))
    assert loaded.adapter is not None
    assert loaded.adapter.saved().digest() == saved.digest()
    with pytest.raises(ModelError, match="an adapter already"):
        loaded.adapt(saved)
    lower = BaseLM.load(replace(tiny_config, adapter=str(tmp_path)), num_layers=2)
    assert lower.adapter is None


def test_an_adapter_that_peft_made_is_read(tiny_config: BaseLMConfig, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = AutoModelForCausalLM.from_pretrained(resolve_model(tiny_config).folder, dtype=torch.float32)
    theirs = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "o_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(str(tmp_path))
    lm = BaseLM.load(replace(tiny_config, adapter=str(tmp_path)))
    embeds = some_embeds(lm)
    with torch.no_grad(), lm.adapted():
        assert torch.equal(lm.logits(embeds), theirs.eval()(inputs_embeds=embeds).logits)


def test_modules_that_are_not_there_are_refused_with_those_that_are(tiny_config: BaseLMConfig) -> None:
    for names in (["query"], ["q_proj", "lm_head"], ["embed_tokens"], ["self_attn.q_proj"]):
        listed = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
        with pytest.raises(ConfigError, match=rf"adapter\.target_modules.* have no {names[-1]}; there are {listed}"):
            fresh(tiny_config, target_modules=names)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"rank": -1}, "rank must be 0"),
        ({"alpha": 0}, "alpha must be at least 1"),
        ({"target_modules": []}, "at least one"),
        ({"target_modules": ["q_proj", "q_proj"]}, "different names"),
    ],
)
def test_values_that_cannot_work(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        AdapterConfig(**fields).validate()  # type: ignore[arg-type]


def header(folder: Path, **fields: object) -> None:
    content = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(content | fields))


def weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    found = load_file(folder / WEIGHTS_FILE)
    change(found)
    save_file(found, folder / WEIGHTS_FILE)


FIRST = f"{PEFT_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: (folder / CONFIG_FILE).unlink(), "there is no adapter at .*; give the folder"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "cannot be read .*again"),
        (lambda folder: header(folder, peft_type="IA3"), "no LoRA adapter"),
        (lambda folder: header(folder, use_dora=True), r"more than plain LoRA \(use_dora=True\).*train it without"),
        (lambda folder: header(folder, bias="all"), "bias='all'"),
        (lambda folder: header(folder, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lambda folder: header(folder, invented_later={"x": 1}), "invented_later"),
        (lambda folder: header(folder, target_modules="all-linear"), "a list of names"),
        (lambda folder: header(folder, r=0), "r=0"),
        (lambda folder: header(folder, target_modules=["q_proj"]), "does not fit tiny: 8 of its weights, .*as base_lm"),
        (lambda folder: header(folder, r=4), r"\(2, 64\) and should be \(4, 64\)"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"nothing"), "cannot be read .*again"),
        (lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin"), "can carry code. Save"),
        (lambda folder: weights(folder, lambda found: found.pop(FIRST)), "is missing and should be"),
        (lambda folder: weights(folder, lambda found: found[FIRST].fill_(float("nan"))), "is not finite; take"),
    ],
)
def test_a_folder_that_is_damaged_or_does_not_fit_is_refused(
    tiny_config: BaseLMConfig, tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    learned(tiny_config).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=why):
        BaseLM.load(replace(tiny_config, adapter=str(tmp_path)))


def test_another_models_adapter_is_refused(tiny_config: BaseLMConfig, tmp_path: Path) -> None:
    replace(learned(tiny_config), model_id="larger", model_digest="f" * 64).save(tmp_path)
    with pytest.raises(ModelError, match="was trained in larger .* this model is tiny .* give"):
        BaseLM.load(replace(tiny_config, adapter=str(tmp_path)))
    # Files of other programs do not say which model they are of.
    found = load_file(tmp_path / WEIGHTS_FILE)
    save_file(found, tmp_path / WEIGHTS_FILE, {MODEL_KEY: ""})
    assert BaseLM.load(replace(tiny_config, adapter=str(tmp_path))).adapter is not None
