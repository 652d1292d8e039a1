"""tree backup: copies a context into another store. Starts no cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cluster.progress import Progress
from cluster.tables import Table
from cluster.tree_config import TreeBackupJob
from pipelines.tree_report import human_bytes
from pipelines.tree_versions import emit
from storage.store import Store
from storage.versions.backup import back_up


def run(job: TreeBackupJob) -> None:
    """Copy what the backup does not have yet."""
    name, target = job.store.context, Path(job.to)
    with Progress(None, "segments", f"backing up {name}") as progress:

        def on_progress(done: int, num_segments: int) -> None:
            progress.set_total(num_segments)
            progress.advance(max(0, done - progress.done))

        done = back_up(Store(job.store.root), name, target, on_progress=on_progress)
    rows = [
        {"what": "newest version of main", "value": str(done.seq)},
        {"what": "segments", "value": f"{done.segments:,}"},
        {"what": "copied now", "value": f"{done.copied_segments:,} ({human_bytes(done.copied_bytes)})"},
        {"what": "removed from the backup", "value": f"{done.removed_segments:,}"},
    ]
    title = f"{name} is in {target}; check it with `tree verify --store.root {target} --store.context {name}`"
    emit(job.json, asdict(done), Table(rows, title))
