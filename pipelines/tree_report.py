"""What a tree holds, as numbers, tables and a picture; shared by the jobs that show one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import StoreConfig
from cluster.plots import figure
from storage.contract import Version
from storage.schema import Encoding
from storage.store import Store
from storage.tree import catalogue
from storage.tree.journal import BLOCK_LAYOUT

Growth = list[tuple[float, int, tuple[int, ...]]]


@dataclass(frozen=True)
class TreeSize:
    """A context's newest version and what it takes on disk."""

    version: Version
    num_documents: int
    num_segments: int
    sealed_payload_bytes: int
    sealed_stored_bytes: int
    journal_bytes: int
    catalogue_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Tokens, counts, prefix sums, gists and keys, in bytes."""
        return sum(level_bytes(self.version, lod) for lod in range(self.version.max_lod + 1))

    @property
    def stored_bytes(self) -> int:
        """Sealed segments and the catalogue with its journal, in bytes."""
        return self.sealed_stored_bytes + self.catalogue_bytes


def level_bytes(version: Version, lod: int) -> int:
    """Payload bytes of a level."""
    if lod == 0:
        return version.num_blocks * sum(stored.node_bytes for stored in BLOCK_LAYOUT)
    return version.num_nodes(lod) * version.encoding.node_bytes


def measure_tree(store: StoreConfig) -> TreeSize:
    """Size of a context.

    Raises:
        StorageError: it cannot be opened.
    """
    folder = Store(store.root).folder(store.context)
    with Store(store.root).open_reader(store.context, store.version) as reader:
        version = reader.version
        num_documents = len(reader.documents())
    with contextlib.closing(catalogue.connect(folder, read_only=True)) as db:
        segments, payload, stored = db.execute(
            "SELECT count(*), coalesce(sum(payload_bytes), 0), coalesce(sum(stored_bytes), 0) FROM segments"
        ).fetchone()
        journal = db.execute("SELECT coalesce(sum(length(payload)), 0) FROM journal").fetchone()[0]
    files = (folder / catalogue.CATALOGUE_FILE, folder / f"{catalogue.CATALOGUE_FILE}-wal")
    catalogue_bytes = sum(path.stat().st_size for path in files if path.exists())
    return TreeSize(version, num_documents, segments, payload, stored, journal, catalogue_bytes)


def level_rows(tree: TreeSize) -> list[dict[str, object]]:
    """One row a level, and the total."""
    version = tree.version
    rows: list[dict[str, object]] = [
        {
            "level": f"LOD{lod}",
            "nodes": f"{version.num_nodes(lod):,}" + (" slots" if lod == 0 else ""),
            "a node covers": "1 token" if lod == 0 else f"{K**lod:,} slots",
            "payload": human_bytes(level_bytes(version, lod)),
        }
        for lod in range(version.max_lod + 1)
    ]
    rows.append(
        {
            "level": "all",
            "nodes": f"{version.num_tokens:,} tokens",
            "a node covers": f"{tree.num_documents:,} documents",
            "payload": f"{human_bytes(tree.payload_bytes)}; on disk {human_bytes(tree.stored_bytes)} "
            f"({tree.num_segments} segments, journal {human_bytes(tree.journal_bytes)})",
        }
    )
    return rows


def human_bytes(count: int) -> str:
    """Bytes in the largest unit that leaves at least one."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def plot_growth(growth: Growth, tree: TreeSize, path: Path) -> None:
    """Tokens and nodes over time, and bytes by level. Nothing is drawn when nothing was written."""
    if len(growth) < 2:
        return
    lods = list(range(tree.version.max_lod + 1))
    sizes = [level_bytes(tree.version, lod) / 2**20 for lod in lods]
    title = f"Context {tree.version.context!r}: {tree.version.num_tokens:,} tokens"
    with figure(path, title, num_columns=2, size=(12.0, 4.2)) as (left, right):
        seconds = [point[0] for point in growth]
        left.plot(seconds, [point[1] for point in growth], label="tokens", color="black", linewidth=2)
        for lod in lods[1:]:
            nodes = [point[2][lod - 1] if lod <= len(point[2]) else 0 for point in growth]
            left.step(seconds, nodes, where="post", label=f"LOD{lod} nodes")
        # Room above the curves for the legend.
        top = growth[-1][1] * 30
        left.set(yscale="log", ylim=(1, top), xlabel="seconds", ylabel="count", title="Growth in this run")
        left.legend(loc="upper left", ncols=2)
        bars = right.barh([f"LOD{lod}" for lod in lods], sizes)
        labels = [
            f" {tree.version.num_nodes(lod):,} nodes, {human_bytes(level_bytes(tree.version, lod))}" for lod in lods
        ]
        right.bar_label(bars, labels)
        right.set(xscale="log", xlim=(None, max(sizes) * 100), xlabel="payload, MiB", title="Levels")
        right.invert_yaxis()


def encoding_rows(encoding: Encoding) -> list[dict[str, object]]:
    """What made a version's gists."""
    arrays = ", ".join(f"{a.name} {a.rows_per_node}x{a.width} {a.dtype}" for a in encoding.arrays)
    return [
        {"what": "GistNet", "value": f"{encoding.gistnet_id} ({encoding.gistnet_digest[:12]})"},
        {"what": "computed in", "value": encoding.compute_dtype},
        {"what": "arrays of a level", "value": arrays},
    ]
