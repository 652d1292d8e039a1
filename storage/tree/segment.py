"""Sealed segments: write-once Zarr v3 groups whose arrays are one uncompressed shard each.

A full shard of an array that is chunked along its first axis only is, by construction here, its chunks in order,
each followed by its crc32c, then the shard index. So the file is plain Zarr for everybody else, and for us a flat
array that can be memory-mapped (6.5 us a node against 270-730 us through zarr-python). Shards are written as bytes
for the same reason (zarr-python needs 12x as long at 32 vectors a chunk). The Zarr spec promises no chunk order
inside a shard, so the index is checked whenever a segment is opened; a chunk's crc32c is checked when it is first
touched.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np
import torch

from cluster.errors import CorruptTreeError, StorageError
from storage.durable import SYNCS_AT_ONCE, PendingSyncs, fsync_folder, write_file

Manifest = dict[str, dict[str, Any]]
"""By file of a segment, its `bytes` and `sha256`."""

WriteFile = Callable[[Path, bytes | memoryview], None]

LARGE_BYTES = 1 << 20
"""Of a file whose sync is begun before the others are written."""

CHUNK_KEY, FLAT_CHUNK_KEY = "c.0.0", "c.0"
"""An array's only shard. With `/` between the numbers, as before format 5, each would be a folder, which a file system
makes in as much time as it writes a megabyte."""

CRC_BYTES = 4
_ZARR_DTYPES = {
    "<f2": "float16",
    "<f4": "float32",
    "<u2": "uint16",
    "<u4": "uint32",
    "<i8": "int64",
    "|i1": "int8",
    "|u1": "uint8",
}


@dataclass(frozen=True)
class SegmentArraySpec:
    """One array of a segment: `(num_rows, width)` or, with width 0, `(num_rows,)`; `chunk_rows` divides `num_rows`."""

    path: str
    """Inside the segment, for example `lod1/gists`."""
    dtype: str
    num_rows: int
    width: int
    chunk_rows: int
    logical_dtype: str = ""
    """What the bytes mean where Zarr has no such dtype (bfloat16 stored as uint16)."""
    fill: int | None = None
    """A chunk that holds nothing else is left out of the shard, as Zarr allows; None stores every chunk."""

    @property
    def chunk_bytes(self) -> int:
        """Payload bytes of a chunk."""
        return self.chunk_rows * max(self.width, 1) * np.dtype(self.dtype).itemsize

    @property
    def num_chunks(self) -> int:
        """Chunks of the shard."""
        return self.num_rows // self.chunk_rows

    @property
    def stride(self) -> int:
        """Bytes from one chunk to the next."""
        return self.chunk_bytes + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of the shard index: offset and length of each chunk, and a crc32c."""
        return self.num_chunks * 16 + CRC_BYTES

    @property
    def file_bytes(self) -> int:
        """Size of the shard file when no chunk is left out."""
        return self.num_chunks * self.stride + self.index_bytes

    @property
    def shard_file(self) -> str:
        """Path of the shard inside the segment."""
        return f"{self.path}/{CHUNK_KEY if self.width else FLAT_CHUNK_KEY}"

    def zarr_metadata(self) -> dict[str, Any]:
        """The array's `zarr.json` (Zarr v3 core, sharding_indexed codec)."""
        columns = [self.width] if self.width else []
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        plain = {"name": "bytes"} if np.dtype(self.dtype).itemsize == 1 else little
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.num_rows, *columns],
            "data_type": _ZARR_DTYPES[self.dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.num_rows, *columns]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0 if self.fill is None else self.fill,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.chunk_rows, *columns],
                        "codecs": [plain, {"name": "crc32c"}],
                        "index_codecs": [little, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {"dtype": self.logical_dtype} if self.logical_dtype else {},
            "storage_transformers": [],
        }


def shard_path(segment_folder: Path, spec: SegmentArraySpec) -> Path:
    """Where an array's shard is; in segments of before format 5 in folders of its own."""
    path = segment_folder / spec.shard_file
    older = path.parent / path.name.replace(".", "/")
    return older if not path.exists() and older.exists() else path


