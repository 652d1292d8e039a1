"""Bundles to test with: exported, compared, taken apart and put together again as a forger would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from storage.bundles import BundleReader, ImportResult, export_bundle, import_bundle
from storage.bundles.container import ContainerReader, ContainerWriter
from storage.bundles.manifest import MANIFEST_NAME, MANIFEST_SUM_NAME, Manifest, manifest_sum
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.verify import verify_context
from tests.storage.support import CONTEXT, IDENTITY

Contents = dict[str, bytes]


def export(root: Path, path: Path, version: str = "main", **options: Any) -> Manifest:
    """A version of the test context as a bundle."""
    with Store(root).open_reader(CONTEXT, version) as reader:
        return export_bundle(reader, IDENTITY, path, **options)


def bring_in(path: Path, root: Path, context: str = CONTEXT, **options: Any) -> ImportResult:
    """Import into a store that need not be there."""
    with BundleReader(path) as bundle:
        return import_bundle(bundle, Store(root, create=True), context, **options)


def open_tree(root: Path, version: str = "main", context: str = CONTEXT) -> ContextReader:
    return Store(root).open_reader(context, version)


def is_sound(root: Path, context: str = CONTEXT) -> None:
    report = verify_context(root / context, context)
    assert report.ok, report.problems


def assert_same_bytes(found: ContextReader, wanted: ContextReader, first_block: int = 0) -> None:
    """All of `found` is, byte for byte, what stands in `wanted` from a block on; so are the levels above, from 0 on."""
    num_blocks = found.version.num_blocks
    pairs = [(0, first_block, num_blocks), (1, first_block, num_blocks)]
    if first_block == 0:
        pairs += [(lod, 0, found.version.num_nodes(lod)) for lod in range(2, found.version.max_lod + 1)]
    for lod, first, count in pairs:
        mine, theirs = found.stored_arrays(lod, 0, count), wanted.stored_arrays(lod, first, count)
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"tokens_before"}:
            assert mine[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(mine[name], theirs[name])


def contents(path: Path) -> Contents:
    """Every member's bytes."""
    container = ContainerReader(path)
    try:
        return {name: container.read_unchecked(name, size) for name, size in container.sizes.items()}
    finally:
        container.close()


def put_together(path: Path, members: Contents) -> None:
    """A container of these members, whatever they are."""
    with ContainerWriter(path, overwrite=True) as file:
        for name, data in members.items():
            with file.member(name) as content:
                content.write(data)
        file.commit()


def forge(path: Path, change: Callable[[dict[str, Any], Contents], None]) -> None:
    """Change a bundle's manifest and members, with checksums that are right again."""
    members = contents(path)
    body = json.loads(members.pop(MANIFEST_NAME))
    del members[MANIFEST_SUM_NAME]
    change(body, members)
    if isinstance(body.get("members"), list):
        for member in body["members"]:
            if isinstance(member, dict) and member.get("name") in members:
                member["sha256"] = hashlib.sha256(members[member["name"]]).hexdigest()
    text = json.dumps(body).encode()
    put_together(path, {**members, MANIFEST_NAME: text, MANIFEST_SUM_NAME: manifest_sum(text)})
