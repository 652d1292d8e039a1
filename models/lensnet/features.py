"""What LensNet is told of a candidate: cheap signals, none of which reads the horizon or the block with the model.

Every feature is a number near 0 to 1, so that an untrained net is not swamped by one of them; what a corpus makes of
them is standardised by the net (`LensNet.measure`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float32, Int64

FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "lod": "level of detail it stands at now, over 8: 0 where it is raw",
        "log_tokens": "log2 of its tokens, over 16",
        "log_distance": "log2 of 1 + tokens between it and the raw tail, over 24",
        "same_document": "1 where it is of the document that is being read or written",
        "log_document_offset": "log2 of 1 + blocks between its document's beginning and it, over 16",
        "lexical_score": "BM25 of the newest tokens' words, over that of the best block; 0 where they do not find it",
        "lexical_rank": "1 over the rank among blocks found by words",
        "key_match_8": "cosine of its key with the newest 8 tokens as a question",
        "key_match_32": "with the newest 32",
        "key_match_128": "with the newest 128",
        "key_rank": "1 over the rank among blocks found by keys",
        "tail_match_max": "cosine of its key with that of the newest blocks, the highest",
        "tail_match_mean": "with their mean",
        "gist_match": "cosine of its gist with the mean embedding of the newest 32 tokens",
        "suffix_match": "log2 of 1 + how many of the newest tokens stand in it in a row, over 4",
        "pair_overlap": "share of the pairs of neighbours among the newest 64 tokens that it holds",
        "rare_overlap": "share of the newest 32 tokens that it holds, rare ones counting more",
        "is_shown": "1 where the Working Context shows it raw",
        "shown_before": "log2 of 1 + refocuses that showed it, over 8",
    }
)
"""By name, in the order of the columns."""


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """The candidates of one refocus over one history: what a net scores together."""

    blocks: Int64[np.ndarray, " n"]
    """Ascending."""
    features: Float32[np.ndarray, "n F"]
    """Columns as `FEATURES`."""
    keys: Float32[np.ndarray, "n D_key"]
    """Routing keys where they are compared (`KeySpace.place`), of length 1."""
    query: Float32[np.ndarray, " D_key"]
    """The newest 32 tokens as a question, there, of length 1."""

    def __len__(self) -> int:
        return len(self.blocks)

    def column(self, name: str) -> Float32[np.ndarray, " n"]:
        """One feature of all of them."""
        return self.features[:, list(FEATURES).index(name)]

    def with_shown(self, shown: Bool[np.ndarray, " n"]) -> CandidateSet:
        """The same, of another Working Context: `is_shown`, and the level that goes with it."""
        features = self.features.copy()
        names = list(FEATURES)
        features[:, names.index("is_shown")] = shown
        features[:, names.index("lod")] = np.where(shown, 0.0, np.maximum(self.column("lod"), 1 / 8))
        return CandidateSet(self.blocks, features, self.keys, self.query)