def shard_bytes(spec: SegmentArraySpec, values: np.ndarray) -> memoryview:
    """The shard file of an array: chunks with their crc32c, then the index with its own.

    Args:
        spec: the array.
        values: `(num_rows, width)` or `(num_rows,)`, C-contiguous, of the stored dtype.
    """
    flat = np.ascontiguousarray(values, dtype=spec.dtype).reshape(-1).view(np.uint8)
    chunks = flat.reshape(spec.num_chunks, spec.chunk_bytes)
    present = np.ones(spec.num_chunks, bool)
    if spec.fill is not None:
        present = (chunks.view(spec.dtype) != spec.fill).any(axis=1)
        if not present.all():
            chunks = chunks[present]
    # Bulk ingest comes through here: everything is put into its place once.
    index_start = len(chunks) * spec.stride
    file = np.empty(index_start + spec.index_bytes, np.uint8)
    out = file[:index_start].reshape(len(chunks), spec.stride)
    out[:, : spec.chunk_bytes] = chunks
    crcs = np.fromiter((google_crc32c.value(chunk.tobytes()) for chunk in chunks), "<u4", len(chunks))
    out[:, spec.chunk_bytes :] = crcs[:, None].view(np.uint8)
    file[index_start:] = np.frombuffer(_index_bytes(spec, present), np.uint8)
    return file.data


_ABSENT = 2**64 - 1
"""Offset and length of a chunk that is not in the shard (Zarr v3, sharding_indexed codec)."""


def _index_bytes(spec: SegmentArraySpec, present: np.ndarray) -> bytes:
    entries = np.full((spec.num_chunks, 2), _ABSENT, "<u8")
    entries[present, 0] = np.arange(present.sum(), dtype=np.uint64) * np.uint64(spec.stride)
    # The recorded length covers the chunk as encoded: payload and checksum.
    entries[present, 1] = spec.stride
    raw = entries.tobytes()
    return raw + google_crc32c.value(raw).to_bytes(CRC_BYTES, "little")


