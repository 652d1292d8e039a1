"""Measured edits with a rule that a net can find: what words find is worth something, the rest nothing."""

from __future__ import annotations

import numpy as np

from models.lensnet.features import FEATURES
from storage.focus.labels import LabelledContext, LabelledEdit

KEY_DIM = 4
WORTH = 0.2
"""Of a block that words find, nats a token, times its `lexical_score`."""


def labelled_context(number: int, num_blocks: int = 10, noise: float = 0.02) -> LabelledContext:
    """Ten candidates, of which all but the last were measured alone, two together, one collapsed and one swapped."""
    rng = np.random.default_rng(number)
    features = rng.random((num_blocks, len(FEATURES)), np.float32)
    features[:, list(FEATURES).index("is_shown")] = 0
    worth = WORTH * (features[:, list(FEATURES).index("lexical_score")] - 0.5)
    blocks = np.arange(num_blocks, dtype=np.int64) * 3 + number

    def edit(shown: list[int], added: list[int], removed: list[int]) -> LabelledEdit:
        def nll(positions: list[int]) -> tuple[float, float]:
            a, b = 2.0 - worth[positions].sum() + noise * rng.standard_normal(2)
            return float(a), float(b)

        after = [p for p in (*shown, *added) if p not in removed]

        def names(positions: list[int]) -> tuple[int, ...]:
            return tuple(int(blocks[p]) for p in positions)

        return LabelledEdit(names(shown), names(added), names(removed), nll(shown), nll(after))

    edits = [edit([], [p], []) for p in range(num_blocks - 1)]
    edits += [edit([], [0, 1], []), edit([0, 1], [], [1]), edit([0, 1], [2], [0])]
    return LabelledContext(
        "c", 1, number, f"doc{number // 2}", 0, 200, 190, blocks, features,
        rng.standard_normal((num_blocks, KEY_DIM)).astype(np.float16),
        rng.standard_normal(KEY_DIM).astype(np.float16), tuple(edits),
    )  # fmt: skip
