"""Bytes of sealed segments against the tokens, gists and keys in them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Result, Setting
from benchmarks.synthetic import build_context, encoding
from cluster.config import SLOTS_PER_SUPER_BLOCK
from storage.tree.sealing import SEGMENT_FOLDER

TOKEN_BYTES = 4


def sealed_size(setting: Setting) -> Result:
    """A context that is sealed as far as whole segments go. Nothing here is random: one build, no spread."""
    # 1,024 super-blocks fill 32 segments of blocks and one of LOD2.
    num_super_blocks = setting.size(1024, 64)
    level = encoding(keys=True)
    with setting.scratch() as root:
        writer, _ = build_context(root, "sealed", level, num_super_blocks)
        with writer.reader() as reader:
            counts = reader.version.level_counts
        writer.close()
        segment_nodes = writer.sealer.segment_nodes
        sealed_counts = [count // segment_nodes * segment_nodes for count in counts]
        files = [path for path in (writer.folder / SEGMENT_FOLDER).rglob("*") if path.is_file()]
        sealed = sum(path.stat().st_size for path in files)
        allocated = sum(path.stat().st_blocks * 512 for path in files)
        folder = _folder_bytes(writer.folder)
    # The prefix sum and the count of each block are the format's own, so they count as overhead.
    payload = sealed_counts[0] * 32 * TOKEN_BYTES + sum(sealed_counts) * level.node_bytes
    whole = counts[0] * 32 * TOKEN_BYTES + sum(counts) * level.node_bytes
    ratio = sealed / payload
    detail = {
        "tokens": num_super_blocks * SLOTS_PER_SUPER_BLOCK,
        "sealed_bytes": sealed,
        "payload_bytes": payload,
        "allocated_on_disk_ratio": round(allocated / payload, 4),
        "context_folder_ratio": round(folder / whole, 4),
        "num_files": len(files),
    }
    return Result(ratio, (ratio, ratio), "exact, one build", detail)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
