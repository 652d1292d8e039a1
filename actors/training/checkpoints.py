"""Checkpoints of a run on disk, and its losses step by step.

    checkpoints/step-00000100/   `gistnet/`, `adapter/` where the reader has one, and `optimiser.safetensors`, whole;
                                 `complete.json`, written behind them
    losses.jsonl                 a line a step; cut back to the checkpoint's step when a run goes on

Without `complete.json` a checkpoint is not there, so that a death in the middle of saving costs the steps since the one
before. Plain files: all workers must see the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.run import write_atomically

COMPLETE = "complete.json"
PREFIX = "step-"


class Checkpoints:
    """The checkpoints of one run. Pickles as its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Of the checkpoint after so many steps."""
        return self.folder / f"{PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, the oldest first."""
        found = (path.parent.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*/{COMPLETE}"))
        return sorted(int(name) for name in found)

    def newest_step(self) -> int:
        """Steps behind the newest complete checkpoint; 0 without any."""
        return max(self.steps(), default=0)

    def facts(self, step: int) -> dict[str, Any]:
        """What was written down with a checkpoint."""
        return json.loads((self.path(step) / COMPLETE).read_text())

    def complete(self, step: int, facts: Mapping[str, Any]) -> None:
        """Everything was saved: from now on it is there, also after a power cut. Its facts are JSON."""
        for path in [file for file in self.path(step).rglob("*") if file.is_file()]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        write_atomically(self.path(step) / COMPLETE, json.dumps(facts))

    def drop_old(self, num_kept: int, also: int | None = None) -> None:
        """Remove all but the newest, and one that is kept besides; unfinished older ones too."""
        steps = self.steps()
        kept = {*steps[-num_kept:], *([] if also is None else [also])}
        newest = max(steps, default=0)
        for path in sorted(self.folder.glob(f"{PREFIX}*")):
            step = int(path.name.removeprefix(PREFIX))
            if step not in kept and step < newest:
                # First no checkpoint any more, then gone.
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


class Divergence:
    """A file that says at which step the loss was no longer finite."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def happened(self, step: int) -> None:
        """Write it down."""
        write_atomically(self.path, str(step))

    def step(self) -> int | None:
        """When; None where all is well."""
        return int(self.path.read_text()) if self.path.exists() else None

    def forget(self) -> None:
        """The run is tried again."""
        self.path.unlink(missing_ok=True)


class LossLog:
    """A line of JSON a step; one writer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int) -> None:
        """Forget everything after so many steps, and a line that a dying process left half-written."""
        lines = [line for line in self.read() if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """On disk, whatever happens next."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
