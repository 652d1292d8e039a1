"""A Working Context in one line of text."""

from __future__ import annotations

import numpy as np

from models.focus.working_context import WorkingContext

LEVELS = "█▓▒░"
"""Raw, LOD1, LOD2, above."""


def picture(wc: WorkingContext, width: int = 72) -> str:
    """The histories from old to new, each column by the finest level that shows a part of it; a bar sets them apart.

    Args:
        wc: any.
        width: columns of all histories together, without the bars; each has at least one.
    """
    sizes = [history.num_blocks + bool(history.tail_tokens) for history in wc.histories]
    parts = []
    for source, (history, blocks) in enumerate(zip(wc.histories, sizes, strict=True)):
        if blocks == 0:
            continue
        columns = max(1, round(width * blocks / sum(sizes)))
        mine = np.flatnonzero(wc.source == source)
        first = (wc.first_block[mine] - history.first_block) * columns // blocks
        stop = -(-(wc.stop_block[mine] - history.first_block) * columns // blocks)
        finest = np.full(columns, len(LEVELS) - 1)
        for lod, start, end in zip(wc.lod[mine].tolist(), first.tolist(), stop.tolist(), strict=True):
            end = max(end, start + 1)
            finest[start:end] = np.minimum(finest[start:end], lod)
        parts.append("".join(LEVELS[lod] for lod in finest))
    return "|".join(parts)
