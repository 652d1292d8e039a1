"""One flipped bit in any file: it is detected, or what is read is what was there before.

What carries no checksum of its own is known, and said in docs/storage.md: text of the catalogue that describes
(encodings, documents), `store.sqlite`, and the postings of the lexical index. SQLite's log ends at a flipped bit:
what is read then is an earlier version, whole.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import MegaContextError
from tests.storage.support import CONTEXT
from tests.torture.damaged import make_stores, problems, read_all
from tests.torture.scratch import scratch_folder

DESCRIBING = {"version", "documents", "contexts"}
"""What may be served with a wrong letter."""


@pytest.fixture(scope="module")
def stores() -> Iterator[Path]:
    with scratch_folder() as folder:
        make_stores(folder)
        yield folder


class Flips:
    """Flips bits in a file of a store, one at a time, and reads everything each time."""

    def __init__(self, store: Path, relative: str, num_flips: int) -> None:
        self._store = store
        self._relative = relative
        self._num_flips = num_flips
        self.chance = random.Random(relative)
        self.work = store.with_name("work")
        self.sound = self._read(None)
        assert not any(isinstance(value, Exception) for value in self.sound.values())

    def _read(self, flip: tuple[int, int] | None) -> dict[str, object]:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._store, self.work)
        if flip is not None:
            path = self.work / self._relative
            data = bytearray(path.read_bytes())
            data[flip[0]] ^= 1 << flip[1]
            path.write_bytes(data)
        self.problems = problems(self.work)
        return read_all(self.work)

    def __iter__(self) -> Iterator[tuple[str, set[str], bool]]:
        """`(what was flipped, what is served and differs, whether it was detected)` of each flip."""
        data = (self._store / self._relative).read_bytes()
        # SQLite's unused pages are zeros.
        places = [place for place, byte in enumerate(data) if byte]
        for _ in range(self._num_flips):
            flip = self.chance.choice(places), self.chance.randrange(8)
            self.found = self._read(flip)
            errors = {what: value for what, value in self.found.items() if isinstance(value, Exception)}
            # A number of the catalogue that has become something else may be met by an error that is not ours.
            ours = all(isinstance(error, MegaContextError) for error in errors.values())
            assert ours or self.problems, f"{self._relative}, {flip}: {errors}"
            refused = errors.keys()
            wrong = {what for what, value in self.found.items() if value != self.sound.get(what)} - refused
            yield f"bit {flip[1]} of byte {flip[0]} of {self._relative}", wrong, bool(self.problems or refused)


def files(store: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.glob(pattern) if path.is_file())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("megacontext.storage")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def assert_all_are_detected(store: Path, names: list[str], num_flips: int) -> None:
    assert names
    for name in names:
        for what, wrong, detected in Flips(store, name, num_flips):
            assert not wrong, f"{what}: wrong {wrong}"
            assert detected, f"{what}: not detected"


def test_every_flip_in_a_segment_is_detected(stores: Path) -> None:
    names = files(stores / "before", f"{CONTEXT}/segments/*_0000000032_*/**/*")
    assert sum(name.endswith("zarr.json") for name in names) == 8
    assert_all_are_detected(stores / "before", names, 3)


def test_every_flip_in_focus_events_is_detected(stores: Path) -> None:
    assert_all_are_detected(stores / "before", files(stores / "before", f"{CONTEXT}/focus/*"), 15)


@pytest.mark.parametrize("name", [f"{CONTEXT}/catalogue.sqlite", "store.sqlite"])
def test_a_flip_in_sqlite_is_detected_or_harms_no_data(stores: Path, name: str) -> None:
    assert_no_data_is_wrong(stores / "before", name, 60)


def assert_no_data_is_wrong(store: Path, name: str, num_flips: int) -> None:
    num_detected = 0
    for what, wrong, detected in Flips(store, name, num_flips):
        assert detected or {each.split()[0] for each in wrong} <= DESCRIBING, f"{what}: wrong {wrong}"
        num_detected += detected
    assert num_detected > num_flips // 4


def test_a_flip_in_the_lexical_index_spoils_nothing_but_searches(stores: Path) -> None:
    for what, wrong, _ in Flips(stores / "before", f"{CONTEXT}/lexical.sqlite", 60):
        assert {each.split()[0] for each in wrong} <= {"search"}, f"{what}: wrong {wrong}"


def test_a_flip_in_the_log_leaves_an_earlier_version_whole(stores: Path) -> None:
    flips = Flips(stores / "open", f"{CONTEXT}/catalogue.sqlite-wal", 40)
    versions = [*(read_all(stores / f"version{number}") for number in range(3)), flips.sound]
    for what, _, _ in flips:
        assert flips.found in versions, what


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_flips(stores: Path) -> None:
    store = stores / "before"
    assert_all_are_detected(store, files(store, f"{CONTEXT}/segments/**/*"), 10)
    assert_all_are_detected(store, files(store, f"{CONTEXT}/focus/*"), 100)
    for name in (f"{CONTEXT}/catalogue.sqlite", "store.sqlite"):
        assert_no_data_is_wrong(store, name, 1500)
