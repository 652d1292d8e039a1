"""Vectors to bytes and back, in the dtype a tree stores.

Writers may hand over float tensors (encoded here) or arrays that are encoded already, which lets compaction workers
ship half the bytes. Encoding is deterministic: equal floats give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cluster.errors import InvalidWriteError
from storage.schema import INT8_GROUP, ArraySpec, StoredArray

Values = torch.Tensor | np.ndarray

_HALF_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""Bits of infinity; every NaN is above it."""


def encode_arrays(specs: tuple[ArraySpec, ...], arrays: Mapping[str, Values], num_nodes: int) -> dict[str, np.ndarray]:
    """Bytes of a level's arrays.

    Args:
        specs: the arrays the level holds.
        arrays: by name, float `(num_nodes * rows, width)` or `(num_nodes, rows, width)`, or already encoded.
        num_nodes: nodes the arrays are for.

    Returns:
        By stored name, C-contiguous `(num_nodes * rows, width)` in the stored dtype.

    Raises:
        InvalidWriteError: a missing or surplus array, a wrong shape, or a value that is not finite once stored.
    """
    check_names(specs, arrays)
    encoded: dict[str, np.ndarray] = {}
    for spec in specs:
        pieces = encoded_pieces(spec, arrays)
        if pieces is None:
            pieces = _encode(spec, arrays[spec.name])
        for stored in spec.stored():
            rows = num_nodes * stored.rows_per_node
            piece = pieces[stored.name]
            if piece.size != rows * stored.width:
                raise InvalidWriteError(
                    f"array {stored.name!r} has shape {tuple(piece.shape)}; {num_nodes} nodes need "
                    f"({rows}, {stored.width})"
                )
            if not _all_finite(stored, piece):
                raise InvalidWriteError(
                    f"array {stored.name!r} holds values that are not finite; check the GistNet or store float32"
                )
            encoded[stored.name] = np.ascontiguousarray(piece.reshape(rows, stored.width))
    return encoded


def check_names(specs: tuple[ArraySpec, ...], arrays: Mapping[str, Values]) -> None:
    """Refuse a write that lacks an array of the level, or brings one the level does not hold.

    Raises:
        InvalidWriteError: naming it.
    """
    for spec in specs:
        if spec.name not in arrays:
            raise InvalidWriteError(f"array {spec.name!r} is missing; got {sorted(arrays)}")
    known = {stored.name for spec in specs for stored in spec.stored()}
    if surplus := sorted(set(arrays) - known):
        raise InvalidWriteError(f"the tree holds no array {surplus[0]!r}; it holds {', '.join(s.name for s in specs)}")


def encoded_pieces(spec: ArraySpec, arrays: Mapping[str, Values]) -> dict[str, np.ndarray] | None:
    """The stored arrays of `spec` when they were handed over encoded; None when they are floats still to encode."""
    pieces: dict[str, np.ndarray] = {}
    for stored in spec.stored():
        values = arrays.get(stored.name)
        if not isinstance(values, np.ndarray) or values.dtype != np.dtype(stored.dtype):
            return None
        pieces[stored.name] = values
    return pieces


def decode_array(spec: ArraySpec, pieces: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Vectors of stored bytes: `(..., width)` float16, bfloat16 or float32 (also for int8). Copies nothing but int8.

    Args:
        spec: the array.
        pieces: its stored arrays by name, each `(..., stored width)`; writable, since the tensor shares them.
    """
    values = torch.from_numpy(pieces[spec.name])
    if spec.dtype == "bfloat16":
        return values.view(torch.bfloat16)
    if spec.dtype == "int8":
        scales = torch.from_numpy(pieces[f"{spec.name}_scale"])
        return values.float() * scales.repeat_interleave(INT8_GROUP, dim=-1)[..., : spec.width]
    return values


def _all_finite(stored: StoredArray, values: np.ndarray) -> bool:
    infinity = _HALF_INFINITY.get(stored.logical_dtype)
    if infinity is not None:
        # Without their sign, halves order as their bits do; numpy's isfinite of float16 takes 4 times as long.
        return int((values.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0)) < infinity
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def _encode(spec: ArraySpec, values: Values) -> dict[str, np.ndarray]:
    tensor = torch.as_tensor(values).detach().to("cpu")
    if not tensor.is_floating_point():
        raise InvalidWriteError(f"array {spec.name!r} is {tensor.dtype}; expected floats or encoded {spec.dtype}")
    if tensor.numel() % spec.width:
        raise InvalidWriteError(
            f"array {spec.name!r} has shape {tuple(tensor.shape)}; its vectors are {spec.width} wide"
        )
    tensor = tensor.reshape(-1, spec.width)
    if spec.dtype == "int8":
        return _encode_int8(spec, tensor.float())
    stored = tensor.to(getattr(torch, spec.dtype)).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise InvalidWriteError(
            f"array {spec.name!r} holds values that are not finite in {spec.dtype} "
            f"(largest finite magnitude given: {_largest(tensor):.3g}); check the GistNet or store float32"
        )
    if spec.dtype == "bfloat16":
        return {spec.name: stored.view(torch.uint16).numpy()}
    return {spec.name: stored.numpy()}


def _encode_int8(spec: ArraySpec, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidWriteError(f"array {spec.name!r} holds values that are not finite; check the GistNet")
    num_groups = -(-spec.width // INT8_GROUP)
    padded = torch.nn.functional.pad(tensor, (0, num_groups * INT8_GROUP - spec.width))
    groups = padded.reshape(-1, num_groups, INT8_GROUP)
    scales = groups.abs().amax(dim=-1) / 127.0
    # An all-zero group has scale 0; dividing by 1 instead keeps it exactly zero.
    quantised = torch.round(groups / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)).to(torch.int8)
    flat = quantised.reshape(-1, num_groups * INT8_GROUP)[:, : spec.width].contiguous()
    return {spec.name: flat.numpy(), f"{spec.name}_scale": scales.contiguous().numpy()}


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else float("nan")
