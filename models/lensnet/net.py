"""LensNet: a non-causal ranker of a set of candidates.

Each candidate is a vector of signals (`features`) and a few directions of its routing key; candidates look at each
other, so that what one says already counts less in another; out comes one signed, bounded score each: by how many nats
a token of what follows would be predicted better for showing it, or worse for giving it up where it is shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.errors import ModelError
from models.lensnet.features import FEATURES, CandidateSet

FORMAT, FORMAT_VERSION = "megacontext-lensnet", 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TRAINED_WITH = "trained_with"
"""Key of the config that holds `LensNet.trained_with`; a net without it is taken as it is."""


@dataclass(frozen=True)
class LensNetSpec:
    """Everything the net's shape depends on."""

    features: tuple[str, ...] = tuple(FEATURES)
    """What it is told, by name; an ablation leaves some out."""
    key_dim: int = 0
    """Of the routing keys it sees beside the features; 0: none."""
    key_directions: int = 16
    """Learned directions of the keys."""
    hidden_dim: int = 64
    num_layers: int = 2
    """Of attention among the candidates; 0 scores each by itself."""
    num_heads: int = 4
    dropout: float = 0.1
    """While it is trained."""
    max_score: float = 0.5
    """Bound of a score, nats a token."""

    def __post_init__(self) -> None:
        """Refuse what makes no net.

        Raises:
            ModelError: unknown features, or sizes that do not fit.
        """
        if unknown := [name for name in self.features if name not in FEATURES]:
            raise ModelError(f"LensNet knows no feature {unknown[0]!r}; there are: {', '.join(FEATURES)}")
        if not self.features or len(set(self.features)) != len(self.features):
            raise ModelError("a LensNet needs features, each once")
        if self.hidden_dim < 1 or self.num_heads < 1 or self.hidden_dim % self.num_heads:
            raise ModelError(f"hidden_dim={self.hidden_dim} must be a multiple of num_heads={self.num_heads}")
        if min(self.key_dim, self.num_layers) < 0 or self.key_directions < 1:
            raise ModelError("key_dim and num_layers must be 0 or more, key_directions at least 1")
        if self.max_score <= 0 or not 0 <= self.dropout < 1:
            raise ModelError("max_score must be positive, dropout from 0 to below 1")


