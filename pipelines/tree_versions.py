"""tree log, show, branch, tag, diff, rollback, gc: the versions of a context. They start no cluster."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.config import StoreConfig
from cluster.tables import Table
from cluster.tree_config import (
    TreeBranchJob,
    TreeDiffJob,
    TreeGcJob,
    TreeLogJob,
    TreeRollbackJob,
    TreeShowJob,
    TreeTagJob,
)
from pipelines.tree_report import human_bytes, level_bytes
from storage.contract import DocumentInfo
from storage.store import Store
from storage.tree.lineage import LIVE
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching
from storage.versions.history import History
from storage.versions.removal import scrub, wants_scrub

DAY_S = 86400.0
SHOWN_ITEMS = 3
"""Of a list in the audit log, for people; `--json true` has all."""


def _short(detail: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the audit log for people: a removal names every document."""
    lists = {key: value for key, value in detail.items() if isinstance(value, list) and len(value) > SHOWN_ITEMS}
    return {**detail, **{key: [*of[:SHOWN_ITEMS], f"and {len(of) - SHOWN_ITEMS:,} more"] for key, of in lists.items()}}


def log(job: TreeLogJob) -> None:
    """Versions of a branch, or the audit log."""
    history = _history(job.store)
    if job.audit:
        entries = history.audit(job.limit)
        rows = [
            {"when": _when(e.at), "who": e.actor, "what": e.action, "detail": json.dumps(_short(e.detail))}
            for e in entries
        ]
        emit(
            job.json, {"audit": [asdict(entry) for entry in entries]}, Table(rows, f"Audit log of {job.store.context}")
        )
        return
    commits = history.log(job.store.version, job.limit)
    rows = [
        {
            "version": str(commit.seq),
            "when": _when(commit.created_at),
            "branch": commit.branch,
            "tokens": commit.num_tokens,
            "blocks": commit.num_blocks,
            "what": commit.message or commit.request_id,
            "author": commit.author,
            "job": commit.job,
            "tags": ", ".join(commit.tags),
        }
        for commit in commits
    ]
    title = f"Versions of branch {job.store.version} of {job.store.context}, newest first"
    emit(job.json, {"versions": [asdict(commit) for commit in commits]}, Table(rows, title))


def show(job: TreeShowJob) -> None:
    """One version."""
    with Store(job.store.root).open_reader(job.store.context, job.store.version) as reader:
        version = reader.version
        documents = reader.documents()
        tail = reader.tail()
        line = reader.lineage.branches
        forks = [(parent.name, child.fork_block) for child, parent in itertools.pairwise(line)]
    newest = documents[::-1][: job.documents]
    payload = sum(level_bytes(version, lod) for lod in range(version.max_lod + 1))
    rows = [
        {"what": "version", "value": f"{version.seq} of branch {version.branch}"},
        {"what": "forked from", "value": ", from ".join(f"{name} at block {at:,}" for name, at in forks) or "nothing"},
        {"what": "GistNet", "value": version.encoding.gistnet_id},
        {"what": "tokens", "value": f"{version.num_tokens:,} in {len(documents):,} documents"},
        *({"what": f"LOD{lod} nodes", "value": f"{version.num_nodes(lod):,}"} for lod in range(1, version.max_lod + 1)),
        {"what": "payload", "value": human_bytes(payload)},
        {"what": "tail", "value": f"{len(tail.tokens)} tokens of {tail.document.uri}" if tail else "none"},
    ]
    report = {
        "version": version.seq,
        "branch": version.branch,
        "forks": forks,
        "gistnet": version.encoding.gistnet_id,
        "num_tokens": version.num_tokens,
        "nodes_by_lod": list(version.level_counts),
        "payload_bytes": payload,
        "num_documents": len(documents),
        "documents": documents_json(newest),
    }
    emit(
        job.json,
        report,
        Table(rows, f"Version {version.seq} of {job.store.context}"),
        Table(document_rows(newest), f"Documents, newest {len(newest)} of {len(documents)}"),
    )


def branch(job: TreeBranchJob) -> None:
    """List the branches, or make, merge or discard one."""
    history = _history(job.store)
    if job.create:
        seq = history.resolve(job.store.version)
        at_block = None if job.at_block < 0 else job.at_block
        with maintained(job.store, "main") as writer:
            Branching(writer).fork(job.create, seq=seq, at_block=at_block, message=job.message)
    elif job.merge:
        with maintained(job.store) as writer:
            done = Branching(writer).merge(job.merge, job.message)
        how = "fast-forward" if done.fast_forward else "documents appended"
        rows = [
            {
                "into": job.store.version,
                "from": job.merge,
                "how": how,
                "documents": done.documents,
                "blocks": done.blocks,
                "there already": done.skipped_documents,
                "taken out before": done.removed_documents,
                "version": str(done.version.seq),
            }
        ]
        report = {**asdict(done), "version": done.version.seq}
        emit(job.json, {"merge": report}, Table(rows, "Merged"))
        return
    elif job.discard:
        with maintained(job.store, "main") as writer:
            Branching(writer).discard(job.discard)
    found = history.branches(retired=job.retired)
    rows = [
        {
            "branch": info.name,
            "version": str(info.head_seq),
            "tokens": info.num_tokens,
            "blocks": info.num_blocks,
            "forked": f"{info.parent} at block {info.fork_block:,}" if info.parent else "",
            "own bytes": human_bytes(info.own_bytes),
            "made": _when(info.created_at),
            **({} if info.state == LIVE else {"state": info.state}),
        }
        for info in found
    ]
    emit(job.json, {"branches": [asdict(info) for info in found]}, Table(rows, f"Branches of {job.store.context}"))


