"""Files that are no honest bundles: each is refused, says why, and leaves no trace in the store."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BundleError
from storage.bundles import BundleReader, chunks
from storage.bundles.container import ContainerWriter
from storage.bundles.manifest import MANIFEST_NAME, MANIFEST_SUM_NAME, manifest_sum
from storage.bundles.strict_json import Unexpected, fields, parse
from storage.geometry import NO_TOKEN
from storage.store import Store
from tests.storage.bundle_support import Contents, bring_in, contents, export, forge, put_together
from tests.storage.support import Text, encoding_of, follow, new_store, open_context

ENCODING = encoding_of("int8", width=5, key_width=3)
DOCUMENTS, FIRST, LAST, UPPER = (
    "documents.jsonl",
    "lod1-0000000000.safetensors",
    "lod1-0000000064.safetensors",
    "lod2-0000000000.safetensors",
)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle of three chunks of blocks and one of the level above, as bytes."""
    folder = tmp_path_factory.mktemp("honest")
    new_store(folder, ENCODING)
    with open_context(folder, segment_super_blocks=32) as writer:
        writer.append([Text("one", 40 * K).span(ENCODING), Text("two", 35 * K - 7).span(ENCODING)])
        follow(writer, ENCODING)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks, "MAX_CHUNK_NODES", 32)
        export(folder, folder / "bundle")
    return (folder / "bundle").read_bytes()


@pytest.fixture
def file(tmp_path: Path, honest: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(chunks, "MAX_CHUNK_NODES", 32)
    path = tmp_path / "bundle"
    path.write_bytes(honest)
    return path


def refused(path: Path, said: str = ".") -> None:
    """Reading it says so."""
    with pytest.raises(BundleError, match=said):
        read(path)


def read(path: Path) -> None:
    with BundleReader(path) as bundle:
        bundle.verify()


def test_the_honest_one_is_taken(file: Path) -> None:
    assert bring_in(file, file.parent / "store").new_blocks == 75
    assert list(contents(file)) == [
        DOCUMENTS,
        FIRST,
        "lod1-0000000032.safetensors",
        LAST,
        UPPER,
        MANIFEST_NAME,
        MANIFEST_SUM_NAME,
    ]
    forge(file, lambda body, members: None)
    assert bring_in(file, file.parent / "another").new_blocks == 75


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(48))
def test_a_flipped_bit_anywhere_is_found(file: Path, honest: bytes, part: int) -> None:
    # Several places of each part of the file, and every place of the first header over all the parts.
    for at in (part, *np.linspace(part, len(honest) - 48 + part, 12).astype(int).tolist()):
        damaged = bytearray(honest)
        damaged[at] ^= 1 << part % 8
        file.write_bytes(damaged)
        refused(file)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_found(file: Path, honest: bytes, share: float) -> None:
    file.write_bytes(honest[: int(len(honest) * share)])
    refused(file, "no bundle" if share < 0.02 else "damaged")
    for missing in (1, 512, 1024):
        file.write_bytes(honest[:-missing])
        refused(file, "damaged")


def test_what_follows_the_end_is_refused(file: Path, honest: bytes) -> None:
    for more in (b"\0", b"x", bytes(512), honest):
        file.write_bytes(honest + more)
        refused(file, "does not end where its last member does")


# -- other containers ------------------------------------------------------------------------------------------------


def tar_of(path: Path, honest: bytes, change: Callable[[tarfile.TarInfo], None], data: bytes = b"") -> None:
    """The honest members behind one that is changed in a way of tar's."""
    info = tarfile.TarInfo("documents.jsonl")
    info.size = len(data)
    change(info)
    path.write_bytes(info.tobuf() + data + bytes(-len(data) % 512) + honest)


def named(name: str) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "name", name)


