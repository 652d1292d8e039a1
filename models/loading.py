"""From a local folder to a frozen Hugging Face model on a device."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from cluster.errors import ModelError
from models.model_conversion import quiet_transformers
from models.model_files import ModelFiles


def load_frozen(files: ModelFiles, num_layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """The whole model with its head, or its `num_layers` lowest layers alone; nothing of it is trained.

    Raises:
        ModelError: it cannot be loaded.
    """
    # SDPA takes boolean masks and is exact; other attention kernels are not always installed.
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    try:
        with quiet_transformers():
            if num_layers is None:
                model: Any = AutoModelForCausalLM.from_pretrained(files.folder, **options)
            else:
                truncated = AutoConfig.from_pretrained(files.folder)
                truncated.num_hidden_layers = num_layers
                if getattr(truncated, "layer_types", None):
                    truncated.layer_types = truncated.layer_types[:num_layers]
                model = AutoModel.from_pretrained(files.folder, config=truncated, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the model in {files.folder} cannot be loaded ({type(error).__name__}: {error}); if it is a "
            "converted one, delete the folder and run again"
        ) from error
    return model.eval().requires_grad_(False).to(device)


def require_plain_head(model: Any, head: nn.Module, embeds: Float[Tensor, "1 T D"]) -> None:
    """Refuse models that change logits after the head (soft caps, scales): NLL made of the head alone would not.

    Args:
        model: the whole of it.
        head: its output embeddings.
        embeds: of any tokens.

    Raises:
        ModelError: naming the model's class.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        with torch.inference_mode():
            logits = model(inputs_embeds=embeds).logits
    finally:
        handle.remove()
    if len(seen) != 1 or not torch.equal(seen[0], logits):
        raise ModelError(
            f"{model.name_or_path} ({type(model).__name__}) does not take its logits straight from its head; such "
            "models are not supported"
        )


def find_device(name: str) -> torch.device:
    """The device of that name; `auto`: the GPU where there is one.

    Raises:
        ModelError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"base_lm.device={name!r} is no device; give auto, cpu or cuda[:n]") from error
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ModelError(
            f"base_lm.device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto"
        )
    return device
