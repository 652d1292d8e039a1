"""Candidates of a refocus and their signals: what LensNet is told, in sessions, evaluations and labels alike.

Candidates are what words and keys find, what stands behind the best of it, the beginning of the document at hand, the
newest blocks before the raw tail (more of the tail is a choice like any other), and what is shown already. None of it
looks at what comes behind the history.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from cluster.config import TOKENS_PER_BLOCK as K
from models.base_lm import BaseLM
from models.focus.allocators import ranked_by_score
from models.focus.dense import KeyIndex, KeySpace, dense_scores, query_states
from models.focus.history import History, blocks_per_node
from models.gistnet import GistNet
from models.lensnet.features import FEATURES, CandidateSet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher, ReplacedText
from storage.schema import GISTS, KEYS

QUERY_CONTEXT_TOKENS = 512
"""Newest tokens the model reads to know what the question's own mean."""
QUESTION_TOKENS = (8, 32, 128)
"""Newest tokens that ask, for each of the `key_match` features."""
ASKING_TOKENS = 32
"""Of them, those whose direction is the question's."""
LEXICAL_TOKENS = 64
"""Newest tokens whose words are looked up."""

RANKED_BLOCKS = 64
"""Blocks that a search ranks; far more than any budget here shows."""

NUM_FOUND = 12
"""Blocks that words, and keys, bring into the candidates."""
NUM_FOLLOWED = 4
"""Of the best found, how many bring the block behind them: what goes on there is what was found, continued."""
NUM_OPENING = 2
"""Blocks of the beginning of the document at hand."""
NUM_NEWEST = 8
"""Blocks before the raw tail."""
TAIL_BLOCKS = 4
"""Newest blocks whose keys a candidate's is compared with."""
LONGEST_SUFFIX = 8


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of every history: the newest tokens, read once."""

    tokens: Int64[np.ndarray, " n"]
    """Newest last, at most `QUERY_CONTEXT_TOKENS`."""
    text: str
    """Whose words are looked up."""
    states: Float32[Tensor, "q D_key"]
    """What the newest tokens would add to a routing key, for as many as the widest question has, or ask for words."""
    embedding: Float32[Tensor, " D"]
    """Mean of the newest tokens' embeddings."""

    @classmethod
    def of(
        cls,
        lm: BaseLM,
        gistnet: GistNet,
        tokenizer: Tokenizer,
        tokens: Int64[np.ndarray, " n"],
        lexical_tokens: int = LEXICAL_TOKENS,
    ) -> Question:
        """Read the newest tokens with the layers that keys are made of.

        Args:
            lm, gistnet, tokenizer: of the tree.
            tokens: newest last, at least one; those before the newest `QUERY_CONTEXT_TOKENS` are not looked at.
            lexical_tokens: newest tokens whose words are looked up.

        Raises:
            ModelError: no tokens.
        """
        newest = np.asarray(tokens, np.int64)[-QUERY_CONTEXT_TOKENS:]
        num_states = min(max(*QUESTION_TOKENS, lexical_tokens), len(newest))
        states = query_states(lm, gistnet, newest, num_states)
        asking = torch.from_numpy(newest[-ASKING_TOKENS:])[None].to(lm.device)
        with torch.inference_mode():
            embedding = lm.embed(asking)[0].float().mean(dim=0).cpu()
        return cls(newest, tokenizer.decode(newest[-lexical_tokens:]), states, embedding)


@dataclass(frozen=True, eq=False)
class Hits:
    """What searching one history found, the best first."""

    lexical: Mapping[int, float]
    """Block to BM25 score."""
    dense: Mapping[int, float]
    """Block to the cosine of its key."""


@dataclass(frozen=True, eq=False)
class Planted:
    """Text that a history has and its tree has not: indexes know nothing of it."""

    indexed: TreeReader
    """The tree's own reader, beneath the one that is asked."""
    blocks: Int64[np.ndarray, " n"]
    """Where the two differ."""
    keys: KeyIndex
    """Of the blocks that are searched, planted ones among them."""


def search_history(
    reader: TreeReader,
    history: History,
    lexical: LexicalSearcher,
    space: KeySpace,
    question: Question,
    stop_block: int,
    key_tokens: int,
    planted: Planted | None = None,
) -> Hits:
    """What words and keys find in one history before a block."""
    first = history.first_block
    if planted is None:
        indexed, replaced = reader, None
        index = KeyIndex(reader, space, first, stop_block, array=KEYS)
    else:
        indexed, replaced, index = planted.indexed, ReplacedText(reader, planted.blocks), planted.keys
    blocks, scores = lexical.search(indexed, question.text, RANKED_BLOCKS, first, stop_block, replaced=replaced)
    by_keys = ranked_by_score(index.scores(question.states[-key_tokens:], "pooled"), first, limit=RANKED_BLOCKS)
    found = {int(block): float(score) for block, score in zip(blocks, scores, strict=True)}
    return Hits(found, {block: float(score) for block, score in by_keys})