def of_type(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, "/etc/passwd"

    return change


@pytest.mark.parametrize(
    "name",
    [
        "../documents.jsonl",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        ".hidden",
        "a\\b",
        "C:evil",
        "A",
        "",
        "a" * 200,
        "ä",
        "a\nb",
    ],
)
def test_names_that_lead_elsewhere_are_refused(file: Path, honest: bytes, name: str) -> None:
    tar_of(file, honest, named(name))
    refused(file, "no bundle")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_what_is_no_plain_file_is_refused(file: Path, honest: bytes, kind: bytes) -> None:
    tar_of(file, honest, of_type(kind))
    refused(file, "says more than a name and a size|no plain member")


def test_a_member_twice_is_refused(file: Path, honest: bytes) -> None:
    tar_of(file, honest, named(DOCUMENTS))
    refused(file, "it has documents.jsonl twice")


def test_endless_members_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(70):
            archive.addfile(tarfile.TarInfo(f"a{number}"))
    monkeypatch.setattr("storage.bundles.container.MAX_MEMBERS", 64)
    refused(file, "more than 64 members")


def test_other_kinds_of_files_are_refused(file: Path, honest: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"\0" * 10_000_000)
    for data in (buffer.getvalue(), gzip.compress(honest), pickle.dumps({"a": 1}), b"", b"{}", bytes(4096)):
        file.write_bytes(data)
        refused(file)
    refused(file.parent / "nowhere", "there is no file")
    refused(file.parent, "there is no file")


def test_a_ustar_header_of_a_huge_member_costs_nothing(file: Path) -> None:
    info = tarfile.TarInfo("documents.jsonl")
    info.size = 8**11 - 1
    file.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    refused(file, "it ends within documents.jsonl")


# -- forged manifests ------------------------------------------------------------------------------------------------


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any], Contents], None]:
    """Set one value of the manifest."""

    def change(body: Any, _: Contents) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = value

    return change


HUGE = 2**53 - 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("format", value="zip"), "its format is"),
        (put("format_version", value=2), "has version 2, this program reads 1"),
        (put("format_version", value=True), "format_version is bool"),
        (put("num_blocks", value=HUGE), "numbers of documents"),
        (put("num_blocks", value=2**60), "is outside 0 to"),
        (put("num_blocks", value=10**4000), "is outside 0 to"),
        (put("num_blocks", value=-1), "is outside 0 to"),
        (put("num_blocks", value=75.0), "is float, expected int"),
        (put("num_blocks", value="75"), "is str, expected int"),
        (put("num_blocks", value=76), "other members or sizes"),
        (lambda body, _: body.update(num_blocks=HUGE, num_tokens=HUGE), "281,474,976,710,657 chunks"),
        (put("num_documents", value=3), "documents.jsonl has 2 documents"),
        (put("num_documents", value=0), "numbers of documents"),
        (put("num_tokens", value=75 * K), "2,393 tokens, the manifest 2, 75 and 2,400"),
        (put("first_block", value=1), "nodes without children"),
        (put("first_block", value=1.5), "is float, expected int"),
        (put("upper_nodes", value=[3]), "nodes without children"),
        (put("upper_nodes", value=[2, 1]), "nodes without children"),
        (put("upper_nodes", value=[True]), "nodes without children"),
        (put("upper_nodes", value=[]), "are 3 chunks; the manifest names 4"),
        (put("upper_nodes", value=[1]), "other members or sizes"),
        (put("created_at", value=float("inf")), "Infinity is no number"),
        (put("created_at", value=None), "is NoneType"),
        (put("context", value="../up"), "no name of a context"),
        (put("context", value="\ud800"), "is no text"),
        (put("branch", value=""), "no name of a context or branch"),
        (put("identity", "tokens_per_block", value=64), "blocks of 64 tokens"),
        (put("identity", "base_model_id", value="\x1b[2J"), "cannot be shown"),
        (put("identity", "more", value=1), "unknown fields: 'more'"),
        (put("surplus", value=1), "unknown fields: 'surplus'"),
        (put("encoding", "arrays", value=[]), "of no name"),
        (put("encoding", "arrays", value=[1]), "an array is no object"),
        (put("encoding", "arrays", 0, "width", value=HUGE), "bundles hold nodes of 1 to"),
        (put("encoding", "arrays", 0, "width", value=0), "bundles hold nodes of 1 to"),
        (put("encoding", "arrays", 0, "width", value=6), "other members or sizes"),
        (put("encoding", "arrays", 0, "rows_per_node", value=2), "other members or sizes"),
        (put("encoding", "arrays", 0, "dtype", value="object"), "cannot be stored"),
        (put("encoding", "arrays", 0, "dtype", value="float32"), "other members or sizes"),
        (put("encoding", "arrays", 0, "name", value="../x"), "cannot be stored"),
        (put("encoding", "arrays", 1, "name", value="gists"), "each array once"),
        (put("encoding", "arrays", 1, "name", value="gists_scale"), "each array once"),
        (put("members", value=[]), "the manifest names -1"),
        (put("members", 1, "num_bytes", value=1), "other members or sizes"),
        (put("members", 1, "num_bytes", value=HUGE), "other members or sizes"),
        (put("members", 1, "name", value="../x"), "other members or sizes"),
        (put("members", 1, "name", value=LAST), "other members or sizes"),
        (put("members", 1, value={"name": "a", "num_bytes": 1, "sha256": None}), "a member: sha256 is NoneType"),
        (put("members", 1, value={"name": "a", "num_bytes": 1, "sha256": "0" * 63}), "is no sha256"),
    ],
)
def test_a_forged_manifest_is_refused(file: Path, change: Callable, said: str) -> None:
    forge(file, change)
    refused(file, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 100_000, "nested too deeply|Expecting"),
        (b'{"format": "megacontext-bundle", "format": "megacontext-bundle"}', "a field twice"),
        (b"\xff", "can't decode"),
        (b"null", "its format is"),
        (b"1" * 10_000, "integer"),
    ],
)
def test_a_manifest_that_is_no_such_json_is_refused(file: Path, text: bytes, said: str) -> None:
    put_together(file, {**contents(file), MANIFEST_NAME: text, MANIFEST_SUM_NAME: manifest_sum(text)})
    refused(file, said)


