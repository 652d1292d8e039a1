"""Focus labels: what edits of Working Contexts were worth, with what was known of the candidates; LensNet's text book.

One Parquet file a run of the job that makes them, a row a Working Context, written whole: to a temporary name, synced,
renamed. A file says which features its columns are, so that a net is never trained on others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16, Float32, Int64

from cluster.errors import StorageError
from storage.durable import fsync_folder, write_file_durably

_BLOCKS = pa.list_(pa.int64())

SCHEMA = pa.schema(
    [
        ("context", pa.string()),
        ("version", pa.int64()),
        ("number", pa.int32()),
        ("uri", pa.string()),
        ("first_block", pa.int64()),
        ("stop_block", pa.int64()),
        ("shown_from", pa.int64()),
        ("blocks", _BLOCKS),
        ("features", pa.list_(pa.float32())),
        ("keys", pa.binary()),
        ("query", pa.binary()),
        (
            "edits",
            pa.list_(
                pa.struct(
                    [
                        ("shown", _BLOCKS),
                        ("added", _BLOCKS),
                        ("removed", _BLOCKS),
                        ("before", pa.list_(pa.float32(), 2)),
                        ("after", pa.list_(pa.float32(), 2)),
                    ]
                )
            ),
        ),
    ]
)
"""`features`: a row a block, one after the other. `keys`, `query`: float16. `before`, `after`: mean NLL of both halves
of the horizon, every other token each, in nats a token."""

EDIT_KINDS = ("expand one", "collapse one", "swap one", "expand several")

FEATURES_KEY, SETTINGS_KEY = b"megacontext.features", b"megacontext.settings"


@dataclass(frozen=True)
class LabelledEdit:
    """One edit."""

    shown: tuple[int, ...]
    """Blocks shown by choice before."""
    added: tuple[int, ...]
    removed: tuple[int, ...]
    before: tuple[float, float]
    """NLL of both halves of the horizon without the edit, nats a token."""
    after: tuple[float, float]

    @property
    def kind(self) -> str:
        """What it does, as tables name it: one of `EDIT_KINDS`."""
        if self.added and self.removed:
            return "swap one"
        if self.removed:
            return "collapse one"
        return "expand one" if len(self.added) == 1 else "expand several"

    @property
    def gains(self) -> tuple[float, float]:
        """What the edit won on each half; negative where it lost."""
        return self.before[0] - self.after[0], self.before[1] - self.after[1]


@dataclass(frozen=True, eq=False)
class LabelledContext:
    """A Working Context, its candidates, and edits of it."""

    context: str
    version: int
    number: int
    uri: str
    """Of the document that the horizon is of."""
    first_block: int
    stop_block: int
    shown_from: int
    """First block of the raw tail."""
    blocks: Int64[np.ndarray, " n"]
    features: Float32[np.ndarray, "n F"]
    keys: Float16[np.ndarray, "n D_key"]
    query: Float16[np.ndarray, " D_key"]
    edits: tuple[LabelledEdit, ...]


def write_labels(
    path: Path, contexts: Iterable[LabelledContext], features: Sequence[str], settings: Mapping[str, object]
) -> None:
    """Write a file of labels, whole or not at all.

    Args:
        path: replaced if it is there.
        contexts: in the order they are to be read in.
        features: names of the columns.
        settings: what the labels depend on, for readers to see.

    Raises:
        StorageError: the machine refused.
    """
    rows = [_row(labelled) for labelled in contexts]
    metadata = {FEATURES_KEY: json.dumps(list(features)), SETTINGS_KEY: json.dumps(dict(settings), default=str)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata)), sink, compression="zstd")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_durably(temporary, sink.getvalue().to_pybytes())
        temporary.rename(path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write labels to {path}: {error}") from error


def read_labels(path: Path, features: Sequence[str]) -> list[LabelledContext]:
    """All of a file.

    Args:
        path: the file.
        features: names of the columns the reader knows.

    Raises:
        StorageError: no such file, none of labels, or one of other features; says what to do.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise StorageError(f"there are no labels at {path}; make them with `ray_job.py label`") from error
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{path} holds no labels: {error}") from error
    metadata = table.schema.metadata or {}
    if FEATURES_KEY not in metadata or table.schema.remove_metadata() != SCHEMA:
        raise StorageError(f"{path} holds no labels of this version; make them anew with `ray_job.py label`")
    known = json.loads(metadata[FEATURES_KEY])
    if known != list(features):
        differing = sorted(set(known) ^ set(features)) or "their order"
        raise StorageError(
            f"{path} was made with other features ({differing}); make the labels anew with `ray_job.py label`"
        )
    return [_labelled(row, len(known)) for row in table.to_pylist()]


def label_settings(path: Path) -> dict[str, object]:
    """What a file of labels depends on. Errors as of `read_labels`, for a file that is none."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[SETTINGS_KEY])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise StorageError(f"{path} holds no labels: {error}") from error


def _row(labelled: LabelledContext) -> dict[str, object]:
    return {
        "context": labelled.context,
        "version": labelled.version,
        "number": labelled.number,
        "uri": labelled.uri,
        "first_block": labelled.first_block,
        "stop_block": labelled.stop_block,
        "shown_from": labelled.shown_from,
        "blocks": labelled.blocks.tolist(),
        "features": labelled.features.ravel().tolist(),
        "keys": labelled.keys.astype(np.float16).tobytes(),
        "query": labelled.query.astype(np.float16).tobytes(),
        "edits": [
            {
                "shown": list(edit.shown),
                "added": list(edit.added),
                "removed": list(edit.removed),
                "before": list(edit.before),
                "after": list(edit.after),
            }
            for edit in labelled.edits
        ],
    }


def _labelled(row: Mapping[str, Any], num_features: int) -> LabelledContext:
    blocks = np.array(row["blocks"], np.int64)
    query = np.frombuffer(row["query"], np.float16)
    return LabelledContext(
        row["context"],
        row["version"],
        row["number"],
        row["uri"],
        row["first_block"],
        row["stop_block"],
        row["shown_from"],
        blocks,
        np.array(row["features"], np.float32).reshape(len(blocks), num_features),
        np.frombuffer(row["keys"], np.float16).reshape(len(blocks), len(query)),
        query,
        tuple(
            LabelledEdit(
                tuple(edit["shown"]),
                tuple(edit["added"]),
                tuple(edit["removed"]),
                (edit["before"][0], edit["before"][1]),
                (edit["after"][0], edit["after"][1]),
            )
            for edit in row["edits"]
        ),
    )