def write_segment(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    specs: list[SegmentArraySpec],
    attributes: Mapping[str, Any],
    write: WriteFile | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> Manifest:
    """Write a segment durably: temporary name, fsync of files and folders, rename, fsync of the parent.

    Args:
        folder: final path; must not exist.
        arrays: values by array path.
        specs: the arrays, in a fixed order.
        attributes: of the Zarr group.
        write: writes one file, which is synced afterwards; replaced by fault drills.
        pool: hashes and syncs, `SYNCS_AT_ONCE` files at a time; None: one of its own.

    Returns:
        For every file its size and sha256, to be kept in the catalogue.

    Raises:
        OSError: the disk refused; the temporary folder is removed.
    """
    if pool is None:
        with ThreadPoolExecutor(SYNCS_AT_ONCE) as own:
            return write_segment(folder, arrays, specs, attributes, write, own)
    write = write or write_file
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    headers = _headers(specs, attributes)
    # The largest is on its way to the disk while the others are written.
    shards = {spec.shard_file: spec for spec in sorted(specs, key=lambda spec: -spec.file_bytes)}
    folders = sorted({parent for name in (*headers, *shards) for parent in PurePosixPath(name).parents})
    sizes: dict[str, int] = {}
    digests: dict[str, Future[str]] = {}

    def put(relative: str, data: bytes | memoryview) -> None:
        # Hashing a shard takes as long as writing it, and neither needs the interpreter.
        digests[relative] = pool.submit(lambda: hashlib.sha256(data).hexdigest())
        sizes[relative] = len(data)
        write(temporary / relative, data)
        syncs.add(temporary / relative, now=len(data) >= LARGE_BYTES)

    try:
        with PendingSyncs(pool) as syncs:
            # All of them first: beside a sync, making one waits for the file system's journal.
            for inner in folders:
                (temporary / inner).mkdir()
            for relative, spec in shards.items():
                put(relative, shard_bytes(spec, arrays[spec.path]))
            for relative, data in headers.items():
                put(relative, data)
            for inner in folders:
                syncs.add(temporary / inner)
            syncs.wait()
        temporary.rename(folder)
        fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {relative: {"bytes": size, "sha256": digests[relative].result()} for relative, size in sizes.items()}


def _headers(specs: Sequence[SegmentArraySpec], attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Every `zarr.json` of a segment: of the group, of each level, of each array."""
    group: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    headers = {"zarr.json": _json({**group, "attributes": dict(attributes)})}
    for spec in specs:
        headers[f"{spec.path.split('/')[0]}/zarr.json"] = _json(group)
        headers[f"{spec.path}/zarr.json"] = _array_json(spec)
    return headers


class SegmentArray:
    """A memory-mapped array of a sealed segment; chunks are verified when first touched."""

    def __init__(self, segment_folder: Path, spec: SegmentArraySpec) -> None:
        """Map the shard.

        Raises:
            CorruptTreeError: the file is missing, has another size, or its index is not what was written.
            StorageError: it cannot be read.
        """
        self.spec = spec
        self.path = shard_path(segment_folder, spec)
        try:
            size = self.path.stat().st_size
            left_out, odd = divmod(spec.file_bytes - size, spec.stride)
            self.num_present = spec.num_chunks - left_out
            # A map of a truncated file would kill the process with SIGBUS on touch.
            if odd or not 0 <= left_out <= (0 if spec.fill is None else spec.num_chunks):
                raise CorruptTreeError(
                    f"segment file {self.path} has {size} bytes, expected {spec.file_bytes}: it was truncated or "
                    "overwritten. Restore it from a backup."
                )
            # Unlike Python's `mmap`, torch keeps no descriptor open; 10 M tokens are 1,500 maps and more.
            mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        except FileNotFoundError as error:
            raise CorruptTreeError(
                f"segment file {self.path} is missing. Restore the segment folder from a backup."
            ) from error
        except (OSError, RuntimeError) as error:
            raise StorageError(f"segment file {self.path} cannot be read: {error}") from error
        mapped.flags.writeable = False
        self._bytes = mapped
        index = self._bytes[self.num_present * spec.stride :].tobytes()
        present = np.ones(spec.num_chunks, bool)
        if left_out:
            present = np.frombuffer(index, "<u8", 2 * spec.num_chunks)[::2] != _ABSENT
        if int(present.sum()) != self.num_present or index != _index_bytes(spec, present):
            raise CorruptTreeError(f"segment file {self.path}: the shard index is damaged. Restore it from a backup.")
        itemsize = np.dtype(spec.dtype).itemsize
        self._place: np.ndarray | None = None
        """Where each chunk is among those in the file, -1 for one that is not; None where all are."""
        if left_out:
            self._place = np.where(present, np.cumsum(present) - 1, -1)
        # (num_present, chunk_rows, width): every chunk, skipping the checksums between them.
        self._chunks = np.ndarray(
            (self.num_present, spec.chunk_rows, max(spec.width, 1)),
            spec.dtype,
            self._bytes,
            strides=(spec.stride, max(spec.width, 1) * itemsize, itemsize),
        )
        self._payload = np.ndarray(
            (self.num_present, spec.chunk_bytes), np.uint8, self._bytes, strides=(spec.stride, 1)
        )
        self._verified = bytearray(spec.num_chunks)
        self.address = self._bytes.ctypes.data
        """Of the file's first byte in memory."""
        self.num_bytes = size
        """Of the file."""

    def present(self) -> np.ndarray:
        """Which chunks are in the shard: `(num_chunks,)` bool."""
        return np.ones(self.spec.num_chunks, bool) if self._place is None else self._place >= 0

    def touch_chunk(self, chunk: int) -> None:
        """Check a chunk's crc32c if nobody has read from it yet.

        Raises:
            CorruptTreeError: as `verify_chunk`.
        """
        if not self._verified[chunk]:
            self.verify_chunk(chunk)

    def verify_chunk(self, chunk: int) -> None:
        """Check a chunk's crc32c now.

        Raises:
            CorruptTreeError: naming the file and the rows that are damaged.
        """
        place = chunk if self._place is None else int(self._place[chunk])
        if place < 0:
            self._verified[chunk] = 1
            return
        start = place * self.spec.stride + self.spec.chunk_bytes
        expected = int.from_bytes(self._bytes[start : start + CRC_BYTES].tobytes(), "little")
        if google_crc32c.value(self._payload[place].tobytes()) != expected:
            rows = self.spec.chunk_rows
            raise CorruptTreeError(
                f"segment file {self.path}: checksum of rows {chunk * rows}-{(chunk + 1) * rows - 1} does not match; "
                "the bytes on disk are damaged and are not served. `tree verify` lists all damage."
            )
        self._verified[chunk] = 1

    def rows(self, first: int, count: int) -> np.ndarray:
        """Copy of consecutive rows: `(count, width)`."""
        if self._place is not None:
            return self._sparse_rows(first, count)
        size = self.spec.chunk_rows
        chunk, offset = divmod(first, size)
        if offset + count <= size:
            if not self._verified[chunk]:
                self.verify_chunk(chunk)
            return self._chunks[chunk, offset : offset + count].copy()
        last = (first + count - 1) // size
        for touched in range(chunk, last + 1):
            self.touch_chunk(touched)
        # The checksums between chunks make `reshape` copy.
        whole = self._chunks[chunk : last + 1].reshape(-1, max(self.spec.width, 1))
        return whole[offset : offset + count]

    def _sparse_rows(self, first: int, count: int) -> np.ndarray:
        """As `rows`, with the fill value where chunks are left out."""
        assert self._place is not None
        size = self.spec.chunk_rows
        start, stop = first // size, -(-(first + count) // size)
        out = np.full((stop - start, size, max(self.spec.width, 1)), self.spec.fill, self.spec.dtype)
        for chunk in range(start, stop):
            if self._place[chunk] >= 0:
                self.touch_chunk(chunk)
                out[chunk - start] = self._chunks[self._place[chunk]]
        offset = first - start * size
        return out.reshape(-1, max(self.spec.width, 1))[offset : offset + count].copy()


@dataclass(frozen=True)
class _Window:
    """Memory as numpy may see it. An array made of it keeps it, and so the maps, alive."""

    __array_interface__: dict[str, Any]
    arrays: tuple[SegmentArray, ...]


def window_over(arrays: Sequence[SegmentArray], item_bytes: int) -> tuple[np.ndarray, int]:
    """One array over all these maps, to gather items of `item_bytes` from any of them in one call.

    A numpy call for every segment costs 16 us each, most of a read that is spread over many. What lies between the
    maps is not ours: an index is safe only if it was derived from the `address` of one of `arrays`.

    Returns:
        `(window, base)`: `window[addresses - base]` copies the items at these addresses, `|V<item_bytes>`.
    """
    base = min(array.address for array in arrays)
    stop = max(array.address + array.num_bytes for array in arrays)
    interface = {
        "version": 3,
        "typestr": f"|V{item_bytes}",
        # A shard whose chunks are all left out is smaller than an item; nothing is gathered from it.
        "shape": (max(stop - base - item_bytes + 1, 0),),
        "strides": (1,),
        "data": (base, True),
    }
    return np.asarray(_Window(interface, tuple(arrays))), base


def check_manifest(folder: Path, manifest: Manifest) -> list[str]:
    """Compare every file of a segment with the manifest; one line for each that differs, naming it.

    Older manifests have a crc32c instead of a sha256. Of a shard that says little: each chunk is followed by its own
    crc32c, which takes the chunk's part out of the file's, so that all sound shards of a size have the same.
    """
    problems = []
    for relative, expected in manifest.items():
        path = folder / relative
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
            continue
        if expected.keys() not in ({"bytes", "sha256"}, {"bytes", "crc32c"}):
            problems.append(f"{path}: its entry in the catalogue is damaged")
        elif len(data) != expected["bytes"]:
            problems.append(f"{path}: {len(data)} bytes, expected {expected['bytes']}")
        elif (
            hashlib.sha256(data).hexdigest() != expected["sha256"]
            if "sha256" in expected
            else google_crc32c.value(data) != expected["crc32c"]
        ):
            problems.append(f"{path}: checksum does not match; damaged bytes")
    return problems


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


@functools.lru_cache
def _array_json(spec: SegmentArraySpec) -> bytes:
    # The same for segment after segment, and a tenth of what writing one takes.
    return _json(spec.zarr_metadata())
