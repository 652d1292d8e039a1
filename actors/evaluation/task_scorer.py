"""What a frozen language model answers to a question behind given contents.

Contents and question are read once. All candidates are then compared in one pass, in which each sees what was read
and itself, and a greedy answer goes on from the same cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.evaluation.contents import Contents
from models.base_lm import BaseLM
from models.focus.layout import Policy, lay_out
from models.kv_cache import KVCache
from models.positions import Positions
from models.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model makes of one question."""

    nll: list[np.ndarray]
    """Of each candidate, `(its tokens,)` float32, nats."""
    generated: np.ndarray
    """`(n,)` int64 ids of the greedy answer."""


class AnswerScorer:
    """A language model that is asked."""

    def __init__(self, lm: BaseLM) -> None:
        self._lm = lm

    def answer(
        self,
        contents: Contents,
        question: np.ndarray,
        candidates: Sequence[np.ndarray],
        num_tokens: int,
        policy: Policy,
        num_generated: int = 0,
    ) -> Answers:
        """NLL of every candidate and a greedy answer, given contents and question.

        Args:
            contents: what stands before the question.
            question: `(q,)` ids, at least one.
            candidates: ids of each answer, at least one each.
            num_tokens: real tokens of the history: the true place of the question's first token.
            policy: where rows are put.
            num_generated: tokens of the greedy answer.
        """
        lm = self._lm
        layout = lay_out(policy, contents.half_tokens, num_tokens)
        behind = layout.next_half_token + 2 * np.arange(len(question))
        with torch.inference_mode():
            cache = lm.new_cache()
            rows = torch.cat([contents.embeds[None], self._embed(question[:-1])], dim=1)
            if rows.shape[1]:
                places = np.concatenate([layout.half_tokens, behind[:-1]])
                lm.read(rows, positions=_positions(places), cache=cache)
            last, place = int(question[-1]), int(behind[-1])
            num_read = cache.num_entries
            nll = self._candidates(cache, last, place, candidates)
            cache.truncate(num_read)
            generated = generate_greedy(lm, cache, last, place, num_generated)
        return Answers(nll, generated)

    def _embed(self, ids: np.ndarray) -> torch.Tensor:
        return self._lm.embed(torch.from_numpy(np.asarray(ids, np.int64))[None].to(self._lm.device))

    def _candidates(self, cache: KVCache, last: int, place: int, candidates: Sequence[np.ndarray]) -> list[np.ndarray]:
        """NLL of the candidates, side by side in one row: each begins anew at the question's last token."""
        sizes = [len(candidate) for candidate in candidates]
        ids = np.concatenate([np.concatenate([[last], candidate[:-1]]) for candidate in candidates])
        steps = np.concatenate([np.arange(size) for size in sizes])
        owner = np.repeat(np.arange(len(sizes)), sizes)
        own = (owner[:, None] == owner) & (steps[:, None] >= steps)
        seen = np.concatenate([np.ones((len(ids), cache.num_entries), bool), own], axis=1)
        targets = torch.from_numpy(np.concatenate(list(candidates)).astype(np.int64))[None].to(self._lm.device)
        nll = self._lm.nll(
            self._embed(ids),
            targets,
            positions=_positions(place + 2 * steps),
            attention_mask=torch.from_numpy(seen)[None, None],
            cache=cache,
        )
        return np.split(nll[0].cpu().numpy(), np.cumsum(sizes)[:-1])


def generate_greedy(lm: BaseLM, cache: KVCache, last: int, half_token: int, num_tokens: int) -> np.ndarray:
    """The likeliest next tokens, one after the other: `(num_tokens,)` int64.

    Args:
        lm: predicts.
        cache: what was read, without the last token; extended.
        last: id of the last token.
        half_token: its place; the others follow a token apart.
        num_tokens: how many.
    """
    ids: list[int] = []
    with torch.inference_mode():
        for step in range(num_tokens):
            embeds = lm.embed(torch.tensor([[last]], device=lm.device))
            positions = _positions(np.array([half_token + 2 * step]))
            last = int(lm.logits(embeds, positions=positions, cache=cache, last_only=True).argmax())
            ids.append(last)
    return np.array(ids, np.int64)


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of special tokens: a text ends where a model says one, as the end of its turn."""
    added = json.loads(tokenizer.path.read_bytes()).get("added_tokens", [])
    return frozenset(int(token["id"]) for token in added if token.get("special"))


def until_end(ids: np.ndarray, ends: frozenset[int]) -> np.ndarray:
    """What stands before the first end."""
    return ids[: next((place for place, token in enumerate(ids.tolist()) if token in ends), len(ids))]


def _positions(half_tokens: np.ndarray) -> Positions:
    return Positions(torch.from_numpy(half_tokens.astype(np.int64))[None])
