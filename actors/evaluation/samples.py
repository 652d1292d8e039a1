"""What was measured, place by place: on disk as it comes, read again by a run that goes on."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from cluster.errors import ConfigError


class Numbered(Protocol):
    """What places are told apart by."""

    @property
    def number(self) -> int: ...


PlaceT = TypeVar("PlaceT", bound=Numbered)
MeasuredT = TypeVar("MeasuredT")


class SampleLog(Generic[PlaceT, MeasuredT]):
    """One line of JSON a place; a line that a dying process left half-written is dropped."""

    def __init__(self, path: Path, place_type: type[PlaceT], measured_type: type[MeasuredT]) -> None:
        """Open for appending, after what is there.

        Args:
            path: the file; made when it is not there.
            place_type: flat dataclass with a `number`.
            measured_type: flat dataclass, one a condition.
        """
        self.path = path
        self.samples: list[tuple[PlaceT, list[MeasuredT]]] = []
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self.samples.append(_parsed(line, place_type, measured_type))
            os.truncate(path, len(whole))
        self._file = path.open("a", encoding="utf-8")

    def missing(self, places: Sequence[PlaceT]) -> list[PlaceT]:
        """Those of `places` that are not in the file yet. It may hold more: those of a run with more places.

        Raises:
            ConfigError: the file holds another place under the number of one of them.
        """
        known = {place.number: place for place in places}
        strangers = [place for place, _ in self.samples if known.get(place.number, place) != place]
        if strangers:
            raise ConfigError(
                f"{self.path} holds {len(strangers)} places of another choice; remove it or rename the run"
            )
        done = {place.number for place, _ in self.samples}
        return [place for place in places if place.number not in done]

    def of(self, places: Sequence[PlaceT]) -> list[tuple[PlaceT, list[MeasuredT]]]:
        """The samples of `places` that are there."""
        wanted = set(places)
        return [sample for sample in self.samples if sample[0] in wanted]

    def append(self, place: PlaceT, measured: Sequence[MeasuredT]) -> None:
        """Keep one place; on disk when this returns."""
        self.samples.append((place, list(measured)))
        record = {"place": _as_dict(place), "measured": [_as_dict(m) for m in measured]}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def files_of_run(folder: Path, command: str) -> tuple[Path, Path]:
    """A run's recipe, and its samples, packed or not.

    Raises:
        ConfigError: there is no such run, or not exactly one file of samples in it.
    """
    recipe = folder / "config.yaml"
    files = sorted([*folder.glob("samples-*.jsonl"), *folder.glob("samples-*.jsonl.gz")])
    if not recipe.exists() or len(files) != 1:
        found = f"{len(files)} files of samples" if recipe.exists() else "no config.yaml"
        raise ConfigError(f"{folder} is no run of `{command}` with one file of samples: it holds {found}")
    return recipe, files[0]


def read_samples(
    path: Path, place_type: type[PlaceT], measured_type: type[MeasuredT]
) -> Iterator[tuple[PlaceT, list[MeasuredT]]]:
    """What a file of samples holds, packed (`.gz`) or not, without touching it: a run may be writing it."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        yield _parsed(line, place_type, measured_type)


def _parsed(line: bytes, place_type: type[PlaceT], measured_type: type[MeasuredT]) -> tuple[PlaceT, list[MeasuredT]]:
    record = json.loads(line)
    return place_type(**record["place"]), [measured_type(**m) for m in record["measured"]]


def _as_dict(record: Any) -> dict[str, Any]:
    return asdict(record)


def sample_file_name(depends_on: Mapping[str, Any]) -> str:
    """Name of the file for everything its numbers depend on: another setting, another file."""
    content = json.dumps(depends_on, sort_keys=True, default=str)
    return f"samples-{hashlib.sha256(content.encode()).hexdigest()[:12]}.jsonl"
