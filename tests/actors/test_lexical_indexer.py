"""The lexical indexer over a real store and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.lexical_indexer import LexicalIndexer, LexicalIndexerActor, LexicalIndexerSpec
from actors.plan import CompactionPlan
from cluster.config import BaseLMConfig, StoreConfig
from cluster.errors import ContextNotFoundError, IncompatibleTreeError, WriterConflictError
from cluster.ray_runtime import RaySession
from models.tokenizer import Tokenizer
from storage.corpus import Document
from storage.lexical.search import LexicalSearcher
from storage.tree.writer import ContextWriter
from storage.versions.curation import prune
from tests.actors.helpers import ingest, make_compactor, make_text, open_context, tiny_plan

NEEDLE = "the vault_code of Überlingen is 7391840"


def documents(num: int) -> list[Document]:
    """Documents of which the second holds the needle in its middle."""
    texts = [make_text(n, 300) for n in range(num)]
    texts[1] = f"{texts[1]} {NEEDLE} {texts[1]}"
    return [Document.from_raw(f"doc{n}.txt", text, text.encode()) for n, text in enumerate(texts)]


@pytest.fixture
def plan(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> CompactionPlan:
    return tiny_plan(tiny_lm_config, tmp_path, "last_token")


def spec_of(tmp_path: Path, lm: BaseLMConfig, context: str = "c") -> LexicalIndexerSpec:
    return LexicalIndexerSpec(StoreConfig(root=tmp_path, context=context), lm, batch_blocks=20)


def found(writer: ContextWriter, tokenizer: Tokenizer, query: str) -> str:
    """Text of the best block; empty when no block holds a term of the query."""

    def decode(tokens: Sequence[np.ndarray]) -> list[str]:
        return [tokenizer.decode(ids) for ids in tokens]

    with writer.reader() as reader, LexicalSearcher(writer.folder, decode) as searcher:
        blocks, _ = searcher.search(reader, query, 3)
        if len(blocks) == 0:
            return ""
        tokens, counts = reader.tokens(int(blocks[0]), 1)
        return tokenizer.decode(tokens[0, : counts[0]])


def test_it_follows_the_context(tmp_path: Path, tiny_lm_config: BaseLMConfig, plan: CompactionPlan) -> None:
    compactor, items = make_compactor(plan), documents(4)
    with open_context(tmp_path, plan) as writer:
        indexer = LexicalIndexer(spec_of(tmp_path, tiny_lm_config), plan.tokenizer)
        assert indexer.advance() == 0
        made = 0
        for count in (1, 2, 4):
            ingest(writer, plan, compactor, items[:count])
            before = found(writer, plan.tokenizer, "Which vault is in ÜBERLINGEN?")
            made += indexer.advance()
            assert made == indexer.num_blocks == writer.version().num_blocks
            assert found(writer, plan.tokenizer, "Which vault is in ÜBERLINGEN?") == before
            assert ("7391840" in before) == (count > 1)
        assert "7391840" in found(writer, plan.tokenizer, "code 7391840")
        indexer.close()
        # Another one goes on where it stopped.
        again = LexicalIndexer(spec_of(tmp_path, tiny_lm_config), plan.tokenizer)
        assert again.num_blocks == made
        assert again.advance() == 0
        with pytest.raises(WriterConflictError):
            LexicalIndexer(spec_of(tmp_path, tiny_lm_config), plan.tokenizer)
        again.close()


def test_another_tokenizer_is_refused(tmp_path: Path, tiny_lm_config: BaseLMConfig, plan: CompactionPlan) -> None:
    open_context(tmp_path, plan).close()
    changed = json.loads(plan.tokenizer.path.read_bytes())
    changed["added_tokens"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed))
    spec = spec_of(tmp_path, tiny_lm_config)
    with pytest.raises(IncompatibleTreeError, match="another tokenizer"):
        LexicalIndexer(spec, Tokenizer(path))
    assert not list(tmp_path.glob("c/lexical*"))
    with pytest.raises(ContextNotFoundError):
        LexicalIndexer(spec_of(tmp_path, tiny_lm_config, "other"), plan.tokenizer)


def test_the_actor(tmp_path: Path, tiny_lm_config: BaseLMConfig, plan: CompactionPlan, ray_cluster: RaySession) -> None:
    del ray_cluster
    with open_context(tmp_path, plan) as writer:
        ingest(writer, plan, make_compactor(plan), documents(2))
        spec = spec_of(tmp_path, tiny_lm_config)
        actor: Any = ray.remote(LexicalIndexerActor).options(num_cpus=0).remote(spec)
        assert ray.get(actor.advance.remote(), timeout=60) == writer.version().num_blocks
        ray.get(actor.close.remote(), timeout=60)
        LexicalIndexer(spec, plan.tokenizer).close()
        ray.kill(actor)


def test_pruning_the_newest_blocks_leaves_the_index_as_it_is(
    tmp_path: Path, tiny_lm_config: BaseLMConfig, plan: CompactionPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows its context by the last block it holds."""
    with open_context(tmp_path, plan) as writer:
        ingest(writer, plan, make_compactor(plan), documents(3))
        indexer = LexicalIndexer(spec_of(tmp_path, tiny_lm_config), plan.tokenizer)
        num_blocks = indexer.advance()
        prune(writer, [(num_blocks - 40, 40)], keep_until=0.0)
        with writer.reader() as reader, LexicalSearcher(writer.folder, plan.tokenizer.decode_batch) as searcher:
            assert searcher.search(reader, NEEDLE, 3)[0].size
            assert set(searcher.search(reader, make_text(2, 300), 40)[0].tolist()) & set(
                range(num_blocks - 40, num_blocks)
            ), "it still has the words of what is pruned"
        assert indexer.advance() == 0
        indexer.close()
    assert "cannot be used" not in caplog.text
