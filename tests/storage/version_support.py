"""Steps that tests of branches, collection, removal and backups share; texts are written in the writer's encoding."""

from __future__ import annotations

from pathlib import Path

import torch

from cluster.config import TOKENS_PER_BLOCK as K
from storage.tree.reader import ContextReader
from storage.tree.verify import verify_context
from storage.tree.writer import ContextWriter
from storage.versions.history import History
from tests.storage.support import CONTEXT, Text, assert_holds, follow


def write(writer: ContextWriter, *texts: Text) -> None:
    """Whole documents, one commit each, and the levels above them."""
    for text in texts:
        writer.append([text.span(writer.encoding)])
    follow(writer, writer.encoding)


def write_and_seal(writer: ContextWriter, *texts: Text) -> None:
    """The same, with nothing left in the journal that fills a segment."""
    write(writer, *texts)
    writer.flush()


def clipped(text: Text, num_blocks: int) -> Text:
    """The part of a document that a fork leaves."""
    return Text(text.key, num_blocks * K, size_bytes=text.num_tokens)


def holds(root: Path, *texts: Text, branch: str = "main", seq: int | None = None) -> None:
    """A version's timeline is these documents, one after the other, and its levels read alike by group and by node."""
    with ContextReader(root / CONTEXT, CONTEXT, branch, seq) as reader:
        encoding = reader.version.encoding
        assert_holds(reader, texts, encoding)
        for lod in range(2, reader.version.max_lod + 1):
            nodes = range(reader.version.num_nodes(lod))
            for spec in encoding.arrays:
                found = [reader.read_group(spec.name, lod, group) for group in range(-(-len(nodes) // K))]
                assert torch.equal(torch.cat(found), reader.read(spec.name, lod, nodes))


def is_sound(root: Path) -> None:
    """Nothing is wrong with the context."""
    report = verify_context(root / CONTEXT, CONTEXT)
    assert report.ok, report.problems


def history(root: Path) -> History:
    """The context's history."""
    return History(root / CONTEXT, CONTEXT)
