"""One adapter over Hugging Face causal LMs: embeddings at explicit positions in, logits, NLL or states out.

Shapes: B rows, T entries of a call, S entries in all (cached ones included), D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from cluster.config import BaseLMConfig
from cluster.errors import ModelError
from models.adapter import LoraAdapter, SavedAdapter
from models.banded_attention import ATTENTION_NAME as BANDED_ATTENTION
from models.banded_attention import BandedMask
from models.dtype_choice import PROBE_TEXT, PROBE_TOKENS, DtypeChoice, measure_dtypes
from models.kv_cache import KVCache
from models.loading import find_device, load_frozen, require_plain_head
from models.model_files import TOKENIZER_FILE, ModelFiles, resolve_model
from models.positions import Positions
from models.rotary import install_rotary_override
from models.shared_past import ATTENTION_NAME as SHARED_PAST_ATTENTION
from models.shared_past import SharedPast
from models.tiled_attention import ATTENTION_NAME as TILED_ATTENTION
from models.tiled_attention import takes_tiles
from models.tokenizer import Tokenizer

logger = logging.getLogger("megacontext.models")

HEAD_CHUNK_ENTRIES = 256
"""Entries whose logits exist at one time in `nll`: 50 MB in float32 at a vocabulary of 49,152."""

IGNORED_TARGET = -100

AnyPositions = Int64[Tensor, "B T"] | Positions
AnyMask = Bool[Tensor, "B S"] | Int64[Tensor, "B S"] | Bool[Tensor, "B 1 T S"] | Float[Tensor, "B 1 T S"] | BandedMask

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _EnoughLayers(Exception):
    """Ends a forward whose remaining layers nobody asked for."""


class BaseLM:
    """A frozen causal language model. Not for concurrent calls: explicit positions are set on the model.

    Gradients flow to the embeddings that are put in (never to the weights) unless the caller turns them off.
    """

    def __init__(self, model: Any, files: ModelFiles, *, has_head: bool) -> None:
        """Wrap a loaded model; use `load`."""
        self.files = files
        self.model_id = files.model_id
        self.digest = files.digest
        self.hidden_size = files.hidden_size
        self.vocab_size = files.vocab_size
        self.trained_context = files.trained_context
        self.has_head = has_head
        self.dtype_choice: DtypeChoice | None = None
        """The measurement behind `dtype`, where it was `auto`."""
        self.adapter: LoraAdapter | None = None
        """What `adapt` put in."""

        self._model = model
        self._stack: Any = model.get_decoder() if has_head else model
        layers = getattr(self._stack, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ModelError(f"{files.model_id} ({type(model).__name__}) is not built like Llama: no stack of layers")
        self._layers = layers
        self._takes_tiles = takes_tiles(self._stack.config, layers)
        self._head: nn.Module | None = model.get_output_embeddings() if has_head else None
        self._rotary = install_rotary_override(self._stack, self.model_id)

    @classmethod
    def load(cls, config: BaseLMConfig, *, num_layers: int | None = None) -> BaseLM:
        """Load a model, converting it first where needed.

        Args:
            num_layers: load only the embeddings and this many of the lowest layers (no head): all that a
                compaction worker needs. None: everything.

        Raises:
            ModelError: a missing or damaged model, an unsupported architecture, a device that is not there,
                more layers than the model has; or an adapter that is damaged or of another model.
        """
        files = resolve_model(config)
        device = find_device(config.device)
        if num_layers is not None and not 0 <= num_layers <= files.num_layers:
            raise ModelError(f"{files.model_id} has {files.num_layers} layers; {num_layers} were asked for")
        if config.dtype == "auto":
            lm = cls._load_fastest(files, num_layers, device)
        else:
            lm = cls._load(files, num_layers, _DTYPES[config.dtype], device)
        if config.adapter and lm.has_head:
            lm.adapt(SavedAdapter.load(config.adapter))
        return lm

    @classmethod
    def _load_fastest(cls, files: ModelFiles, num_layers: int | None, device: torch.device) -> BaseLM:
        """In the dtype that measures best."""
        lm = cls._load(files, num_layers, torch.float32, device)
        probe_ids = Tokenizer(files.folder / TOKENIZER_FILE).encode(PROBE_TEXT)[:PROBE_TOKENS]
        choice = measure_dtypes(lm, torch.from_numpy(probe_ids.astype("int64"))[None].to(device))
        if choice.dtype == "float32":
            lm = cls._load(files, num_layers, torch.float32, device)
        lm.dtype_choice = choice
        logger.info("%s computes in %s", files.model_id, choice)
        return lm

    @classmethod
    def _load(cls, files: ModelFiles, num_layers: int | None, dtype: torch.dtype, device: torch.device) -> BaseLM:
        model = load_frozen(files, num_layers, dtype, device)
        lm = cls(model, files, has_head=num_layers is None)
        if lm.has_head:
            require_plain_head(model, lm._require_head(), lm.embed(torch.arange(2, device=device)[None]))
        return lm

    @property
    def num_layers(self) -> int:
        """Layers loaded."""
        return len(self._layers)

    @property
    def num_layer_weights(self) -> int:
        """Weights of the loaded layers' own matrices; an adapter's do not count."""
        matrices = sum(p.numel() for layer in self._layers for p in layer.parameters() if p.dim() >= 2)
        return matrices - (0 if self.adapter is None else self.adapter.num_weights)

    @property
    def attention_width(self) -> int:
        """Query heads times their size."""
        config = self._stack.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads * head_size

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype, also of the embeddings."""
        return self._embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """sha256 hex of the model's tokenizer."""
        return Tokenizer(self.files.folder / TOKENIZER_FILE).digest

    @property
    def _embedding(self) -> nn.Embedding:
        return self._stack.get_input_embeddings()

    def cast_parameters(self, dtype: torch.dtype) -> None:
        """Convert the weights in place. The rotary frequencies (buffers) and an adapter must stay float32."""
        kept = set() if self.adapter is None else set(self.adapter.weights.parameters())
        for parameter in self._model.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.to(dtype)

    def adapt(self, saved: SavedAdapter, *, trained: bool = False) -> None:
        """Put an adapter in: nothing changes but what is read inside `adapted`.

        Args:
            saved: copied.
            trained: whether its weights are to get gradients.

        Raises:
            ModelError: it is another model's, there is one already, or no head.
        """
        self._require_head()
        if self.adapter is not None:
            raise ModelError(f"{self.model_id} has an adapter already")
        saved.check_fits(self.files)
        self.adapter = LoraAdapter(self._model, saved, trained=trained)

    def adapted(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model reads with its adapter; one without reads as always."""
        return contextlib.nullcontext() if self.adapter is None else self.adapter.on()

    def embed(self, ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Embeddings of token ids, in the model's dtype."""
        return self._embedding(ids)

    def new_cache(self, origin_half_tokens: int | None = None) -> KVCache:
        """An empty KV cache for `logits` and `nll`; with an explicit origin where caches are to be joined."""
        return KVCache(DynamicCache(), origin_half_tokens)

    def logits(
        self,
        embeds: Float[Tensor, "B T D"],
        *,
        positions: AnyPositions | None = None,
        attention_mask: AnyMask | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "B T V"]:
        """Next-token logits in the model's dtype, (B, T, V), or (B, 1, V) of the last entry with `last_only`.

        Args:
            embeds: embeddings of tokens, gists, or anything between.
            positions: int64 token indices, or `Positions`. None: 0, 1, 2, … (continuing the cache's).
            attention_mask: (B, S) with 1 for entries that may be seen and 0 for padding, on top of causality;
                or (B, 1, T, S), boolean (True: may be seen) or additive, which replaces causality; or a `BandedMask`,
                which replaces it, too.
            cache: read and extended in place. Incremental calls give what one full call gives.

        Raises:
            ModelError: wrong shapes, no head loaded, or positions the architecture does not take.
        """
        hidden = self._run(embeds, positions, attention_mask, cache)
        return self._require_head()(hidden[:, -1:] if last_only else hidden)

    def read(self, embeds: Float[Tensor, "B T D"], *, positions: AnyPositions | None = None, cache: KVCache) -> None:
        """Extend a cache by these entries and predict nothing. Arguments and errors as of `logits`."""
        self._run(embeds, positions, None, cache)

    def nll(
        self,
        embeds: Float[Tensor, "B T D"],
        targets: Int64[Tensor, "B T"],
        *,
        positions: AnyPositions | None = None,
        attention_mask: AnyMask | None = None,
        cache: KVCache | SharedPast | None = None,
        start: int = 0,
    ) -> Float32[Tensor, "B T_scored"]:
        """Negative log-likelihood in nats of each target, (B, T - start) float32.

        Args:
            targets: `targets[:, t]` is the id predicted AT entry t, that is the token that comes after it:
                for a raw sequence `ids`, embed `ids[:, :-1]` and give `ids[:, 1:]`. -100 is not scored and
                gives 0.
            cache: as in `logits`; or a past that all rows share, which stays as it is.
            start: first entry that is scored; the ones before it are only read.

        Raises:
            ModelError: as `logits`.
        """
        if targets.shape != embeds.shape[:2]:
            raise ModelError(f"targets {tuple(targets.shape)} must be (B, T) of embeds {tuple(embeds.shape)}")
        head = self._require_head()
        hidden = self._run(embeds, positions, attention_mask, cache)[:, start:]
        targets = targets[:, start:]

        def score(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
            # Not F.cross_entropy: its float32 sum over a large vocabulary is off by up to 1e-4 nats, all in
            # one direction; logsumexp's is good to 1e-6.
            scored = target_chunk != IGNORED_TARGET
            logits = head(hidden_chunk[scored]).float()  # (scored, V): nothing is spent on the others
            chosen = logits.gather(-1, target_chunk[scored][:, None])[:, 0]
            nll = logits.new_zeros(target_chunk.shape)
            nll[scored] = logits.logsumexp(-1) - chosen
            return nll

        chunks = []
        for first in range(0, hidden.shape[1], HEAD_CHUNK_ENTRIES):
            part = slice(first, first + HEAD_CHUNK_ENTRIES)
            if hidden.requires_grad:  # or the backward pass would keep every chunk's logits
                chunk = checkpoint(score, hidden[:, part], targets[:, part], use_reentrant=False)
                assert isinstance(chunk, Tensor)
                chunks.append(chunk)
            else:
                chunks.append(score(hidden[:, part], targets[:, part]))
        return torch.cat(chunks, dim=1) if chunks else hidden.new_zeros(targets.shape, dtype=torch.float32)

    def hidden_states(
        self,
        embeds: Float[Tensor, "B T D"],
        layers: Sequence[int],
        *,
        positions: AnyPositions | None = None,
        attention_mask: AnyMask | None = None,
        cache: KVCache | None = None,
    ) -> dict[int, Float[Tensor, "B T D"]]:
        """States after n layers for each n in `layers` (0: the embeddings), before any final norm.

        The forward pass ends after the highest one asked for.

        Args:
            cache: as in `logits`, extended in the layers that run: for calls that ask for the same highest one.

        Raises:
            ModelError: a layer that is not loaded, or as `logits`.
        """
        self._require_layers(layers)
        states: dict[int, Tensor] = {}
        if 0 in layers:
            states[0] = embeds.to(self.dtype)
        if max(layers) > 0:
            with self._kept_states(layers, states, stop_after=max(layers)), contextlib.suppress(_EnoughLayers):
                self._run(embeds, positions, attention_mask, cache)
        return states

    def final_states(
        self,
        embeds: Float[Tensor, "B T D"],
        *,
        positions: AnyPositions | None = None,
        attention_mask: AnyMask | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[Float[Tensor, "B T D"], dict[int, Float[Tensor, "B T D"]]]:
        """What the head makes logits of, and on the way the states after some layers, as `hidden_states`.

        Raises:
            ModelError: no head loaded, a layer that is not there, or as `logits`.
        """
        self._require_head()
        states: dict[int, Tensor] = {}
        if layers:
            self._require_layers(layers)
        if 0 in layers:
            states[0] = embeds.to(self.dtype)
        with self._kept_states(layers, states):
            return self._run(embeds, positions, attention_mask, None), states

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """The head as a matrix: logits are `final states @ head_weight.T`.

        Raises:
            ModelError: no head loaded, or one with a bias.
        """
        head = self._require_head()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ModelError(f"{self.model_id} has a head ({head}) that is more than one matrix")
        return head.weight

    def _require_layers(self, layers: Sequence[int]) -> None:
        if not layers or any(not 0 <= n <= self.num_layers for n in layers):
            raise ModelError(
                f"hidden states after layers {list(layers)} were asked for; {self.model_id} is loaded with "
                f"{self.num_layers} of {self.files.num_layers} layers"
            )

    @contextlib.contextmanager
    def _kept_states(
        self, layers: Sequence[int], states: dict[int, Tensor], stop_after: int | None = None
    ) -> Iterator[None]:
        """While a forward pass runs, keep the states after `layers`, and end it after one of them."""

        def keep(num_layers: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                states[num_layers] = output[0] if isinstance(output, tuple) else output
                if num_layers == stop_after:
                    raise _EnoughLayers

            return hook

        handles = [self._layers[n - 1].register_forward_hook(keep(n)) for n in set(layers) if n > 0]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(
        self,
        embeds: Tensor,
        positions: AnyPositions | None,
        attention_mask: AnyMask | None,
        cache: KVCache | SharedPast | None,
    ) -> Tensor:
        """The stack's output after its final norm, (B, T, D)."""
        if isinstance(cache, SharedPast):
            return self._run_after(cache, embeds, positions, attention_mask)
        if embeds.dim() != 3 or embeds.shape[-1] != self.hidden_size:
            raise ModelError(f"embeds must be (B, T, {self.hidden_size}), not {tuple(embeds.shape)}")
        if isinstance(attention_mask, BandedMask):
            if cache is not None:
                raise ModelError("a banded mask takes no cache")
            return self._run_within(attention_mask, embeds, positions)
        tiled = attention_mask is None and self._gains_from_tiles(embeds)
        attending = self._attending_by(TILED_ATTENTION) if tiled else contextlib.nullcontext()
        with self._at(positions, embeds, cache), attending:
            output = self._stack(
                inputs_embeds=embeds.to(self.dtype),
                attention_mask=self._mask(attention_mask, embeds.shape[1], cache),
                past_key_values=None if cache is None else cache.layers,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def _run_after(
        self, past: SharedPast, embeds: Tensor, positions: AnyPositions | None, attention_mask: AnyMask | None
    ) -> Tensor:
        """`_run` of rows that share a past."""
        if positions is None or attention_mask is not None:
            raise ModelError("rows that share a past need positions, and take no mask")
        if isinstance(positions, Tensor):
            positions = Positions.of_tokens(positions)
        if isinstance(self._rotary, ModelError):
            raise self._rotary
        origin = past.origin(embeds.shape[0], embeds.device)
        phases = self._rotary.phases(positions.to(embeds.device), origin, self.dtype)
        with self._rotary.using(*phases), self._attending_by(SHARED_PAST_ATTENTION):
            output = self._stack(inputs_embeds=embeds.to(self.dtype), use_cache=False, shared_past=past)
        return output.last_hidden_state

    def _run_within(self, mask: BandedMask, embeds: Tensor, positions: AnyPositions | None) -> Tensor:
        """`_run` of entries that see summaries and neighbours only."""
        if (len(mask.back), mask.num_entries) != tuple(embeds.shape[:2]):
            raise ModelError(
                f"a banded mask of {len(mask.back)} rows of {mask.num_entries} entries is not of embeds "
                f"{tuple(embeds.shape)}"
            )
        mask = mask.to(self.device)
        with self._at(positions, embeds, None), self._attending_by(BANDED_ATTENTION):
            bands = (mask, mask.of_blocks())
            output = self._stack(inputs_embeds=embeds.to(self.dtype), use_cache=False, bands=bands)
        return output.last_hidden_state

    def _gains_from_tiles(self, embeds: Tensor) -> bool:
        """Whether attention by plain products is faster here: bfloat16 on some CPUs, several entries, no gradients."""
        on_cpu = self.device.type == "cpu" and self.dtype == torch.bfloat16
        no_gradients = not (torch.is_grad_enabled() and embeds.requires_grad)
        return self._takes_tiles and on_cpu and embeds.shape[1] > 1 and no_gradients

    @contextlib.contextmanager
    def _attending_by(self, name: str) -> Iterator[None]:
        """While a forward pass runs, attention by a function of our own."""
        config = self._stack.config
        usual, config._attn_implementation = config._attn_implementation, name
        try:
            yield
        finally:
            config._attn_implementation = usual

    def _at(
        self, positions: AnyPositions | None, embeds: Tensor, cache: KVCache | None
    ) -> contextlib.AbstractContextManager[None]:
        """The rotary override of one call."""
        if isinstance(positions, Tensor):
            positions = Positions.of_tokens(positions)
        if positions is None:
            if cache is not None:
                cache.origin(None, embeds.shape[0], embeds.device)
            return contextlib.nullcontext()
        if isinstance(self._rotary, ModelError):
            raise self._rotary
        positions = positions.to(embeds.device)
        half_tokens = positions.half_tokens
        if half_tokens.shape != embeds.shape[:2]:
            raise ModelError(f"positions {tuple(half_tokens.shape)} must be (B, T) of {tuple(embeds.shape)}")
        origin = half_tokens.amin(dim=1)
        if cache is not None:
            origin = cache.origin(positions, embeds.shape[0], embeds.device)
        return self._rotary.using(*self._rotary.phases(positions, origin, self.dtype))

    def _mask(self, mask: AnyMask | None, num_entries: int, cache: KVCache | None) -> Tensor | None:
        if mask is None:
            return None
        assert isinstance(mask, Tensor)
        num_seen = num_entries + (cache.num_entries if cache is not None else 0)
        expected = (num_seen,) if mask.dim() == 2 else (1, num_entries, num_seen)
        if mask.dim() not in {2, 4} or tuple(mask.shape[1:]) != expected:
            raise ModelError(
                f"attention_mask {tuple(mask.shape)} must be (B, {num_seen}) or (B, 1, {num_entries}, {num_seen})"
            )
        if mask.dim() == 4 and mask.dtype != torch.bool:
            mask = mask.to(self.dtype)
        return mask.to(self.device)

    def _require_head(self) -> nn.Module:
        if self._head is None:
            raise ModelError(
                f"{self.model_id} was loaded with its {self.num_layers} lowest layers only and predicts nothing; "
                "load it without num_layers"
            )
        return self._head


def choose_dtype(config: BaseLMConfig, *, num_layers: int | None = None) -> DtypeChoice:
    """Measure which dtype `config.source` should compute in here, whatever `config.dtype` says.

    A driver decides once and gives `dataclasses.replace(config, dtype=choice.dtype)` to its workers: each of
    them measuring for itself could choose differently, and gists of two dtypes are not bit-identical.

    Raises:
        ModelError: as `BaseLM.load`.
    """
    choice = BaseLM.load(dataclasses.replace(config, dtype="auto"), num_layers=num_layers).dtype_choice
    assert choice is not None
    return choice
