"""A second encoding of the same tokens, built beside the active one and activated as a new version.

Readers pinned before the activation go on reading the old gists. Nothing is edited: the new levels are new journal
rows and segments, and an interrupted rebuild goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import OutOfOrderError
from storage.codec import Values
from storage.contract import Ack
from storage.schema import Encoding
from storage.tree import journal
from storage.tree.levels import fresh_nodes, level_counts
from storage.tree.writer import ContextWriter


class EncodingBuilder:
    """Builds one encoding of a writer's branch. The same encoding resumes."""

    def __init__(self, writer: ContextWriter, encoding: Encoding) -> None:
        """Begin, or go on with, an encoding."""
        self._writer = writer
        self.encoding = encoding
        body = encoding.to_json()
        with writer.lock:
            with writer.reading() as db:
                row = db.execute(
                    "SELECT encoding_id FROM encodings WHERE body = ? ORDER BY encoding_id DESC LIMIT 1", (body,)
                ).fetchone()
            if row is not None:
                self.encoding_id = int(row[0])
                return
            with writer.commit() as db:
                cursor = db.execute("INSERT INTO encodings (body) VALUES (?)", (body,))
                assert cursor.lastrowid is not None
                self.encoding_id = cursor.lastrowid
                writer.audit(db, "start_encoding", {"encoding_id": self.encoding_id, "gistnet": encoding.gistnet_id})

    @property
    def active(self) -> bool:
        """Whether this is the encoding the branch has already."""
        return self.encoding_id == self._writer.encoding_id

    def level_counts(self) -> tuple[int, ...]:
        """Nodes of LOD1, LOD2, … built so far."""
        writer = self._writer
        with writer.reading() as db:
            return level_counts(db, writer.branch, self.encoding_id, self.encoding)

    def put_nodes(self, lod: int, first: int, arrays: Mapping[str, Values]) -> Ack:
        """Store nodes of any level from LOD1 on; idempotent and gapless like `TreeWriter.put_nodes`."""
        writer = self._writer
        if self.active:
            return Ack(writer.version())
        with writer.lock:
            counts = self.level_counts()
            nodes = fresh_nodes(self.encoding, writer.version().num_blocks, counts, lod, first, arrays)
            if nodes is None:
                return Ack(writer.version())
            level = writer.branch.level(self.encoding_id, self.encoding, lod)
            with writer.commit() as db:
                journal.insert(db, level, nodes.first, nodes.count, nodes.arrays, writer.row_ids)
            writer.sealer.notify(nodes.first, nodes.count)
            return Ack(writer.version(), new_nodes=nodes.count)

    def activate(self) -> Ack:
        """Make the finished encoding the branch's own, in a new version; no-op when it is already.

        Raises:
            OutOfOrderError: a level is not complete, for example because blocks were appended meanwhile.
        """
        writer = self._writer
        with writer.lock:
            if self.active:
                return Ack(writer.version())
            counts = self.level_counts()
            expected = writer.version().num_blocks
            for lod, count in enumerate((*counts, 0), start=1):
                if count != expected:
                    raise OutOfOrderError(
                        f"the new encoding of context {writer.name!r} has {count} of {expected} LOD{lod} nodes; "
                        "run the same rebuild again to finish it"
                    )
                expected //= K
            with writer.commit() as db:
                writer.audit(db, "activate_encoding", {"from": writer.encoding_id, "to": self.encoding_id})
                writer.switch_encoding(db, self.encoding_id, counts)
            writer.reload()
            return Ack(writer.version())
