"""Writes a version of a context, or a span of it, as a bundle."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.errors import BundleError
from storage.bundles.chunks import Chunk, chunks
from storage.bundles.container import ContainerWriter
from storage.bundles.manifest import (
    DOCUMENTS_NAME,
    MANIFEST_NAME,
    MANIFEST_SUM_NAME,
    Manifest,
    document_line,
    manifest_sum,
)
from storage.bundles.strict_json import Unexpected
from storage.contract import DocumentInfo, Version
from storage.geometry import complete_nodes
from storage.schema import TreeIdentity
from storage.store import check_room
from storage.tree.reader import ContextReader

_DOCUMENT_BYTES = 1024
"""Room for a document's line in the estimate of a bundle's size."""


def export_bundle(
    reader: ContextReader,
    identity: TreeIdentity,
    path: Path,
    *,
    first_block: int = 0,
    num_blocks: int | None = None,
    overwrite: bool = False,
    on_blocks: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write blocks of a reader's version with their documents and, from block 0 on, the levels above them.

    A document that the span, or the version, does not hold to its end comes as `cut`; its tail, which has no gist yet,
    stays behind. One that began before the span comes as a document of its own, `<key>#from<block>`.

    Args:
        reader: the version. A long export wants its lease renewed, which `on_blocks` can do.
        identity: of the context.
        path: the file. It appears when all of it is on the disk.
        first_block: where the span begins.
        num_blocks: its length; None is up to the version's end.
        overwrite: replace a file that is there.
        on_blocks: is told of every so many blocks that were written.

    Returns:
        What the bundle says of itself.

    Raises:
        StorageError: tokens of the span were pruned.
        BundleError: an empty span or one outside the version, a file that is there, a folder that cannot be written.
        DiskFullError: the disk cannot hold it.
        CorruptTreeError: the context is damaged; nothing was left.
    """
    version = reader.version
    stop = version.num_blocks if num_blocks is None else first_block + num_blocks
    if not 0 <= first_block < stop <= version.num_blocks:
        raise BundleError(
            f"version {version.seq} of context {version.context!r} has {version.num_blocks} blocks; "
            f"{stop - first_block} blocks from {first_block} on cannot be exported"
        )
    reader.require_whole(
        first_block,
        stop - first_block,
        "an export",
        "; or export a version that still has them (store.version), or a span that does (first_block, num_blocks)",
    )
    upper_nodes = _upper_nodes(version, stop) if first_block == 0 else ()
    first_token, last_token = reader.tokens_before(np.array([first_block, stop]))
    manifest = Manifest(
        context=version.context,
        branch=version.branch,
        version=version.seq,
        created_at=time.time(),
        identity=identity,
        encoding=version.encoding,
        first_block=first_block,
        num_blocks=stop - first_block,
        num_documents=1,
        num_tokens=int(last_token - first_token),
        upper_nodes=upper_nodes,
        members=(),
    )
    with _bundled(path):
        # What an import would refuse is refused before the work.
        Manifest.from_json(manifest.to_json())
    planned = list(chunks(version.encoding, stop - first_block, upper_nodes))
    num_bytes = sum(chunk.num_bytes for chunk in planned) + _DOCUMENT_BYTES * (1 + len(planned))
    check_room(
        path.parent, num_bytes, f"{stop - first_block:,} blocks in a bundle", "Free space or name another folder"
    )
    with ContainerWriter(path, overwrite=overwrite) as file:
        num_documents = 0
        with file.member(DOCUMENTS_NAME) as content, _bundled(path):
            for document in _documents(reader, first_block, stop):
                content.write(document_line(document))
                num_documents += 1
        for chunk in planned:
            with file.member(chunk.name) as content:
                for piece in chunk.pieces(_levels(reader, chunk, first_block)):
                    content.write(piece)
            if chunk.lod == 1:
                on_blocks(chunk.count)
        manifest = replace(manifest, num_documents=num_documents, members=tuple(file.members))
        text = manifest.to_json()
        for name, data in ((MANIFEST_NAME, text), (MANIFEST_SUM_NAME, manifest_sum(text))):
            with file.member(name) as content:
                content.write(data)
        file.commit()
    return manifest


def _upper_nodes(version: Version, num_blocks: int) -> tuple[int, ...]:
    """Nodes of LOD2, LOD3, … that the version has and that the first blocks cover wholly."""
    counts = (min(version.num_nodes(lod), complete_nodes(lod, num_blocks)) for lod in range(2, version.max_lod + 1))
    return tuple(count for count in counts if count)


def _levels(reader: ContextReader, chunk: Chunk, first_block: int) -> dict[int, dict[str, np.ndarray]]:
    first = chunk.first + (first_block if chunk.lod == 1 else 0)
    levels = {chunk.lod: reader.stored_arrays(chunk.lod, first, chunk.count)}
    if chunk.lod == 1:
        levels[0] = reader.stored_arrays(0, first, chunk.count)
    return levels


def _documents(reader: ContextReader, first_block: int, stop: int) -> Iterator[DocumentInfo]:
    """The span's documents as a bundle has them, one look-up each: a context may have more than memory holds."""
    at = first_block
    while at < stop:
        found = reader.document_at(at)
        skipped = at - found.first_block
        end = found.first_block + found.num_blocks
        until = min(end, stop)
        before, after = reader.tokens_before(np.array([at, until]))
        meta = replace(found.meta, key=f"{found.meta.key}#from{skipped}") if skipped else found.meta
        state = "complete" if found.state == "complete" and end == until else "cut"
        yield DocumentInfo(meta, at - first_block, until - at, int(after - before), state)
        at = until


@contextlib.contextmanager
def _bundled(path: Path) -> Iterator[None]:
    """Say of what does not fit a bundle which one it is."""
    try:
        yield
    except Unexpected as error:
        raise BundleError(f"{path} cannot be written: {error}") from error