def test_a_manifest_of_any_size_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.bundles.manifest.MAX_MANIFEST_BYTES", 100)
    refused(file, "of more than 100 bytes")


def test_members_that_the_manifest_does_not_name_are_refused(file: Path) -> None:
    forge(file, lambda body, members: members.update(surplus=b""))
    refused(file, "the file holds 5")
    members = contents(file)
    del members["surplus"]
    put_together(file, dict(sorted(members.items(), reverse=True)))
    refused(file, "its members are not those")
    del members[LAST]
    put_together(file, members)
    refused(file, "the file holds 3")
    del members[MANIFEST_NAME]
    put_together(file, members)
    refused(file, "it has no manifest.json")


# -- forged contents -------------------------------------------------------------------------------------------------


def test_a_pickle_in_place_of_safetensors_is_refused(file: Path) -> None:
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    def change(body: dict[str, Any], members: Contents) -> None:
        size = len(members[FIRST])
        members[FIRST] = pickle.dumps(Evil()).ljust(size, b"\0")

    forge(file, change)
    refused(file, "is not the safetensors file that the encoding means")


@pytest.mark.parametrize(
    ("old", "new"), [(b'"I8"', b'"U8"'), (b"lod1/gists", b"lod1/gistz"), (b"[32,5]", b"[5,32]"), (b"[0,", b"[1,")]
)
def test_a_safetensors_header_that_says_something_else_is_refused(file: Path, old: bytes, new: bytes) -> None:
    def change(_: Any, members: Contents) -> None:
        assert old in members[FIRST]
        members[FIRST] = members[FIRST].replace(old, new, 1)

    forge(file, change)
    refused(file, "is not the safetensors file")


def overwrite(name: str, tensor: str, value: np.ndarray) -> Callable[[Any, Contents], None]:
    """Put numbers at the end of a tensor."""

    def change(_: Any, members: Contents) -> None:
        data = bytearray(members[name])
        start = 8 + int.from_bytes(data[:8], "little")
        end = start + json.loads(data[8:start])[tensor]["data_offsets"][1]
        data[end - value.nbytes : end] = value.tobytes()
        members[name] = bytes(data)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (overwrite(FIRST, "lod0/num_tokens", np.array([0], np.uint8)), "num_tokens must be uint8 from 1 to 32"),
        (overwrite(FIRST, "lod0/num_tokens", np.array([255], np.uint8)), "num_tokens must be uint8 from 1 to 32"),
        (overwrite(FIRST, "lod0/num_tokens", np.array([31], np.uint8)), "only a document's last block may be short"),
        (overwrite(FIRST, "lod0/tokens", np.array([NO_TOKEN], np.uint32)), "must hold NO_TOKEN"),
        (overwrite(LAST, "lod0/tokens", np.array([5], np.uint32)), "must hold NO_TOKEN"),
        (overwrite(LAST, "lod0/num_tokens", np.array([24], np.uint8)), "must hold NO_TOKEN"),
        (overwrite(LAST, "lod1/gists_scale", np.array([np.nan], np.float32)), "not finite"),
        (overwrite(UPPER, "lod2/keys_scale", np.array([np.inf], np.float32)), "not finite"),
    ],
)
def test_numbers_that_a_context_would_refuse_are_refused(file: Path, change: Callable, said: str) -> None:
    forge(file, change)
    refused(file, said)


