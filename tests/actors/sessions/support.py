"""A small session on the tiny model, and what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.plan import CompactionPlan
from actors.session import Session
from actors.session_turn import Turn
from cluster.session_config import SamplingConfig, SessionConfig
from models.positions import Positions
from storage.contract import DocumentMeta
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context

CONFIG = SessionConfig(
    budget=320, compact_tokens=64, tail_tokens=64, refocus_tokens=16, age_tokens=64, max_blocks=3, row_price=0.0
)
SAMPLING = SamplingConfig(max_new_tokens=40, temperature=1.0, top_p=1.0)


def document(name: str, text: str) -> DocumentMeta:
    return DocumentMeta(name, f"file:///{name}", size_bytes=len(text))


def ask(session: Session, question: str, **sampling: Any) -> Turn:
    *pieces, turn = session.ask(question, replace(SAMPLING, **sampling))
    assert isinstance(turn, Turn)
    assert "".join(str(piece) for piece in pieces) == turn.text
    return turn


def said(session: Session) -> str:
    """All of the session's own context."""
    reader = session.memory.readers()[-1]
    tokens, counts = reader.tokens(0, reader.version.num_blocks)
    ids = [int(t) for row, count in zip(tokens, counts, strict=True) for t in row[:count]]
    tail = reader.tail()
    return session._tokenizer.decode(ids + ([] if tail is None else tail.tokens.tolist()))


def assert_as_full_pass(session: Session) -> None:
    """The next token's logits are those of the Working Context read in one pass."""
    embeds, places, _ = session._rows()
    with torch.inference_mode():
        at = Positions(torch.from_numpy(places)[None])
        expected = session._lm.logits(embeds[None], positions=at, last_only=True)[0, -1]
    assert torch.allclose(session._cache.logits(), expected, atol=1e-3, rtol=0)


def other_context(root: Path, plan: CompactionPlan, texts: Sequence[int], name: str = "other") -> None:
    writer = open_context(root, plan, name)
    ingest(writer, plan, make_compactor(plan), make_documents(texts))
    follow(writer, plan)
    writer.close()
