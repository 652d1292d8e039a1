"""Makes single gists of a tree again, with the bits of those that were made first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from actors.compactor import Compactor
from actors.follower import encode_groups
from actors.packing import BLOCKS_PER_WINDOW, windows_of
from actors.plan import CompactionPlan, plan_models
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from models.node_encoder import NodeEncoder
from storage.geometry import NO_TOKEN
from storage.schema import Encoding, check_same
from storage.tree.reader import ContextReader


class GistMaker:
    """The net of one encoding, on this machine."""

    def __init__(self, plan: CompactionPlan, num_threads: int) -> None:
        """Load what the net needs of the LM."""
        self._compactor = Compactor(plan.compactor_spec(num_threads, 1), plan.gistnet)
        self._encoder = NodeEncoder(plan.gistnet)

    def nodes(self, reader: ContextReader, lod: int, first: int, count: int) -> dict[str, np.ndarray]:
        """Nodes `[first, first + count)` of level `lod` >= 1 as stored bytes, from their tokens or children.

        Raises:
            CorruptTreeError: those are damaged themselves.
        """
        if lod > 1:
            return encode_groups(self._encoder, reader, lod, first, count)
        pieces: list[dict[str, np.ndarray]] = []
        block, stop = first, first + count
        while block < stop:
            piece, block = self._window(reader, block, stop)
            pieces.append(piece)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _window(self, reader: ContextReader, block: int, stop: int) -> tuple[dict[str, np.ndarray], int]:
        """Gists from a block on to the end of its window, or to `stop`; and the block behind them."""
        document = reader.document_at(block)
        inside = block - document.first_block
        start = inside // BLOCKS_PER_WINDOW * BLOCKS_PER_WINDOW
        end = min(start + BLOCKS_PER_WINDOW, document.num_blocks)
        tokens = reader.tokens(document.first_block + start, end - start)[0].reshape(-1)
        (window,) = windows_of(document.meta, tokens[tokens != NO_TOKEN])
        (span,) = self._compactor.encode([window])
        behind = min(end, stop - document.first_block)
        arrays = {}
        for name, values in span.arrays.items():
            stored = np.asarray(values)
            rows = len(stored) // span.num_blocks
            arrays[name] = stored[(inside - start) * rows : (behind - start) * rows]
        return arrays, document.first_block + behind


def load_gist_maker(
    what: str, encoding: Encoding, base_lm: BaseLMConfig, gistnet: GistNetConfig, store: StoreConfig, num_threads: int
) -> GistMaker:
    """Who makes an encoding's gists.

    Args:
        what: is to be made anew, for the error.
        encoding: of those gists.
        base_lm, gistnet, store: as configured; a dtype of `auto` is the encoding's.
        num_threads: CPU threads.

    Raises:
        IncompatibleTreeError: the configured net is another one.
        ModelError: a model that is not there.
    """
    if base_lm.dtype == "auto":
        base_lm = replace(base_lm, dtype=encoding.compute_dtype)
    plan = plan_models(base_lm, gistnet, replace(store, gist_dtype=encoding.arrays[0].dtype))
    check_same(
        what,
        encoding,
        plan.encoding,
        "Give the net that made it with --gistnet.path (and --base_lm.dtype); nothing was changed",
    )
    return GistMaker(plan, num_threads)
