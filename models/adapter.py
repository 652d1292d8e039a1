"""LoRA on the frozen base LM: a few trained weights that adapt how it reads, off unless turned on.

    y = W x + (alpha / rank) B A x        W: frozen, A: (rank, inputs), B: (outputs, rank), at first zero

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3. peft puts A and B beside W; off, a layer is
its stock self, bit for bit. In files an adapter is peft's, so that `peft.PeftModel.from_pretrained` reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.errors import ConfigError, ModelError
from cluster.training_config import AdapterConfig
from models.model_conversion import quiet_transformers
from models.model_files import ModelFiles

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PEFT_PREFIX = "base_model.model."
"""Before the names of a model's modules in peft's files: a `PeftModel` holds the model twice wrapped."""

MODEL_KEY = "megacontext.base_lm"
"""In the weights' metadata: the digest of the model they were trained in."""

# Keys of an adapter_config.json that say where it comes from, or how it was trained; none changes what is read. How it
# began is none of them: some ways (PiSSA, OLoRA) change the model's own weights.
_DESCRIPTIVE_KEYS = {"base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping"}
_TRAINING_KEYS = {"inference_mode", "lora_dropout"}
_OWN_KEYS = {"r", "lora_alpha", "target_modules"}


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """An adapter apart from a model: what its files hold."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    """Names of the linear maps in every layer that have one, in order of the alphabet."""
    model_id: str
    model_digest: str
    """Of the model it was trained in; empty in files of other programs, which do not say."""
    weights: Mapping[str, Tensor]
    """`<module>.lora_A.weight` (rank, inputs) and `<module>.lora_B.weight` (outputs, rank), float32."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight."""
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def digest(self) -> str:
        """sha256 hex over everything that decides what is read."""
        header = [self.rank, float(self.alpha), *self.target_modules]
        digest = hashlib.sha256(json.dumps(header).encode())
        for name, weight in sorted(self.weights.items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def is_like(self, other: SavedAdapter) -> bool:
        """Whether it differs from another in the values of its weights alone."""
        mine, others = ((a.rank, a.alpha, a.target_modules, a.model_digest, a.shapes) for a in (self, other))
        return mine == others

    def check_fits(self, files: ModelFiles) -> None:
        """Compare with a model.

        Raises:
            ModelError: it was trained in another one, or has weights of other names or shapes.
        """
        if self.model_digest not in {"", files.digest}:
            raise ModelError(
                f"the adapter was trained in {self.model_id} (sha256 {self.model_digest[:12]}), this model is "
                f"{files.model_id} (sha256 {files.digest[:12]}); give the model's own adapter, or none, as "
                "base_lm.adapter"
            )
        expected = _shapes(_linears(files), self.rank, self.target_modules)
        if self.shapes != expected:
            wrong = sorted(name for name in {**expected, **self.shapes} if self.shapes.get(name) != expected.get(name))
            first = wrong[0]
            raise ModelError(
                f"the adapter does not fit {files.model_id}: {len(wrong)} of its weights, {first!r} among them, which "
                f"is {self.shapes.get(first, 'missing')} and should be {expected.get(first, 'missing')}; give the "
                "model's own adapter, or none, as base_lm.adapter"
            )

    def peft_config(self) -> Any:
        """As peft wants to know it."""
        from peft import LoraConfig  # imported only where there is an adapter

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it by the rank
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.model_id,
            inference_mode=True,
        )

    def save(self, folder: Path | str) -> None:
        """Write peft's two files to a folder; each appears whole, the configuration last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = {**self.peft_config().to_dict(), "target_modules": list(self.target_modules)}
        named = {f"{PEFT_PREFIX}{name}": weight.contiguous() for name, weight in self.weights.items()}
        save_file(named, folder / f"{WEIGHTS_FILE}.tmp", {"format": "pt", MODEL_KEY: self.model_digest})
        os.replace(folder / f"{WEIGHTS_FILE}.tmp", folder / WEIGHTS_FILE)
        (folder / f"{CONFIG_FILE}.tmp").write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        os.replace(folder / f"{CONFIG_FILE}.tmp", folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: Path | str) -> SavedAdapter:
        """Read what `save` or peft wrote. Nothing but JSON and safetensors is ever opened.

        Raises:
            ModelError: no adapter there, a damaged one, or one that is more than plain LoRA.
        """
        folder = Path(folder).expanduser()
        header = _read_header(folder)
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise ModelError(
                f"{folder} holds no {WEIGHTS_FILE}; other formats are not read because they can carry code. Save the "
                "adapter again with peft, which writes safetensors"
            )
        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get(MODEL_KEY, "")
                weights = {name.removeprefix(PEFT_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); take the adapter from its run's folder again"
            ) from error
        broken = [n for n, w in weights.items() if not w.is_floating_point() or not bool(w.isfinite().all())]
        if broken:
            raise ModelError(f"{path}: {broken[0]!r} is not finite; take the adapter of another checkpoint or run")
        return cls(
            rank=header["r"],
            alpha=header["lora_alpha"],
            target_modules=tuple(sorted(header["target_modules"])),
            model_id=str(header.get("base_model_name_or_path")),
            model_digest=digest,
            weights={name: weight.float() for name, weight in weights.items()},
        )


class LoraAdapter:
    """An adapter in a loaded model, off at first. One reader at a time, as the model itself."""

    def __init__(self, model: nn.Module, saved: SavedAdapter, *, trained: bool) -> None:
        """Put `saved` into `model`, which it fits and which has none.

        Args:
            model: of transformers, with its head.
            saved: copied.
            trained: whether its weights are to get gradients. They stay float32 whatever the model computes in.
        """
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        inject_adapter_in_model(saved.peft_config(), model)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
        self._saved = saved
        self._layers = list(layers.values())
        self._trained = trained
        self.weights = nn.Module()
        """A and B by the names of `SavedAdapter.weights`, and nothing of the model: what is trained and saved. Its
        modules are the ones that peft calls."""
        for name, layer in layers.items():
            place = self.weights
            for part in name.split("."):
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            for matrix in ("lora_A", "lora_B"):
                (only,) = getattr(layer, matrix).values()
                place.add_module(matrix, only)
        # In bfloat16, as peft made them where the model is, steps of training would be rounded away.
        self.weights.float().load_state_dict(dict(saved.weights))
        self._switch(False)

    @property
    def num_weights(self) -> int:
        """Of all matrices."""
        return sum(weight.numel() for weight in self.weights.parameters())

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the model reads with the adapter."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def saved(self) -> SavedAdapter:
        """A copy of its weights as they are now."""
        weights = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.state_dict().items()}
        return dataclasses.replace(self._saved, weights=weights)

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            layer.enable_adapters(on)
        # peft freezes what it turns off, and frees what it turns on. Whoever trains must not see that: weights without
        # a gradient are in no optimiser and no checkpoint.
        self.weights.requires_grad_(self._trained)


def fresh_adapter(files: ModelFiles, config: AdapterConfig) -> SavedAdapter | None:
    """An untrained adapter, which changes nothing: A drawn as peft draws it, B zero. None at rank 0.

    Raises:
        ConfigError: target modules that the model's layers do not have.
        ModelError: the model's configuration cannot be read.
    """
    if config.rank == 0:
        return None
    linears = _linears(files)
    valid = sorted({name.rpartition(".")[2] for name in linears})
    unknown = sorted(set(config.target_modules) - set(valid))
    if unknown:
        raise ConfigError(
            f"adapter.target_modules={config.target_modules}: the layers of {files.model_id} have no "
            f"{', '.join(unknown)}; there are {', '.join(valid)}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    weights = {}
    for name, shape in _shapes(linears, config.rank, config.target_modules).items():
        weights[name] = torch.zeros(shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(weights[name], a=math.sqrt(5), generator=generator)
    targets = tuple(sorted(config.target_modules))
    return SavedAdapter(config.rank, config.alpha, targets, files.model_id, files.digest, weights)


def _linears(files: ModelFiles) -> dict[str, nn.Linear]:
    """The linear maps in a model's layers, by their names in it; no weight is loaded."""
    try:
        with quiet_transformers(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.folder))
        inside = set(model.get_decoder().layers.modules())
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{files.model_id} takes no adapter ({type(error).__name__}: {error})") from error
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part in inside}


