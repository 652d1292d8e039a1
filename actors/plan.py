"""What a compaction will do, decided and checked before any resource is asked for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal

from actors.compactor import CompactorSpec, encoding_of, explicit_dtype
from cluster.config import AUTO_GISTNET, BaseLMConfig, CompactionConfig, GistNetConfig, StoreConfig
from cluster.errors import ContextNotFoundError
from models.base_lm import choose_dtype
from models.gistnet import GistNet, build_gistnet, packaged_gistnet
from models.model_files import ModelFiles, resolve_model
from models.tokenizer import Tokenizer
from storage.corpus import CorpusSource
from storage.schema import Encoding, TreeIdentity, check_same
from storage.store import Store, check_disk_space

logger = logging.getLogger("megacontext.compaction")

BYTES_PER_TOKEN = 4.0
"""Of source code and prose with a vocabulary of 49k; files range from 3.0 to 4.5."""

DISK_MARGIN = 4 / 3
"""On the estimated tokens when disk need is checked: for text of 3 bytes a token."""

Feed = Literal["actors", "ray_data"]


@dataclass(frozen=True)
class CompactionPlan:
    """The models, the tree's identity and the feed of one compaction."""

    files: ModelFiles
    tokenizer: Tokenizer
    gistnet: GistNet
    base_lm: BaseLMConfig
    """With its dtype decided."""
    identity: TreeIdentity
    encoding: Encoding
    gistnet_path: str
    """Where the net comes from; empty: it is not trained."""

    def compactor_spec(self, num_threads: int, window_batch: int) -> CompactorSpec:
        """What a compactor needs of the plan."""
        return CompactorSpec(self.base_lm, self.files.digest, self.encoding, num_threads, window_batch)

    def digests(self) -> dict[str, str]:
        """What is recorded of the models."""
        return {
            "base_lm": self.files.digest,
            "tokenizer": self.tokenizer.digest,
            "gistnet": self.encoding.gistnet_digest,
        }


def plan_models(base_lm: BaseLMConfig, gistnet: GistNetConfig, store: StoreConfig) -> CompactionPlan:
    """Resolve the models and compare them with the context, if it exists.

    Raises:
        ModelError: a model or net that is missing or does not fit.
        IncompatibleTreeError: the context was made by something else.
    """
    files = resolve_model(base_lm)
    tokenizer = Tokenizer.load(base_lm)
    identity = TreeIdentity(files.model_id, files.digest, tokenizer.digest)
    existing = _existing(store)
    gistnet = _chosen(gistnet, files, existing[1] if existing else None)
    net = build_gistnet(gistnet, files)
    decided = _decide_dtype(base_lm, net, existing[1] if existing else None)
    encoding = encoding_of(net, decided.dtype, store.gist_dtype)
    if existing is not None:
        check_same(
            f"context {store.context!r}",
            existing[0],
            identity,
            "Use the model it was made for, or write to another context with --store.context",
        )
    return CompactionPlan(files, tokenizer, net, decided, identity, encoding, gistnet.path)


def _chosen(gistnet: GistNetConfig, files: ModelFiles, existing: Encoding | None) -> GistNetConfig:
    """What `gistnet.path=auto` comes to: the net that comes along with the model, or an untrained one."""
    if gistnet.path != AUTO_GISTNET:
        return gistnet
    untrained = replace(gistnet, path="")
    along = packaged_gistnet(files)
    if along is None or gistnet != GistNetConfig():
        return untrained
    if existing is not None and existing.gistnet_digest == build_gistnet(untrained, files).digest():
        logger.info("GistNet: untrained, as the context was begun with it; `tree rebuild-gists` takes a trained one")
        return untrained
    logger.info("GistNet: %s, which comes along with %s", along.name, files.model_id)
    return replace(gistnet, path=str(along))


def check_encoding(plan: CompactionPlan, store: StoreConfig) -> None:
    """Refuse to append gists of another net or dtype to an existing context.

    Raises:
        IncompatibleTreeError: with what the tree has and what this run offers.
    """
    existing = _existing(store)
    if existing is not None:
        check_same(
            f"context {store.context!r}",
            existing[1],
            plan.encoding,
            "Use the GistNet it was made with, write to another context with --store.context, or re-derive its gists "
            "with `tree rebuild-gists`",
        )


def _existing(store: StoreConfig) -> tuple[TreeIdentity, Encoding] | None:
    try:
        return Store(store.root).identity(store.context, store.version)
    except ContextNotFoundError:
        return None


def _decide_dtype(base_lm: BaseLMConfig, net: GistNet, existing: Encoding | None) -> BaseLMConfig:
    """The compute dtype: as configured, as the tree has it, or measured."""
    if base_lm.dtype != "auto":
        return base_lm
    if existing is not None:
        return explicit_dtype(base_lm, existing.compute_dtype)
    if net.lm_layer is None:
        return explicit_dtype(base_lm, "float32")
    return explicit_dtype(base_lm, choose_dtype(base_lm, num_layers=net.lm_layer).dtype)


def estimate_tokens(source: CorpusSource) -> int | None:
    """About how many tokens a corpus holds; None where its size is not known."""
    return None if source.estimated_bytes is None else int(source.estimated_bytes / BYTES_PER_TOKEN)


def choose_feed(config: CompactionConfig, num_tokens: int | None) -> Feed:
    """Plain actors for small corpora, Ray Data for bulk, and a log line that says which and why."""
    if config.feed != "auto":
        return config.feed
    bulk = num_tokens is None or num_tokens > config.bulk_threshold_tokens
    size = "of unknown size" if num_tokens is None else f"of about {num_tokens:,} tokens"
    feed: Feed = "ray_data" if bulk else "actors"
    logger.info(
        "feed: %s, for a corpus %s (compaction.bulk_threshold_tokens is %s)",
        feed,
        size,
        f"{config.bulk_threshold_tokens:,}",
    )
    return feed


def check_space(store: StoreConfig, plan: CompactionPlan, num_tokens: int | None) -> int:
    """Disk need in bytes; refuses what the disk cannot hold (`storage.store.check_disk_space`)."""
    return check_disk_space(store.root, plan.encoding, int((num_tokens or 0) * DISK_MARGIN))