def documents(*changes: dict[str, Any]) -> Callable[[dict[str, Any], Contents], None]:
    """Change the lines of the documents, and what the manifest says of them."""

    def change(body: dict[str, Any], members: Contents) -> None:
        lines = [json.loads(line) for line in members[DOCUMENTS].splitlines()]
        for line, new in zip(lines, changes, strict=False):
            line.update(new)
        members[DOCUMENTS] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        body["members"][0]["num_bytes"] = len(members[DOCUMENTS])

    return change


def lines(text: bytes) -> Callable[[dict[str, Any], Contents], None]:
    def change(body: dict[str, Any], members: Contents) -> None:
        members[DOCUMENTS] = text
        body["members"][0]["num_bytes"] = len(text)

    return change


def add_document(body: dict[str, Any], members: Contents) -> None:
    more = {**json.loads(members[DOCUMENTS].splitlines()[1]), "key": "more", "first_block": 75}
    lines(members[DOCUMENTS] + json.dumps(more | {"num_blocks": 1, "num_tokens": 3}).encode() + b"\n")(body, members)


def test_nothing_is_made_for_a_bundle_that_is_refused_late(file: Path) -> None:
    forge(file, overwrite(UPPER, "lod2/keys_scale", np.array([np.inf], np.float32)))
    with pytest.raises(BundleError, match="Nothing was written"):
        bring_in(file, file.parent / "store")
    assert not Store(file.parent / "store").contexts()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (documents({"first_block": 1}), "cannot be"),
        (documents({"num_blocks": 39}), "cannot be"),
        (documents({"num_blocks": 41, "num_tokens": 41 * K}), "cannot be"),
        (documents({"num_blocks": HUGE, "num_tokens": HUGE}), "cannot be"),
        (documents({}, {"num_tokens": 35 * K - 8}), "other tokens than it says"),
        (documents({"num_tokens": 40 * K - 1}, {"num_tokens": 35 * K - 6}), "other tokens than it says"),
        (documents({}, {"state": "cut"}), "cannot be"),
        (documents({"state": "open"}), "cannot be"),
        (documents({"key": ""}), "cannot be"),
        (documents({}, {"key": "one"}), "'one' comes again behind its end"),
        (documents({"tags": [1]}), "a tag is int"),
        (documents({"modified_at": "now"}), "modified_at is str"),
        (documents({"size_bytes": -1}), "size_bytes is outside"),
        (documents({"surplus": 1}), "unknown fields: 'surplus'"),
        (lines(b""), "has 0 documents, 0 blocks"),
        (add_document, "has 3 documents, 76 blocks"),
        (lines(b"[]\n"), "a document is no object"),
        (lines(b"{}"), "does not end"),
        (lines(b"x" * 2**21), "has a line of more than"),
    ],
)
def test_documents_that_cannot_be_are_refused(file: Path, change: Callable, said: str) -> None:
    forge(file, change)
    refused(file, said)


# -- parts -----------------------------------------------------------------------------------------------------------


def test_a_bundle_that_is_overtaken_does_not_replace_another_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ContainerWriter(path) as writer:
        path.write_bytes(b"other")
        with pytest.raises(BundleError, match="is there already"):
            writer.commit()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"other"]


def test_a_member_changed_since_it_was_checked_is_found(file: Path, honest: bytes) -> None:
    with BundleReader(file) as bundle:
        bundle.verify()
        with file.open("r+b") as other:
            other.seek(len(honest) // 2)
            other.write(b"changed")
        with pytest.raises(BundleError, match="is not what its checksum says"):
            bundle.verify()


def test_integers_are_floats_and_nothing_else_is() -> None:
    assert fields(parse(b'{"a": 3}'), {"a": float}, "it") == {"a": 3.0}
    for text in (b'{"a": true}', b'{"a": "3"}', b'{"a": 1e999}', b"3", b'{"a": 123456789012345678901234567890}'):
        with pytest.raises(Unexpected):
            fields(parse(text), {"a": float}, "it")
