"""Planting: a text put into a super-block of a history, so that the grid of blocks stays as it was.

The tokens that were there keep their ids: those behind the needle move back, and as many as it takes fall off the end.
Nothing is tokenised anew, so everything before the needle is bit for bit what it was. The price: at the seams (the
needle's edges, the super-block's end) a tokenizer might have merged tokens otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from actors.tasks.sample import Draws
from cluster.config import BLOCKS_PER_SUPER_BLOCK, SLOTS_PER_SUPER_BLOCK
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError, InvalidWriteError
from models.tokenizer import Tokenizer
from storage.geometry import NO_TOKEN


class Planted(NamedTuple):
    """A super-block with a needle in it."""

    tokens: np.ndarray
    """(32, 32) uint32"""
    counts: np.ndarray
    """(32,) uint8, all 32: those of the super-block it stands in for."""
    first_block: int
    """Blocks `[first_block, stop_block)` of the super-block hold the needle's tokens."""
    stop_block: int


def is_plantable(counts: np.ndarray) -> bool:
    """Whether a super-block can take a needle: its 32 blocks are there and full. `counts`: (n,) real tokens a block."""
    return len(counts) == BLOCKS_PER_SUPER_BLOCK and bool((counts == K).all())


def plantable_super_blocks(counts: np.ndarray) -> np.ndarray:
    """Indices of a timeline's plantable super-blocks, int64 in order. `counts`: (num_blocks,) real tokens a block."""
    num_super_blocks = len(counts) // BLOCKS_PER_SUPER_BLOCK
    grid = counts[: num_super_blocks * BLOCKS_PER_SUPER_BLOCK].reshape(num_super_blocks, BLOCKS_PER_SUPER_BLOCK)
    return np.flatnonzero((grid == K).all(axis=1))


def choose_places(
    available: np.ndarray | Sequence[int], depths: Sequence[float], *, first_tail_block: int | None = None
) -> np.ndarray:
    """Which super-block takes which needle.

    Args:
        available: indices of plantable super-blocks, in any order.
        depths: of the needles; 0 is the oldest of the available super-blocks, 1 the newest.
        first_tail_block: where the raw tail begins, which is read in any case: super-blocks that reach into it are
            left out.

    Returns:
        int64, shape of `depths`: different super-blocks, in the order of the depths (equal ones in the order given).

    Raises:
        ConfigError: fewer places than needles.
    """
    places = np.unique(np.asarray(available, np.int64))
    if first_tail_block is not None:
        places = places[(places + 1) * BLOCKS_PER_SUPER_BLOCK <= first_tail_block]
    num_places, num_needles = len(places), len(depths)
    if num_needles > num_places:
        raise ConfigError(
            f"{num_needles} needles need a super-block each and {num_places} before the raw tail can take one; "
            "choose a longer history, or tell the task how many places there are"
        )
    chosen = np.empty(num_needles, np.int64)
    previous = -1
    for rank, needle in enumerate(np.argsort(np.asarray(depths, np.float64), kind="stable")):
        wanted = max(int(depths[needle] * num_places), previous + 1)
        # The needles still to come need a place each.
        previous = min(wanted, num_places - num_needles + rank)
        chosen[needle] = places[previous]
    return chosen


def plant(tokens: np.ndarray, counts: np.ndarray, needle_text: str, tokenizer: Tokenizer, seed: int | str) -> Planted:
    """Insert a text into a super-block.

    It goes to a break of the text that `seed` chooses: the end of a sentence or paragraph where there is one, else of
    a line, else of a word, else of a character.

    Args:
        tokens: (32, 32) uint32.
        counts: (32,) uint8 real tokens a block; all must be full.

    Raises:
        InvalidWriteError: the super-block is not plantable.
        ConfigError: the text is empty, or longer than a super-block.
    """
    if tokens.shape != (BLOCKS_PER_SUPER_BLOCK, K) or not is_plantable(counts) or (tokens == NO_TOKEN).any():
        raise InvalidWriteError(
            f"a needle needs a super-block of {BLOCKS_PER_SUPER_BLOCK} full blocks, and this one has tokens "
            f"{tokens.shape} with {np.asarray(counts).tolist()} used; choose among plantable_super_blocks"
        )
    if not needle_text.strip():
        raise ConfigError("there is nothing to plant: the needle's text is empty")
    old = tokens.reshape(-1)
    inserts = {lead: tokenizer.encode(lead + needle_text) for lead in (" ", "\n")}
    room = SLOTS_PER_SUPER_BLOCK - max(map(len, inserts.values()))
    if room < 1:
        raise ConfigError(
            f"the needle {needle_text[:40]!r}… has {SLOTS_PER_SUPER_BLOCK - room} tokens and a super-block "
            f"{SLOTS_PER_SUPER_BLOCK}; make it shorter, or give the task more places"
        )
    pieces = _pieces(old, tokenizer)
    start = _break(old, pieces, room, tokenizer, Draws("plant", seed))
    needle = inserts["\n" if _line_begins(pieces, start) else " "]
    stop = start + len(needle)
    new = np.concatenate([old[:start], needle, old[start : len(old) - len(needle)]]).astype(np.uint32)
    # The white space before the needle may be a token of its own, and stand in the block before it.
    first = start + next(i for i, piece in enumerate(_pieces(needle, tokenizer)) if piece.strip())
    return Planted(new.reshape(tokens.shape), counts.copy(), first // K, -(-stop // K))


def _pieces(ids: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Each token's text as it reads behind another one; part of a character is U+FFFD."""
    # Some tokenizers drop the space before a text's first word, so no token is decoded as the first.
    before = tokenizer.encode("a").tolist()
    length = len(tokenizer.decode(before))
    texts = {token: tokenizer.decode([*before, token])[length:] for token in set(ids.tolist())}
    return [texts[token] for token in ids.tolist()]


def _break(ids: np.ndarray, pieces: Sequence[str], room: int, tokenizer: Tokenizer, draws: Draws) -> int:
    """A token before which a needle may stand, in `[1, room]`."""
    for rule in (_paragraph_or_sentence_ends, _line_begins, _word_begins):
        if places := [place for place in range(1, room + 1) if rule(pieces, place)]:
            return draws.pick(places)
    # A character has at most four tokens; a part of one decodes to U+FFFD.
    ends = (
        place for place in range(1, room + 1) if not tokenizer.decode(ids[max(0, place - 4) : place]).endswith("\ufffd")
    )
    return draws.pick(list(ends) or [room])


def _paragraph_or_sentence_ends(pieces: Sequence[str], place: int) -> bool:
    behind = "".join(pieces[place : place + 3])
    if _line_begins(pieces, place) and behind.replace("\r", "").startswith("\n\n"):
        return True
    if not "".join(pieces[max(0, place - 3) : place]).rstrip("\"')]”’").endswith((".", "!", "?")):
        return False
    # A capital must follow, or every abbreviation would end a sentence.
    return _line_begins(pieces, place) or (_word_begins(pieces, place) and behind.lstrip(" ")[:1].isupper())


def _line_begins(pieces: Sequence[str], place: int) -> bool:
    """The token begins with the end of a line."""
    return pieces[place].startswith(("\n", "\r")) and not pieces[place - 1].endswith("\r")


def _word_begins(pieces: Sequence[str], place: int) -> bool:
    return pieces[place].startswith(" ") and not pieces[place - 1].endswith(" ")
