"""Every kind of damage is found, and the line that reports it names the place."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError
from storage.tree import catalogue, journal
from storage.tree.reader import ContextReader
from storage.tree.rebuild import EncodingBuilder
from storage.tree.verify import verify_context
from tests.storage.support import CONTEXT, Text, encoding_of, follow, new_store, nodes_of, open_context

ENCODING = encoding_of("float16", width=5, key_width=3)
TEXTS = [Text("one", 50 * K - 3), Text("two", 30), Text("three", 60 * K)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A context of 111 blocks, 96 of them sealed."""
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path) as writer:
        writer.append([text.span(ENCODING) for text in TEXTS])
        follow(writer, ENCODING)
        writer.flush()
    return tmp_path / CONTEXT


def run(folder: Path, statement: str, *arguments: object) -> None:
    """Change the catalogue as a program with a fault would: every row has a right checksum."""
    with closing(catalogue.connect(folder, read_only=False)) as db:
        assert db.execute(statement, arguments).rowcount > 0


def problems(folder: Path) -> list[str]:
    report = verify_context(folder, CONTEXT)
    assert report.ok == (not report.problems)
    return report.problems


def test_a_clean_tree_is_ok_and_counted(folder: Path) -> None:
    report = verify_context(folder, CONTEXT)
    assert report.ok
    assert report.problems == []
    assert (report.num_segments, report.num_blocks, report.num_documents) == (3, 111, 3)
    # Blocks 96-110 and their gists, in one run each, and the three nodes of LOD2.
    assert report.num_journal_rows == 3
    assert report.num_bytes > 111 * (32 * 4 + ENCODING.node_bytes)


def test_an_empty_tree_is_ok(tmp_path: Path) -> None:
    new_store(tmp_path, ENCODING)
    assert verify_context(tmp_path / CONTEXT, CONTEXT).ok


def test_a_half_built_encoding_is_no_damage(folder: Path) -> None:
    other = encoding_of("int8", width=70)
    with open_context(folder.parent) as writer:
        EncodingBuilder(writer, other).put_nodes(1, 0, nodes_of(other, 1, 0, 40))
        writer.flush()
    assert problems(folder) == []


def flip(folder: Path, pattern: str, offset: int) -> None:
    (path,) = folder.glob(f"segments/{pattern}")
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def flip_journal(folder: Path) -> None:
    with closing(sqlite3.connect(folder / catalogue.CATALOGUE_FILE, isolation_level=None)) as db:
        row_id, payload = db.execute("SELECT row_id, payload FROM journal WHERE lod = 1").fetchone()
        spoiled = bytearray(payload)
        spoiled[7] ^= 1
        db.execute("UPDATE journal SET payload = ? WHERE row_id = ?", (bytes(spoiled), row_id))


def wrong_prefix_sum(folder: Path) -> None:
    """Wrong content under a right checksum: block 98 begins one token too late."""
    level = journal.block_level(1)
    with closing(sqlite3.connect(folder / catalogue.CATALOGUE_FILE, isolation_level=None)) as db:
        row = db.execute("SELECT row_id, first, count, crc, payload FROM journal WHERE lod = 0").fetchone()
        arrays = {name: np.array(values) for name, values in journal.unpack(level, *row[1:]).arrays.items()}
        arrays["tokens_before"][2] += 1
        payload = b"".join(arrays[stored.name].tobytes() for stored in level.layout)
        crc = journal.checksum(*level.key, row[1], row[2], payload)
        db.execute("UPDATE journal SET payload = ?, crc = ? WHERE row_id = ?", (payload, crc, row[0]))


