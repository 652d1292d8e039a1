"""Sealed segments: plain Zarr for everybody, checked by us, and never half there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import Crc32cCodec

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import CorruptTreeError, StorageError
from storage.tree import sealing
from storage.tree.sealing import SEGMENT_FOLDER
from storage.tree.segment import (
    CRC_BYTES,
    SegmentArray,
    SegmentArraySpec,
    check_manifest,
    shard_bytes,
    window_over,
    write_segment,
)
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, follow, new_store, open_context, rows

ROWS = SegmentArraySpec("lod1/gists", "<f2", 96, 8, 32)
FLAT = SegmentArraySpec("lod0/tokens", "<u4", 4096, 0, 1024)


def numbers(spec: SegmentArraySpec, seed: int = 0) -> np.ndarray:
    shape = (spec.num_rows, spec.width) if spec.width else (spec.num_rows,)
    return np.random.default_rng(seed).integers(1, 100, shape).astype(spec.dtype)


def written(folder: Path, *specs: SegmentArraySpec) -> dict[str, np.ndarray]:
    arrays = {spec.path: numbers(spec) for spec in specs}
    write_segment(folder, arrays, list(specs), {"made_by": "a test"})
    return arrays


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def group_at(folder: Path) -> zarr.Group:
    return zarr.open_group(str(folder), mode="r", zarr_format=3)


def array_at(folder: Path, path: str) -> zarr.Array:
    array = group_at(folder)[path]
    assert isinstance(array, zarr.Array)
    return array


# -- as Zarr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<u2", "<u4", "<i8", "|i1", "|u1"])
@pytest.mark.parametrize("zeros", [False, True], ids=["numbers", "all fill value"])
def test_zarr_reads_what_was_written(tmp_path: Path, dtype: str, zeros: bool) -> None:
    two_d = SegmentArraySpec("lod1/two", dtype, 96, 7, 32, "bfloat16" if dtype == "<u2" else "")
    flat = SegmentArraySpec("lod0/flat", dtype, 128, 0, 32)
    arrays = {spec.path: numbers(spec) * (not zeros) for spec in (two_d, flat)}
    arrays = {path: values.astype(dtype) for path, values in arrays.items()}
    write_segment(tmp_path / "s.zarr", arrays, [two_d, flat], {"context": "c"})
    assert dict(group_at(tmp_path / "s.zarr").attrs) == {"context": "c"}
    for spec in (two_d, flat):
        found = array_at(tmp_path / "s.zarr", spec.path)
        np.testing.assert_array_equal(np.asarray(found[:]), arrays[spec.path])
        assert found.dtype == np.dtype(dtype)
        assert found.attrs.get("dtype", "") == spec.logical_dtype
        ours = SegmentArray(tmp_path / "s.zarr", spec).rows(0, spec.num_rows)
        np.testing.assert_array_equal(ours.reshape(arrays[spec.path].shape), arrays[spec.path])


def test_zarr_would_have_written_chunks_of_the_same_bytes(tmp_path: Path) -> None:
    values = numbers(ROWS)
    array = zarr.create_array(
        str(tmp_path / "reference.zarr"),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(ROWS.chunk_rows, ROWS.width),
        shards=values.shape,
        compressors=[Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    assert (tmp_path / "reference.zarr" / "c" / "0" / "0").read_bytes() == shard_bytes(ROWS, values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_zarr_reads_every_array_of_a_sealed_context(tmp_path: Path, dtype) -> None:
    encoding = encoding_of(dtype, width=70, rows=2, key_width=6)
    texts = [Text("long", 1030 * K), Text("short", 5)]
    new_store(tmp_path, encoding)
    with open_context(tmp_path) as writer:
        writer.append([text.span(encoding) for text in texts])
        follow(writer, encoding)
        writer.flush()
    segments = sorted((tmp_path / CONTEXT / SEGMENT_FOLDER).iterdir())
    assert len(segments) == 32 + 1
    tokens, counts = texts[0].packed(0, 1030)
    num_checked = 0
    with open_context(tmp_path) as writer, writer.reader() as reader:
        for folder in segments:
            levels: Any = group_at(folder).attrs["levels"]
            for described in levels:
                lod, first, count = described["lod"], described["first_node"], described["num_nodes"]
                if lod == 0:
                    found = np.asarray(array_at(folder, "lod0/tokens")[:]).reshape(-1, K)
                    np.testing.assert_array_equal(found, tokens[first : first + count])
                    found = np.asarray(array_at(folder, "lod0/num_tokens")[:])
                    np.testing.assert_array_equal(found, counts[first : first + count])
                    found = np.asarray(array_at(folder, "lod0/tokens_before")[:])
                    np.testing.assert_array_equal(found, np.arange(first, first + count) * K)
                    continue
                for spec in encoding.arrays:
                    found = array_at(folder, f"lod{lod}/{spec.name}")
                    values = torch.from_numpy(np.array(found[:]))
                    if dtype == "bfloat16":
                        assert found.attrs["dtype"] == "bfloat16"
                        values = values.view(torch.bfloat16)
                    if dtype == "int8":
                        scales = np.asarray(array_at(folder, f"lod{lod}/{spec.name}_scale")[:])
                        values = values.float() * torch.from_numpy(np.repeat(scales, 64, axis=-1)[:, : spec.width])
                    wanted = reader.read(spec.name, lod, np.arange(first, first + count))
                    assert torch.equal(values.reshape(wanted.shape), wanted)
                    num_checked += count
    assert num_checked == 2 * (1024 + 32)


# -- our own reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ROWS, FLAT], ids=["rows", "flat"])
def test_rows(tmp_path: Path, spec: SegmentArraySpec) -> None:
    values = written(tmp_path / "s.zarr", spec)[spec.path].reshape(spec.num_rows, -1)
    array = SegmentArray(tmp_path / "s.zarr", spec)
    size = spec.chunk_rows
    for first, count in ((0, spec.num_rows), (3, 1), (size - 1, 2), (size, size), (5, 2 * size), (7, 0)):
        np.testing.assert_array_equal(array.rows(first, count), values[first : first + count])


def test_a_window_sees_the_bytes_of_every_map_and_keeps_them(tmp_path: Path) -> None:
    specs = [ROWS, SegmentArraySpec("lod2/gists", "<f2", 192, 8, 32)]
    values = written(tmp_path / "s.zarr", *specs)
    arrays = [SegmentArray(tmp_path / "s.zarr", spec) for spec in specs]
    window, base = window_over(arrays, 16)
    rows = [np.array([0, 31, 5, 5]), np.array([33, 191])]
    addresses = [
        array.address + row * 16 + row // 32 * CRC_BYTES - base for array, row in zip(arrays, rows, strict=True)
    ]
    del arrays
    expected = np.concatenate([values[spec.path][row] for spec, row in zip(specs, rows, strict=True)])
    np.testing.assert_array_equal(window[np.concatenate(addresses)].view("<f2").reshape(-1, 8), expected)
    with pytest.raises(IndexError):
        window[[len(window)]]
    assert not window.flags.writeable


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    values = written(tmp_path / "s.zarr", ROWS)[ROWS.path]
    array = SegmentArray(tmp_path / "s.zarr", ROWS)
    for copy in (array.rows(0, 1), array.rows(0, 96)):
        copy[:] = 0
    np.testing.assert_array_equal(array.rows(0, 96), values)


def test_maps_hold_no_descriptors(tmp_path: Path) -> None:
    written(tmp_path / "s.zarr", ROWS)
    before = len(os.listdir("/proc/self/fd"))
    arrays = [SegmentArray(tmp_path / "s.zarr", ROWS) for _ in range(50)]
    assert all(array.rows(5, 1).shape == (1, 8) for array in arrays)
    assert len(os.listdir("/proc/self/fd")) == before


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_named_and_never_served_and_the_rest_is(tmp_path: Path) -> None:
    values = written(tmp_path / "s.zarr", ROWS)[ROWS.path]
    damage(tmp_path / "s.zarr" / ROWS.shard_file, ROWS.stride + 100)
    array = SegmentArray(tmp_path / "s.zarr", ROWS)
    for read in (
        lambda: array.rows(40, 1),
        lambda: array.rows(0, 96),
        lambda: array.touch_chunk(1),
        lambda: array.verify_chunk(1),
    ):
        for _ in range(2):
            with pytest.raises(CorruptTreeError, match=r"gists/c.0.0: checksum of rows 32-63"):
                read()
    np.testing.assert_array_equal(array.rows(0, 32), values[:32])
    np.testing.assert_array_equal(array.rows(64, 32), values[64:])


def test_a_damaged_checksum_is_damage_too(tmp_path: Path) -> None:
    written(tmp_path / "s.zarr", ROWS)
    damage(tmp_path / "s.zarr" / ROWS.shard_file, ROWS.chunk_bytes + 1)
    with pytest.raises(CorruptTreeError, match="rows 0-31"):
        SegmentArray(tmp_path / "s.zarr", ROWS).rows(0, 1)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "s.zarr", ROWS)
    damage(tmp_path / "s.zarr" / ROWS.shard_file, ROWS.file_bytes - 10)
    with pytest.raises(CorruptTreeError, match="shard index is damaged"):
        SegmentArray(tmp_path / "s.zarr", ROWS)


def test_chunks_in_another_order_are_refused(tmp_path: Path) -> None:
    # Zarr allows a shard whose index names its chunks in any order; read flat it would give the wrong rows.
    written(tmp_path / "s.zarr", ROWS)
    path = tmp_path / "s.zarr" / ROWS.shard_file
    data = path.read_bytes()
    chunks = [data[i * ROWS.stride : (i + 1) * ROWS.stride] for i in range(3)]
    index = np.frombuffer(data[3 * ROWS.stride : -4], "<u8").reshape(3, 2)[[1, 0, 2]].tobytes()
    path.write_bytes(chunks[1] + chunks[0] + chunks[2] + index + google_crc32c.value(index).to_bytes(4, "little"))
    np.testing.assert_array_equal(np.asarray(array_at(tmp_path / "s.zarr", ROWS.path)[:]), numbers(ROWS))
    with pytest.raises(CorruptTreeError, match="shard index"):
        SegmentArray(tmp_path / "s.zarr", ROWS)


@pytest.mark.parametrize("size", [0, 1, ROWS.stride, ROWS.file_bytes - 1, ROWS.file_bytes + 1])
def test_another_size_is_an_error_and_no_signal(tmp_path: Path, size: int) -> None:
    written(tmp_path / "s.zarr", ROWS)
    os.truncate(tmp_path / "s.zarr" / ROWS.shard_file, size)
    with pytest.raises(CorruptTreeError, match=rf"has {size} bytes, expected {ROWS.file_bytes}"):
        SegmentArray(tmp_path / "s.zarr", ROWS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptTreeError, match=r"lod1/gists/c.0.0 is missing"):
        SegmentArray(tmp_path / "s.zarr", ROWS)


def test_the_manifest_tells_every_kind_of_damage(tmp_path: Path) -> None:
    folder = tmp_path / "s.zarr"
    manifest = write_segment(folder, {s.path: numbers(s) for s in (ROWS, FLAT)}, [ROWS, FLAT], {})
    assert check_manifest(folder, manifest) == []
    assert set(manifest) == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    damage(folder / ROWS.shard_file, 3)
    os.truncate(folder / FLAT.shard_file, 7)
    (folder / "zarr.json").unlink()
    problems = check_manifest(folder, manifest)
    assert len(problems) == 3
    assert any("gists/c.0.0: checksum" in line for line in problems)
    assert any("tokens/c.0: 7 bytes" in line for line in problems)
    assert any("zarr.json: No such file" in line for line in problems)


def test_damage_in_one_segment_leaves_the_others_readable(tmp_path: Path) -> None:
    encoding = encoding_of()
    text = Text("doc", 96 * K)
    new_store(tmp_path, encoding)
    with open_context(tmp_path) as writer:
        writer.append([text.span(encoding)])
        writer.flush()
        folder = next((tmp_path / CONTEXT / SEGMENT_FOLDER).glob("*_0000000032_*"))
        damage(folder / "lod1/gists/c.0.0", 50)
        with writer.reader() as reader:
            with pytest.raises(CorruptTreeError, match=rf"{folder.name}/lod1/gists"):
                reader.read_node("gists", 1, 40)
            with pytest.raises(CorruptTreeError, match=folder.name):
                reader.read("gists", 1, [0, 40, 70])
            for fine in (0, 31, 64, 95):
                assert torch.equal(reader.read_node("gists", 1, fine), text.gists(fine, fine + 1, encoding.arrays[0]))
            # The tokens of the same segment are another file.
            np.testing.assert_array_equal(reader.tokens(0, 96)[0], text.packed(0, 96)[0])
        shutil.rmtree(folder)
        with writer.reader() as reader, pytest.raises(CorruptTreeError, match=r"tokens/c.0 is missing"):
            reader.tokens(40, 1)


# -- leftovers ---------------------------------------------------------------------------------------------------------


def test_a_refused_write_leaves_nothing(tmp_path: Path) -> None:
    num_files = 0

    def fails_late(path: Path, data: bytes | memoryview) -> None:
        nonlocal num_files
        num_files += 1
        if num_files == 4:
            raise OSError(5, "Input/output error")
        path.write_bytes(data)

    with pytest.raises(OSError, match="Input/output"):
        write_segment(tmp_path / "s.zarr", {ROWS.path: numbers(ROWS)}, [ROWS], {}, fails_late)
    assert num_files == 4
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_an_interrupted_sealing_are_removed_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = encoding_of()
    text = Text("doc", 100 * K)
    new_store(tmp_path, encoding)
    segments = tmp_path / CONTEXT / SEGMENT_FOLDER
    with open_context(tmp_path, seal_in_background=False) as writer:
        writer.append([text.span(encoding)])
        record = sealing.SealedSegment.record

        def interrupted(sealed: sealing.SealedSegment, connection) -> None:
            record(sealed, connection)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(sealing.SealedSegment, "record", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.flush()
        (orphan,) = segments.iterdir()
        with writer.reader() as reader:
            assert_holds(reader, [text], encoding)
        # The same writer goes on under another name.
        writer.flush()
        assert len(list(segments.iterdir())) == 4
    shutil.copytree(orphan, segments / f".{orphan.name}.tmp-4711")
    (segments / "notes of the owner").mkdir()
    (segments / "README").write_text("kept")
    with open_context(tmp_path, seal_in_background=False) as writer:
        assert not orphan.exists()
        names = {path.name for path in segments.iterdir()}
        assert {"notes of the owner", "README"} < names
        assert len(names) == 3 + 2
        with writer.reader() as reader:
            assert_holds(reader, [text], encoding)


def test_segments_stay_aligned_when_their_size_changes(tmp_path: Path) -> None:
    encoding = encoding_of()
    text = Text("doc", 260 * K)
    new_store(tmp_path, encoding)
    stored = 0
    for size, stop in ((1, 40), (4, 200), (2, 260)):
        with open_context(tmp_path, segment_super_blocks=size) as writer:
            writer.append([text.span(encoding, stored, stop)])
            writer.flush()
            extents = rows(writer, "SELECT first, count FROM extents WHERE lod = 0 ORDER BY first")
            ends = [first + count for first, count in extents]
            [(left,)] = rows(writer, "SELECT min(first) FROM journal WHERE lod = 0")
            assert left == ends[-1] == stop // (32 * size) * 32 * size
            stored = stop
    with open_context(tmp_path) as writer, writer.reader() as reader:
        assert_holds(reader, [text], encoding)


def test_an_unreadable_segment_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "lod1").write_text("a file where a folder belongs")
    with pytest.raises(StorageError, match="cannot be read"):
        SegmentArray(tmp_path / "s.zarr", ROWS)
