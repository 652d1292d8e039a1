"""Bundles: what is exported is what is imported, whatever is cut off, interrupted or repeated."""

from __future__ import annotations

import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors.torch
import torch

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import GistDtype
from cluster.errors import BundleError, DiskFullError, IncompatibleTreeError, StorageError
from storage import store as store_module
from storage.bundles import BundleReader, chunks, export_bundle, import_bundle
from storage.contract import DocumentMeta
from storage.store import Store
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching
from storage.versions.history import History
from tests.storage.bundle_support import assert_same_bytes, bring_in, export, is_sound, open_tree
from tests.storage.support import (
    CONTEXT,
    IDENTITY,
    Text,
    assert_holds,
    encoding_of,
    follow,
    new_store,
    open_context,
)

ENCODING = encoding_of("float16", key_width=3)
ONE, TWO, THREE = Text("one", 100 * K), Text("two", 60 * K - 7), Text("three", 45 * K)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these trees have several a level."""
    monkeypatch.setattr(chunks, "MAX_CHUNK_NODES", 32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path / "here", ENCODING)
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "context.mcb"


def opened(root: Path, **options) -> ContextWriter:
    """The context's writer, whose blocks stay in the journal: quick."""
    return open_context(root, segment_super_blocks=32, **options)


def write(root: Path, *texts: Text, branch: str = "main") -> None:
    with opened(root, branch=branch) as writer:
        for text in texts:
            writer.append([text.span(ENCODING)])
        follow(writer, ENCODING)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", get_args(GistDtype))
def test_a_tree_arrives_byte_for_byte(tmp_path: Path, dtype: GistDtype, rows: int) -> None:
    encoding = encoding_of(dtype, width=70, rows=rows, key_width=3)
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "file.mcb"
    new_store(here, encoding)
    with opened(here) as writer:
        for text in (ONE, TWO):
            writer.append([text.span(encoding)])
        follow(writer, encoding)
    manifest = export(here, file)
    assert (manifest.num_blocks, manifest.num_documents, manifest.upper_nodes) == (160, 2, (5,))
    done = bring_in(file, there)
    assert (done.new_documents, done.new_blocks, done.new_nodes, done.levels_missing) == (2, 160, 5, False)
    with open_tree(there) as found, open_tree(here) as wanted:
        assert found.version.encoding == wanted.version.encoding
        assert found.version.level_counts == wanted.version.level_counts
        assert_same_bytes(found, wanted)
        assert found.documents() == wanted.documents()
    assert Store(there).identity(CONTEXT) == (IDENTITY, encoding)
    is_sound(there)


def test_a_tree_of_many_levels_and_segments_arrives(root: Path, there: Path, file: Path) -> None:
    texts = [Text("long", 1100 * K), TWO]
    with open_context(root, segment_super_blocks=8) as writer:
        for text in texts:
            writer.append([text.span(ENCODING)])
        follow(writer, ENCODING)
    assert export(root, file).upper_nodes == (36, 1)
    assert bring_in(file, there, segment_super_blocks=8).new_nodes == 37
    with open_tree(there) as found, open_tree(root) as wanted:
        assert_holds(found, texts, ENCODING)
        assert_same_bytes(found, wanted)
        assert found.version.level_counts == (1160, 36, 1)
    is_sound(there)


def test_other_programs_can_read_a_bundle(root: Path, file: Path, tmp_path: Path) -> None:
    write(root, ONE)
    export(root, file)
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path / "taken", filter="data")
    with open_tree(root) as reader:
        found = safetensors.torch.load_file(tmp_path / "taken/lod1-0000000032.safetensors")
        assert torch.equal(found["lod1/gists"][:, None], reader.read("gists", 1, np.arange(32, 64)))
        np.testing.assert_array_equal(found["lod0/tokens"].numpy(), reader.tokens(32, 32)[0])
    checked = subprocess.run(["sha256sum", "--check", "manifest.sha256"], cwd=tmp_path / "taken", capture_output=True)
    assert checked.returncode == 0