def _shapes(
    linears: Mapping[str, nn.Linear], rank: int, target_modules: list[str] | tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Of an adapter's weights, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in linears.items():
        if name.rpartition(".")[2] in target_modules:
            shapes[f"{name}.lora_A.weight"] = (rank, linear.in_features)
            shapes[f"{name}.lora_B.weight"] = (linear.out_features, rank)
    return shapes


def _read_header(folder: Path) -> dict[str, Any]:
    """An adapter_config.json that describes plain LoRA."""
    path = folder / CONFIG_FILE
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no adapter at {folder}: {CONFIG_FILE} is missing; give the folder `adapter` of a run of "
            "`train gistnet` that trained one"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); take the adapter from its run's folder again") from error
    if not isinstance(header, dict) or header.get("peft_type") != "LORA":
        raise ModelError(f"{path} describes no LoRA adapter of peft; other kinds are not supported")
    rank, alpha, targets = (header.get(key) for key in ("r", "lora_alpha", "target_modules"))
    sound = isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float) and isinstance(targets, list)
    if not sound or not targets or not all(isinstance(name, str) for name in targets):
        raise ModelError(
            f"{path}: r={rank!r}, lora_alpha={alpha!r}, target_modules={targets!r} must be a positive integer, a "
            "number and a list of names"
        )
    from peft import LoraConfig

    plain = {key: value for key, value in LoraConfig().to_dict().items() if value}
    ignored = _DESCRIPTIVE_KEYS | _TRAINING_KEYS | _OWN_KEYS
    # What another version of peft knows besides counts where it is set.
    special = {key: value for key, value in header.items() if key not in ignored and value and value != plain.get(key)}
    if special:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(special.items()))
        raise ModelError(f"{path} is more than plain LoRA ({listed}), which is not supported; train it without")
    return header
