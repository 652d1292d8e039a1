"""Disks that refuse or hold up, and what is asked of a context afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster.config import TOKENS_PER_BLOCK as K
from storage.contract import TreeWriter
from storage.tree.writer import ContextWriter
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, rows

ENCODING = encoding_of()
ONE, TWO = Text("one", 100 * K), Text("two", 60 * K - 7)


class Disk:
    """Writes segment files, while there is room and nobody holds it up."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.num_refused = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.busy = threading.Event()

    def write(self, path: Path, data: bytes | memoryview) -> None:
        self.busy.set()
        assert self.go_on.wait(30)
        if self.error is not None:
            self.num_refused += 1
            raise self.error
        path.write_bytes(data)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def num_sealed(writer: ContextWriter) -> int:
    return int(rows(writer, "SELECT coalesce(sum(count), 0) FROM extents WHERE lod = 0")[0][0])


def segment_folders(root: Path) -> set[str]:
    return {path.name for path in (root / CONTEXT / "segments").iterdir()}


def assert_reads(tree: TreeWriter, *texts: Text) -> None:
    reader = tree.reader()
    assert_holds(reader, texts, ENCODING)
    reader.close()


def raising(error: BaseException) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise error

    return refuse
