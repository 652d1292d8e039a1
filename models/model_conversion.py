"""Writes model folders: a GGUF file as safetensors, and the tiny random model of the tests."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ModelError

logger = logging.getLogger("megacontext.models")

GGUF_CONVERSION_VERSION = 1
"""Raise it when a conversion gives other weights or other token ids than before."""

# Llama-family tokenizers whose byte-level BPE first takes every digit on its own. transformers drops this
# step when it reads a GGUF; without it a run of blanks before a number is split differently than in training.
_DIGIT_SPLITTING = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_PLAIN_BYTE_LEVEL = {"", "default", "gpt-2"}

TINY_RECIPE: dict[str, Any] = {
    "version": 1,
    "seed": 1234,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "weight_std": 0.15,
}
"""The tiny model. Its weights are wide enough that context moves its predictions; nothing was trained."""

TINY_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports of transformers inside; errors still raise."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model to `folder` as float32 safetensors + tokenizer.json + config.json.

    Raises:
        ModelError: transformers cannot read the file.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The dequantiser draws a bar that no setting turns off.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{gguf} cannot be converted ({type(error).__name__}: {error}); Llama-like GGUF models work"
        ) from error
    _restore_pre_tokenizer(tokenizer.backend_tokenizer, str(field.contents()) if field else "", gguf)

    # transformers refuses to save a model it marks as quantised; these weights no longer are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    save_file(_untied(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def _untied(state: dict[str, Any]) -> dict[str, Any]:
    """The first name of every storage; a tied head is tied again by the config when loading."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            unique[name] = tensor.contiguous()
    return unique


def _restore_pre_tokenizer(backend: Any, kind: str, gguf: Path) -> None:
    from tokenizers import pre_tokenizers

    if type(backend.pre_tokenizer).__name__ != "ByteLevel":
        return  # SentencePiece-like models need none
    if kind in _DIGIT_SPLITTING:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif kind not in _PLAIN_BYTE_LEVEL:
        logger.warning(
            "%s names the pre-tokenizer %r, which is read as plain byte-level BPE; some text may be split "
            "differently than in training. A folder with the model's own tokenizer.json avoids this",
            gguf.name,
            kind,
        )


def write_tiny(folder: Path) -> None:
    """Write the model of `TINY_RECIPE` and a byte-level tokenizer (256 bytes + 3 specials)."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = TINY_RECIPE
    config = LlamaConfig(
        hidden_size=recipe["hidden_size"],
        intermediate_size=recipe["intermediate_size"],
        num_hidden_layers=recipe["num_hidden_layers"],
        num_attention_heads=recipe["num_attention_heads"],
        num_key_value_heads=recipe["num_key_value_heads"],
        vocab_size=recipe["vocab_size"],
        max_position_embeddings=recipe["max_position_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": recipe["rope_theta"]},
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=None,
    )
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    # Filled by name from numpy's generator: torch's and transformers' ways of initialising may change.
    rng = np.random.Generator(np.random.PCG64(recipe["seed"]))
    weights = {
        name: torch.from_numpy(
            np.ones(shape, np.float32)
            if len(shape) == 1
            else (rng.standard_normal(shape) * recipe["weight_std"]).astype(np.float32)
        )
        for name, shape in sorted(shapes.items())
    }
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _byte_level_tokenizer().save(str(folder / "tokenizer.json"))


def _byte_level_tokenizer() -> Any:
    """Ids 0-255 are the bytes, in order; specials follow."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={c: byte for byte, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in TINY_SPECIAL_TOKENS])
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2): itself where it is
    printable Latin-1, else the next unused code point from 256 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]
