"""A tree in memory: the same contract, with tensors that keep their gradients.

For training (losses flow from a Working Context back into the gists it read) and for tests. Nothing is encoded:
`read` returns what was written, whatever its float dtype and device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import InvalidWriteError, NodeMissingError
from storage.codec import Values, check_names, decode_array, encoded_pieces
from storage.contract import Ack, DocumentInfo, DocumentMark, DocumentMeta, SpanWrite, Tail, Version
from storage.schema import ArraySpec, Encoding
from storage.tree.accept import accept_spans, accept_tail, ended_document
from storage.tree.documents import OpenDocument
from storage.tree.levels import stored_prefix

_Level = dict[str, list[torch.Tensor]]


class MemoryTree:
    """Implements `TreeWriter`; `reader` gives pinned `TreeReader`s. Not thread-safe."""

    def __init__(self, encoding: Encoding, name: str = "memory") -> None:
        """An empty tree whose levels hold the arrays of `encoding`."""
        self.encoding = encoding
        self.name = name
        self._blocks: list[dict[str, np.ndarray]] = []
        self._levels: list[_Level] = []
        self._documents: dict[str, OpenDocument] = {}
        self._cut: list[OpenDocument] = []
        self._open: OpenDocument | None = None
        self._version = Version(name, "main", 1, encoding, 0, ())

    def version(self) -> Version:
        """The newest version."""
        return self._version

    def open_document(self) -> DocumentMeta | None:
        """The document that is still growing."""
        return self._open.meta if self._open else None

    def _find(self, key: str) -> OpenDocument | None:
        document = self._documents.get(key)
        return document.copy() if document else None

    def marks(self, keys: Sequence[str]) -> dict[str, DocumentMark]:
        """High-water marks of those documents that are known."""
        return {key: self._documents[key].mark() for key in keys if key in self._documents}

    def _advance(self, num_tokens: int, counts: tuple[int, ...]) -> None:
        self._version = Version(self.name, "main", self._version.seq + 1, self.encoding, num_tokens, counts)

    def append(self, spans: Sequence[SpanWrite], request_id: str = "") -> Ack:
        """Store spans (`TreeWriter.append`); tensors are kept with their gradients."""
        del request_id
        accepted = accept_spans(spans, self.name, self._version.num_blocks, self._open, self._find)
        if not accepted.spans:
            return Ack(self._version, skipped_blocks=accepted.skipped_blocks)
        gists = [_checked(self.encoding, span.arrays, span.num_blocks) for span in accepted.spans]
        blocks = accepted.blocks(self._version.num_tokens)
        for arrays in gists:
            self._extend(1, arrays)
        self._blocks.append(blocks)
        self._documents.update({document.meta.key: document for document in accepted.documents})
        self._open = accepted.open_document
        counts = (self._version.num_blocks + accepted.num_blocks, *self._version.level_counts[1:])
        self._advance(self._version.num_tokens + int(blocks["num_tokens"].sum(dtype=np.int64)), counts)
        return Ack(self._version, new_blocks=accepted.num_blocks, skipped_blocks=accepted.skipped_blocks)

    def append_tail(self, document: DocumentMeta, token_offset: int, tokens: np.ndarray) -> Ack:
        """Keep raw tokens of the open document (`TreeWriter.append_tail`)."""
        known = self._find(document.key)
        num_blocks = self._version.num_blocks
        target = accept_tail(document, token_offset, tokens, self.name, num_blocks, self._open, known)
        if target is not None:
            self._documents[document.key] = self._open = target
            self._advance(self._version.num_tokens, self._version.level_counts)
        return Ack(self._version)

    def close_document(self, key: str, *, complete: bool = False) -> Ack:
        """End the open document (`TreeWriter.close_document`)."""
        document = ended_document(key, self.name, self._open, complete=complete)
        if complete:
            self._documents[key] = document
        else:
            del self._documents[key]
            self._cut.append(document)
        self._open = None
        self._advance(self._version.num_tokens, self._version.level_counts)
        return Ack(self._version)

    def put_nodes(self, lod: int, first: int, arrays: Mapping[str, Values]) -> Ack:
        """Store nodes of a level above the blocks (`TreeWriter.put_nodes`)."""
        if lod < 2:
            raise InvalidWriteError(f"put_nodes takes LOD2 and above, got LOD{lod}; blocks go through append")
        counts = self._version.level_counts
        num_nodes, stored = stored_prefix(self.encoding, self._version.num_blocks, counts, lod, first, arrays)
        if stored == num_nodes:
            return Ack(self._version)
        checked = _checked(self.encoding, arrays, num_nodes)
        self._extend(lod, {name: values[stored:] for name, values in checked.items()})
        grown = list(counts) + [0] * (lod - len(counts))
        grown[lod - 1] += num_nodes - stored
        self._advance(self._version.num_tokens, tuple(grown))
        return Ack(self._version, new_nodes=num_nodes - stored)

    def _extend(self, lod: int, arrays: Mapping[str, torch.Tensor]) -> None:
        while len(self._levels) < lod:
            self._levels.append({spec.name: [] for spec in self.encoding.arrays})
        for name, values in arrays.items():
            self._levels[lod - 1][name].append(values)

    def flush(self) -> Ack:
        """Nothing waits in memory."""
        return Ack(self._version)

    def reader(self) -> MemoryReader:
        """A reader pinned to the newest version."""
        documents = [*self._cut, *self._documents.values()]
        tail = Tail(self._open.meta, self._open.tail) if self._open and len(self._open.tail) else None
        return MemoryReader(self, self._blocks[:], self._levels, documents, tail)

    def close(self) -> None:
        """Nothing to give up; the tree stays readable."""


class MemoryReader:
    """Implements `TreeReader` over a `MemoryTree`."""

    def __init__(
        self,
        tree: MemoryTree,
        blocks: list[dict[str, np.ndarray]],
        levels: list[_Level],
        documents: list[OpenDocument],
        tail: Tail | None,
    ) -> None:
        """Pin the newest version; made by `MemoryTree.reader`."""
        self._tree = tree
        self._version = tree.version()
        self._columns = {
            name: np.concatenate([run[name] for run in blocks]) if blocks else np.empty((0, width), dtype)
            for name, width, dtype in (
                ("tokens", K, np.uint32),
                ("tokens_before", 1, np.int64),
                ("num_tokens", 1, np.uint8),
            )
        }
        self._levels = [{name: list(parts) for name, parts in level.items()} for level in levels]
        self._joined: dict[tuple[str, int], torch.Tensor] = {}
        infos = [DocumentInfo(d.meta, d.first_block, d.num_blocks, d.num_tokens, d.state) for d in documents]
        self._documents = sorted((i for i in infos if i.num_blocks), key=lambda info: info.first_block)
        self._tail = tail

    @property
    def version(self) -> Version:
        """The version this reader is pinned to."""
        return self._version

    def _check(self, what: str, first: int, last: int, count: int) -> None:
        if first < 0 or last >= count:
            raise NodeMissingError(f"{what} {first} to {last} were asked for; the version has {count}")

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of consecutive blocks (`TreeReader.tokens`)."""
        self._check("blocks", first_block, first_block + num_blocks - 1, self._version.num_blocks)
        chosen = slice(first_block, first_block + num_blocks)
        return self._columns["tokens"][chosen].copy(), self._columns["num_tokens"][chosen, 0].copy()

    def tokens_before(self, blocks: np.ndarray) -> np.ndarray:
        """Real tokens of the timeline before each block (`TreeReader.tokens_before`)."""
        blocks = np.asarray(blocks, np.int64)
        if blocks.size:
            self._check("blocks", int(blocks.min()), int(blocks.max()), self._version.num_blocks + 1)
        return np.append(self._columns["tokens_before"][:, 0], self._version.num_tokens)[blocks]

    def read(self, name: str, lod: int, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Nodes of a level, with gradients (`TreeReader.read`)."""
        spec = self._version.encoding.spec(name)
        if lod < 1:
            raise NodeMissingError(f"LOD{lod} holds no array {name!r}; arrays begin at LOD1, tokens are LOD0")
        # torch takes no negative strides, so a reversed view is copied.
        wanted = np.ascontiguousarray(indices, np.int64).reshape(-1)
        if len(wanted) == 0:
            return torch.empty(0, spec.rows_per_node, spec.width)
        self._check(f"LOD{lod} nodes", int(wanted.min()), int(wanted.max()), self._version.num_nodes(lod))
        if (name, lod) not in self._joined:
            self._joined[name, lod] = torch.cat(self._levels[lod - 1][name])
        joined = self._joined[name, lod]
        return joined[torch.from_numpy(wanted).to(joined.device)]

    def read_node(self, name: str, lod: int, index: int) -> torch.Tensor:
        """One node (`TreeReader.read_node`)."""
        return self.read(name, lod, [index])[0]

    def read_group(self, name: str, lod: int, group: int) -> torch.Tensor:
        """A sibling group (`TreeReader.read_group`)."""
        first = group * K
        count = min(K, self._version.num_nodes(lod) - first)
        self._check(f"LOD{lod} nodes", first, first + max(count, 1) - 1, self._version.num_nodes(lod))
        return self.read(name, lod, np.arange(first, first + count))

    def documents(self) -> list[DocumentInfo]:
        """The version's documents in timeline order."""
        return list(self._documents)

    def document_at(self, block: int) -> DocumentInfo:
        """The document a block belongs to (`TreeReader.document_at`)."""
        self._check("blocks", block, block, self._version.num_blocks)
        return next(d for d in self._documents if d.first_block <= block < d.first_block + d.num_blocks)

    def tail(self) -> Tail | None:
        """The open document's unfilled tail, when this version is still the newest (`TreeReader.tail`)."""
        return self._tail if self._tree.version() == self._version else None

    def close(self) -> None:
        """Let go of the tensors."""
        self._joined.clear()


def _decoded(spec: ArraySpec, pieces: Mapping[str, np.ndarray]) -> torch.Tensor:
    return decode_array(spec, {name: piece.copy() for name, piece in pieces.items()})


def _checked(encoding: Encoding, arrays: Mapping[str, Values], num_nodes: int) -> dict[str, torch.Tensor]:
    check_names(encoding.arrays, arrays)
    checked = {}
    for spec in encoding.arrays:
        pieces = encoded_pieces(spec, arrays)
        values = torch.as_tensor(arrays[spec.name]) if pieces is None else _decoded(spec, pieces)
        if not values.is_floating_point() or values.numel() != num_nodes * spec.rows_per_node * spec.width:
            raise InvalidWriteError(
                f"array {spec.name!r} is {values.dtype}{tuple(values.shape)}; {num_nodes} nodes need floats of "
                f"({num_nodes * spec.rows_per_node}, {spec.width})"
            )
        if not bool(torch.isfinite(values.detach()).all()):
            raise InvalidWriteError(f"array {spec.name!r} holds values that are not finite; check the GistNet")
        checked[spec.name] = values.reshape(num_nodes, spec.rows_per_node, spec.width)
    return checked
