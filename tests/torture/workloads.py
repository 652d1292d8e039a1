"""Programs that write to a context for ever, for killing: documents follow one another, every token known beforehand.

A workload is a function of `WORKLOADS`; a new one is registered with `@workload` and takes part in every drill. It goes
on from what it finds, says what was acknowledged as soon as it was, and never ends by itself.

Its own module, so that a fork server can have it loaded.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from cluster.config import TOKENS_PER_BLOCK as K
from storage.contract import Ack, BlockState, TreeWriter
from storage.focus.events import FocusEvent, FocusEventLog, read_focus_events
from storage.geometry import complete_nodes, deepest_lod
from storage.schema import Encoding
from storage.store import Store
from storage.tree.bulk_writer import BulkWriter
from storage.tree.rebuild import EncodingBuilder
from storage.tree.states import PRUNED, Span
from storage.tree.writer import ContextWriter
from storage.versions.branching import Branching
from storage.versions.curation import expire_archives, prune, restore
from storage.versions.history import History
from storage.versions.removal import remove_documents
from tests.storage.support import CONTEXT, Text, encoding_of, follow, new_store, nodes_of, open_context

ENCODINGS = (encoding_of("float16", width=6, rows=2, key_width=3), encoding_of("float16", width=7, key_width=2))
"""Those that a context is rebuilt with in turn; it begins with the first."""

FAR_OFF = 4e9
"""Unix seconds."""


@dataclass(frozen=True)
class Acknowledged:
    """What a returned call promised to keep."""

    seq: int
    """Version of the branch."""
    encoding: Encoding
    level_counts: tuple[int, ...]
    """Nodes of LOD1, LOD2, … of `encoding`."""
    active: bool = True
    """Whether the branch reads by `encoding`; else it is being built."""
    document: int = 0
    num_tokens: int = 0
    """Of the document, its tail included."""


@dataclass(frozen=True)
class EventsKept:
    """Focus events `[0, num_events)` that a returned flush promised to keep."""

    num_events: int


@dataclass(frozen=True)
class Tagged:
    """A version of so many blocks has a name; with -1 it may lose it from now on."""

    name: str
    seq: int
    num_blocks: int


@dataclass(frozen=True)
class Moving:
    """The branch's name may go to another branch from now on, and with it what was built of another encoding."""


@dataclass(frozen=True)
class Curating:
    """Blocks of the branch may get another state from now on: all of them or none."""

    spans: tuple[Span, ...]
    state: BlockState
    keeps: bool = True
    """Whether their tokens stay where they are, whatever is collected."""
    archives: bool = False
    """Whether the tokens they have are in an archive first, for ever."""


@dataclass(frozen=True)
class Curated:
    """They have it, from this version on."""

    seq: int
    what: Curating


Promise = Acknowledged | EventsKept | Tagged | Moving | Curating | Curated
Say = Callable[[Promise], None]


class Workload(Protocol):
    """Writes to the context under `root` until it is killed."""

    def __call__(self, root: Path, seed: int, say: Say) -> None: ...


WORKLOADS: dict[str, Workload] = {}


def workload(function: Workload) -> Workload:
    """Register a workload under its function's name."""
    WORKLOADS[function.__name__] = function  # pyright: ignore[reportAttributeAccessIssue]
    return function


# -- the documents -----------------------------------------------------------------------------------------------------


def text_number(number: int) -> Text:
    """The endless sequence of documents: 1 to 3,000 tokens."""
    return Text(f"doc{number}", 1 + number * 7919 % 3001)


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


def event_number(number: int) -> FocusEvent:
    """The endless sequence of focus events."""
    return FocusEvent(
        session="torture",
        number=number,
        reason="question",
        policy="{}",
        contexts=[(CONTEXT, number)],
        num_tokens=number * 7919,
        budget=480,
        cost=number % 480,
        entries=[(0, number, 0)],
        scores={(number, 0): number / 4},
        found=[],
        pinned=[],
        added=[],
        dropped=[],
        num_aged=0,
        time=float(number),
    )


def first_unfinished(tree: TreeWriter) -> int:
    """The document to go on with."""
    for number in itertools.count():
        mark = tree.marks([text_number(number).key]).get(text_number(number).key)
        if mark is None or mark.state != "complete":
            return number
    raise AssertionError


# -- steps -------------------------------------------------------------------------------------------------------------


def open_or_create(root: Path, **options) -> ContextWriter:
    """The context's writer; store and context are made when a dead process did not come that far."""
    if not (root / CONTEXT).exists() or not Store(root).has_context(CONTEXT):
        new_store(root, ENCODINGS[0])
    return open_context(root, **options)