def tag(job: TreeTagJob) -> None:
    """List the tags, or make or forget one."""
    history = _history(job.store)
    if job.create:
        seq = history.resolve(job.store.version)
        with maintained(job.store, "main") as writer:
            Branching(writer).tag(job.create, seq, job.message)
    elif job.delete:
        with maintained(job.store, "main") as writer:
            Branching(writer).delete_tag(job.delete)
    found = history.tags()
    rows = [
        {
            "tag": info.name,
            "version": str(info.seq),
            "branch": info.branch,
            "made": _when(info.created_at),
            "author": info.author,
            "message": info.message,
        }
        for info in found
    ]
    emit(job.json, {"tags": [asdict(info) for info in found]}, Table(rows, f"Tags of {job.store.context}"))


def diff(job: TreeDiffJob) -> None:
    """What two versions do not share."""
    found = _history(job.store).diff(job.store.version, job.other)
    rows = [
        {"version": name, "documents": len(only), "blocks": blocks, "tokens": tokens, "payload": human_bytes(size)}
        for name, only, blocks, tokens, size in (
            (
                f"only in {job.store.version} ({found.left})",
                found.only_left,
                found.left_blocks,
                found.left_tokens,
                found.left_bytes,
            ),
            (
                f"only in {job.other} ({found.right})",
                found.only_right,
                found.right_blocks,
                found.right_tokens,
                found.right_bytes,
            ),
        )
    ]
    tables = [Table(rows, f"{found.shared_blocks:,} blocks are shared")]
    for name, only in ((job.store.version, found.only_left), (job.other, found.only_right)):
        if only:
            tables.append(Table(document_rows(only[: job.documents]), f"Only in {name}, first {job.documents}"))
    report = asdict(found) | {
        "only_left": documents_json(found.only_left),
        "only_right": documents_json(found.only_right),
    }
    emit(job.json, report, *tables)


def rollback(job: TreeRollbackJob) -> None:
    """Let a branch stand at another version again."""
    seq = _history(job.store).resolve(job.to)
    with maintained(job.store) as writer:
        before = writer.version()
        after = Branching(writer).roll_back(seq, job.message)
    rows = [
        {"what": "was", "version": str(before.seq), "tokens": before.num_tokens, "blocks": before.num_blocks},
        {"what": "is now", "version": str(after.seq), "tokens": after.num_tokens, "blocks": after.num_blocks},
    ]
    report = {"branch": after.branch, "from": before.seq, "to": seq, "version": after.seq}
    emit(job.json, report, Table(rows, f"Branch {after.branch}; `tree rollback --to {before.seq}` undoes this"))


def gc(job: TreeGcJob) -> None:
    """Collect garbage, or say what there is."""
    store = Store(job.store.root)
    with maintained(job.store, "main") as writer:
        found = store.collect(writer, keep_s=job.keep_days * DAY_S, dry_run=not job.apply)
        if job.apply and wants_scrub(writer):
            scrub(writer)
    rows = [
        {"what": "segments", "number": len(found.segments), "bytes": human_bytes(found.segment_bytes)},
        {"what": "segments shortened", "number": len(found.shortened), "bytes": human_bytes(found.shortened_bytes)},
        {"what": "journal rows", "number": found.journal_rows, "bytes": human_bytes(found.journal_bytes)},
        {"what": "versions", "number": found.versions},
        {"what": "documents of retired branches", "number": found.documents},
        {"what": "retired branches", "number": len(found.branches)},
    ]
    done = "Removed" if job.apply else "Would be removed with --apply true"
    emit(job.json, {"applied": job.apply, **asdict(found)}, Table(rows, f"{done}, from {job.store.context}"))


def _history(store: StoreConfig) -> History:
    return History(Store(store.root).folder(store.context), store.context)


@contextlib.contextmanager
def maintained(store: StoreConfig, branch: str = "") -> Iterator[ContextWriter]:
    """The context's writer, on a branch."""
    owner = f"{Path(sys.argv[0]).name} {' '.join(sys.argv[1:3])}"
    with Store(store.root).open_maintenance(store.context, branch or store.version, owner) as writer:
        yield writer


def document_rows(documents: Sequence[DocumentInfo]) -> list[dict[str, Any]]:
    """Documents for a table."""
    return [
        {
            "document": document.meta.uri,
            "tokens": document.num_tokens,
            "first block": document.first_block,
            "blocks": document.num_blocks,
            "state": document.state,
        }
        for document in documents
    ]


def documents_json(documents: Sequence[DocumentInfo]) -> list[dict[str, Any]]:
    """Documents for JSON."""
    return [asdict(document) for document in documents]


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def emit(as_json: bool, report: Mapping[str, Any], *tables: Table) -> None:
    """Print a report as JSON, or its tables."""
    if as_json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return
    for table in tables:
        if table.rows:
            table.show()
        else:
            sys.stdout.write(f"{table.title}: none\n")
