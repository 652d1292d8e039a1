"""Measured edits as what LensNet is trained on: sets of candidates, and what was measured of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32

from models.lensnet.features import CandidateSet
from models.lensnet.net import padded
from models.training.lens_losses import LensBatch
from storage.focus.labels import LabelledContext


@dataclass(frozen=True, eq=False)
class MeasuredSet:
    """One Working Context: its candidates, and what blocks are worth to it."""

    uri: str
    """Documents are independent of each other, contexts of one are not."""
    candidates: CandidateSet
    worth: Float32[np.ndarray, "n 2"]
    """By half of the horizon what showing a candidate is worth, nats a token; NaN where that was not measured alone."""
    edits: tuple[tuple[Float32[np.ndarray, " n"], float], ...]
    """Edits of more than one block: which they show (1) and give up (-1), and the gain."""

    @property
    def measured(self) -> Bool[np.ndarray, " n"]:
        """Candidates that were measured alone."""
        return ~np.isnan(self.worth[:, 0])

    @property
    def shows_nothing(self) -> bool:
        """Whether nothing is shown but the newest tokens."""
        return not self.candidates.column("is_shown").any()


def measured_sets(contexts: Sequence[LabelledContext]) -> list[MeasuredSet]:
    """A set for every Working Context that edits were measured of: of one place with nothing and with some shown."""
    return [found for context in contexts for found in _sets_of(context)]


def _sets_of(context: LabelledContext) -> Iterator[MeasuredSet]:
    candidates = CandidateSet(
        context.blocks, context.features, context.keys.astype(np.float32), context.query.astype(np.float32)
    )
    position = {int(block): row for row, block in enumerate(context.blocks)}
    for shown in dict.fromkeys(edit.shown for edit in context.edits):
        worth = np.full((len(candidates), 2), np.nan, np.float32)
        several = []
        for edit in context.edits:
            if edit.shown != shown:
                continue
            if len(edit.added) + len(edit.removed) == 1:
                # What is given up was worth what that lost.
                sign, block = (1, edit.added[0]) if edit.added else (-1, edit.removed[0])
                worth[position[block]] = sign * np.array(edit.gains)
            else:
                signs = np.zeros(len(candidates), np.float32)
                signs[[position[block] for block in edit.added]] = 1
                signs[[position[block] for block in edit.removed]] = -1
                several.append((signs, float(np.mean(edit.gains))))
        is_shown = np.isin(context.blocks, shown)
        yield MeasuredSet(context.uri, candidates.with_shown(is_shown), worth, tuple(several))


def batch_of(sets: Sequence[MeasuredSet], bound: float = float("inf")) -> LensBatch:
    """Sets of different sizes as one batch.

    Args:
        sets: at least one.
        bound: what is worth more, or less, counts as so much, nats a token: a net cannot say more.
    """
    features, keys, query, there = padded([found.candidates for found in sets])
    longest = there.shape[1]
    worth = torch.zeros(len(sets), longest)
    measured = torch.zeros(len(sets), longest, dtype=torch.bool)
    owners, signs, gains = [], [], []
    for row, found in enumerate(sets):
        n = len(found.candidates)
        measured[row, :n] = torch.from_numpy(found.measured)
        worth[row, :n] = torch.from_numpy(np.nan_to_num(found.worth.mean(axis=1))).clamp(-bound, bound)
        for edit, gain in found.edits:
            owners.append(row)
            signs.append(np.pad(edit, (0, longest - n)))
            gains.append(min(max(gain, -bound), bound))
    return LensBatch(
        features,
        keys,
        query,
        there,
        worth,
        measured,
        torch.tensor(owners, dtype=torch.int64),
        torch.from_numpy(np.stack(signs)) if signs else torch.zeros(0, longest),
        torch.tensor(gains, dtype=torch.float32),
    )


def split_documents(
    sets: Sequence[MeasuredSet], share: float, seed: int
) -> tuple[list[MeasuredSet], list[MeasuredSet]]:
    """Sets to train on, and sets of other documents that are held back."""
    documents = sorted({found.uri for found in sets})
    np.random.default_rng(seed).shuffle(documents)
    held_back = set(documents[: max(1, round(share * len(documents)))])
    return [s for s in sets if s.uri not in held_back], [s for s in sets if s.uri in held_back]
