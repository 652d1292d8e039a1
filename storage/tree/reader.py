"""Reads one pinned version of a context on disk.

Sealed nodes come from memory-mapped segments, recent ones from the journal. The reader holds no SQLite snapshot
(that would grow the WAL for as long as it lives): counts and extents are taken once, and a journal row that has been
sealed since is found in its segment. Nodes are written once, so the version cannot change under the reader.
"""

from __future__ import annotations

import functools
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, NodeMissingError, StorageError
from storage.codec import decode_array
from storage.contract import DocumentInfo, PrunedSpan, Tail, Version
from storage.geometry import NO_TOKEN
from storage.schema import ArraySpec, Encoding
from storage.tree import catalogue, journal
from storage.tree.documents import document_info_at, document_infos, open_document
from storage.tree.journal import Level, Run
from storage.tree.levels import level_counts
from storage.tree.lineage import LIVE, Branch, Lineage, Part, branches, check_head, find_branch, load_lineage
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.states import PRUNED, as_spans, block_states, pruned_spans
from storage.tree.stored_nodes import Extent, StoredNodes

CACHED_RUNS = 256
"""Journal runs kept parsed: at most 32 nodes each, about 20 MB at d = 576 with keys."""

_NO_STOP = 2**63 - 1


class ContextReader:
    """Implements `TreeReader` on disk. Cheap to open; use one a thread."""

    def __init__(
        self,
        folder: Path,
        name: str,
        branch: str = "main",
        seq: int | None = None,
        *,
        encoding_id: int | None = None,
    ) -> None:
        """Pin a version.

        Args:
            folder: the context's folder.
            name: the context's name.
            branch: whose tip to pin.
            seq: pin this version instead, of whatever branch.
            encoding_id: read this encoding, which may be under construction, with the levels it has by now.

        Raises:
            StorageError: no such branch or version.
            CorruptTreeError, IncompatibleTreeError: see `catalogue.connect`.
        """
        self.folder = folder
        self._connection = catalogue.connect(folder, read_only=True)
        try:
            with (
                catalogue.translated(folder / catalogue.CATALOGUE_FILE),
                catalogue.snapshot(self._connection) as db,
            ):
                self._lineage, self._encoding_id, self._version = _load_version(db, name, branch, seq)
                if encoding_id is not None and encoding_id != self._encoding_id:
                    self._version = _with_encoding(db, self._version, self._lineage.branch, encoding_id)
                    self._encoding_id = encoding_id
        except BaseException:
            self._connection.close()
            raise
        self._parts_of: dict[tuple[int, int, int], list[Part]] = {}
        self._nodes: dict[tuple[str, int], StoredNodes] = {}
        self._specs: dict[tuple[str, int], tuple[ArraySpec, list[StoredNodes]]] = {}
        self._cached_run = functools.lru_cache(maxsize=CACHED_RUNS)(self._load_run)

    @property
    def version(self) -> Version:
        """The version this reader is pinned to."""
        return self._version

    @property
    def lineage(self) -> Lineage:
        """The version's branch and its ancestors."""
        return self._lineage

    @property
    def encoding_id(self) -> int:
        """The catalogue's number of the encoding that is read."""
        return self._encoding_id

    def check_kept(self) -> None:
        """Raise when the version is not in the catalogue any more.

        Raises:
            StorageError: it was collected.
        """
        with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
            row = self._connection.execute("SELECT 1 FROM commits WHERE seq = ?", (self._version.seq,)).fetchone()
        if row is None:
            raise StorageError(
                f"version {self._version.seq} of context {self._version.context!r} was collected; tag a version, or "
                "hold a lease on it, to keep it"
            )

    # -- where nodes are -----------------------------------------------------------------------------------------

    def extents(self, level: Level) -> list[Extent]:
        """A level's sealed nodes, in order."""
        found = []
        with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
            for part in self._parts(level):
                rows = self._connection.execute(
                    "SELECT e.first, e.count, s.folder FROM extents e JOIN segments s USING (segment_id) "
                    "WHERE branch_id = ? AND encoding_id = ? AND lod = ? AND e.first < ? ORDER BY e.first",
                    (*part.level.key, _NO_STOP if part.stop is None else part.stop),
                )
                found += [
                    Extent(first, count, min(first + count, part.stop or _NO_STOP), self.folder / SEGMENT_FOLDER / name)
                    for first, count, name in rows
                ]
        return found

    def run(self, level: Level, index: int) -> Run | None:
        """The journal's run that holds a node, or None when the journal does not hold it (any more)."""
        part = next(part for part in reversed(self._parts(level)) if part.first <= index)
        with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
            found = journal.find(self._connection, part.level, index)
            run = None if found is None else self._cached_run(part.level, found[0])
        if run is not None and not run.first <= index < run.first + run.count:
            raise CorruptTreeError(
                f"the journal's index and its row of LOD{level.lod} nodes {run.first}-{run.first + run.count - 1} do "
                "not agree. Run `tree verify` and restore the catalogue from a backup."
            )
        return run

    def _parts(self, level: Level) -> list[Part]:
        """Who holds which nodes of a level of this branch."""
        parts = self._parts_of.get(level.key)
        if parts is None:
            if level.encoding_id == journal.BLOCKS:
                parts = self._lineage.block_parts()
            else:
                parts = self._lineage.parts(level.encoding_id, self._version.encoding, level.lod)
            self._parts_of[level.key] = parts
        return parts

    def _load_run(self, level: Level, row_id: int) -> Run | None:
        return journal.load(self._connection, level, row_id)

    def _blocks(self, name: str) -> StoredNodes:
        nodes = self._nodes.get((name, 0))
        if nodes is None:
            level = self._lineage.branch.block_level()
            stored = next(s for s in level.layout if s.name == name)
            nodes = self._nodes[name, 0] = StoredNodes(self, level, stored, self._version.num_blocks)
        return nodes

    def _level(self, name: str, lod: int) -> tuple[ArraySpec, list[StoredNodes]]:
        found = self._specs.get((name, lod))
        if found is None:
            if lod < 1:
                raise NodeMissingError(f"LOD{lod} holds no array {name!r}; arrays begin at LOD1, tokens are LOD0")
            spec = self._version.encoding.spec(name)
            level = self._lineage.branch.level(self._encoding_id, self._version.encoding, lod)
            num_nodes = self._version.num_nodes(lod)
            found = spec, [StoredNodes(self, level, stored, num_nodes) for stored in spec.stored()]
            self._specs[name, lod] = found
        return found

    # -- TreeReader ----------------------------------------------------------------------------------------------

    def tokens(self, first_block: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of consecutive blocks (`TreeReader.tokens`)."""
        tokens = self._blocks("tokens").nodes(first_block, num_blocks).reshape(num_blocks, K)
        counts = self._blocks("num_tokens").nodes(first_block, num_blocks).reshape(num_blocks)
        if self._states is not None:
            pruned = np.isin(self._states[first_block : first_block + num_blocks], PRUNED)
            tokens[pruned], counts[pruned] = NO_TOKEN, 0
        if ((tokens[:, 0] == NO_TOKEN) & (counts > 0)).any():
            raise StorageError(
                f"version {self._version.seq} of context {self._version.context!r} was read without a lease, and "
                "tokens that curation pruned since were collected. Open the newest version"
            )
        return tokens, counts

    @functools.cached_property
    def _states(self) -> np.ndarray | None:
        version = self._version
        with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
            return block_states(self._connection, self._lineage, version.seq, version.num_blocks)

    def block_states(self, first_block: int, num_blocks: int) -> np.ndarray:
        """`BlockState` of consecutive blocks: `(num_blocks,)` int8.

        Raises:
            NodeMissingError: blocks outside the version.
        """
        if first_block < 0 or num_blocks < 0 or first_block + num_blocks > self._version.num_blocks:
            raise NodeMissingError(
                f"blocks {first_block} to {first_block + num_blocks - 1} were asked for; version {self._version.seq} "
                f"of context {self._version.context!r} has {self._version.num_blocks}"
            )
        if self._states is None:
            return np.zeros(num_blocks, np.int8)
        return self._states[first_block : first_block + num_blocks].copy()

    def pruned_spans(self, first_block: int, num_blocks: int) -> tuple[PrunedSpan, ...]:
        """What is not whole of consecutive blocks, counted from the first of them."""
        if self._states is None:
            return ()
        version = self._version
        with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
            return pruned_spans(
                self._connection, self._lineage, version.seq, version.num_blocks, first_block, num_blocks
            )

    def require_whole(self, first_block: int, num_blocks: int, what: str, otherwise: str = "") -> None:
        """Refuse to go on where tokens were pruned.

        Raises:
            StorageError: saying where, what needs them, and what to do, `otherwise` included.
        """
        pruned = as_spans(np.isin(self.block_states(first_block, num_blocks), PRUNED), first_block)
        if pruned:
            first, count = pruned[0]
            where = f"blocks {first}-{first + count - 1}"
            if len(pruned) > 1:
                others = sum(count for _, count in pruned[1:])
                where += f" and {others:,} others, up to block {sum(pruned[-1]) - 1},"
            raise StorageError(
                f"{what} needs all tokens, and curation took those of {where} of context {self._version.context!r} "
                f"away (version {self._version.seq}). `curate restore` brings them back while they are kept{otherwise}"
            )

    def tokens_before(self, blocks: np.ndarray) -> np.ndarray:
        """Real tokens of the timeline before each block (`TreeReader.tokens_before`)."""
        blocks = np.asarray(blocks, np.int64)
        flat = blocks.reshape(-1)
        inside = flat != self._version.num_blocks
        out = np.full(len(flat), self._version.num_tokens, np.int64)
        out[inside] = self._blocks("tokens_before").gather(flat[inside]).reshape(-1)
        return out.reshape(blocks.shape)

    def read(self, name: str, lod: int, indices: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Nodes of a level in the order asked for (`TreeReader.read`)."""
        spec, stored = self._level(name, lod)
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if len(stored) == 1:
            return decode_array(spec, {name: stored[0].gather(wanted)})
        return decode_array(spec, {s.name: n.gather(wanted) for s, n in zip(spec.stored(), stored, strict=True)})

    def _consecutive(self, name: str, lod: int, first: int, count: int) -> torch.Tensor:
        spec, stored = self._level(name, lod)
        if len(stored) == 1:
            return decode_array(spec, {name: stored[0].nodes(first, count)})
        return decode_array(spec, {s.name: n.nodes(first, count) for s, n in zip(spec.stored(), stored, strict=True)})

    def read_node(self, name: str, lod: int, index: int) -> torch.Tensor:
        """One node (`TreeReader.read_node`)."""
        return self._consecutive(name, lod, index, 1)[0]

    def read_group(self, name: str, lod: int, group: int) -> torch.Tensor:
        """A sibling group (`TreeReader.read_group`)."""
        first = group * K
        # A group without a node is asked for as one node, and so refused as missing.
        return self._consecutive(name, lod, first, max(1, min(K, self._version.num_nodes(lod) - first)))

    def stored_arrays(self, lod: int, first: int, count: int) -> dict[str, np.ndarray]:
        """Consecutive nodes as they are stored, all arrays of the level: `(count * rows_per_node, width)` by name.

        LOD0 counts blocks. Errors as `read`.
        """
        if lod == 0:
            nodes = [self._blocks(stored.name) for stored in journal.BLOCK_LAYOUT]
            names = [stored.name for stored in journal.BLOCK_LAYOUT]
        else:
            nodes = [n for spec in self._version.encoding.arrays for n in self._level(spec.name, lod)[1]]
            names = [stored.name for stored in self._version.encoding.stored()]
        arrays = {name: n.nodes(first, count) for name, n in zip(names, nodes, strict=True)}
        return {name: values.reshape(-1, values.shape[-1]) for name, values in arrays.items()}

    def documents(self) -> list[DocumentInfo]:
        """The version's documents in timeline order (`TreeReader.documents`)."""
        with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
            found = document_infos(self._connection, self._lineage, self._version.num_blocks)
        return [self._clipped(document) for document in found]

    def document_at(self, block: int) -> DocumentInfo:
        """The document a block belongs to (`TreeReader.document_at`)."""
        if 0 <= block < self._version.num_blocks:
            with catalogue.translated(self.folder / catalogue.CATALOGUE_FILE):
                found = document_info_at(self._connection, self._lineage, self._version.num_blocks, block)
            if found is not None and not found.first_block <= block < found.first_block + found.num_blocks:
                raise CorruptTreeError(
                    f"the catalogue's row of document {found.meta.key!r} is damaged: it does not hold block {block}. "
                    "Run `tree verify` and restore the catalogue from a backup."
                )
            if found is not None:
                return self._clipped(found)
        raise NodeMissingError(
            f"block {block} is outside version {self._version.seq} of context {self._version.context!r}, which has "
            f"{self._version.num_blocks} blocks"
        )

    def _clipped(self, document: DocumentInfo) -> DocumentInfo:
        """The document as it was in this version: it may have grown since."""
        stop = document.first_block + document.num_blocks
        if stop <= self._version.num_blocks:
            return document
        start_tokens = int(self.tokens_before(np.array([document.first_block]))[0])
        return replace(
            document,
            num_blocks=self._version.num_blocks - document.first_block,
            num_tokens=self._version.num_tokens - start_tokens,
            state="open",
        )

    def tail(self) -> Tail | None:
        """The open document's unfilled tail, when this version is still the newest (`TreeReader.tail`)."""
        with (
            catalogue.translated(self.folder / catalogue.CATALOGUE_FILE),
            catalogue.snapshot(self._connection) as db,
        ):
            branch_id = self._lineage.branch.branch_id
            head = db.execute("SELECT head_seq FROM branches WHERE branch_id = ?", (branch_id,)).fetchone()[0]
            document = open_document(db, branch_id, self._version.num_blocks) if head == self._version.seq else None
        if document is None or len(document.tail) == 0:
            return None
        return Tail(document.meta, document.tail)

    def close(self) -> None:
        """Release the catalogue and the maps."""
        self._nodes.clear()
        self._specs.clear()
        self._cached_run.cache_clear()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load_version(db: sqlite3.Connection, name: str, branch_name: str, seq: int | None) -> tuple[Lineage, int, Version]:
    wanted = seq
    if wanted is None:
        branch = find_branch(db, branch_name)
        if branch is None:
            known = ", ".join(b.name for b in branches(db) if b.state == LIVE)
            raise StorageError(f"context {name!r} has no branch {branch_name!r}; it has: {known}")
        wanted = branch.head_seq
        check_head(db, branch.branch_id, wanted)
    commit = db.execute(
        f"SELECT c.branch_id, c.encoding_id, e.body, c.num_tokens, c.level_counts, {catalogue.sound('commits', 'c')}, "
        f"{catalogue.sound('encodings', 'e')} FROM commits c JOIN encodings e USING (encoding_id) WHERE c.seq = ?",
        (wanted,),
    ).fetchone()
    if commit is None:
        newest = db.execute("SELECT max(seq) FROM commits").fetchone()[0]
        raise StorageError(f"context {name!r} has no version {wanted}, or not any more; the newest is {newest}")
    catalogue.require_sound(commit[5], f"version {wanted}")
    catalogue.require_sound(commit[6], f"encoding {commit[1]}")
    # A version may be of an ancestor, or of a branch whose name went to another since.
    lineage = load_lineage(db, commit[0])
    counts = tuple(json.loads(commit[4]))
    version = Version(name, lineage.branch.name, wanted, Encoding.from_json(commit[2]), commit[3], counts, commit[0])
    return lineage, commit[1], version


def _with_encoding(db: sqlite3.Connection, version: Version, branch: Branch, encoding_id: int) -> Version:
    row = db.execute(
        f"SELECT e.body, {catalogue.sound('encodings', 'e')} FROM encodings e WHERE encoding_id = ?", (encoding_id,)
    ).fetchone()
    if row is None:
        raise StorageError(f"context {version.context!r} has no encoding {encoding_id}")
    catalogue.require_sound(row[1], f"encoding {encoding_id}")
    encoding = Encoding.from_json(row[0])
    return replace(version, encoding=encoding, level_counts=level_counts(db, branch, encoding_id, encoding))
