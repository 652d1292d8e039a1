"""kill -9 at random moments: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from storage import catalogue
from storage.reader import ContextReader
from storage.verify import verify_context
from tests.storage import endless_writer
from tests.storage.endless_writer import ENCODING, Acknowledged, Kind, text_number, write_on
from tests.storage.support import CONTEXT, Text, assert_holds, new_store, open_context, read_everything

NUM_KILLS = 20
LONGEST_LIFE_S = 0.3


def expected_texts(num_blocks: int) -> list[Text]:
    """The documents that lie on a timeline of that many blocks, the last one perhaps in part."""
    texts: list[Text] = []
    while num_blocks > 0:
        text = text_number(len(texts))
        if text.num_blocks > num_blocks:
            text = Text(text.key, num_blocks * K, size_bytes=text.num_tokens)
        texts.append(text)
        num_blocks -= text.num_blocks
    return texts


class Drill:
    """One context, its killers, and what it promised."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / CONTEXT
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([endless_writer.__name__])
        self.num_acknowledged = self.num_lost = self.num_doubled = self.num_unfinished_segments = 0
        self.level_counts: tuple[int, ...] = ()
        self.last: Acknowledged | None = None

    def kill_once(self, kind: Kind, seed: int, life_s: float, *, from_birth: bool) -> None:
        """Let a writer live for a while, from its start or its first word; remember what it acknowledged."""
        receive, send = self.processes.Pipe(duplex=False)
        child = self.processes.Process(target=write_on, args=(self.root, kind, seed, send))
        child.start()
        send.close()
        try:
            assert from_birth or receive.poll(60), "the writer said nothing for a minute"
            deadline = time.monotonic() + life_s
            while (left := deadline - time.monotonic()) > 0:
                if receive.poll(left):
                    self.hear(receive.recv())
            child.kill()
            child.join()
            # What it said before it died counts, also when nobody had listened yet.
            while True:
                self.hear(receive.recv())
        except EOFError:
            pass
        finally:
            child.kill()
            child.join()
            receive.close()
        assert child.exitcode == -9, "the writer ended by itself; its traceback is in the output"
        child.close()

    def hear(self, ack: Acknowledged) -> None:
        self.num_acknowledged += 1
        for lod, (now, before) in enumerate(zip(ack.level_counts, self.level_counts, strict=False), start=1):
            assert now >= before, f"LOD{lod} shrank"
        self.level_counts, self.last = ack.level_counts, ack

    def inspect(self) -> None:
        """Read what the dead writer left, before anybody repairs anything."""
        report = verify_context(self.folder, CONTEXT)
        assert report.ok, report.problems
        with ContextReader(self.folder, CONTEXT) as reader:
            version = reader.version
            promised = self.level_counts[0] if self.level_counts else 0
            self.num_lost += max(0, promised - version.num_blocks)
            texts = expected_texts(version.num_blocks)
            stored = Counter(block.tobytes() for block in reader.tokens(0, version.num_blocks)[0])
            wanted = Counter(block.tobytes() for text in texts for block in text.packed(0, text.num_blocks)[0])
            self.num_doubled += (stored - wanted).total()
            assert_holds(reader, texts, ENCODING)
            for lod, count in enumerate(self.level_counts, start=1):
                assert version.num_nodes(lod) >= count
            self.inspect_tail(reader, texts)
        with closing(catalogue.connect(self.folder, read_only=True)) as db:
            known = {row[0] for row in db.execute("SELECT folder FROM segments")}
        self.num_unfinished_segments += len({p.name for p in (self.folder / "segments").iterdir()} - known)

    def inspect_tail(self, reader: ContextReader, texts: list[Text]) -> None:
        tail = reader.tail()
        if tail is not None:
            text = next(t for n in range(len(texts) + 1) if (t := text_number(n)).key == tail.document.key)
            stored = texts[-1].num_tokens if texts and texts[-1].key == text.key else 0
            np.testing.assert_array_equal(tail.tokens, text.tokens(stored, stored + len(tail.tokens)))
        if self.last is None or self.last.num_tokens == 0:
            return
        documents = {document.meta.key: document.num_tokens for document in reader.documents()}
        key = text_number(self.last.document).key
        held = documents.get(key, 0) + (len(tail.tokens) if tail is not None and tail.document.key == key else 0)
        assert held >= self.last.num_tokens, "acknowledged tail tokens are gone"


@pytest.mark.timeout(180)
def test_nothing_acknowledged_is_lost_or_doubled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_store(tmp_path / "killed", ENCODING)
    drill = Drill(tmp_path / "killed")
    # The first start loads the fork server, which takes seconds.
    warm_up = drill.processes.Process(target=time.sleep, args=(0,))
    warm_up.start()
    warm_up.join()
    chance = random.Random()
    for number in range(NUM_KILLS):
        kind: Kind = "bulk" if number % 3 == 2 else "streaming"
        # Every fifth dies while it opens or soon after.
        drill.kill_once(kind, number, chance.uniform(0, LONGEST_LIFE_S), from_birth=number % 5 == 4)
        drill.inspect()

    with open_context(tmp_path / "killed") as writer:
        last = endless_writer.first_unfinished(writer)
    write_on(tmp_path / "killed", "streaming", 1, None, last)
    new_store(tmp_path / "undisturbed", ENCODING)
    write_on(tmp_path / "undisturbed", "bulk", 2, None, last)
    found = []
    for name in ("killed", "undisturbed"):
        assert verify_context(tmp_path / name / CONTEXT, CONTEXT).ok
        with ContextReader(tmp_path / name / CONTEXT, CONTEXT) as reader:
            found.append(read_everything(reader, ENCODING))
            num_blocks = reader.version.num_blocks
    assert found[0].keys() == found[1].keys()
    for what, values in found[0].items():
        assert values.tobytes() == found[1][what].tobytes(), what
    with capsys.disabled():
        print(
            f"\nkill -9: {NUM_KILLS} kills, {drill.num_unfinished_segments} unfinished segments left behind, "
            f"{drill.num_acknowledged} acknowledgements, {num_blocks} blocks stored, {drill.num_lost} lost, "
            f"{drill.num_doubled} doubled"
        )
    assert drill.num_acknowledged > 2 * NUM_KILLS
    assert drill.num_lost == drill.num_doubled == 0