def write_document(
    tree: TreeWriter, encoding: Encoding, number: int, chance: random.Random, say: Say, *, tails: bool
) -> None:
    """Bring a document to its end in pieces, some of which are stored already; with `tails`, by single tokens too."""
    text = text_number(number)
    mark = tree.marks([text.key]).get(text.key)
    done = mark.num_blocks if mark else 0
    while done < text.num_blocks:
        if tails and chance.random() < 0.3:
            stop = min(text.num_tokens, done * K + chance.randint(1, 3 * K))
            say(_promise(tree.append_tail(text.meta, done * K, text.tokens(done * K, stop)), number, stop))
        first = max(0, done - chance.choice([0, 0, 0, 4]))
        done = min(text.num_blocks, done + chance.randint(1, 12))
        ack = tree.append([text.span(encoding, first, done)], request_id=f"{number}/{done}")
        durable = min(done * K, text.num_tokens) if ack.pending_blocks == 0 else 0
        say(_promise(ack, number, durable))


def put_all(tree: TreeWriter, encoding: Encoding, number: int, say: Say) -> None:
    """The upper levels, and everything durable up to and with document `number`."""
    follow(tree, encoding)
    say(_promise(tree.flush(), number, text_number(number).num_tokens))


def derive(writer: ContextWriter, encoding: Encoding, say: Say) -> None:
    """Give the tree another encoding: every level in pieces, then the switch."""
    builder = EncodingBuilder(writer, encoding)
    num_blocks = writer.version().num_blocks
    texts = expected_texts(num_blocks)
    gists = {s.name: torch.cat([t.gists(0, t.num_blocks, s) for t in texts]) for s in encoding.arrays if texts}
    for lod in range(1, deepest_lod(num_blocks) + 1):
        counts = builder.level_counts()
        first, whole = counts[lod - 1] if lod <= len(counts) else 0, complete_nodes(lod, num_blocks)
        while first < whole:
            stop = min(whole, first + 40)
            arrays = nodes_of(encoding, lod, first, stop)
            if lod == 1:
                rows = {spec.name: spec.rows_per_node for spec in encoding.arrays}
                arrays = {name: values[first * rows[name] : stop * rows[name]] for name, values in gists.items()}
            ack = builder.put_nodes(lod, first, arrays)
            say(Acknowledged(ack.version.seq, encoding, builder.level_counts(), active=False))
            first = stop
    say(_promise(builder.activate()))


def curate(writer: ContextWriter, what: Curating, say: Say, *, archive_until: float | None = None) -> None:
    """Prune or restore blocks."""
    say(what)
    if what.state == BlockState.WHOLE:
        version = restore(writer, what.spans).version
    else:
        keep_until = FAR_OFF if what.keeps else 0.0
        version = prune(
            writer, what.spans, keep_until=keep_until, state=what.state, archive_until=archive_until, now=0.0
        )
    say(Curated(version.seq, what))


def restore_all(writer: ContextWriter, say: Say) -> None:
    """Everything whole again."""
    num_blocks = writer.version().num_blocks
    if num_blocks:
        curate(writer, Curating(((0, num_blocks),), BlockState.WHOLE), say)


