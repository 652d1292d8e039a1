"""What a bundle says of itself: its manifest, and a line for every document."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistDtype
from storage.bundles import strict_json
from storage.bundles.container import MAX_MEMBERS, Member
from storage.bundles.strict_json import Unexpected
from storage.contract import DocumentInfo, DocumentMeta
from storage.schema import ArraySpec, Encoding, TreeIdentity

FORMAT = "megacontext-bundle"
FORMAT_VERSION = 1

MANIFEST_NAME = "manifest.json"
MANIFEST_SUM_NAME = "manifest.sha256"
DOCUMENTS_NAME = "documents.jsonl"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_LINE_BYTES = 2**20
"""Of a document's line."""
MAX_NODE_BYTES = 2**20
"""Of a node's arrays. 4 vectors of 8,192 float32 with as many keys take a quarter."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[\w.~-]{1,255}")
_ARRAY = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and where it comes from."""

    context: str
    branch: str
    version: int
    created_at: float
    """Unix seconds."""
    identity: TreeIdentity
    encoding: Encoding
    first_block: int
    """Of the span, in the version it was taken from."""
    num_blocks: int
    num_documents: int
    num_tokens: int
    upper_nodes: tuple[int, ...]
    """Nodes of LOD2, LOD3, …; none unless the span begins at block 0."""
    members: tuple[Member, ...]
    """All but the manifest and its checksum, in the order of the file."""

    def to_json(self) -> bytes:
        """The text of the manifest's member."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return (json.dumps(body, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Inverse of `to_json`; every value is checked by itself and against the others, none against the file.

        Raises:
            Unexpected: it is not the manifest of a bundle, or of a later format.
        """
        value = strict_json.parse(text)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise Unexpected(f"it does not say that its format is {FORMAT}")
        if value.get("format_version") != FORMAT_VERSION:
            raise Unexpected(
                f"its format has version {value.get('format_version')!r}, this program reads {FORMAT_VERSION}; take "
                "the version of this program that wrote it, or a later one"
            )
        found = strict_json.fields(value, _MANIFEST_TYPES, "the manifest")
        del found["format"], found["format_version"]
        found["identity"] = TreeIdentity(**strict_json.fields(found["identity"], _IDENTITY_TYPES, "identity"))
        found["encoding"] = _encoding(found["encoding"])
        found["upper_nodes"] = tuple(found["upper_nodes"])
        found["members"] = _members(found["members"])
        manifest = cls(**found)
        manifest._check()
        return manifest

    def _check(self) -> None:
        for label in (self.context, self.branch):
            if not _LABEL.fullmatch(label):
                raise Unexpected(f"{label!r} is no name of a context or branch")
        shown = (*asdict(self.identity).values(), *asdict(self.encoding).values())
        if not all(text.isprintable() for text in shown if isinstance(text, str)):
            raise Unexpected("its identity or encoding holds characters that cannot be shown")
        if self.identity.tokens_per_block != K:
            raise Unexpected(f"blocks of {self.identity.tokens_per_block} tokens; this program's have {K}")
        if not 1 <= self.num_documents <= self.num_blocks <= self.num_tokens <= self.num_blocks * K:
            raise Unexpected("its numbers of documents, blocks and tokens cannot be")
        children = self.num_blocks if self.first_block == 0 else 0
        for nodes in self.upper_nodes:
            if type(nodes) is not int or not 1 <= nodes <= children // K:
                raise Unexpected("its upper levels have nodes without children")
            children = nodes


_MANIFEST_TYPES = {
    "format": str,
    "format_version": int,
    "context": str,
    "branch": str,
    "version": int,
    "created_at": float,
    "identity": dict,
    "encoding": dict,
    "first_block": int,
    "num_blocks": int,
    "num_documents": int,
    "num_tokens": int,
    "upper_nodes": list,
    "members": list,
}
_IDENTITY_TYPES = {"base_model_id": str, "base_model_digest": str, "tokenizer_digest": str, "tokens_per_block": int}
_ENCODING_TYPES = {"gistnet_id": str, "gistnet_digest": str, "compute_dtype": str, "arrays": list}
_ARRAY_TYPES = {"name": str, "width": int, "rows_per_node": int, "dtype": str}
_MEMBER_TYPES = {"name": str, "num_bytes": int, "sha256": str}


