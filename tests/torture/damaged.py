"""A store with every kind of file in it, and everything that can be read of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cluster.errors import MegaContextError
from storage.check import check_context
from storage.contract import TreeReader
from storage.focus.events import FocusEventLog, read_focus_events
from storage.lexical.index import LexicalWriter
from storage.lexical.search import LexicalSearcher
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.rebuild import EncodingBuilder
from storage.versions.archive import Archives
from storage.versions.branching import Branching
from storage.versions.history import History
from tests.storage.support import CONTEXT, Text, follow, new_store, nodes_of, open_context
from tests.torture.workloads import ENCODINGS, event_number

ENCODING, OTHER = ENCODINGS
TEXTS = [Text("one", 50 * 32 - 3), Text("two", 30), Text("three", 60 * 32)]
OPEN = Text("four", 40 * 32)
QUERIES = ("w17 w23", "w3", "w101 w7 w9")


def decode(rows: object) -> list[str]:
    """A text of words for tokens, of which some are rare."""
    return [" ".join(f"w{token % 251}" for token in row.tolist()) + " " for row in rows]  # pyright: ignore


def make_stores(folder: Path) -> None:
    """`before`: everything folded in; `open`: as a killed writer leaves it, with all versions in its log; `tailed`:
    folded in, with a tail, a second branch, a tag, a lease and an archive."""
    root = folder / "closed"
    new_store(root, ENCODING)
    with open_context(root, seal_in_background=False) as writer:
        writer.append([text.span(ENCODING) for text in TEXTS])
        follow(writer, ENCODING)
        writer.flush()
        builder = EncodingBuilder(writer, OTHER)
        builder.put_nodes(1, 0, nodes_of(OTHER, 1, 0, 40))
        writer.flush()
        with LexicalWriter(root / CONTEXT, decode) as index, writer.reader() as reader:
            index.advance(reader)
    log = FocusEventLog(root / CONTEXT)
    for number in range(3):
        log.add(event_number(number))
    log.flush()
    shutil.copytree(root, folder / "before")
    with open_context(root, seal_in_background=False) as writer:
        shutil.copytree(root, folder / "version0")
        writer.append([OPEN.span(ENCODING, 0, 5, ends=False)])
        shutil.copytree(root, folder / "version1")
        writer.append_tail(OPEN.meta, 5 * 32, OPEN.tokens(5 * 32, 5 * 32 + 9))
        shutil.copytree(root, folder / "version2")
        writer.append([OPEN.span(ENCODING, 5, 9, ends=False)])
        shutil.copytree(root, folder / "open")
        branching = Branching(writer)
        branching.fork("side", at_block=40)
        branching.tag("kept", message="a word of its own")
        writer.append_tail(OPEN.meta, 9 * 32, OPEN.tokens(9 * 32, 9 * 32 + 11))
        with writer.reader() as reader:
            Archives(writer.folder).add(reader, [(0, 20)], keep_until=0.0)
    Store(root).set_pin("a reader", CONTEXT, "main", 2)
    shutil.copytree(root, folder / "tailed")


def read_all(root: Path) -> dict[str, object]:
    """What readers are served, by what it is; an error in the place of what was refused."""
    found: dict[str, object] = {}

    def serve(what: str, read: Callable[[], object]) -> None:
        try:
            found[what] = read()
        except Exception as error:
            found[what] = error

    folder = root / CONTEXT
    history = History(folder, CONTEXT)
    serve("history", lambda: history.log("main", 1000))
    serve("history of branches", lambda: history.branches(retired=True))
    serve("history of tags", history.tags)
    serve("history of changes", lambda: history.audit(1000))
    serve("contexts", lambda: [(info.name, info.folder.name) for info in Store(root).contexts()])
    serve("leases", lambda: Store(root).pins(CONTEXT))
    serve("events", lambda: read_focus_events(folder).to_pylist())
    for encoding_id in (None, 2):
        try:
            reader = ContextReader(folder, CONTEXT, encoding_id=encoding_id)
        except Exception as error:
            found[f"reader {encoding_id}"] = error
            continue
        with reader:
            for what, read in _of_version(reader):
                serve(f"{what} {encoding_id}", read)
            if encoding_id is None:
                for query in QUERIES:
                    serve(f"search {query}", lambda query=query, reader=reader: _search(folder, reader, query))
    return found


def _of_version(reader: ContextReader) -> Iterator[tuple[str, Callable[[], object]]]:
    version = reader.version
    blocks = version.num_blocks
    yield "version", lambda: version
    yield "tokens", lambda: [part.tobytes() for part in reader.tokens(0, blocks)]
    yield "before", lambda: reader.tokens_before(np.arange(blocks + 1)).tobytes()
    yield "documents", reader.documents
    yield "tail", lambda: _tail(reader)
    for lod in range(1, version.max_lod + 1):
        for spec in version.encoding.arrays:
            nodes = np.arange(version.num_nodes(lod))
            yield (
                f"LOD{lod} {spec.name}",
                lambda spec=spec, lod=lod, nodes=nodes: reader.read(spec.name, lod, nodes).numpy().tobytes(),
            )


def _tail(reader: ContextReader) -> object:
    tail = reader.tail()
    return None if tail is None else (tail.document, tail.tokens.tobytes())


def _search(folder: Path, reader: TreeReader, query: str) -> object:
    with LexicalSearcher(folder, decode) as searcher:
        blocks, scores = searcher.search(reader, query, 20)
    return blocks.tobytes(), scores.tobytes()


def problems(root: Path) -> list[str]:
    """What `tree verify` says."""
    try:
        return check_context(Store(root), CONTEXT).problems
    except MegaContextError as error:
        return [str(error)]