class LensNet(nn.Module):
    """Scores candidates. Before training every score is 0: nothing is worth showing rather than the newest tokens."""

    feature_mean: Tensor
    feature_scale: Tensor
    trained_with: Mapping[str, str]
    """Digests of the models its labels were made with, by what they are (`base_lm`, `gistnet`, ...); empty: unknown."""

    def __init__(self, spec: LensNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.trained_with = {}
        names = list(FEATURES)
        self._columns = [names.index(name) for name in spec.features]
        self.register_buffer("feature_mean", torch.zeros(len(spec.features)))
        self.register_buffer("feature_scale", torch.ones(len(spec.features)))
        width = spec.hidden_dim
        self.read_features = nn.Linear(len(spec.features), width)
        if spec.key_dim:
            self.read_key = nn.Linear(spec.key_dim, spec.key_directions, bias=False)
            # Where a candidate and the question point the same way, direction by direction, and where it points.
            self.read_match = nn.Linear(2 * spec.key_directions, width, bias=False)
        self.mix = nn.Sequential(nn.GELU(), nn.Dropout(spec.dropout), nn.Linear(width, width))
        self.attend = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, spec.num_heads, 2 * width, spec.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(spec.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(
        self,
        features: Float[Tensor, "sets n F"],
        keys: Float[Tensor, "sets n D_key"],
        query: Float[Tensor, "sets D_key"],
        there: Bool[Tensor, "sets n"],
    ) -> Float32[Tensor, "sets n"]:
        """Scores, nats a token, within `max_score` of 0; 0 where nothing is.

        Args:
            features: all columns of `FEATURES`, whatever the net is told of them.
            keys, query: of `CandidateSet`; not looked at without `key_dim`.
            there: False for what only fills a set up; it has no influence.

        Raises:
            ModelError: shapes that do not fit the net.
        """
        spec = self.spec
        if features.shape[-1] != len(FEATURES):
            raise ModelError(f"a LensNet is told {len(FEATURES)} features of a candidate, not {features.shape[-1]}")
        if spec.key_dim and keys.shape[-1] != spec.key_dim:
            raise ModelError(f"this LensNet reads keys of {spec.key_dim} dimensions, not {keys.shape[-1]}")
        told = (features[..., self._columns].float() - self.feature_mean) / self.feature_scale
        # What is beyond anything the net was trained on says no more than the edge of that.
        x = self.read_features(told.clamp(-5.0, 5.0))
        if spec.key_dim:
            own, asked = self.read_key(keys.float()), self.read_key(query.float())[:, None]
            x = x + self.read_match(torch.cat([own, own * asked * spec.key_directions], dim=-1))
        x = x + self.mix(x)
        # A set with nothing in it still needs something to attend to.
        hidden = ~there & there.any(dim=1, keepdim=True)
        for layer in self.attend:
            x = layer(x, src_key_padding_mask=hidden)
        scores = spec.max_score * torch.tanh(self.score(self.norm(x))[..., 0] / spec.max_score)
        return torch.where(there, scores, torch.zeros((), device=scores.device))

    @torch.no_grad()
    def measure(self, features: Float32[np.ndarray, "n F"]) -> None:
        """Take mean and spread of candidates' features as those to standardise by."""
        told = torch.from_numpy(features[:, self._columns])
        self.feature_mean.copy_(told.mean(dim=0))
        # A feature that never changes says nothing; divided by nearly 0 it would, once it does.
        spread = told.std(dim=0, unbiased=False)
        self.feature_scale.copy_(torch.where(spread > 1e-3, spread, torch.ones(())))

    @torch.inference_mode()
    def scores(self, candidates: CandidateSet) -> Float32[np.ndarray, " n"]:
        """Of one set; empty for an empty one."""
        if len(candidates) == 0:
            return np.empty(0, np.float32)
        device = self.feature_mean.device
        return (
            self(
                torch.tensor(candidates.features, device=device)[None],
                torch.tensor(candidates.keys, device=device)[None],
                torch.tensor(candidates.query, device=device)[None],
                torch.ones(1, len(candidates), dtype=torch.bool, device=device),
            )[0]
            .cpu()
            .numpy()
        )

    def digest(self) -> str:
        """Of shape and weights: equal for equal nets."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.spec), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def save(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors` to a folder; each appears whole, the config last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self.spec)}
        header[TRAINED_WITH] = dict(self.trained_with)
        save_file(weights, folder / f"{WEIGHTS_FILE}.tmp")
        os.replace(folder / f"{WEIGHTS_FILE}.tmp", folder / WEIGHTS_FILE)
        (folder / f"{CONFIG_FILE}.tmp").write_text(json.dumps(header, indent=2) + "\n")
        os.replace(folder / f"{CONFIG_FILE}.tmp", folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a net that `save` wrote, on the CPU.

        Raises:
            ModelError: no net there, another format, or weights that do not fit the config or are not finite.
        """
        folder = Path(folder).expanduser()
        spec, trained_with = _read_config(folder / CONFIG_FILE)
        try:
            # Built without memory and filled from the file, so that a forged config cannot ask for any.
            with torch.device("meta"):
                net = cls(spec)
            weights = load_file(folder / WEIGHTS_FILE)
            net.load_state_dict(weights, strict=True, assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}") from error
        if broken := [n for n, t in weights.items() if t.dtype != torch.float32 or not bool(t.isfinite().all())]:
            raise ModelError(f"{folder / WEIGHTS_FILE}: {broken[0]!r} is not finite float32")
        net.trained_with = trained_with
        return net.eval()


def require_models(net: LensNet, folder: Path | str, digests: Mapping[str, str], key_dim: int) -> None:
    """Refuse a net whose signals would mean something else: scores of another model's gains, other keys and gists.

    Args:
        digests: of the models that a context was made with, by the names of `LensNet.trained_with`.
        key_dim: of the context's routing keys.

    Raises:
        ModelError: naming the model that differs, or both widths of keys.
    """
    for what, trained in net.trained_with.items():
        if digests.get(what, trained) != trained:
            raise ModelError(
                f"the LensNet in {folder} was trained with another {what} ({trained[:12]}) than the context's "
                f"({digests[what][:12]}): take a context that was compacted with that one, or train a LensNet on "
                "labels of this one (`ray_job.py label`, `train lensnet`)"
            )
    if net.spec.key_dim not in {0, key_dim}:
        raise ModelError(
            f"the LensNet in {folder} reads keys of {net.spec.key_dim} dimensions, the context has {key_dim}; train "
            "one on labels of this GistNet"
        )


def packaged_lensnet(digests: Mapping[str, str]) -> Path | None:
    """Folder of the net that comes along for these models, as in `require_models`; None where there is none."""
    for path in sorted((Path(__file__).parents[1] / "packaged").glob(f"lensnet-*/{CONFIG_FILE}")):
        _, trained_with = _read_config(path)
        if trained_with and all(digests.get(what) == digest for what, digest in trained_with.items()):
            return path.parent
    return None


def untrained_lensnet(spec: LensNetSpec, seed: int = 0) -> LensNet:
    """The same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LensNet(spec).eval()


def padded(sets: Sequence[CandidateSet]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sets of different sizes as the arguments of one call of a net."""
    longest = max(len(candidates) for candidates in sets)
    there = torch.zeros(len(sets), longest, dtype=torch.bool)
    features = torch.zeros(len(sets), longest, sets[0].features.shape[1])
    keys = torch.zeros(len(sets), longest, sets[0].keys.shape[1])
    for row, candidates in enumerate(sets):
        n = len(candidates)
        there[row, :n] = True
        # Copied: what came from another process may not be written to, and torch would complain.
        features[row, :n] = torch.tensor(candidates.features)
        keys[row, :n] = torch.tensor(candidates.keys)
    return features, keys, torch.stack([torch.tensor(candidates.query) for candidates in sets]), there


def _read_config(path: Path) -> tuple[LensNetSpec, dict[str, str]]:
    """What a net's shape depends on, and what it was trained with."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        found = (header.pop("format", None), header.pop("format_version", None))
        header["features"] = tuple(header["features"])
        trained_with = {str(what): str(digest) for what, digest in header.pop(TRAINED_WITH, {}).items()}
    except FileNotFoundError as error:
        raise ModelError(f"there is no LensNet at {path.parent}: {path.name} is missing") from error
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ModelError(
            f"{path} is {found[0]!r} version {found[1]!r}; this program reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    try:
        return LensNetSpec(**header), trained_with
    except TypeError as error:
        raise ModelError(f"{path} is no LensNet configuration of version {FORMAT_VERSION}: {error}") from error
