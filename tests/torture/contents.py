"""All that a context holds, as bytes, and how far two contexts differ."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from storage.lexical.index import LEXICAL_FILE
from storage.tree.reader import ContextReader


@dataclass(frozen=True)
class Contents:
    """What readers can see of a context's `main`, however it lies on disk."""

    parts: dict[str, bytes]
    """By name: tokens, counts, prefix sums, every array of every level, documents, tail, lexical index."""
    blocks: Counter[bytes]
    """The tokens of each block, and how often they stand there."""

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return sum(map(len, self.parts.values()))


@dataclass(frozen=True)
class Difference:
    """Of what is there to what should be."""

    lost_blocks: int
    doubled_blocks: int
    """Blocks more often there than they should be."""
    differing_bytes: dict[str, int]
    """By part, where there are any; bytes that only one side has count too."""

    @property
    def num_bytes(self) -> int:
        """Differing bytes of all parts."""
        return sum(self.differing_bytes.values())


def read_contents(folder: Path, name: str) -> Contents:
    """Read the newest version of a context and its lexical index."""
    parts: dict[str, bytes] = {}
    with ContextReader(folder, name) as reader:
        version = reader.version
        tokens, num_tokens = reader.tokens(0, version.num_blocks)
        parts["tokens"], parts["num_tokens"] = tokens.tobytes(), num_tokens.tobytes()
        parts["tokens_before"] = reader.tokens_before(np.arange(version.num_blocks + 1)).tobytes()
        for lod in range(1, version.max_lod + 1):
            for array in version.encoding.arrays:
                values = reader.read(array.name, lod, np.arange(version.num_nodes(lod)))
                parts[f"lod{lod} {array.name}"] = values.contiguous().view(torch.uint8).numpy().tobytes()
        parts["documents"] = _lines(asdict(info) for info in reader.documents())
        tail = reader.tail()
        parts["tail"] = b"" if tail is None else tail.tokens.tobytes()
    if (folder / LEXICAL_FILE).exists():
        parts |= _lexical(folder / LEXICAL_FILE)
    return Contents(parts, Counter(block.tobytes() for block in tokens))


def _lexical(path: Path) -> dict[str, bytes]:
    """Its rows in an order of their own; how FTS5 packs them depends on the batches they came in."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("CREATE VIRTUAL TABLE temp.occurrences USING fts5vocab(main, postings, instance)")
        return {
            "lexical postings": _lines(db.execute("SELECT term, doc FROM occurrences ORDER BY term, doc")),
            "lexical terms": _lines(db.execute("SELECT term, num_blocks, most FROM terms ORDER BY term")),
            "lexical lengths": b"".join(row[0] for row in db.execute("SELECT lengths FROM lengths ORDER BY number")),
            "lexical mark": _lines(db.execute("SELECT num_blocks, num_terms, last_block_crc FROM state")),
        }


def _lines(rows: Iterable[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def difference(found: Contents, wanted: Contents) -> Difference:
    """How far `found` is from `wanted`."""
    differing: dict[str, int] = {}
    for name in sorted(found.parts.keys() | wanted.parts.keys()):
        left, right = (np.frombuffer(side.parts.get(name, b""), np.uint8) for side in (found, wanted))
        shared = min(len(left), len(right))
        number = int((left[:shared] != right[:shared]).sum()) + abs(len(left) - len(right))
        if number:
            differing[name] = number
    lost, doubled = wanted.blocks - found.blocks, found.blocks - wanted.blocks
    return Difference(lost.total(), doubled.total(), differing)
