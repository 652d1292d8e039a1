"""Reads a bundle that came from anywhere, and believes nothing of it that it has not compared.

Opening compares the members with what the manifest's numbers mean: names, order, sizes. `verify` reads every byte. What
is held in memory is one chunk, and for `verify` 16 bytes a document.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BundleError, InvalidWriteError
from storage.bundles import manifest as manifest_file
from storage.bundles.chunks import Chunk, chunks, num_chunks
from storage.bundles.container import ContainerReader
from storage.bundles.manifest import (
    DOCUMENTS_NAME,
    MANIFEST_NAME,
    MANIFEST_SUM_NAME,
    Manifest,
    manifest_sum,
    parse_document,
)
from storage.bundles.strict_json import Unexpected
from storage.codec import encode_arrays
from storage.contract import DocumentInfo, SpanWrite

Piece = tuple[DocumentInfo, SpanWrite]
"""Consecutive blocks of a document, and the document; its `first_block` counts from the bundle's first one."""


class BundleReader:
    """A bundle's file. Every method raises `BundleError` when the file is not what it should be."""

    def __init__(self, path: Path) -> None:
        """Open a bundle.

        Raises:
            BundleError: there is no such file, or it is no bundle, one of a later format, or not whole.
        """
        self.path = path
        self._container = ContainerReader(path)
        try:
            self.manifest = self._load_manifest()
            self._members = {member.name: member for member in self.manifest.members}
            self._check_members()
        except BaseException:
            self._container.close()
            raise

    def _load_manifest(self) -> Manifest:
        text = self._container.read_unchecked(MANIFEST_NAME, manifest_file.MAX_MANIFEST_BYTES)
        if self._container.read_unchecked(MANIFEST_SUM_NAME, 1024) != manifest_sum(text):
            raise self._refused(f"{MANIFEST_NAME} is not what {MANIFEST_SUM_NAME} says")
        with self._expected(MANIFEST_NAME):
            return Manifest.from_json(text)

    def _check_members(self) -> None:
        manifest = self.manifest
        sizes = self._container.sizes
        # The number first: what the manifest says of itself may mean more chunks than could ever be listed.
        if num_chunks(manifest) + 1 != len(manifest.members) or len(manifest.members) + 2 != len(sizes):
            raise self._refused(
                f"{manifest.num_blocks:,} blocks with their levels are {num_chunks(manifest):,} chunks; the manifest "
                f"names {len(manifest.members) - 1:,}, the file holds {len(sizes) - 3:,}"
            )
        expected = {DOCUMENTS_NAME: sizes.get(DOCUMENTS_NAME, 0)}
        expected |= {chunk.name: chunk.num_bytes for chunk in self._chunks()}
        named = {member.name: member.num_bytes for member in manifest.members}
        if list(expected.items()) != list(named.items()):
            raise self._refused("the manifest names other members or sizes than its numbers mean")
        if list(sizes.items())[:-2] != list(named.items()) or list(sizes)[-2:] != [MANIFEST_NAME, MANIFEST_SUM_NAME]:
            raise self._refused("its members are not those that the manifest names")

    def _chunks(self) -> Iterator[Chunk]:
        return chunks(self.manifest.encoding, self.manifest.num_blocks, self.manifest.upper_nodes)

    def _arrays(self, chunk: Chunk) -> dict[int, dict[str, np.ndarray]]:
        levels = chunk.arrays(self._container.read(self._members[chunk.name]))
        if levels is None:
            raise self._refused(f"{chunk.name} is not the safetensors file that the encoding means")
        return levels

    # -- content -------------------------------------------------------------------------------------------------------

    def documents(self) -> Iterator[DocumentInfo]:
        """The documents in timeline order; together they cover the bundle's blocks."""
        num_documents = num_blocks = num_tokens = 0
        for line in self._container.lines(self._members[DOCUMENTS_NAME], manifest_file.MAX_LINE_BYTES):
            with self._expected(DOCUMENTS_NAME):
                document = parse_document(line, num_blocks)
            num_documents += 1
            num_blocks += document.num_blocks
            num_tokens += document.num_tokens
            yield document
        found = (num_documents, num_blocks, num_tokens)
        if found != (self.manifest.num_documents, self.manifest.num_blocks, self.manifest.num_tokens):
            raise self._refused(
                f"{DOCUMENTS_NAME} has {num_documents:,} documents, {num_blocks:,} blocks and {num_tokens:,} tokens, "
                f"the manifest {self.manifest.num_documents:,}, {self.manifest.num_blocks:,} and "
                f"{self.manifest.num_tokens:,}"
            )

    def blocks(self) -> Iterator[list[Piece]]:
        """All blocks, chunk by chunk, cut where documents end. Arrays are stored bytes, as a writer takes them."""
        documents = self.documents()
        document: DocumentInfo | None = None
        for chunk in self._chunks():
            if chunk.lod > 1:
                break
            levels = self._arrays(chunk)
            pieces: list[Piece] = []
            at = chunk.first
            while at < chunk.stop:
                if document is None or at == document.first_block + document.num_blocks:
                    document = next(documents)
                stop = min(chunk.stop, document.first_block + document.num_blocks)
                pieces.append((document, _span(chunk, levels, document, at, stop)))
                at = stop
            yield pieces
        # What is said behind the last one that has blocks is checked, too.
        collections.deque(documents, maxlen=0)

    def upper_nodes(self) -> Iterator[tuple[int, int, int, dict[str, np.ndarray]]]:
        """`(lod, first, count, stored arrays)` of the levels above the blocks, from LOD2 on."""
        for chunk in self._chunks():
            if chunk.lod > 1:
                yield chunk.lod, chunk.first, chunk.count, self._arrays(chunk)[chunk.lod]

    def verify(self, on_blocks: Callable[[int], None] = lambda _: None) -> None:
        """Read every byte and check all that a context would refuse.

        Args:
            on_blocks: is told of every so many blocks that were read.

        Raises:
            BundleError: something is wrong with it.
        """
        ended: set[bytes] = set()
        arrays = self.manifest.encoding.arrays
        for pieces in self.blocks():
            for document, span in pieces:
                key = hashlib.blake2b(document.meta.key.encode(), digest_size=16).digest()
                if key in ended:
                    raise self._refused(f"document {document.meta.key[:80]!r} comes again behind its end")
                with self._accepted():
                    span.check()
                    encode_arrays(arrays, span.arrays, span.num_blocks)
                if is_end(document, span):
                    full = (document.num_blocks - 1) * K
                    if document.num_tokens != full + int(span.num_tokens[-1]):
                        raise self._refused(f"document {document.meta.key[:80]!r} has other tokens than it says")
                    if document.state == "complete":
                        ended.add(key)
            on_blocks(sum(span.num_blocks for _, span in pieces))
        for _, _, count, values in self.upper_nodes():
            with self._accepted():
                encode_arrays(arrays, values, count)

    # -- refusals ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _expected(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unexpected as error:
            raise self._refused(f"{name}: {error}") from error

    @contextlib.contextmanager
    def _accepted(self) -> Iterator[None]:
        try:
            yield
        except InvalidWriteError as error:
            raise self._refused(str(error)) from error

    def _refused(self, what: str) -> BundleError:
        return BundleError(f"{self.path} cannot be imported: {what}. Nothing was written. Copy or export it again.")

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def __enter__(self) -> BundleReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_end(document: DocumentInfo, span: SpanWrite) -> bool:
    """Whether a span holds its document's last block."""
    return span.first_block + span.num_blocks == document.num_blocks


def _span(
    chunk: Chunk, levels: dict[int, dict[str, np.ndarray]], document: DocumentInfo, first: int, stop: int
) -> SpanWrite:
    start, end = first - chunk.first, stop - chunk.first
    rows = {stored.name: stored.rows_per_node for stored in chunk.encoding.stored()}
    return SpanWrite(
        document.meta,
        first - document.first_block,
        levels[0]["tokens"][start:end],
        levels[0]["num_tokens"][start:end].reshape(-1),
        {name: values[start * rows[name] : end * rows[name]] for name, values in levels[1].items()},
        last=document.state == "complete" and stop == document.first_block + document.num_blocks,
    )