def _encoding(value: object) -> Encoding:
    found = strict_json.fields(value, _ENCODING_TYPES, "encoding")
    specs = []
    for array in found["arrays"]:
        spec = ArraySpec(**strict_json.fields(array, _ARRAY_TYPES, "an array"))
        if not _ARRAY.fullmatch(spec.name) or spec.dtype not in get_args(GistDtype):
            raise Unexpected(f"array {spec.name!r} of {spec.dtype!r} cannot be stored")
        specs.append(spec)
    encoding = Encoding(found["gistnet_id"], found["gistnet_digest"], found["compute_dtype"], tuple(specs))
    names = [stored.name for stored in encoding.stored()]
    sizes = [stored.node_bytes for stored in encoding.stored()]
    if not names or len(set(names)) != len(names) or min(sizes) < 1 or sum(sizes) > MAX_NODE_BYTES:
        raise Unexpected(
            f"a node takes {sum(sizes):,} bytes in arrays {', '.join(names[:8]) or 'of no name'}; bundles hold "
            f"nodes of 1 to {MAX_NODE_BYTES:,} bytes, each array once"
        )
    return encoding


def _members(values: Sequence[object]) -> tuple[Member, ...]:
    if len(values) > MAX_MEMBERS:
        raise Unexpected(f"it names {len(values):,} members")
    members = tuple(Member(**strict_json.fields(value, _MEMBER_TYPES, "a member")) for value in values)
    for member in members:
        if not _SHA256.fullmatch(member.sha256):
            raise Unexpected(f"{member.sha256!r} is no sha256")
    return members


def manifest_sum(text: bytes) -> bytes:
    """The member that guards the manifest: a line that `sha256sum --check` reads."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n".encode()


# -- documents -------------------------------------------------------------------------------------------------------

_DOCUMENT_TYPES: dict[str, type] = {
    "key": str,
    "uri": str,
    "content_sha256": str,
    "size_bytes": int,
    "tags": list,
    "first_block": int,
    "num_blocks": int,
    "num_tokens": int,
    "state": str,
}


def document_line(document: DocumentInfo) -> bytes:
    """A document's line, with its end. `first_block` counts from the bundle's first one.

    Raises:
        Unexpected: what is known of the document does not fit in a line, or `parse_document` would refuse it.
    """
    body = asdict(document)
    line = json.dumps({**body.pop("meta"), **body}).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise Unexpected(f"document {document.meta.key[:80]!r} has {len(line):,} bytes of key, uri and tags")
    parse_document(line, document.first_block)
    return line


def parse_document(line: bytes, first_block: int) -> DocumentInfo:
    """Inverse of `document_line` for the document that begins at that block of the bundle.

    Raises:
        Unexpected: it is no document, begins elsewhere, or has numbers that cannot be.
    """
    value = strict_json.parse(line)
    types = dict(_DOCUMENT_TYPES)
    # The one field that may be null.
    known = isinstance(value, dict) and value.get("modified_at") is not None
    types["modified_at"] = float if known else type(None)
    found: dict[str, Any] = strict_json.fields(value, types, "a document")
    tags = strict_json.strings(found["tags"], "a tag")
    meta = DocumentMeta(
        found["key"], found["uri"], found["content_sha256"], found["size_bytes"], found["modified_at"], tags
    )
    document = DocumentInfo(meta, found["first_block"], found["num_blocks"], found["num_tokens"], found["state"])
    slots = document.num_blocks * K
    least = slots - K + 1 if document.state == "complete" else slots
    if (
        not meta.key
        or document.state not in {"complete", "cut"}
        or document.first_block != first_block
        or document.num_blocks < 1
        or not least <= document.num_tokens <= slots
    ):
        raise Unexpected(f"document {meta.key[:80]!r}: its state, blocks or tokens cannot be")
    return document
