"""A tiny compactor, an in-process ingest, and a way to compare trees byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from actors.compactor import Compactor
from actors.follower import FollowerSpec, LevelFollower
from actors.packing import Packer, batched_windows
from actors.plan import CompactionPlan, plan_models
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from storage.contract import TreeReader, TreeWriter
from storage.corpus import CorpusItem, Document
from storage.store import Store
from storage.tree.writer import ContextWriter

SENTENCE = "the tree keeps every token it has read and shows a working context of fixed size to the model"
WORDS = SENTENCE.split()


def make_text(seed: int, num_words: int) -> str:
    """Text that is the same for a seed and differs between seeds."""
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] + str(rng.integers(100)) for i in rng.integers(len(WORDS), size=num_words))


def make_documents(lengths: Sequence[int]) -> list[Document]:
    """Documents of about so many words."""
    texts = [make_text(index, length) for index, length in enumerate(lengths)]
    return [Document.from_raw(f"doc{i}.txt", text, text.encode()) for i, text in enumerate(texts)]


def tiny_plan(lm: BaseLMConfig, root: Path, kind: str = "windowed", **gistnet: int) -> CompactionPlan:
    """A plan with the tiny model, in float32."""
    net = GistNetConfig(kind=kind, lm_layers=2, **gistnet)  # type: ignore[arg-type]
    return plan_models(lm, net, StoreConfig(root=root, context="c"))


def open_context(root: Path, plan: CompactionPlan, name: str = "c") -> ContextWriter:
    """A writer with small segments (4 super-blocks)."""
    store = Store(root, create=True)
    return store.open_writer(name, plan.identity, plan.encoding, create=True, segment_super_blocks=4)


def make_compactor(plan: CompactionPlan) -> Compactor:
    """A compactor of one thread."""
    torch.set_num_threads(1)
    return Compactor(plan.compactor_spec(1, 1), plan.gistnet)


def ingest(
    writer: TreeWriter, plan: CompactionPlan, compactor: Compactor, items: Sequence[CorpusItem], batch: int = 4
) -> None:
    """The same stages as the job's, in this process."""
    for windows in batched_windows(Packer(plan.tokenizer, writer.marks).pack(items), batch, lambda _: None):
        writer.append(compactor.encode(windows))
    writer.flush()


def follow(writer: ContextWriter, plan: CompactionPlan) -> int:
    """Make every level above the blocks."""
    return LevelFollower(FollowerSpec(writer.folder, writer.name, 1), plan.gistnet, writer.put_nodes).advance()


def assert_same_tree(left: TreeReader, right: TreeReader) -> None:
    """Equal tokens, counts, prefix sums, and bit-identical arrays on every level."""
    assert left.version.level_counts == right.version.level_counts
    assert left.version.num_tokens == right.version.num_tokens
    num_blocks = left.version.num_blocks
    for mine, theirs in zip(left.tokens(0, num_blocks), right.tokens(0, num_blocks), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    blocks = np.arange(num_blocks + 1)
    np.testing.assert_array_equal(left.tokens_before(blocks), right.tokens_before(blocks))
    for lod in range(1, left.version.max_lod + 1):
        nodes = np.arange(left.version.num_nodes(lod))
        for array in left.version.encoding.arrays:
            assert torch.equal(left.read(array.name, lod, nodes), right.read(array.name, lod, nodes)), (array.name, lod)
