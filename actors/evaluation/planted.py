"""Planted readers: a tree some of whose super-blocks hold other text, without a write to the tree.

Replaced super-blocks are encoded by the tree's own nets, and so is every node above them, in the tree's dtype. A
needle thus costs one window and one node a level, however long the history it is planted in.

The price: a replaced super-block is a window of its own. Where a document's windows begin at super-blocks the result
equals, bit for bit, a tree that was made of the replaced text. Elsewhere the replaced blocks do not see the text
before them in their document's window, and the blocks after them in that window still speak of the text that was
there. Lexical indexes know nothing of planted text: `PlantedReader.planted_blocks` tells whose hits are stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8, UInt32

from actors.compactor import Compactor
from actors.evaluation.states import ReaderOver
from actors.packing import BLOCKS_PER_WINDOW, WINDOW_TOKENS, Window
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import IncompatibleTreeError, InvalidWriteError
from models.node_encoder import NodeEncoder
from storage.codec import Values, decode_array, encode_arrays, encoded_pieces
from storage.contract import BlockState, DocumentMeta, SpanWrite, TreeReader, Version
from storage.geometry import NO_TOKEN
from storage.schema import GISTS, KEYS, Encoding


@dataclass(frozen=True, eq=False)
class PlantedSuperBlock:
    """What stands in a super-block's place.

    Raises:
        InvalidWriteError: other shapes or dtypes, or unused slots that hold tokens.
    """

    tokens: UInt32[np.ndarray, "32 32"]
    """A block a row, `NO_TOKEN` in unused slots."""
    num_tokens: UInt8[np.ndarray, " 32"]
    """Real tokens of each block: those of the super-block it replaces, so that no place of the timeline moves."""
    arrays: Mapping[str, Values]
    """LOD1 gists and keys by name, encoded as the tree stores them, or floats: `(32 * rows_per_node, width)`."""

    def __post_init__(self) -> None:
        tokens, counts = self.tokens, self.num_tokens
        if tokens.dtype != np.uint32 or tokens.shape != (BLOCKS_PER_WINDOW, K):
            raise InvalidWriteError(
                f"a planted super-block's tokens are uint32({BLOCKS_PER_WINDOW}, {K}), not {tokens.dtype}{tokens.shape}"
            )
        if counts.dtype != np.uint8 or counts.shape != (BLOCKS_PER_WINDOW,):
            raise InvalidWriteError(
                f"a planted super-block's counts are uint8({BLOCKS_PER_WINDOW},), not {counts.dtype}{counts.shape}"
            )
        if not np.array_equal(tokens != NO_TOKEN, np.arange(K) < counts[:, None]):
            raise InvalidWriteError("a planted super-block's unused slots, and only those, must hold NO_TOKEN")


@dataclass(frozen=True, eq=False)
class PlantedNodes:
    """Nodes of one level that are served in place of the stored ones."""

    lod: int
    indices: Int64[np.ndarray, " n"]
    """Ascending."""
    arrays: Mapping[str, torch.Tensor]
    """`(n, rows_per_node, width)` each, decoded: what a reader gives."""

    @classmethod
    def of(cls, encoding: Encoding, lod: int, indices: np.ndarray, arrays: Mapping[str, Values]) -> PlantedNodes:
        """Nodes as a tree of that encoding would hold them; `arrays` as `storage.codec.encode_arrays` takes them.

        Raises:
            InvalidWriteError: arrays the encoding does not have, of other shapes, or not finite.
        """
        stored = encode_arrays(encoding.arrays, arrays, len(indices))
        decoded = {}
        for spec in encoding.arrays:
            # Copied: bytes that came from another process cannot be written to, which tensors must be.
            pieces = {s.name: stored[s.name].reshape(len(indices), s.rows_per_node, -1).copy() for s in spec.stored()}
            decoded[spec.name] = decode_array(spec, pieces)
        return cls(lod, indices, decoded)

    def patch(self, name: str, nodes: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """Put planted rows over those of `nodes`, `(len(indices), rows_per_node, width)`, in place."""
        hits, places = _matches(self.indices, indices)
        if len(hits):
            planted = self.arrays[name][torch.from_numpy(places)]
            nodes[torch.from_numpy(hits).to(nodes.device)] = planted.to(nodes)
        return nodes


class PlantedReader(ReaderOver):
    """Some super-blocks hold other text; version, documents, prefix sums and tail are those beneath.

    Documents keep their provenance, too: the content hash of one with planted text is that of the text it had.
    """

    def __init__(
        self, reader: TreeReader, replaced: Mapping[int, PlantedSuperBlock], ancestors: Sequence[PlantedNodes] = ()
    ) -> None:
        """Serve `replaced` (by super-block) and the nodes above them; `plant` makes both.

        Args:
            reader: belongs to the caller, who closes it; many planted readers may share it.
            replaced: by index of the super-block.
            ancestors: every node over a replaced super-block that the version holds, LOD2 and up.

        Raises:
            NodeMissingError: a super-block outside the version.
            InvalidWriteError: counts that differ from the original's, arrays that do not fit the tree's encoding,
                or other ancestors than those there are.
        """
        super().__init__(reader)
        order = sorted(replaced)
        for index in order:
            # Not `tokens`: what curation pruned counts on the timeline, and can be planted over all the same.
            blocks = np.arange(index * BLOCKS_PER_WINDOW, (index + 1) * BLOCKS_PER_WINDOW + 1)
            if index < 0 or blocks[-1] > reader.version.num_blocks:
                reader.tokens(index * BLOCKS_PER_WINDOW, BLOCKS_PER_WINDOW)  # says what is missing
            counts = np.diff(reader.tokens_before(blocks))
            if not np.array_equal(counts, replaced[index].num_tokens):
                raise InvalidWriteError(
                    f"super-block {index} cannot be replaced: its blocks hold {counts.tolist()} tokens, what is to "
                    f"stand there {replaced[index].num_tokens.tolist()}; give every block as many as it has"
                )
        self._tokens = np.array([replaced[index].tokens for index in order], np.uint32).reshape(-1, K)
        blocks = _blocks_of(reader.version.encoding, replaced)
        self._blocks = blocks.indices
        self._levels = {nodes.lod: nodes for nodes in (blocks, *ancestors)}
        wanted = dict(_ancestor_indices(reader.version, order))
        found = {nodes.lod: nodes.indices for nodes in ancestors}
        if found.keys() != wanted.keys() or not all(np.array_equal(found[lod], wanted[lod]) for lod in wanted):
            raise InvalidWriteError(
                f"over super-blocks {order} the version has nodes {_listed(wanted)}, and {_listed(found)} came with "
                "them; plant() makes those there are"
            )

    @property
    def planted_blocks(self) -> Int64[np.ndarray, " n"]:
        """Blocks whose text is planted, ascending."""
        return self._blocks

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of consecutive blocks (`TreeReader.tokens`)."""
        tokens, counts = self._reader.tokens(first_block, num_blocks)
        hits, places = _matches(self._blocks, np.arange(first_block, first_block + num_blocks))
        tokens[hits] = self._tokens[places]
        return tokens, counts

    def block_states(self, first_block: int, num_blocks: int) -> np.ndarray:
        """States of consecutive blocks as beneath, planted ones whole: `(num_blocks,)` int8."""
        states = super().block_states(first_block, num_blocks)
        hits, _ = _matches(self._blocks, np.arange(first_block, first_block + num_blocks))
        states[hits] = BlockState.WHOLE
        return states

    def read(self, name: str, lod: int, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Nodes of a level in the order asked for (`TreeReader.read`): one read beneath, planted rows put over it."""
        return self._patched(name, lod, self._reader.read(name, lod, indices), indices)

    def read_node(self, name: str, lod: int, index: int) -> torch.Tensor:
        """One node (`TreeReader.read_node`)."""
        return self._patched(name, lod, self._reader.read_node(name, lod, index)[None], [index])[0]

    def read_group(self, name: str, lod: int, group: int) -> torch.Tensor:
        """A sibling group (`TreeReader.read_group`)."""
        nodes = self._reader.read_group(name, lod, group)
        return self._patched(name, lod, nodes, np.arange(group * K, group * K + len(nodes)))

    def _patched(self, name: str, lod: int, nodes: torch.Tensor, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        planted = self._levels.get(lod)
        return nodes if planted is None else planted.patch(name, nodes, np.asarray(indices, np.int64).reshape(-1))


def plant(
    reader: TreeReader, compactor: Compactor, node_encoder: NodeEncoder, replacements: Mapping[int, np.ndarray]
) -> PlantedReader:
    """A reader in which super-blocks hold other tokens, encoded as if the tree had been made of them.

    Args:
        reader: the tree, made by the nets of `compactor` and `node_encoder`; itself planted, if need be.
        compactor: encodes each replaced super-block as a full window.
        node_encoder: encodes the nodes above.
        replacements: by super-block, its 1,024 token ids, in any shape.

    Raises:
        InvalidWriteError: not 1,024 tokens, or a super-block with a short block.
        IncompatibleTreeError: the compactor makes other arrays than the tree holds.
        ModelError: token ids the model does not have.
        NodeMissingError: a super-block outside the version.
    """
    replaced = encode_replacements(reader, compactor, replacements)
    return plant_encoded(reader, node_encoder, replaced)


def encode_replacements(
    reader: TreeReader, compactor: Compactor, replacements: Mapping[int, np.ndarray]
) -> dict[int, PlantedSuperBlock]:
    """The expensive half of `plant`, one window each; arguments and errors are its.

    What comes out does not depend on the place it is planted at: a grid over depths encodes a text once.
    """
    for index in replacements:
        _, counts = reader.tokens(index * BLOCKS_PER_WINDOW, BLOCKS_PER_WINDOW)
        if counts.min() < K:
            raise InvalidWriteError(
                f"super-block {index} cannot be replaced: a document ends in it, its block {counts.argmin()} holds "
                f"{counts.min()} tokens; choose one whose 32 blocks are full"
            )
    spans = compactor.encode([_window(index, tokens) for index, tokens in replacements.items()])
    return {
        index: PlantedSuperBlock(span.tokens, span.num_tokens, _checked(reader.version.encoding, span))
        for index, span in zip(replacements, spans, strict=True)
    }


def plant_encoded(
    reader: TreeReader, node_encoder: NodeEncoder, replaced: Mapping[int, PlantedSuperBlock]
) -> PlantedReader:
    """The cheap half of `plant`: encode the nodes above, each once however many replaced super-blocks it covers.

    Raises:
        InvalidWriteError, NodeMissingError: as `PlantedReader`.
        ModelError: a net of another shape than the tree's.
    """
    encoding = reader.version.encoding
    below = _blocks_of(encoding, replaced)
    ancestors = []
    for lod, indices in _ancestor_indices(reader.version, sorted(replaced)):
        children = (indices[:, None] * K + np.arange(K)).reshape(-1)
        gists, keys = (
            below.patch(name, reader.read(name, lod - 1, children), children)
            .detach()
            .to("cpu", torch.float32)
            .unflatten(0, (len(indices), K))
            .numpy()
            for name in (GISTS, KEYS)
        )
        nodes = node_encoder.encode_nodes(gists, keys.reshape(len(indices), K, -1), lod)
        below = PlantedNodes.of(encoding, lod, indices, {GISTS: nodes.gists, KEYS: nodes.keys})
        ancestors.append(below)
    return PlantedReader(reader, replaced, ancestors)


def _window(index: int, tokens: np.ndarray) -> Window:
    tokens = np.asarray(tokens)
    if tokens.size != WINDOW_TOKENS or tokens.dtype.kind not in "iu":
        raise InvalidWriteError(
            f"super-block {index} is replaced by {WINDOW_TOKENS} token ids, not by {tokens.dtype}{tokens.shape}"
        )
    name = f"planted in super-block {index}"
    return Window(DocumentMeta(name, name), 0, tokens.reshape(-1).astype(np.uint32), last=False)


def _checked(encoding: Encoding, span: SpanWrite) -> Mapping[str, Values]:
    for spec in encoding.arrays:
        if encoded_pieces(spec, span.arrays) is None:
            raise IncompatibleTreeError(
                f"the tree stores {spec.name!r} as {spec.dtype}, the compactor makes "
                f"{ {name: str(values.dtype) for name, values in span.arrays.items()} }; use the tree's own encoding"
            )
    return span.arrays


def _blocks_of(encoding: Encoding, replaced: Mapping[int, PlantedSuperBlock]) -> PlantedNodes:
    """LOD1 of all replaced super-blocks."""
    order = sorted(replaced)
    if not order:
        return PlantedNodes(1, np.empty(0, np.int64), {})
    parts = [encode_arrays(encoding.arrays, replaced[index].arrays, BLOCKS_PER_WINDOW) for index in order]
    stored = {s.name: np.concatenate([part[s.name] for part in parts]) for s in encoding.stored()}
    blocks = np.array(order)[:, None] * BLOCKS_PER_WINDOW + np.arange(BLOCKS_PER_WINDOW)
    return PlantedNodes.of(encoding, 1, blocks.reshape(-1), stored)


def _ancestor_indices(version: Version, super_blocks: Sequence[int]) -> Iterable[tuple[int, np.ndarray]]:
    """`(lod, indices)` of the nodes over super-blocks that the version holds, LOD2 first.

    Upper levels may lag behind the blocks: what is not stored yet is not planted.
    """
    indices = np.array(super_blocks, np.int64)
    for lod in range(2, version.max_lod + 1):
        indices = indices[indices < version.num_nodes(lod)]
        if len(indices) == 0:
            return
        yield lod, indices
        indices = np.unique(indices // K)


def _matches(planted: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the nodes that both hold: their positions in `wanted`, and in `planted`, which is ascending."""
    if len(planted) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    places = np.searchsorted(planted, wanted).clip(max=len(planted) - 1)
    hits = np.flatnonzero(planted[places] == wanted)
    return hits, places[hits]


def _listed(nodes: Mapping[int, np.ndarray]) -> str:
    return "; ".join(f"LOD{lod} {indices.tolist()}" for lod, indices in nodes.items()) or "none"
