"""inspect: what a store, a context or one node holds. Starts no cluster and writes nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import InspectJob
from cluster.errors import ConfigError, IncompatibleTreeError
from cluster.tables import Table
from models.tokenizer import Tokenizer
from pipelines.tree_report import encoding_rows, human_bytes, level_rows, measure_tree
from storage.contract import DocumentInfo, TreeReader
from storage.geometry import NO_TOKEN, node_block_range
from storage.schema import GISTS
from storage.store import Store

SHOWN_CHARACTERS = 2000


def run(job: InspectJob) -> None:
    """Print what was asked for."""
    if job.all:
        return show_store(job)
    if job.node:
        return show_node(job)
    return show_context(job)


def show_store(job: InspectJob) -> None:
    """All contexts of a store."""
    store = Store(job.store.root)
    rows: list[dict[str, Any]] = []
    for info in store.contexts():
        with store.open_reader(info.name) as reader:
            version = reader.version
            rows.append(
                {
                    "context": info.name,
                    "tokens": version.num_tokens,
                    "levels": version.max_lod,
                    "version": version.seq,
                    "GistNet": version.encoding.gistnet_id,
                    "last writer": info.owner,
                }
            )
    _emit(job, {"contexts": rows}, [(f"Store {store.root}", rows)])


def show_context(job: InspectJob) -> None:
    """Levels, bytes, models and documents of one context."""
    store = Store(job.store.root)
    name = job.store.context
    tree = measure_tree(job.store)
    identity, encoding = store.identity(name, job.store.version)
    with store.open_reader(name, job.store.version) as reader:
        documents = reader.documents()
        tail = reader.tail()
    shown = documents[::-1][: job.documents]
    made_by = [
        {"what": "base LM", "value": f"{identity.base_model_id} ({identity.base_model_digest[:12]})"},
        {"what": "tokenizer", "value": identity.tokenizer_digest[:12]},
        *encoding_rows(encoding),
        {"what": "version", "value": f"{tree.version.seq} of branch {tree.version.branch}"},
        {"what": "pinned versions", "value": ", ".join(map(str, store.pins(name))) or "none"},
        {"what": "tail", "value": f"{len(tail.tokens)} tokens of {tail.document.uri}" if tail else "none"},
    ]
    report = {
        "context": name,
        "identity": asdict(identity),
        "encoding": asdict(encoding),
        "version": tree.version.seq,
        "num_tokens": tree.version.num_tokens,
        "nodes_by_lod": list(tree.version.level_counts),
        "payload_bytes": tree.payload_bytes,
        "stored_bytes": tree.stored_bytes,
        "num_segments": tree.num_segments,
        "num_documents": len(documents),
        "documents": [_document_json(document) for document in shown],
    }
    tables = [
        (f"Context {name}", level_rows(tree)),
        ("Made by", made_by),
        (f"Documents, newest {len(shown)} of {len(documents)}", [_document_row(document) for document in shown]),
    ]
    _emit(job, report, tables)


def show_node(job: InspectJob) -> None:
    """One node: its span, its documents, its vectors' sizes, its text."""
    lod, index = _parse_node(job.node)
    store = Store(job.store.root)
    with store.open_reader(job.store.context, job.store.version) as reader:
        version = reader.version
        if not 0 <= index < version.num_nodes(lod):
            raise ConfigError(
                f"node {job.node} is not there: LOD{lod} has {version.num_nodes(lod):,} nodes, levels go up to "
                f"LOD{version.max_lod}"
            )
        first, stop = node_block_range(lod, index)
        stop = min(stop, version.num_blocks)
        documents = _documents_between(reader, first, stop)
        text = _text(job, store, reader, first, stop, slot=index % K if lod == 0 else None)
        norms = reader.read_node(GISTS, lod, index).float().norm(dim=-1).tolist() if lod else []
    report = {
        "node": [lod, index],
        "slots": [index * K**lod, (index + 1) * K**lod],
        "blocks": [first, stop],
        "gist_norms": norms,
        "documents": [_document_json(document) for document in documents],
        "text": text,
    }
    rows = [
        {"what": "slots", "value": f"{index * K**lod:,} to {(index + 1) * K**lod - 1:,}"},
        {"what": "blocks", "value": f"{first:,} to {stop - 1:,}"},
        {"what": "norm of its vectors", "value": ", ".join(f"{norm:.3f}" for norm in norms) or "a token has none"},
        {"what": "documents", "value": ", ".join(document.meta.uri for document in documents)},
    ]
    _emit(job, report, [(f"Node LOD{lod}:{index}", rows)])
    if not job.json:
        sys.stdout.write(f"\n{text}\n")


def _parse_node(text: str) -> tuple[int, int]:
    lod, _, index = text.partition(":")
    if not (lod.isdigit() and index.isdigit()):
        raise ConfigError(f"node={text!r} must be lod:index, for example --node 2:0")
    return int(lod), int(index)


def _documents_between(reader: TreeReader, first: int, stop: int) -> list[DocumentInfo]:
    found, block = [], first
    while block < stop:
        found.append(reader.document_at(block))
        block = found[-1].first_block + found[-1].num_blocks
    return found


def _text(job: InspectJob, store: Store, reader: TreeReader, first: int, stop: int, slot: int | None) -> str:
    tokenizer = Tokenizer.load(job.base_lm)
    identity, _ = store.identity(job.store.context)
    if tokenizer.digest != identity.tokenizer_digest:
        raise IncompatibleTreeError(
            f"context {job.store.context!r} was tokenised for {identity.base_model_id}; set --base_lm.source to it"
        )
    # About a token a character at worst, so this many blocks fill what is shown.
    tokens, _ = reader.tokens(first, min(stop - first, SHOWN_CHARACTERS // K + 1))
    ids = tokens[0, slot : slot + 1] if slot is not None else tokens.reshape(-1)
    text = tokenizer.decode(ids[ids != NO_TOKEN].astype(np.int64))
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _document_row(document: DocumentInfo) -> dict[str, Any]:
    return {
        "document": document.meta.uri,
        "tokens": f"{document.num_tokens:,}",
        "blocks": f"{document.first_block:,} to {document.first_block + document.num_blocks - 1:,}",
        "bytes": human_bytes(document.meta.size_bytes),
        "state": document.state,
        "tags": ", ".join(document.meta.tags),
    }


def _document_json(document: DocumentInfo) -> dict[str, Any]:
    return asdict(document)


def _emit(job: InspectJob, report: dict[str, Any], tables: list[tuple[str, list[dict[str, Any]]]]) -> None:
    if job.json:
        sys.stdout.write(json.dumps(report, indent=1, sort_keys=True) + "\n")
        return
    for title, rows in tables:
        Table(rows, title).show()
