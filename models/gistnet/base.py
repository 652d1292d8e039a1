"""What every GistNet is: one interface for all nets and levels, routing keys, identity, and files.

Shapes: G groups (blocks or nodes) of a call, K = 32 children, m vectors a node, D the LM's hidden size, D_key the
routing keys' size, T = K or K·m entries a group.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.config import TOKENS_PER_BLOCK
from cluster.errors import ModelError
from models.gistnet.key_head import KeyHead
from models.gistnet.lead_in import LeadIn

FORMAT = "megacontext.gistnet"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

RMS_EPSILON = 1e-6

ADDED_LATER = {"key_layer": None, "num_keywords": 0, "key_dim": 0, "key_metric": "whitened", "key_reach": 0}
"""Parts of a specification that older nets do not have: unset, they are in no digest."""


KeyMetric = Literal["whitened", "cosine"]
"""`whitened`: in the metric of how a tree's own keys differ, because untrained ones hardly do. `cosine`: as they are,
which is how trained ones were trained."""


@dataclass(frozen=True)
class GistNetSpec:
    """Everything but the weights; saved as `config.json`."""

    kind: str
    dim: int
    """D: the LM's hidden size, and a gist's."""
    num_vectors: int
    """m."""
    lm_layer: int | None = None
    """The net reads the LM's state after this many layers. None: token embeddings only."""
    key_layer: int | None = None
    """Routing keys are made of the LM's states after this many layers, fewer than `lm_layer`. None: of what the net
    reads."""
    num_heads: int = 0
    """Pooling heads, and attention heads of `block`. 0 for controls."""
    hidden_dim: int = 0
    """Width of the adapter, and of `block`'s transformer. 0 for controls."""
    num_encoder_layers: int = 0
    """Transformer layers of `block`."""
    num_keywords: int = 0
    """Words of its block that each vector of a gist begins as. 0: as the last token."""
    key_dim: int = 0
    """D_key of projected routing keys. 0: keys are as wide as the LM's states."""
    key_metric: KeyMetric = "whitened"
    """Where keys and questions are compared."""
    key_reach: int = 0
    """Tokens right before a block that its routing key is made of, too: what is said of a thing often runs on into the
    block after the one that names it."""

    def __post_init__(self) -> None:
        limits = {  # a forged config must not keep the program busy
            "dim": (self.dim, 1, 2**17),
            "lm_layer": (self.lm_layer or 0, 0, 2**10),
            "key_layer": (self.key_layer or 0, 0, (self.lm_layer or 1) - 1),
            "num_heads": (self.num_heads, 0, 2**10),
            "hidden_dim": (self.hidden_dim, 0, 2**20),
            "num_encoder_layers": (self.num_encoder_layers, 0, 2**8),
            "num_keywords": (self.num_keywords, 0, TOKENS_PER_BLOCK),
            "key_dim": (self.key_dim, 0, self.dim),
            "key_reach": (self.key_reach, 0, TOKENS_PER_BLOCK),
        }
        for name, (value, low, high) in limits.items():
            if type(value) is not int or not low <= value <= high:
                raise ModelError(f"no GistNet can have {name}={value!r}; it is an integer from {low} to {high}")
        if self.num_vectors not in {1, 2, 4}:
            raise ModelError(f"no GistNet can have num_vectors={self.num_vectors!r}; it is 1, 2 or 4")
        if self.key_metric not in get_args(KeyMetric):
            raise ModelError(f"no GistNet can have key_metric={self.key_metric!r}; it is whitened or cosine")


@dataclass(frozen=True)
class GistOutput:
    """What a net makes of G groups; both float32."""

    gists: Float32[Tensor, "G m D"]
    keys: Float32[Tensor, "G D_key"]
    """Routing keys of length 1 (0 for an empty group): gists are for reading, keys for finding."""


@dataclass(frozen=True)
class Entries:
    """The inputs of G groups, padding zeroed."""

    embeddings: Float32[Tensor, "G T D"]
    """Token embeddings, or the children's gists one after another."""
    hidden: Float32[Tensor, "G T D"] | None
    """The LM's states, for blocks of nets that read them."""
    key_states: Float32[Tensor, "G T D"]
    """What routing keys are made of: states of the net's key layer, or embeddings."""
    mask: Bool[Tensor, "G T"]
    """True for entries that are there."""
    last: Int64[Tensor, "G m"]
    """Index of the last entry of each of the m equal sub-spans of a group's real entries."""

    @property
    def last_embeddings(self) -> Float32[Tensor, "G m D"]:
        return take(self.embeddings, self.last)