def curate_something(writer: ContextWriter, chance: random.Random, say: Say) -> None:
    """Spans of blocks are pruned in one of the ways there are, or restored; so that all can be restored later."""
    growing = writer.open_document()
    document = None if growing is None else writer.document(growing.key)
    num_blocks = writer.version().num_blocks if document is None else document.first_block
    if num_blocks == 0:
        return
    edges = sorted(chance.sample(range(num_blocks + 1), min(chance.choice([2, 2, 4]), (num_blocks + 1) // 2 * 2)))
    spans = tuple((low, high - low) for low, high in zip(edges[::2], edges[1::2], strict=True))
    pruned = chance.choice(PRUNED)
    way = chance.choice(["kept", "archived", "archived", "restored"])
    if way == "kept":
        # An archive that goes at once is another file to lose.
        curate(writer, Curating(spans, pruned), say, archive_until=chance.choice([None, 1.0]))
    elif way == "archived":
        curate(writer, Curating(spans, pruned, keeps=False, archives=True), say, archive_until=0.0)
    else:
        curate(writer, Curating(spans, BlockState.WHOLE), say)


def go_on(root: Path, num_documents: int, say: Say) -> int:
    """Recover, bring so many more documents and all levels to their end, and everything that was pruned back; returns
    the number of the last document."""
    with open_or_create(root) as writer:
        last = first_unfinished(writer) + num_documents - 1
        for number in range(first_unfinished(writer), last + 1):
            write_document(writer, writer.encoding, number, random.Random(number), say, tails=True)
        restore_all(writer, say)
        put_all(writer, writer.encoding, last, say)
    return last


def _promise(ack: Ack, document: int = 0, num_tokens: int = 0) -> Acknowledged:
    version = ack.version
    return Acknowledged(version.seq, version.encoding, version.level_counts, True, document, num_tokens)


# -- the workloads -----------------------------------------------------------------------------------------------------


@workload
def streaming(root: Path, seed: int, say: Say) -> None:
    """Small commits and tails through the journal; a thread seals behind them."""
    with open_or_create(root) as writer:
        _ingest(writer, writer.encoding, seed, say, tails=True)


@workload
def bulk(root: Path, seed: int, say: Say) -> None:
    """Whole segments past the journal, by half of the seeds written by a thread of their own."""
    writer = open_or_create(root)
    _ingest(BulkWriter(writer, gather_s=(0.0, 1e-6)[seed % 2]), writer.encoding, seed, say, tails=False)


@workload
def sealing(root: Path, seed: int, say: Say) -> None:
    """Nothing is sealed until several segments wait in the journal, then all of them at once."""
    chance = random.Random(seed)
    with open_or_create(root, seal_in_background=False) as writer:
        for number in itertools.count(first_unfinished(writer)):
            write_document(writer, writer.encoding, number, chance, say, tails=False)
            if chance.random() < 0.5:
                put_all(writer, writer.encoding, number, say)


@workload
def rebuild(root: Path, seed: int, say: Say) -> None:
    """The tree's second encoding, the first again, and so on; a document between them."""
    chance = random.Random(seed)
    with open_or_create(root) as writer:
        for number in itertools.count(first_unfinished(writer)):
            write_document(writer, writer.encoding, number, chance, say, tails=True)
            # Gists are made from tokens, so a rebuild needs all of them.
            restore_all(writer, say)
            derive(writer, next(other for other in ENCODINGS if other != writer.encoding), say)


@workload
def reopening(root: Path, seed: int, say: Say) -> None:
    """Every document by a writer of its own: most of the time something recovers or closes."""
    chance = random.Random(seed)
    while True:
        with open_or_create(root) as writer:
            number = first_unfinished(writer)
            write_document(writer, writer.encoding, number, chance, say, tails=True)


@workload
def versions(root: Path, seed: int, say: Say) -> None:
    """Documents written on a branch beside something that is taken out again; then the branch's name moves there, the
    version is tagged, and what is left is collected."""
    chance = random.Random(seed)
    store = Store(root, create=True)
    with open_or_create(root) as writer:
        branching = Branching(writer)
        for left in History(writer.folder, CONTEXT).branches():
            if left.name != "main":
                branching.discard(left.name)
        for tag in History(writer.folder, CONTEXT).tags():
            say(Tagged(tag.name, 0, -1))
            branching.delete_tag(tag.name)
        while True:
            number = first_unfinished(writer)
            if writer.open_document() is not None:
                write_document(writer, writer.encoding, number, chance, say, tails=True)
                continue
            say(Moving())
            branching.fork("draft")
            writer.switch("draft")
            if chance.random() < 0.5:
                junk = Text(f"junk{number}", chance.randint(1, 2000))
                writer.append([junk.span(writer.encoding)])
                write_document(writer, writer.encoding, number, chance, lambda _: None, tails=True)
                remove_documents(writer, [junk.key])
            else:
                write_document(writer, writer.encoding, number, chance, lambda _: None, tails=True)
            writer.switch("main")
            text = text_number(number)
            say(_promise(Ack(branching.fast_forward("draft")), number, text.num_tokens))
            branching.discard("draft")
            say(Tagged("kept", branching.tag("kept"), writer.version().num_blocks))
            say(_promise(Ack(branching.roll_back(writer.version().seq)), number, text.num_tokens))
            put_all(writer, writer.encoding, number, say)
            store.collect(writer, keep_s=0.0, clip_share=chance.random())
            say(Tagged("kept", 0, -1))
            branching.delete_tag("kept")


@workload
def curation(root: Path, seed: int, say: Say) -> None:
    """Spans of whatever there is are pruned, with and without an archive, tombstoned and restored; between documents,
    what need not be kept is collected."""
    chance = random.Random(seed)
    store = Store(root, create=True)
    with open_or_create(root) as writer:
        for number in itertools.count(first_unfinished(writer)):
            for _ in range(3):
                curate_something(writer, chance, say)
            write_document(writer, writer.encoding, number, chance, say, tails=True)
            if chance.random() < 0.5:
                put_all(writer, writer.encoding, number, say)
            store.collect(writer, keep_s=0.0)
            if chance.random() < 0.5:
                expire_archives(writer)


@workload
def events(root: Path, seed: int, say: Say) -> None:
    """A session's focus events, in small files that are merged."""
    chance = random.Random(seed)
    open_or_create(root).close()
    log = FocusEventLog(root / CONTEXT)
    for number in itertools.count(read_focus_events(root / CONTEXT).num_rows):
        log.add(event_number(number))
        if chance.random() < 0.3:
            log.flush()
            say(EventsKept(number + 1))


def _ingest(tree: TreeWriter, encoding: Encoding, seed: int, say: Say, *, tails: bool) -> None:
    chance = random.Random(seed)
    for number in itertools.count(first_unfinished(tree)):
        write_document(tree, encoding, number, chance, say, tails=tails)
        if chance.random() < 0.1:
            put_all(tree, encoding, number, say)