def test_a_fork_is_exported_as_it_is_read(root: Path, there: Path, file: Path) -> None:
    write(root, ONE, TWO)
    with opened(root) as writer:
        Branching(writer).fork("side", at_block=100)
    write(root, THREE, branch="side")
    manifest = export(root, file, "side")
    assert manifest.branch == "side"
    bring_in(file, there, "copy")
    with open_tree(there, context="copy") as found, open_tree(root, "side") as wanted:
        assert_holds(found, [ONE, THREE], ENCODING)
        assert_same_bytes(found, wanted)
        assert found.version.branch == "main"


@pytest.mark.parametrize(
    ("first", "count", "keys", "states"),
    [
        (0, 100, ["one"], ["complete"]),
        (0, 70, ["one"], ["cut"]),
        (0, 5, ["one"], ["cut"]),
        (100, None, ["two", "three"], ["complete", "complete"]),
        (110, 60, ["two#from10", "three"], ["complete", "cut"]),
        (30, 7, ["one#from30"], ["cut"]),
        (90, 70, ["one#from90", "two"], ["complete", "complete"]),
    ],
)
def test_spans_cut_documents(
    root: Path, there: Path, file: Path, first: int, count: int | None, keys: list[str], states: list[str]
) -> None:
    write(root, ONE, TWO, THREE)
    manifest = export(root, file, first_block=first, num_blocks=count)
    done = bring_in(file, there)
    with open_tree(there) as found, open_tree(root) as wanted:
        assert [d.meta.key for d in found.documents()] == keys
        assert [d.state for d in found.documents()] == states
        assert found.version.num_tokens == manifest.num_tokens
        assert_same_bytes(found, wanted, first)
        if first == 0:
            expected = [found.version.num_blocks // K**n for n in range(2)]
            assert found.version.level_counts == tuple(nodes for nodes in expected if nodes)
    assert done.levels_missing == (first != 0 and done.new_blocks >= K)
    is_sound(there)


def test_an_open_document_comes_cut_and_without_its_tail(root: Path, there: Path, file: Path) -> None:
    with opened(root) as writer:
        writer.append([TWO.span(ENCODING), ONE.span(ENCODING, 0, 40, ends=False)])
        writer.append_tail(ONE.meta, 40 * K, ONE.tokens(40 * K, 40 * K + 9))
    export(root, file)
    bring_in(file, there)
    with open_tree(there) as found:
        assert [(d.meta.key, d.state, d.num_blocks) for d in found.documents()] == [
            ("two", "complete", 60),
            ("one", "cut", 40),
        ]
        assert found.tail() is None
    # The key is free: the text may come again, from its start.
    write(there, ONE)
    assert bring_in(file, there).new_blocks == 0
    is_sound(there)


def test_an_older_version_is_exported_as_it_was(root: Path, there: Path, file: Path) -> None:
    with opened(root) as writer:
        writer.append([ONE.span(ENCODING, 0, 50, ends=False)])
        Branching(writer).tag("then")
        writer.append([ONE.span(ENCODING, 50), TWO.span(ENCODING)])
    manifest = export(root, file, "then")
    assert (manifest.num_blocks, manifest.upper_nodes) == (50, ())
    assert bring_in(file, there).levels_missing
    with open_tree(there) as found:
        assert [(d.meta.key, d.state, d.num_blocks) for d in found.documents()] == [("one", "cut", 50)]


def test_importing_twice_brings_nothing_twice(root: Path, there: Path, file: Path) -> None:
    write(root, ONE, TWO, THREE)
    export(root, file, first_block=5, num_blocks=120)
    bring_in(file, there)
    with open_tree(there) as reader:
        before = reader.version
    again = bring_in(file, there)
    assert again.version == before
    assert (again.new_documents, again.skipped_documents, again.new_blocks, again.new_nodes) == (0, 2, 0, 0)
    # A longer export brings what is new in it; a cut document is another one than the whole.
    export(root, file, first_block=5, overwrite=True)
    more = bring_in(file, there)
    assert (more.new_documents, more.skipped_documents, more.new_blocks) == (2, 1, 105)
    assert bring_in(file, there).new_blocks == 0
    is_sound(there)


def test_a_part_of_a_document_that_is_there_is_there(root: Path, file: Path) -> None:
    write(root, ONE, TWO)
    export(root, file, num_blocks=70)
    done = bring_in(file, root)
    assert (done.new_blocks, done.skipped_documents) == (0, 1)


class _Killed(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("call", [0, 1, 2, 3, 4, 6, 9, 10])
def test_an_interrupted_import_goes_on(
    root: Path, there: Path, file: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with opened(root) as writer:
        writer.append([ONE.span(ENCODING, 0, 70, ends=False)])
        writer.close_document("one")
        writer.append([text.span(ENCODING) for text in (TWO, ONE)])
        follow(writer, ENCODING)
    export(root, file)
    num_calls = 0

    def dying(name: str):
        method = getattr(ContextWriter, name)

        def called(*arguments, **options):
            nonlocal num_calls
            num_calls += 1
            if num_calls == call + 1:
                raise _Killed
            return method(*arguments, **options)

        return called

    with monkeypatch.context() as patched:
        for name in ("append", "close_document", "put_nodes"):
            patched.setattr(ContextWriter, name, dying(name))
        with pytest.raises(_Killed):
            bring_in(file, there)
    bring_in(file, there)
    with open_tree(there) as found, open_tree(root) as wanted:
        assert found.documents() == wanted.documents()
        assert found.version.level_counts == wanted.version.level_counts
        assert_same_bytes(found, wanted)
    assert bring_in(file, there).new_documents == 0
    is_sound(there)


def test_a_bundle_is_appended_behind_what_is_there(root: Path, there: Path, file: Path) -> None:
    write(root, ONE)
    export(root, file)
    new_store(there, ENCODING)
    write(there, TWO)
    with opened(there) as writer:
        Branching(writer).fork("side")
    done = bring_in(file, there, branch="side")
    assert (done.new_blocks, done.new_nodes, done.levels_missing) == (100, 0, True)
    with open_tree(there, "side") as reader:
        assert_holds(reader, [TWO, ONE], ENCODING)
    with open_tree(there) as reader:
        assert_holds(reader, [TWO], ENCODING)
    with opened(there, branch="side") as writer:
        follow(writer, ENCODING)
    assert not bring_in(file, there, branch="side").levels_missing
    entry = History(there / CONTEXT, CONTEXT).audit()[0]
    assert (entry.action, entry.detail["blocks"]) == ("import", 100)
    is_sound(there)


def test_what_contradicts_the_context_is_refused_before_anything_is_written(
    root: Path, there: Path, file: Path
) -> None:
    write(root, TWO, ONE)
    export(root, file)

    def refused(kind: type[Exception], said: str, root: Path = there, **options) -> None:
        with open_tree(root) as reader:
            before = reader.version
        with pytest.raises(kind, match=said):
            bring_in(file, root, **options)
        with open_tree(root) as reader:
            assert reader.version == before

    new_store(there, ENCODING)
    refused(StorageError, "has no branch 'side' to append to", branch="side")
    with pytest.raises(StorageError, match="a new one has the branch 'main' alone"):
        bring_in(file, there, "new", branch="side")
    with opened(there) as writer:
        writer.append([THREE.span(ENCODING, 0, 5, ends=False)])
    refused(BundleError, "'three' is still open there")
    with opened(there) as writer:
        writer.close_document("three")
        writer.append([Text("one", 50 * K, size_bytes=ONE.num_tokens).span(ENCODING)])
    refused(BundleError, "'one' has 1,600 tokens there and 3,200")
    other = there.with_name("other")
    new_store(other, ENCODING)
    with opened(other) as writer:
        span = ONE.span(ENCODING, 0, 40, ends=False)
        changed = span.tokens.copy()
        changed[39, 3] += 1
        writer.append([TWO.span(ENCODING)])
        writer.append([replace(span, tokens=changed)])
    refused(BundleError, "'one' holds other text there", other)
    strange = there.with_name("strange")
    new_store(strange, encoding_of("float16", width=5, key_width=3))
    refused(IncompatibleTreeError, "Import it into a context of its own", strange)


def test_what_cannot_be_exported_is_said_and_leaves_nothing(
    root: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="has 0 blocks"):
        export(root, file)
    write(root, TWO)
    for first, count in ((0, 61), (60, None), (-1, 3), (5, 0)):
        with pytest.raises(BundleError, match="cannot be exported"):
            export(root, file, first_block=first, num_blocks=count)
    with pytest.raises(BundleError, match="cannot write"):
        export(root, file.parent / "nowhere" / "file")
    with pytest.raises(BundleError, match="is a folder"):
        export(root, file.parent, overwrite=True)

    def die(_: int) -> None:
        raise _Killed

    with pytest.raises(_Killed):
        export(root, file, on_blocks=die)
    assert [path.name for path in file.parent.iterdir()] == ["here"]
    export(root, file)
    with pytest.raises(BundleError, match="is there already"):
        export(root, file)
    usage = store_module.shutil.disk_usage(root)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="60 blocks in a bundle need"):
        export(root, file, overwrite=True)
    with pytest.raises(DiskFullError, match="60 blocks need"):
        bring_in(file, file.parent / "there")
    assert not Store(file.parent / "there").contexts()
    # Where nothing is missing, nothing is needed.
    assert bring_in(file, root).new_blocks == 0


def test_names_and_documents_of_any_kind_are_carried(there: Path, file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "here", create=True)
    store.create_context("Über_2", IDENTITY, ENCODING)
    meta = DocumentMeta("k\n\u2028ey", "x:\x1b[31m\x00", "", 2**40, None, ("a", "", "ß\n"))
    span = replace(ONE.span(ENCODING), document=meta)
    with store.open_writer("Über_2", IDENTITY, ENCODING) as writer:
        writer.append([span])
    with store.open_reader("Über_2") as reader:
        export_bundle(reader, IDENTITY, file)
    bring_in(file, there)
    with open_tree(there) as found:
        assert [document.meta for document in found.documents()] == [meta]


def test_what_no_import_would_take_is_not_exported(root: Path, file: Path) -> None:
    with opened(root) as writer:
        writer.append([replace(TWO.span(ENCODING), document=replace(TWO.meta, uri="x" * 2**20))])
    with pytest.raises(BundleError, match="bytes of key, uri and tags"):
        export(root, file)
    with open_tree(root) as reader, pytest.raises(BundleError, match="characters that cannot be shown"):
        export_bundle(reader, replace(IDENTITY, base_model_id="a\nb"), file)
    assert [path.name for path in file.parent.iterdir()] == ["here"]


def test_chunks_are_bounded_in_nodes_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunks.nodes_per_chunk(encoding_of("float16", width=576, key_width=576)) == 8192
    assert chunks.nodes_per_chunk(encoding_of("float32", width=8192, rows=4, key_width=8192)) == 192
    assert chunks.nodes_per_chunk(encoding_of("float32", width=2**18)) == 32


def test_progress_counts_every_block(root: Path, there: Path, file: Path) -> None:
    write(root, ONE)
    seen: list[int] = []
    export(root, file, on_blocks=seen.append)
    assert seen == [32] * 3 + [4]
    told: list[tuple[int, str]] = []
    with BundleReader(file) as bundle:
        import_bundle(bundle, Store(there, create=True), "a", on_blocks=lambda count, step: told.append((count, step)))
        import_bundle(bundle, Store(there), "a", on_blocks=lambda count, step: told.append((count, step)))
    steps = [step for count, step in told for _ in range(count)]
    assert [steps.count(step) for step in ("checking", "comparing", "writing")] == [200, 100, 200]