def newest_keys(reader: TreeReader, history: History) -> Float32[Tensor, "t D_key"]:
    """Stored keys of a history's newest blocks; a candidate's own is compared with them."""
    tail = np.arange(max(history.first_block, history.stop_block - TAIL_BLOCKS), history.stop_block)
    return reader.read(KEYS, 1, tail).flatten(1).float()


def find_candidates(
    reader: TreeReader,
    history: History,
    hits: Hits,
    shown_from: int,
    *,
    opening: bool,
    also: Sequence[int] = (),
) -> Int64[np.ndarray, " n"]:
    """Blocks of one history that could be shown, ascending.

    Args:
        reader: of its tree.
        history: where they may lie.
        hits: what was found.
        shown_from: first block of the raw tail; candidates lie before it.
        opening: whether the document at hand is of this history.
        also: others: what is shown already, what chance adds.
    """
    found = [block for ranking in (list(hits.lexical), list(hits.dense)) for block in ranking[:NUM_FOUND]]
    follow = [block + 1 for ranking in (list(hits.lexical), list(hits.dense)) for block in ranking[:NUM_FOLLOWED]]
    first = list[int]()
    newest = range(shown_from - NUM_NEWEST, shown_from) if opening else ()
    if opening and history.num_blocks:
        document = reader.document_at(history.stop_block - 1)
        first = list(range(document.first_block, document.first_block + NUM_OPENING))
    wanted = np.unique(np.array([*found, *follow, *first, *newest, *also], np.int64))
    return wanted[(wanted >= history.first_block) & (wanted < shown_from)]


def signals(
    reader: TreeReader,
    history: History,
    gistnet: GistNet,
    space: KeySpace,
    question: Question,
    hits: Hits,
    blocks: Int64[np.ndarray, " n"],
    shown_from: int,
    *,
    tail_keys: Float32[Tensor, "t D_key"],
    own: bool,
    shown: Mapping[int, int] | None = None,
) -> CandidateSet:
    """What is known of some blocks of one history.

    Args:
        reader: of its tree.
        history: what the Working Context represents of it.
        gistnet: the tree's net.
        space: where keys and questions are compared.
        question: what is asked.
        hits: what was found.
        blocks: of `find_candidates`.
        shown_from: first block of the raw tail, in the history that has it; elsewhere the history's end.
        tail_keys: of `newest_keys`, of the history that has the raw tail; none where that has no blocks yet.
        own: whether the raw tail is of this history; others are as far away as they are old.
        shown: raw blocks to how many refocuses showed them; others stand at the level of the gist over them.
    """
    shown = shown or {}
    n = len(blocks)
    asked = [_direction(question.states[-count:], space) for count in QUESTION_TOKENS]
    asking = asked[QUESTION_TOKENS.index(ASKING_TOKENS)]
    if n == 0:
        nothing = np.zeros((0, len(FEATURES)), np.float32), np.zeros((0, len(asking)), np.float32)
        return CandidateSet(blocks, *nothing, asking.numpy())
    stored_keys = reader.read(KEYS, 1, blocks).flatten(1)
    keys = F.normalize(space.place(stored_keys.float()), dim=-1)
    before = history.tokens_before
    offset = blocks - history.first_block
    sizes = before[offset + 1] - before[offset]
    distance = before[shown_from - history.first_block] - before[offset + 1]
    documents = [reader.document_at(int(block)) for block in blocks]
    current = reader.document_at(history.stop_block - 1).first_block if own else -1
    lexical_rank = {block: rank for rank, block in enumerate(hits.lexical, start=1)}
    key_rank = {block: rank for rank, block in enumerate(hits.dense, start=1)}
    best = max(hits.lexical.values(), default=1.0)
    same = mean = np.zeros(n, np.float32)
    if len(tail_keys):
        same = dense_scores(stored_keys, tail_keys, "max_sim", space.centre, space.whitening)
        mean = dense_scores(stored_keys, tail_keys, "pooled", space.centre, space.whitening)
    gists = reader.read(GISTS, 1, blocks).float().reshape(n, -1)[:, : gistnet.dim]
    overlap = _Overlap.of(reader, blocks, question.tokens)
    is_shown = np.array([b in shown for b in blocks.tolist()])
    columns = {
        "lod": np.where(is_shown, 0, _root_lods(history, blocks)) / 8,
        "log_tokens": np.log2(np.maximum(sizes, 1)) / 16,
        "log_distance": np.log2(1 + np.maximum(distance, 0)) / 24,
        "same_document": np.array([document.first_block == current for document in documents]),
        "log_document_offset": np.log2(1 + blocks - np.array([d.first_block for d in documents])) / 16,
        "lexical_score": np.array([hits.lexical.get(b, 0.0) / best for b in blocks.tolist()]),
        "lexical_rank": np.array([1 / lexical_rank[b] if b in lexical_rank else 0.0 for b in blocks.tolist()]),
        **{
            f"key_match_{count}": (keys @ direction).numpy()
            for count, direction in zip(QUESTION_TOKENS, asked, strict=True)
        },
        "key_rank": np.array([1 / key_rank[b] if b in key_rank else 0.0 for b in blocks.tolist()]),
        "tail_match_max": same,
        "tail_match_mean": mean,
        "gist_match": F.cosine_similarity(gists, question.embedding[None], dim=-1).numpy(),
        "suffix_match": np.log2(1 + overlap.suffix) / 4,
        "pair_overlap": overlap.pairs,
        "rare_overlap": overlap.rare,
        "is_shown": is_shown,
        "shown_before": np.log2(1 + np.array([shown.get(b, 0) for b in blocks.tolist()])) / 8,
    }
    features = np.stack([columns[name] for name in FEATURES], axis=1).astype(np.float32)
    return CandidateSet(blocks, features, keys.numpy(), asking.numpy())


