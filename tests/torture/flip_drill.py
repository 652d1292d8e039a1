"""Flips bits, one at a time, in every kind of file of a store, its backup and a bundle.

A flip is detected when `tree verify` names it or reading is refused, harmless when nothing is and all that can be read
is what was there before, silent otherwise. SQLite's log ends at a flipped bit: in its last commit that looks like a
power cut, and an earlier version is read, whole.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import MegaContextError
from storage.store import Store
from storage.versions.backup import back_up
from tests.storage.bundle_support import bring_in, export
from tests.storage.support import CONTEXT
from tests.torture.damaged import make_stores, problems, read_all

BUNDLE = "bundle.mcb"

KINDS = {
    "segment": ("tailed", f"{CONTEXT}/segments/**/*"),
    "catalogue": ("tailed", f"{CONTEXT}/catalogue.sqlite"),
    "catalogue log": ("open", f"{CONTEXT}/catalogue.sqlite-wal"),
    "lexical index": ("tailed", f"{CONTEXT}/lexical.sqlite"),
    "focus events": ("tailed", f"{CONTEXT}/focus/*.parquet"),
    "archive": ("tailed", f"{CONTEXT}/archive/*"),
    "store": ("tailed", "store.sqlite"),
    "backup": ("backup", f"{CONTEXT}/**/*"),
    "bundle": ("bundles", BUNDLE),
}
"""Which store is damaged, and which of its files."""


@dataclass
class FlipCounts:
    """What became of the flips in one kind of file."""

    flips: int = 0
    detected: int = 0
    named: int = 0
    """Of `detected`, those of which a line names the file or the row."""
    harmless: int = 0
    earlier: int = 0
    """An earlier version was read, whole: of logs only."""
    silent: list[str] = field(default_factory=list)


def table(counts: dict[str, FlipCounts]) -> str:
    """One line a kind."""
    lines = [f"{'bit flips in':<16}{'flips':>8}{'detected':>10}{'named':>8}{'harmless':>10}{'earlier':>9}{'silent':>8}"]
    lines += [
        f"{kind:<16}{c.flips:>8,}{c.detected:>10,}{c.named:>8,}{c.harmless:>10,}{c.earlier:>9,}{len(c.silent):>8,}"
        for kind, c in counts.items()
    ]
    return "\n".join(lines)


class FlipDrill:
    """Makes stores with every kind of file in them, and damages copies."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._work = folder / "work"
        folder.mkdir(exist_ok=True)
        make_stores(folder)
        back_up(Store(folder / "tailed"), CONTEXT, folder / "backup")
        (folder / "bundles").mkdir()
        export(folder / "tailed", folder / "bundles" / BUNDLE)
        self._versions = [read_all(folder / f"version{number}") for number in range(3)]

    def files(self, kind: str) -> list[str]:
        """Files of a kind, relative to their store."""
        store, pattern = KINDS[kind]
        root = self._folder / store
        found = sorted(path for path in root.glob(pattern) if path.is_file() and path.stat().st_size)
        return [path.relative_to(root).as_posix() for path in found]

    def run(self, kind: str, num_flips: int) -> FlipCounts:
        """Flip bits at random places of a kind's files, in turn."""
        chance = random.Random(f"{self._seed} {kind}")
        store = self._folder / KINDS[kind][0]
        sound = self._look(store, kind)[1]
        assert not any(isinstance(value, Exception) for value in sound.values())
        counts = FlipCounts()
        files = self.files(kind)
        assert files
        for number in range(num_flips):
            relative = files[number % len(files)]
            data = bytearray((store / relative).read_bytes())
            # SQLite's unused pages are zeros: most flips go where something is.
            used = [place for place, byte in enumerate(data) if byte] if chance.random() < 0.8 else range(len(data))
            place, bit = chance.choice(used), chance.randrange(8)
            data[place] ^= 1 << bit
            self._count(counts, store, kind, relative, bytes(data), sound, f"bit {bit} of byte {place} of {relative}")
        return counts

    def _count(
        self,
        counts: FlipCounts,
        store: Path,
        kind: str,
        relative: str,
        data: bytes,
        sound: dict[str, object],
        what: str,
    ) -> None:
        lines, read = self._look(store, kind, relative, data)
        errors = {key: value for key, value in read.items() if isinstance(value, Exception)}
        texts = [*lines, *(str(error) for error in errors.values())]
        served = {key for key, value in read.items() if value != sound.get(key)} - errors.keys()
        counts.flips += 1
        if lines or (errors and not served):
            counts.detected += 1
            counts.named += any(name in text for text in texts for name in (Path(relative).name, "row of"))
            strange = [error for error in errors.values() if not isinstance(error, MegaContextError)]
            if strange and not lines:
                counts.silent.append(f"{what}: an error that is not ours, {strange[0]!r}")
        elif not served:
            counts.harmless += 1
        elif kind.endswith("log") and read in self._versions:
            counts.earlier += 1
        else:
            counts.silent.append(f"{what}: other {sorted(served)}")

    def _look(
        self, store: Path, kind: str, relative: str = "", data: bytes | None = None
    ) -> tuple[list[str], dict[str, object]]:
        """What verify says of a copy, and what is read of it."""
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(store, self._work)
        if data is not None:
            (self._work / relative).write_bytes(data)
        if kind == "bundle":
            return self._look_at_bundle()
        # Reading first: a program that verifies folds a log in.
        lines = problems(self._work)
        return lines, read_all(self._work)

    def _look_at_bundle(self) -> tuple[list[str], dict[str, object]]:
        try:
            bring_in(self._work / BUNDLE, self._work)
        except MegaContextError as error:
            return [str(error)], {}
        # Times are those of the import, and only one encoding came along.
        read = read_all(self._work)
        return [], {key: value for key, value in read.items() if not key.startswith(("history", "reader 2"))}


def run_all(folder: Path, seed: int, num_flips: int) -> Iterator[tuple[str, FlipCounts]]:
    """`num_flips` of every kind."""
    drill = FlipDrill(folder, seed)
    for kind in KINDS:
        yield kind, drill.run(kind, num_flips)
