"""What an answer is worth: exact match, share of items, choice among candidates, and what no budget could show."""

from __future__ import annotations

import re
import unicodedata

import numpy as np

from actors.tasks.sample import TaskSample
from cluster.errors import ModelError

_EDGES = " \t\n.,;:!?\"'`*()[]{}“”‘’"


def normalise(text: str) -> str:
    """Letter case, forms of one character, white space and the punctuation around words taken away."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(word for word in (word.strip(_EDGES) for word in words) if word)


def exact_match(generated: str, answer: str) -> bool:
    """Whether a text begins with the answer after `normalise`; it may go on behind its last word."""
    wanted = normalise(answer).split()
    return bool(wanted) and normalise(generated).split()[: len(wanted)] == wanted


def items_found(generated: str, answer: str) -> float:
    """Share of the answer's items (separated by commas) that stand anywhere in a text as whole words, 0 … 1."""
    text = f" {normalise(generated)} "
    items = [normalise(item) for item in re.split(r",\s*", answer)]
    return sum(f" {item} " in text for item in items) / len(items)


def choose_candidate(
    log_probs: np.ndarray, num_tokens: np.ndarray | None = None, *, length_normalised: bool = False
) -> int:
    """Index of the most likely candidate, the first among equals.

    Args:
        log_probs: (n,) summed over each candidate's tokens, in nats.
        num_tokens: (n,) tokens of each candidate; needed when `length_normalised`.
        length_normalised: compare means per token, for candidates of unequal length.

    Raises:
        ModelError: a log-probability is NaN, so nothing can be compared.
    """
    values = np.asarray(log_probs, np.float64)
    if np.isnan(values).any():
        raise ModelError(f"candidate log-probabilities hold NaN ({values.tolist()}); check the model's dtype and input")
    if length_normalised:
        if num_tokens is None:
            raise ModelError("length-normalised choice needs the number of tokens of each candidate")
        values = values / np.asarray(num_tokens, np.float64)
    return int(np.argmax(values))


def infeasible(sample: TaskSample, blocks_needed: int, blocks_affordable: int) -> bool:
    """Whether no choice of blocks could show what the answer depends on.

    Args:
        blocks_needed: blocks that hold tokens of needed needles, as planted.
        blocks_affordable: blocks the budget can show raw beside everything else it must hold.
    """
    # Needles stand in different super-blocks, so they never share a block.
    return max(blocks_needed, sample.num_needed) > blocks_affordable