class GistNet(nn.Module, abc.ABC):
    """Base of all nets; subclasses set `kind` and make gists of `Entries`.

    Works in float32 whatever the LM computes in: it is about 1% of the multiplications of the LM layers
    beneath it, gists are stored with 11 bits or more of mantissa, and bfloat16's 8 would be the coarsest step
    of the chain.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[GistNet]]] = {}

    embedding_mean: Tensor
    hidden_mean: Tensor
    own_key_mean: Tensor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            GistNet.kinds[cls.kind] = cls

    def __init__(self, spec: GistNetSpec) -> None:
        super().__init__()
        self.spec = spec
        # Means of rms-normalised embeddings and states over a corpus, measured when a net is trained. Token
        # vectors of an LM share a large common direction, which would drown what tells blocks apart.
        self.register_buffer("embedding_mean", torch.zeros(spec.dim))
        self.register_buffer("hidden_mean", torch.zeros(spec.dim))
        if spec.key_layer is not None:
            self.register_buffer("own_key_mean", torch.zeros(spec.dim))
        self.key_head = KeyHead(spec.dim, spec.key_dim) if spec.key_dim else None

    @property
    def dim(self) -> int:
        """D: size of a gist's vectors."""
        return self.spec.dim

    @property
    def key_dim(self) -> int:
        """D_key: size of a routing key; unprojected, that of the LM's states."""
        return self.spec.key_dim or self.spec.dim

    @property
    def num_vectors(self) -> int:
        """m: vectors a node."""
        return self.spec.num_vectors

    @property
    def lm_layer(self) -> int | None:
        """Layers of the LM the net wants to have run; None: no LM pass."""
        return self.spec.lm_layer

    @property
    def key_layer(self) -> int | None:
        """Layers of the LM behind the states that routing keys are made of; None: embeddings."""
        return self.lm_layer if self.spec.key_layer is None else self.spec.key_layer

    @property
    def key_mean(self) -> Tensor:
        """Mean of the rms-normalised states that routing keys are made of, (D,)."""
        if self.spec.key_layer is not None:
            return self.own_key_mean
        return self.embedding_mean if self.lm_layer is None else self.hidden_mean

    @property
    def lm_layers(self) -> list[int]:
        """After which layers of the LM the net wants its states; the highest is `lm_layer`."""
        return sorted({layer for layer in (self.key_layer, self.lm_layer) if layer is not None})

    @property
    def net_id(self) -> str:
        """Readable name, for example `windowed-m1-l8`."""
        layer = "" if self.lm_layer is None else f"-l{self.lm_layer}"
        return f"{self.kind}-m{self.num_vectors}{layer}"

    def digest(self) -> str:
        """sha256 hex over the specification and every weight: equal nets, equal digests, in any process."""
        spec = dataclasses.asdict(self.spec)
        for name, unset in ADDED_LATER.items():
            if spec[name] == unset:
                del spec[name]
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, *args: Any, parents: bool = False) -> tuple[Tensor, ...]:
        """Gists and keys of blocks, as `forward_tokens`: what hooks on modules (DeepSpeed's) see.

        Args:
            args: of `forward_tokens`.
            parents: gists and keys of the LOD2 nodes above every 32 blocks, too, in the same call.
        """
        output = self.forward_tokens(*args)
        if not parents:
            return output.gists, output.keys
        children = (part.unflatten(0, (-1, TOKENS_PER_BLOCK)) for part in (output.gists, output.keys))
        above = self.forward_nodes(*children, lod=2)
        return output.gists, output.keys, above.gists, above.keys

    def forward_tokens(
        self,
        embeddings: Float[Tensor, "G K D"],
        lengths: Int64[Tensor, " G"],
        hidden: Float[Tensor, "G K D"] | None = None,
        key_states: Float[Tensor, "G K D"] | None = None,
        before: LeadIn | None = None,
    ) -> GistOutput:
        """Gists and keys of blocks (LOD1).

        Args:
            embeddings: of the block's tokens; whatever stands past its length has no influence.
            lengths: real tokens of each block, 1 … K. 0 (a block that only fills up a batch) gives finite
                values without meaning.
            hidden: the LM's states after `lm_layer` layers; needed unless that is None.
            key_states: the LM's states after `key_layer` layers; needed where that is another layer.
            before: what stands before the blocks, for keys that reach there; None where nothing does, and where keys
                are not wanted.

        Raises:
            ModelError: shapes that do not fit the net, or missing states.
        """
        self._check("embeddings", embeddings, (TOKENS_PER_BLOCK, self.dim))
        if self.lm_layer is None:
            hidden = None
        elif hidden is None:
            raise ModelError(f"{self.net_id} needs the LM's states after {self.lm_layer} layers")
        else:
            self._check("hidden", hidden, (TOKENS_PER_BLOCK, self.dim))
        if self.spec.key_layer is None:
            key_states = None
        elif key_states is None:
            raise ModelError(f"{self.net_id} needs the LM's states after {self.key_layer} layers, for routing keys")
        else:
            self._check("key_states", key_states, (TOKENS_PER_BLOCK, self.dim))
        entries = self._entries(embeddings, lengths, hidden, key_states)
        if before is not None:
            self._check("before", before.states, (self.spec.key_reach, self.dim))
        return GistOutput(self._block_gists(entries), self._block_keys(entries, before))

    def forward_nodes(
        self,
        child_gists: Float[Tensor, "G K m D"],
        child_keys: Float[Tensor, "G K D_key"],
        lod: int,
    ) -> GistOutput:
        """Gists and keys of nodes of level `lod` >= 2 from all their 32 children.

        Raises:
            ModelError: shapes that do not fit the net, or a level below 2.
        """
        if lod < 2:
            raise ModelError(f"nodes with children are of LOD 2 and above, not {lod}")
        self._check("child_gists", child_gists, (TOKENS_PER_BLOCK, self.num_vectors, self.dim))
        self._check("child_keys", child_keys, (TOKENS_PER_BLOCK, self.key_dim))
        num_entries = TOKENS_PER_BLOCK * self.num_vectors
        lengths = torch.full((child_gists.shape[0],), num_entries, device=child_gists.device)
        entries = self._entries(child_gists.flatten(1, 2), lengths, None)
        keys = F.normalize(child_keys.float().mean(dim=1), dim=-1)
        return GistOutput(self._node_gists(entries, lod), keys)

    @abc.abstractmethod
    def _block_gists(self, entries: Entries) -> Float32[Tensor, "G m D"]: ...

    @abc.abstractmethod
    def _node_gists(self, entries: Entries, lod: int) -> Float32[Tensor, "G m D"]: ...

    def key_rows(
        self, states: Float[Tensor, "*G T D"], mask: Bool[Tensor, "*G T"], *, asking: bool = False
    ) -> Float32[Tensor, "*G T D_key"]:
        """What each token adds to a routing key, which is the direction of the sum: of blocks and of questions alike.

        Args:
            states: of the LM after `key_layer` layers; embeddings where that is None.
            mask: True for tokens that are there; the others' rows are zero.
            asking: they are a question's, of which other words may count.
        """
        # Every token counts alike: unnormalised, a window's first token (an attention sink, 8x as long as
        # others in SmolLM2 after 8 layers) would be its block's key.
        centred = masked(rms_normalised(states.float()) - self.key_mean, mask)
        return centred if self.key_head is None else self.key_head(centred, mask, asking=asking)

    def _block_keys(self, entries: Entries, before: LeadIn | None) -> Float32[Tensor, "G D_key"]:
        states, mask = entries.key_states, entries.mask
        if before is not None:
            states, mask = torch.cat([before.states.float(), states], 1), torch.cat([before.mask, mask], 1)
        return F.normalize(self.key_rows(states, mask).sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)

    def _entries(
        self, embeddings: Tensor, lengths: Tensor, hidden: Tensor | None, key_states: Tensor | None = None
    ) -> Entries:
        if lengths.shape != embeddings.shape[:1]:
            raise ModelError(f"lengths {tuple(lengths.shape)} must be (G,) of {tuple(embeddings.shape)}")
        lengths = lengths.clamp(min=1)
        mask = torch.arange(embeddings.shape[1], device=embeddings.device) < lengths[:, None]
        embeddings = masked(embeddings.float(), mask)
        hidden = None if hidden is None else masked(hidden.float(), mask)
        if key_states is None:
            key_states = embeddings if hidden is None else hidden
        else:
            key_states = masked(key_states.float(), mask)
        return Entries(
            embeddings=embeddings,
            hidden=hidden,
            key_states=key_states,
            mask=mask,
            last=last_of_sub_spans(lengths, self.num_vectors),
        )

    def _check(self, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape[1:]) != expected:
            raise ModelError(
                f"{self.net_id} wants {name} of shape (G, {', '.join(map(str, expected))}), not {tuple(tensor.shape)}"
            )

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors` to a folder; each appears whole, the config last.

        Args:
            folder: made where it is missing.
            dtype: of the file, float32 or bfloat16: half the size, and a net whose weights are rounded to 8 bits, with
                a digest of its own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self.spec)}
        save_file(weights, folder / f"{WEIGHTS_FILE}.tmp")
        os.replace(folder / f"{WEIGHTS_FILE}.tmp", folder / WEIGHTS_FILE)
        (folder / f"{CONFIG_FILE}.tmp").write_text(json.dumps(header, indent=2) + "\n")
        os.replace(folder / f"{CONFIG_FILE}.tmp", folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a net that `save` wrote, on the CPU, in float32.

        Raises:
            ModelError: no net there, an unknown kind or format version, or weights that do not fit the
                config; or, called on a subclass, a net of another kind.
        """
        folder = Path(folder).expanduser()
        spec = _read_spec(folder / CONFIG_FILE)
        known = GistNet.kinds.get(spec.kind)
        if known is None:
            raise ModelError(f"{folder}: GistNet kind {spec.kind!r} is unknown; known are {sorted(GistNet.kinds)}")
        if not issubclass(known, cls):
            raise ModelError(f"{folder} holds a {spec.kind!r} net, not a {cls.__name__}")
        try:
            # Built without memory and filled from the file, so that a forged config cannot ask for any.
            with torch.device("meta"):
                net = known(spec)
            weights = load_file(folder / WEIGHTS_FILE)
            floats = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in weights.items()}
            net.load_state_dict(floats, strict=True, assign=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}") from error
        broken = [n for n, t in floats.items() if t.dtype != torch.float32 or not bool(t.isfinite().all())]
        if broken:
            raise ModelError(f"{folder / WEIGHTS_FILE}: {broken[0]!r} is not finite float32 or bfloat16")
        return net.eval()


def _read_spec(path: Path) -> GistNetSpec:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        found = (header.pop("format", None), header.pop("format_version", None))
    except FileNotFoundError as error:
        raise ModelError(f"there is no GistNet at {path.parent}: {path.name} is missing") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise ModelError(
            f"{path} is {found[0]!r} version {found[1]!r}; this program reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    try:
        return GistNetSpec(**header)
    except TypeError as error:
        raise ModelError(f"{path} is no GistNet configuration of version {FORMAT_VERSION}: {error}") from error


def rms_normalised(x: Float32[Tensor, "*batch D"]) -> Float32[Tensor, "*batch D"]:
    """Every vector scaled to a root mean square of 1; zero stays zero."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + RMS_EPSILON)


def masked(x: Float32[Tensor, "G T D"], mask: Bool[Tensor, "G T"]) -> Float32[Tensor, "G T D"]:
    """Zero where the mask is False, even where x is not finite."""
    return torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def take(x: Float32[Tensor, "G T D"], index: Int64[Tensor, "G m"]) -> Float32[Tensor, "G m D"]:
    """The entries of each group at its own indices."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def last_of_sub_spans(lengths: Int64[Tensor, " G"], num_vectors: int) -> Int64[Tensor, "G m"]:
    """Last index of each of m equal sub-spans of 0 … length-1; with length < m some share an entry."""
    upto = torch.arange(1, num_vectors + 1, device=lengths.device)
    return (upto * lengths[:, None] + num_vectors - 1) // num_vectors - 1