def _root_lods(history: History, blocks: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Levels of the coarsest gists over blocks: at which those stand that nothing shows in detail."""
    lods, indices = history.roots()
    begins = indices * np.array([blocks_per_node(int(lod)) for lod in lods], np.int64)
    return lods[np.searchsorted(begins, blocks, side="right") - 1].astype(np.int64)


def _direction(states: Float32[Tensor, "q D_key"], space: KeySpace) -> Float32[Tensor, " D_key"]:
    """Of a question, where keys are compared."""
    return F.normalize(space.place(F.normalize(states.mean(dim=0, keepdim=True), dim=-1)), dim=-1)[0]


@dataclass(frozen=True, eq=False)
class _Overlap:
    """What blocks' tokens have in common with the newest ones."""

    suffix: Int64[np.ndarray, " n"]
    """How many of the newest tokens stand in a block in a row."""
    pairs: Float32[np.ndarray, " n"]
    rare: Float32[np.ndarray, " n"]

    @classmethod
    def of(cls, reader: TreeReader, blocks: Int64[np.ndarray, " n"], newest: Int64[np.ndarray, " q"]) -> _Overlap:
        texts = []
        for block in blocks.tolist():
            tokens, counts = reader.tokens(block, 1)
            texts.append(tokens[0, : int(counts[0])].astype(np.int64))
        asking = newest[-LEXICAL_TOKENS:].tolist()
        wanted_pairs = set(itertools.pairwise(asking))
        wanted = set(newest[-K:].tolist())
        held = [wanted.intersection(text.tolist()) for text in texts]
        seen = {token: sum(token in own for own in held) for token in wanted}
        # How rare a token is among the candidates themselves: they were found for being like the newest text.
        weight = {token: float(np.log((len(blocks) + 1) / (count + 0.5))) for token, count in seen.items()}
        total = max(sum(weight.values()), 1e-6)
        pairs = [
            len(wanted_pairs.intersection(itertools.pairwise(t))) / max(len(wanted_pairs), 1)
            for t in (text.tolist() for text in texts)
        ]
        return cls(
            np.array([_suffix(text, newest) for text in texts], np.int64),
            np.array(pairs, np.float32),
            np.array([sum(weight[token] for token in own) / total for own in held], np.float32),
        )


def _suffix(text: Int64[np.ndarray, " t"], newest: Int64[np.ndarray, " q"]) -> int:
    """The most newest tokens, up to `LONGEST_SUFFIX`, that stand in a text in a row."""
    longest = 0
    for end in np.flatnonzero(text == newest[-1]):
        length = 1
        while length < min(LONGEST_SUFFIX, end + 1, len(newest)) and text[end - length] == newest[-1 - length]:
            length += 1
        longest = max(longest, length)
    return longest
