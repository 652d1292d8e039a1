"""tree delete: takes documents out of a branch, or erases them. Starts no cluster."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from cluster.errors import ConfigError
from cluster.tables import Table
from cluster.tree_config import TreeDeleteJob
from pipelines.tree_versions import DAY_S, document_rows, documents_json, emit, maintained
from storage.contract import DocumentInfo
from storage.store import Store
from storage.versions.removal import erasable_documents, erase_documents, holders, remove_documents

SHOWN_DOCUMENTS = 20


def run(job: TreeDeleteJob) -> None:
    """Find the documents, and remove them if that was asked for.

    Raises:
        ConfigError: a pattern fits no document.
        BranchConflictError: they cannot be erased while another branch, a tag or a reader shows them.
    """
    store, name = Store(job.store.root), job.store.context
    with store.open_reader(name, job.store.version) as reader:
        shown = reader.documents()
        branch = reader.version.branch
    # An erase that was interrupted has taken the document out of this branch already.
    documents = chosen(job, shown, erasable_documents(store, name) if job.erase else shown)
    keys = [document.meta.key for document in documents]
    still = holders(store, name, keys, but=branch)
    report = {
        "documents": documents_json(documents),
        "still_shown_by": still,
        "applied": job.apply,
        "erased": job.apply and job.erase,
    }
    doing = "erased" if job.erase else "taken out"
    title = f"{'Would be ' if not job.apply else ''}{doing}: {len(documents)} documents of {name}"
    tables = [Table(document_rows(documents[:SHOWN_DOCUMENTS]), title)]
    if job.apply and documents:
        with maintained(job.store) as writer:
            if job.erase:
                done = erase_documents(store, writer, keys, keep_s=job.keep_days * DAY_S)
            else:
                done = remove_documents(writer, keys, job.message)
        report |= {"version": done.version.seq, "blocks": done.blocks, "moved_blocks": done.moved_blocks}
        moved = {"version": str(done.version.seq), "blocks out": done.blocks, "blocks stored again": done.moved_blocks}
        tables.append(Table([moved], "Upper levels behind them come with the next `compact` or `chat`"))
    elif still:
        tables.append(Table([{"who": who} for who in still], "Still shown by"))
    emit(job.json, report, *tables)


def chosen(job: TreeDeleteJob, shown: Sequence[DocumentInfo], reachable: Sequence[DocumentInfo]) -> list[DocumentInfo]:
    """The documents that the job means: by URI of those it can reach, superseded ones of those the branch shows.

    Raises:
        ConfigError: a pattern fits none.
    """
    uris = {document.meta.uri for document in reachable}
    wanted: set[str] = set()
    for pattern in job.documents:
        found = {pattern} & uris or set(fnmatch.filter(uris, pattern))
        if not found:
            raise ConfigError(f"no document of context {job.store.context!r} fits {pattern!r}; `inspect` lists them")
        wanted |= found
    # Documents come in timeline order, so the last of a URI is the newest.
    newest = {document.meta.uri: document.meta.key for document in shown}
    superseded = [d for d in shown if job.superseded and d.meta.key != newest[d.meta.uri]]
    meant = {d.meta.key: d for d in [*(d for d in reachable if d.meta.uri in wanted), *superseded]}
    return list(meant.values())
