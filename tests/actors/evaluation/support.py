"""Histories for the tiny model, and its NLL computed in the plainest way there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from actors.evaluation.contents import Contents, Reading
from actors.plan import CompactionPlan
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig, StoreConfig
from models.base_lm import BaseLM
from models.focus.history import History
from models.gistnet import GistNet
from models.positions import Positions
from storage.contract import DocumentMeta, SpanWrite, TreeReader
from storage.corpus import Document
from storage.geometry import NO_TOKEN
from storage.lexical.search import LexicalSearcher
from storage.memory_tree import MemoryTree
from storage.schema import GISTS, KEYS, ArraySpec, Encoding
from tests.actors.helpers import follow, ingest, make_compactor, make_text, open_context, tiny_plan

DIM = 64
"""Of the tiny model."""


def byte_tokens(num_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_tokens)


def random_tree(documents: Sequence[int | np.ndarray], *, max_lod: int = 2, uri: str = "doc") -> MemoryTree:
    """Documents of given tokens, or of so many random ones; gists and keys are random, as large as embeddings."""
    arrays = tuple(ArraySpec(name, DIM, 1, "float32") for name in (GISTS, KEYS))
    tree = MemoryTree(Encoding("net", "digest", "float32", arrays))
    rng = np.random.default_rng(5)

    def rows(count: int) -> dict[str, np.ndarray]:
        return {name: (rng.standard_normal((count, DIM)) * 0.15).astype(np.float32) for name in (GISTS, KEYS)}

    for number, given in enumerate(documents):
        tokens = byte_tokens(given, number) if isinstance(given, int) else given
        num_blocks = -(-len(tokens) // K)
        slots = np.full(num_blocks * K, NO_TOKEN, np.uint32)
        slots[: len(tokens)] = tokens
        counts = np.full(num_blocks, K, np.uint8)
        counts[-1] = len(tokens) - (num_blocks - 1) * K
        meta = DocumentMeta(f"{uri}{number}", f"{uri}{number}")
        tree.append([SpanWrite(meta, 0, slots.reshape(-1, K), counts, rows(num_blocks), last=True)])
    for lod in range(2, max_lod + 1):
        if count := tree.version().num_nodes(lod - 1) // K:
            tree.put_nodes(lod, 0, rows(count))
    return tree


def reading_of(lm: BaseLM, tree: MemoryTree, first: int = 0, stop: int | None = None) -> Reading:
    reader = tree.reader()
    return Reading(lm, reader, History.of(reader, first, stop))


def plain_nll(
    lm: BaseLM, rows: Contents, ids: np.ndarray, first_place: float, mask: torch.Tensor | None = None
) -> np.ndarray:
    """NLL of `ids[1:]` after rows at their true places: one pass, log-softmax of all logits.

    Args:
        rows: what stands before.
        ids: the horizon.
        first_place: of `ids[0]`, in tokens, a multiple of 1/2.
        mask: `(rows + n - 1, rows + n - 1)` bool, who sees whom; by default everyone what is before.
    """
    tokens = torch.from_numpy(ids.astype(np.int64))
    places = np.concatenate([rows.half_tokens, round(2 * first_place) + 2 * np.arange(len(ids) - 1)])
    with torch.inference_mode():
        embeds = torch.cat([rows.embeds, lm.embed(tokens[None, :-1])[0]])[None]
        logits = lm.logits(
            embeds,
            positions=Positions(torch.from_numpy(places)[None]),
            attention_mask=None if mask is None else mask[None, None],
        )
        log_p = torch.log_softmax(logits[0, rows.num_rows :].double(), dim=-1)
        return -log_p[torch.arange(len(ids) - 1), tokens[1:]].numpy()


def masked_nll(
    lm: BaseLM, stand_ins: Contents, tail: Contents, blocks: Sequence[Contents], ids: np.ndarray, first_place: int
) -> np.ndarray:
    """One pass in which tail and blocks see the stand-ins and themselves only, and the horizon sees all."""
    rows = Contents.joined([stand_ins, tail, *blocks])
    size = rows.num_rows + len(ids) - 1
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    start = stand_ins.num_rows
    for part in (tail, *blocks):
        mask[start : start + part.num_rows, stand_ins.num_rows : start] = False
        start += part.num_rows
    return plain_nll(lm, rows, ids, first_place, mask)


def continued(lm: BaseLM, rows: Contents, num_tokens: int, length: int) -> np.ndarray:
    """What the model itself would write after some contents."""
    ids = [7]
    with torch.inference_mode():
        for _ in range(length - 1):
            tokens = torch.tensor([ids])
            places = np.concatenate([rows.half_tokens, 2 * (num_tokens + np.arange(len(ids)))])
            embeds = torch.cat([rows.embeds[None], lm.embed(tokens)], dim=1)
            logits = lm.logits(embeds, positions=Positions(torch.from_numpy(places)[None]), last_only=True)
            ids.append(int(logits[0, -1].argmax()))
    return np.array(ids)


@dataclass(frozen=True)
class StoredText:
    """Texts in a context on disk, as `compact` makes it, for the tiny model."""

    plan: CompactionPlan
    store: StoreConfig
    folder: Path
    reader: TreeReader
    gistnet: GistNet
    lexical: LexicalSearcher


@contextmanager
def stored(lm: BaseLMConfig, root: Path, texts: Sequence[str]) -> Iterator[StoredText]:
    """Documents of these texts; the tiny tokenizer's tokens are bytes, so a block is 32 characters."""
    plan = tiny_plan(lm, root)
    documents = [Document.from_raw(f"doc{i}.txt", text, text.encode()) for i, text in enumerate(texts)]
    with open_context(root, plan) as writer:
        ingest(writer, plan, make_compactor(plan), documents)
        follow(writer, plan)
        lexical = LexicalSearcher(writer.folder, plan.tokenizer.decode_batch)
        yield StoredText(
            plan, StoreConfig(root=root, context="c"), writer.folder, writer.reader(), plan.gistnet, lexical
        )


NEEDLE = "the quokka of zanzibar whistles"
"""31 characters: with the blank behind it one block."""


def text_with_needle(num_blocks: int, needle_block: int, end: str = "", seed: int = 0) -> str:
    """Text of so many blocks, one of them the needle; `end` are its last characters."""
    size = num_blocks * K
    text = make_text(seed, size)[: size - len(end)] + end
    return f"{text[: needle_block * K]}{NEEDLE} {text[(needle_block + 1) * K :]}"
