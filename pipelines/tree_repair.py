"""tree repair: mends what is damaged and can be had again. Starts no cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from actors.gist_maker import GistMaker, load_gist_maker
from actors.lexical_indexer import LexicalIndexer, LexicalIndexerSpec
from cluster.errors import CorruptTreeError
from cluster.tables import Table
from cluster.tree_config import TreeRepairJob
from models.tokenizer import Tokenizer
from pipelines.tree_versions import emit, maintained
from storage.check import ContextReport, check_context
from storage.lexical.index import remove_index
from storage.repair import Repair, TreeRepair
from storage.schema import Encoding
from storage.store import Store
from storage.tree import catalogue
from storage.tree.log_check import forget_lost_commits, lost_commits
from storage.tree.writer import MAIN_BRANCH
from storage.tree.writer_lock import writer_lock


def run(job: TreeRepairJob) -> None:
    """Find what is damaged, mend it if that was asked for, and check again.

    Raises:
        CorruptTreeError: something is damaged that cannot be had again, or still.
        IncompatibleTreeError, ModelError: the net at hand is not the one that made the damaged gists.
        WriterConflictError: something writes to the context.
    """
    name = job.store.context
    store = Store(job.store.root)
    folder = store.folder(name)
    backup = Store(Path(job.from_store)).folder(name) if job.from_store else None
    found = check_context(store, name)
    repair = TreeRepair(folder, name, found.tree, lambda encoding: _maker(job, encoding), backup)
    beside = _beside_the_tree(store, name, found)
    repairs = [*beside, *repair.plan()] if found.problems else []
    left = found.problems
    if job.apply and repairs:
        if lost_commits(folder / catalogue.CATALOGUE_FILE):
            with writer_lock(folder, name):
                forget_lost_commits(folder / catalogue.CATALOGUE_FILE)
        store.forget_damaged_leases()
        with maintained(job.store, MAIN_BRANCH) as writer:
            for entry in beside:
                if entry.how:
                    with writer.commit() as db:
                        writer.audit(db, "repair", {"what": entry.what, "how": entry.how})
            repairs = [*beside, *repair.apply(writer)]
        if found.index:
            _rebuild_index(job, folder)
        left = check_context(store, name).problems
    report = {
        "context": name,
        "applied": job.apply,
        "problems": found.problems,
        "repairs": [asdict(entry) for entry in repairs],
        "left": left if job.apply else [entry.lost for entry in repairs if entry.lost],
    }
    title = f"{name}: {len(found.problems)} problem(s)"
    rows = [{"what": r.what, "mended" if job.apply else "would be": r.how or "not", "lost": r.lost} for r in repairs]
    emit(job.json, report, Table(rows, title))
    lost = [f"{entry.what}: {entry.lost}" for entry in repairs if entry.lost]
    if job.apply and left:
        raise CorruptTreeError(
            f"context {name!r} has {len(left)} problem(s) still, the first is: {left[0]}. {_advice(job)}"
        )
    if lost or (found.problems and not repairs):
        raise CorruptTreeError(f"context {name!r}: {(lost or found.problems)[0]}. {_advice(job)}")


def _advice(job: TreeRepairJob) -> str:
    first = "The backup does not have it either" if job.from_store else "Give a backup with --from_store"
    return f"{first}, restore the context from a backup, or take the documents out and ingest them again."


def _beside_the_tree(store: Store, name: str, found: ContextReport) -> list[Repair]:
    """What is not a tree's nodes."""
    entries = []
    if lost := lost_commits(store.folder(name) / catalogue.CATALOGUE_FILE):
        entries.append(Repair(lost, "the log is cut there; what it was is kept as catalogue.sqlite-wal.damaged"))
    if found.index:
        entries.append(Repair("lexical index", "built anew from the blocks"))
    for line in found.store:
        if "row of pins" in line:
            entries.append(Repair(line, "the lease is forgotten"))
        else:
            entries.append(Repair(line, "", "what the store lists; see docs/operations.md"))
    rows = [line for line in found.tree.problems if "row of" in line and "journal row" not in line]
    entries += [Repair(line, "", "what the catalogue says there") for line in rows]
    entries += [Repair(line, "", "the focus events of that file") for line in found.events]
    return entries


def _maker(job: TreeRepairJob, encoding: Encoding) -> GistMaker:
    what = f"what is damaged in context {job.store.context!r}"
    return load_gist_maker(what, encoding, job.base_lm, job.gistnet, job.store, job.threads)


def _rebuild_index(job: TreeRepairJob, folder: Path) -> None:
    remove_index(folder)
    indexer = LexicalIndexer(LexicalIndexerSpec(job.store, job.base_lm), Tokenizer.load(job.base_lm))
    try:
        indexer.advance()
    finally:
        indexer.close()