def remove_segment(folder: Path) -> None:
    (segment,) = folder.glob("segments/*_0000000032_*")
    shutil.rmtree(segment)


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "journal payload": (flip_journal, ["journal row of LOD1 nodes 96-110 is damaged"]),
    "segment byte": (
        lambda folder: flip(folder, "*_0000000032_*/lod1/gists/c.0.0", 9),
        ["_0000000032_32", "lod1/gists/c.0.0", "LOD1 nodes 32-63", "checksum"],
    ),
    "token byte": (
        lambda folder: flip(folder, "*_0000000064_*/lod0/tokens/c.0", 900),
        ["lod0/tokens/c.0", "LOD0 nodes 64-95"],
    ),
    "shard index": (
        lambda folder: flip(folder, "*_0000000000_*/lod1/keys/c.0.0", -10),
        ["lod1/keys/c.0.0", "LOD1 nodes 0-31", "shard index is damaged"],
    ),
    "metadata file": (
        lambda folder: flip(folder, "*_0000000032_*/lod1/gists/zarr.json", 30),
        ["_0000000032_32", "lod1/gists/zarr.json: checksum does not match"],
    ),
    "missing segment": (remove_segment, ["_0000000032_32", "LOD0 nodes 32-63", "is missing"]),
    "lost journal row": (
        lambda folder: run(folder, "DELETE FROM journal WHERE lod = 0"),
        ["LOD0: the newest version has 111 nodes, 96 are stored"],
    ),
    "lost upper nodes": (
        lambda folder: run(folder, "DELETE FROM journal WHERE lod = 2"),
        ["LOD2: the newest version has 3 nodes, 0 are stored"],
    ),
    "lost extent": (
        lambda folder: run(folder, "DELETE FROM extents WHERE lod = 1 AND first = 32"),
        ["LOD1 (encoding 1): nodes 32-63 are missing, before segment"],
    ),
    "gap in the journal": (
        lambda folder: run(folder, "UPDATE journal SET first = 97 WHERE lod = 1"),
        ["LOD1 (encoding 1): nodes 96-96 are missing, before journal row"],
    ),
    "twice": (
        lambda folder: run(folder, "UPDATE journal SET first = 90 WHERE lod = 1"),
        ["LOD1 (encoding 1): nodes 90-95 are stored twice, before journal row"],
    ),
    "more than the version": (
        lambda folder: run(folder, "UPDATE commits SET level_counts = '[111, 2]' WHERE seq = 3"),
        ["LOD2: the newest version has 2 nodes, 3 are stored"],
    ),
    "a level the version does not know": (
        lambda folder: run(folder, "UPDATE commits SET level_counts = '[111]' WHERE seq = 3"),
        ["LOD2: the newest version has 0 nodes, 3 are stored"],
    ),
    "unknown encoding": (
        lambda folder: run(folder, "UPDATE journal SET encoding_id = 77 WHERE lod = 2"),
        ["nodes of encoding 77, which the catalogue does not describe"],
    ),
    "lost version": (
        lambda folder: run(folder, "DELETE FROM commits WHERE seq = 3"),
        ["points at version 3, which is not there"],
    ),
    "prefix sum": (wrong_prefix_sum, [f"block 98: prefix sum {98 * K - 3 - 2 + 1}, counted {98 * K - 3 - 2}"]),
    "tokens of the version": (
        lambda folder: run(folder, "UPDATE commits SET num_tokens = 5 WHERE seq = 3"),
        ["5 tokens in 111 blocks, after 3547"],
    ),
    "tokens of a document": (
        lambda folder: run(folder, "UPDATE documents SET num_tokens = 31 WHERE key = 'two'"),
        ["document 'two' says 31 tokens, its blocks hold 30"],
    ),
    "place of a document": (
        lambda folder: run(folder, "UPDATE documents SET first_block = 52 WHERE key = 'three'"),
        ["document 'three' begins at block 52, expected 51"],
    ),
    "lost row of a segment": (
        lambda folder: run(folder, "DELETE FROM segments WHERE segment_id = 2"),
        ["LOD0 nodes 32-63: the catalogue has no row of their segment"],
    ),
    "manifest": (
        lambda folder: run(folder, "UPDATE segments SET manifest = replace(manifest, 'bytes', 'bites')"),
        ["_0000000032_32", "zarr.json: its entry in the catalogue is damaged"],
    ),
    "lost document": (
        lambda folder: run(folder, "DELETE FROM documents WHERE key = 'three'"),
        ["documents cover 51 of 111 blocks"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(folder: Path, kind: str) -> None:
    harm, named = DAMAGE[kind]
    harm(folder)
    found = "\n".join(problems(folder))
    for part in named:
        assert part in found


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE encodings SET body = replace(body, 'float16', 'gloat16')",
        "UPDATE encodings SET body = replace(body, 'width', 'wist')",
        "UPDATE encodings SET body = replace(body, ':', ';')",
        "UPDATE commits SET level_counts = '[111, 3'",
        "UPDATE segments SET manifest = substr(manifest, 5)",
    ],
)
def test_damaged_text_in_the_catalogue_is_an_error_of_ours(folder: Path, statement: str) -> None:
    run(folder, statement)
    assert any("damaged" in problem for problem in problems(folder))


def test_damaged_places_are_not_read(folder: Path) -> None:
    run(folder, "UPDATE extents SET first = 33 WHERE first = 32")
    run(folder, "UPDATE documents SET num_blocks = 0 WHERE key = 'two'")
    run(folder, "UPDATE documents SET num_blocks = 1 WHERE key = 'three'")
    with ContextReader(folder, CONTEXT) as reader:
        with pytest.raises(CorruptTreeError, match="row of segment .* is damaged"):
            reader.read("gists", 1, [40])
        with pytest.raises(CorruptTreeError, match="document 'three' is damaged: it does not hold block 60"):
            reader.document_at(60)


def test_all_damage_is_listed_not_only_the_first(folder: Path) -> None:
    flip(folder, "*_0000000000_*/lod1/gists/c.0.0", 9)
    flip(folder, "*_0000000064_*/lod1/keys/c.0.0", 9)
    flip_journal(folder)
    found = "\n".join(problems(folder))
    for part in ("LOD1 nodes 0-31", "LOD1 nodes 64-95", "LOD1 nodes 96-110"):
        assert part in found


def test_verifying_changes_nothing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert verify_context(folder, CONTEXT).ok
    after = {path: path.read_bytes() for path in before}
    assert after == before


def test_a_sound_shard_of_other_content_is_noticed(tmp_path: Path) -> None:
    """Each of its checksums is right, and so is a crc32c of the whole, which they take its content out of."""
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path, seal_in_background=False) as writer:
        writer.append([Text("one", 64 * K).span(ENCODING)])
        writer.flush()
    one, other = sorted((tmp_path / CONTEXT / "segments").glob("*/lod0/tokens/c.0"))
    other.write_bytes(one.read_bytes())
    problems = verify_context(tmp_path / CONTEXT, CONTEXT).problems
    assert f"{other}: checksum does not match; damaged bytes" in problems
