"""tree export, import: a context, or a span of it, as one file from one machine to another. They start no cluster."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.progress import Progress
from cluster.tables import Table
from cluster.tree_config import TreeExportJob, TreeImportJob
from pipelines.tree_report import encoding_rows, human_bytes
from storage.bundles import BundleReader, export_bundle, import_bundle
from storage.bundles.manifest import Manifest
from storage.store import LEASE_S, Store


def export(job: TreeExportJob) -> None:
    """Write a bundle."""
    store = Store(job.store.root)
    path = Path(job.to).expanduser().absolute()
    identity, _ = store.identity(job.store.context, job.store.version)
    num_blocks = None if job.num_blocks < 0 else job.num_blocks
    with store.open_reader(job.store.context, job.store.version) as reader:
        tail = reader.tail()
        renewed = time.monotonic()
        with Progress(num_blocks or reader.version.num_blocks - job.first_block, "blocks", "exporting") as progress:

            def on_blocks(count: int) -> None:
                nonlocal renewed
                progress.advance(count)
                if time.monotonic() - renewed > LEASE_S / 10:
                    reader.renew()
                    renewed = time.monotonic()

            manifest = export_bundle(
                reader,
                identity,
                path,
                first_block=job.first_block,
                num_blocks=num_blocks,
                overwrite=job.overwrite,
                on_blocks=on_blocks,
            )
    file_bytes = path.stat().st_size
    left_out = len(tail.tokens) if tail else 0
    rows = [
        *_manifest_rows(manifest),
        {"what": "left out", "value": f"{left_out} tokens of the open document that have no gist yet"},
        {"what": "file", "value": f"{path}, {human_bytes(file_bytes)}"},
    ]
    report = {"file": str(path), "file_bytes": file_bytes, "tail_tokens_left_out": left_out, **_summary(manifest)}
    _emit(job.json, report, Table(rows, f"Exported; `tree import --from_file {path.name}` brings it in"))


def import_(job: TreeImportJob) -> None:
    """Check a bundle, then append it."""
    with BundleReader(Path(job.from_file).expanduser().absolute()) as bundle:
        manifest = bundle.manifest
        # Every block is read twice, to be checked and to be written; what is there already a third time.
        with Progress(2 * manifest.num_blocks, "blocks", "importing") as progress:
            done = import_bundle(
                bundle,
                Store(job.store.root, create=True),
                job.store.context,
                branch=job.store.version,
                segment_super_blocks=job.store.segment_super_blocks,
                owner=f"tree import into {job.store.context}",
                on_blocks=lambda count, step: progress.advance(0 if step == "comparing" else count, step=step),
            )
    above = f"{done.new_nodes:,} new nodes" + ("; the next `compact` makes those missing" * done.levels_missing)
    rows = [
        *_manifest_rows(manifest),
        {"what": "new", "value": f"{done.new_documents:,} documents, {done.new_blocks:,} blocks"},
        {"what": "there already", "value": f"{done.skipped_documents:,} documents"},
        {"what": "levels above the blocks", "value": above},
        {"what": "now", "value": f"version {done.version.seq}, {done.version.num_tokens:,} tokens"},
    ]
    report = {"bundle": _summary(manifest), **asdict(done), "version": done.version.seq}
    _emit(job.json, report, Table(rows, f"Imported into branch {done.version.branch} of {job.store.context}"))


def _manifest_rows(manifest: Manifest) -> list[dict[str, Any]]:
    stop = manifest.first_block + manifest.num_blocks
    levels = ", ".join(f"LOD{lod} {count:,}" for lod, count in enumerate(manifest.upper_nodes, start=2))
    return [
        {"what": "from", "value": f"version {manifest.version} of {manifest.context}, branch {manifest.branch}"},
        {"what": "blocks", "value": f"{manifest.first_block:,} to {stop - 1:,}"},
        {"what": "holds", "value": f"{manifest.num_tokens:,} tokens in {manifest.num_documents:,} documents"},
        {"what": "nodes above", "value": levels or "none"},
        {"what": "base model", "value": manifest.identity.base_model_id},
        *encoding_rows(manifest.encoding),
    ]


def _summary(manifest: Manifest) -> dict[str, Any]:
    """The manifest without its list of members."""
    return {name: value for name, value in asdict(manifest).items() if name != "members"}


def _emit(as_json: bool, report: Mapping[str, Any], table: Table) -> None:
    if as_json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        table.show()
