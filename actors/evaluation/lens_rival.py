"""LensNet as a rival of focus: the candidates it scores above 0, the best first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from actors.evaluation.candidate_finder import CandidateFinder
from actors.evaluation.contents import Reading
from actors.focus_signals import Planted
from models.focus.allocators import RankedBlocks
from models.lensnet import LensNet


@dataclass(frozen=True)
class LensRival:
    """Scores what words and keys find in a history, and the newest blocks before its tail."""

    net: LensNet
    finder: CandidateFinder

    def rank(
        self,
        reading: Reading,
        shown_from: int,
        asked: Int64[np.ndarray, " n"] | None = None,
        planted: Planted | None = None,
    ) -> RankedBlocks:
        """Blocks before the raw tail that are worth showing, the best first.

        Args:
            reading: the history.
            shown_from: first block of the tail.
            asked, planted: as of `CandidateFinder.find`.
        """
        candidates = self.finder.find(reading, shown_from, asked=asked, planted=planted)
        scores, blocks = self.net.scores(candidates), candidates.blocks
        order = sorted(range(len(blocks)), key=lambda i: (-scores[i], -blocks[i]))
        return [(int(blocks[i]), 0) for i in order if scores[i] > 0]
