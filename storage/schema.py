"""What a tree's bytes mean: who made them, and which arrays a level holds.

A tree never guesses. The base model and the tokenizer are fixed for a context's life (`TreeIdentity`); the gists
of every level belong to an `Encoding` (one GistNet, one dtype, a set of named arrays), and a context may hold more
than one encoding of the same tokens, each version naming the one it reads.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.config import TOKENS_PER_BLOCK, GistDtype
from cluster.errors import CorruptTreeError, IncompatibleTreeError

FORMAT_VERSION = 5
"""Raised when the layout changes. A reader takes its own version and, by a step in `catalogue.MIGRATIONS`, older
ones; a newer one is refused."""

GISTS = "gists"
KEYS = "keys"
"""Names of the arrays compaction writes: gists are for reading, routing keys for finding."""

INT8_GROUP = 64
"""Dimensions that share one scale in int8 (mean 1 - cos about 5e-5 at 0.52x of the bytes of float16)."""

_NUMPY_DTYPES = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "|i1"}


@dataclass(frozen=True)
class StoredArray:
    """One array as bytes: `(nodes * rows_per_node, width)` of `dtype`, C order, little endian."""

    name: str
    dtype: str
    width: int
    rows_per_node: int
    logical_dtype: str

    @property
    def node_bytes(self) -> int:
        """Bytes of one node."""
        return np.dtype(self.dtype).itemsize * self.width * self.rows_per_node


@dataclass(frozen=True)
class ArraySpec:
    """A named array of a level: `rows_per_node` vectors of `width` numbers for every node."""

    name: str
    width: int
    rows_per_node: int = 1
    dtype: GistDtype = "float16"

    def stored(self) -> tuple[StoredArray, ...]:
        """The arrays of bytes that carry this one: one, or for int8 two (values and scales)."""
        return _stored(self)


@functools.lru_cache
def _stored(spec: ArraySpec) -> tuple[StoredArray, ...]:
    values = StoredArray(spec.name, _NUMPY_DTYPES[spec.dtype], spec.width, spec.rows_per_node, spec.dtype)
    if spec.dtype != "int8":
        return (values,)
    num_scales = -(-spec.width // INT8_GROUP)
    scales = StoredArray(f"{spec.name}_scale", "<f4", num_scales, spec.rows_per_node, "float32")
    return values, scales


@dataclass(frozen=True)
class TreeIdentity:
    """What the tokens of a context are, fixed when it is created."""

    base_model_id: str
    base_model_digest: str
    tokenizer_digest: str
    tokens_per_block: int = TOKENS_PER_BLOCK


@dataclass(frozen=True)
class Encoding:
    """What made the gists of a version, and the arrays each of its levels (LOD1 and up) holds."""

    gistnet_id: str
    gistnet_digest: str
    compute_dtype: str
    arrays: tuple[ArraySpec, ...]

    def spec(self, name: str) -> ArraySpec:
        """The array of that name.

        Raises:
            IncompatibleTreeError: when the encoding has none of that name.
        """
        for array in self.arrays:
            if array.name == name:
                return array
        raise IncompatibleTreeError(
            f"the tree holds no array {name!r}; it holds {', '.join(a.name for a in self.arrays)}"
        )

    def stored(self) -> tuple[StoredArray, ...]:
        """All arrays of bytes of a level, in journal order."""
        return tuple(stored for array in self.arrays for stored in array.stored())

    @property
    def node_bytes(self) -> int:
        """Bytes of one node over all its arrays."""
        return sum(stored.node_bytes for stored in self.stored())

    def to_json(self) -> str:
        """Canonical JSON: equal encodings give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Encoding:
        """Inverse of `to_json`.

        Raises:
            CorruptTreeError: it describes no encoding.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["arrays"] = tuple(ArraySpec(**array) for array in fields["arrays"])
            encoding = cls(**fields)
            encoding.stored()
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptTreeError(
                f"the catalogue's description of an encoding is damaged ({error!r}). Restore it from a backup."
            ) from error
        return encoding


def check_same(what: str, found: TreeIdentity | Encoding, expected: TreeIdentity | Encoding, advice: str) -> None:
    """Refuse a tree made by something else, naming every field that differs.

    Raises:
        IncompatibleTreeError: with the tree's and the offered value of each differing field.
    """
    found_fields, expected_fields = asdict(found), asdict(expected)
    differing = [
        f"{name}: the tree has {found_fields[name]!r}, this run offers {expected_fields[name]!r}"
        for name in found_fields
        if found_fields[name] != expected_fields[name]
    ]
    if differing:
        raise IncompatibleTreeError(f"{what} was made by something else; " + "; ".join(differing) + f". {advice}")
