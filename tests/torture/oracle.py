"""Knows what was acknowledged, and says what a store has lost, doubled or torn of it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from cluster.errors import MegaContextError
from storage.contract import BlockState
from storage.focus.events import read_focus_events
from storage.store import Store
from storage.tree import catalogue
from storage.tree.reader import ContextReader
from storage.tree.states import PRUNED
from storage.tree.verify import verify_context
from storage.versions.archive import Archives, check_archives, places_of
from storage.versions.history import History
from tests.storage.support import CONTEXT, Text, assert_holds, vectors
from tests.torture.workloads import (
    ENCODINGS,
    Acknowledged,
    Curated,
    Curating,
    EventsKept,
    Moving,
    Promise,
    Tagged,
    event_number,
    expected_texts,
    text_number,
)


@dataclass
class Findings:
    """What is wrong with a store; a line each."""

    lost: list[str] = field(default_factory=list)
    """Acknowledged, and not there."""
    doubled: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    """Half there, damaged, or unreadable."""

    @property
    def ok(self) -> bool:
        """Nothing is."""
        return not (self.lost or self.doubled or self.torn)

    def __str__(self) -> str:
        kinds = {"lost": self.lost, "doubled": self.doubled, "torn": self.torn}
        return "; ".join(f"{kind}: {line}" for kind, lines in kinds.items() for line in lines) or "nothing is wrong"


@dataclass(frozen=True)
class CuratedBlock:
    """What is known of a block that curation had to do with."""

    state: BlockState = BlockState.WHOLE
    kept: bool = True
    """Its tokens are in the tree."""
    archived: bool = False
    """They are in an archive."""

    def after(self, what: Curating) -> Self:
        """The block after it was pruned or restored."""
        if what.state == BlockState.WHOLE:
            return replace(self, state=what.state, kept=True)
        # What was archived is never taken away again.
        return replace(self, state=what.state, kept=self.kept and what.keeps, archived=self.archived or what.archives)


class Oracle:
    """Hears acknowledgements, inspects stores. What it has heard only grows."""

    def __init__(self) -> None:
        self.num_heard = 0
        self.seq = 0
        self.encoding = ENCODINGS[0]
        self.level_counts: dict[str, tuple[int, ...]] = {}
        """By the digest of the encoding."""
        self.num_blocks = 0
        self.last: Acknowledged | None = None
        """That promised tokens of a document."""
        self.num_events = 0
        self.tags: dict[str, tuple[Tagged, dict[int, CuratedBlock]]] = {}
        self.curated: dict[int, CuratedBlock] = {}
        """By number; the others are as they were written."""
        self.curating: Curating | None = None
        """What was begun, and may be done or not."""
        self._contradictions = Findings()
        """Between what was heard and what was heard later."""

    def copy(self) -> Self:
        """One that goes on by itself."""
        return copy.deepcopy(self)

    def hear(self, ack: Promise) -> None:
        """Remember a promise."""
        self.num_heard += 1
        if isinstance(ack, EventsKept):
            self.num_events = ack.num_events
            return
        if isinstance(ack, Tagged):
            self.tags[ack.name] = ack, self.curated.copy()
            return
        if isinstance(ack, Curating):
            self.curating = ack
            return
        if isinstance(ack, Curated):
            self.seq = max(self.seq, ack.seq)
            self._curate(ack.what)
            return
        if isinstance(ack, Moving):
            active = self.encoding.gistnet_digest
            self.level_counts = {digest: counts for digest, counts in self.level_counts.items() if digest == active}
            return
        digest = ack.encoding.gistnet_digest
        before = self.level_counts.get(digest, ())
        if any(now < old for now, old in zip(ack.level_counts, before, strict=False)):
            self._contradictions.lost.append(f"{before} nodes of {digest} were promised, then {ack.level_counts}")
        if ack.seq < self.seq:
            self._contradictions.doubled.append(f"version {ack.seq} came after version {self.seq}")
        self.level_counts[digest] = ack.level_counts
        self.seq = ack.seq
        if ack.active:
            self.encoding = ack.encoding
            self.num_blocks = max([self.num_blocks, *ack.level_counts[:1]])
        if ack.num_tokens:
            self.last = ack

    def _curate(self, what: Curating) -> None:
        for first, count in what.spans:
            for block in range(first, first + count):
                self.curated[block] = self.curated.get(block, CuratedBlock()).after(what)
        self.curating = None

    def inspect(self, root: Path) -> Findings:
        """Read everything of a store, before anybody repairs anything. What was begun is found done, or not, and stays
        so from now on."""
        findings = copy.deepcopy(self._contradictions)
        folder = root / CONTEXT
        if not folder.exists():
            if self.num_heard:
                findings.lost.append("the context")
            return findings
        try:
            if self.num_heard and not Store(root).has_context(CONTEXT):
                findings.lost.append("the store's entry of the context")
            findings.torn += verify_context(folder, CONTEXT).problems
            if findings.ok:
                with ContextReader(folder, CONTEXT) as reader:
                    self._inspect_blocks(reader, findings)
                    self._inspect_pruned(folder, reader, findings)
                    self._inspect_upper_levels(reader, findings)
                    self._inspect_tail(reader, findings)
                    self._inspect_encodings(folder, reader, findings)
                self._inspect_tags(folder, findings)
                self._inspect_events(folder, findings)
        except MegaContextError as error:
            findings.torn.append(f"{type(error).__name__}: {error}")
        except AssertionError as error:
            findings.torn.append(str(error).strip())
        return findings

    def _inspect_blocks(self, reader: ContextReader, findings: Findings) -> None:
        version = reader.version
        if version.seq < self.seq:
            findings.lost.append(f"version {self.seq}; the newest is {version.seq}")
        elif version.seq == self.seq and version.encoding != self.encoding:
            findings.lost.append("the switch to another encoding")
        if version.num_blocks < self.num_blocks:
            findings.lost.append(f"blocks {version.num_blocks}-{self.num_blocks - 1}")
        texts = expected_texts(version.num_blocks)
        if self.curating is not None:
            if self._is_done(self.curating, reader):
                self._curate(self.curating)
            self.curating = None
        tokens, counts = reader.tokens(0, version.num_blocks)
        stored = Counter(block.tobytes() for block in tokens[counts > 0])
        wanted = Counter(block.tobytes() for text in texts for block in text.packed(0, text.num_blocks)[0])
        if more := (stored - wanted).total():
            findings.doubled.append(f"{more} blocks that nobody wrote there")
        assert_holds(reader, texts, version.encoding, states=_states(self.curated, version.num_blocks))

    def _is_done(self, what: Curating, reader: ContextReader) -> bool:
        """Whether all of it is; what is half done is found by the comparison of states that follows."""
        spans = [span for span in what.spans if sum(span) <= reader.version.num_blocks]
        return bool(spans) and all((reader.block_states(*span) == what.state).all() for span in spans)

    def _inspect_pruned(self, folder: Path, reader: ContextReader, findings: Findings) -> None:
        """What can be restored: tokens in the tree, or in archives."""
        findings.torn += check_archives(folder)
        num_blocks = reader.version.num_blocks
        pruned = sorted(n for n, block in self.curated.items() if n < num_blocks and block.state in PRUNED)
        if not pruned:
            return
        wanted = np.concatenate([text.packed(0, text.num_blocks)[0] for text in expected_texts(num_blocks)])
        stored = reader.stored_arrays(0, 0, num_blocks)["tokens"].reshape(num_blocks, -1)
        places = {}
        for document in reader.documents():
            mine = [n for n in pruned if document.first_block <= n < document.first_block + document.num_blocks]
            places |= dict(zip(mine, places_of(reader, document, mine), strict=True))
        archived = Archives(folder).find(set(places.values()))
        for number in pruned:
            in_tree = np.array_equal(stored[number], wanted[number])
            there = archived.get(places[number])
            in_archive = there is not None and np.array_equal(there, wanted[number])
            if (self.curated[number].kept and not in_tree) or (self.curated[number].archived and not in_archive):
                findings.lost.append(f"tokens of pruned block {number}: {self.curated[number]}")

    def _inspect_upper_levels(self, reader: ContextReader, findings: Findings) -> None:
        version = reader.version
        promised = self.level_counts.get(version.encoding.gistnet_digest, ())
        for lod, count in enumerate(promised, start=1):
            if version.num_nodes(lod) < count:
                findings.lost.append(f"LOD{lod} nodes {version.num_nodes(lod)}-{count - 1}")
        for lod in range(2, version.max_lod + 1):
            nodes = np.arange(version.num_nodes(lod))
            for spec in version.encoding.arrays:
                wanted = vectors(0, lod, nodes, spec).reshape(len(nodes), spec.rows_per_node, spec.width)
                if not torch.equal(reader.read(spec.name, lod, nodes).float(), wanted):
                    findings.torn.append(f"{spec.name} of LOD{lod} differ")

    def _inspect_tail(self, reader: ContextReader, findings: Findings) -> None:
        texts = expected_texts(reader.version.num_blocks)
        tail = reader.tail()
        if tail is not None:
            text = next(t for n in range(len(texts) + 1) if (t := text_number(n)).key == tail.document.key)
            stored = texts[-1].num_tokens if texts and texts[-1].key == text.key else 0
            if not np.array_equal(tail.tokens, text.tokens(stored, stored + len(tail.tokens))):
                findings.torn.append(f"the tail of {text.key}")
        if self.last is None:
            return
        key = text_number(self.last.document).key
        held = next((document.num_tokens for document in reader.documents() if document.meta.key == key), 0)
        held += len(tail.tokens) if tail is not None and tail.document.key == key else 0
        if held < self.last.num_tokens:
            findings.lost.append(f"tokens {held}-{self.last.num_tokens - 1} of {key}")

    def _inspect_encodings(self, folder: Path, reader: ContextReader, findings: Findings) -> None:
        """Of an encoding that is being built, what was acknowledged of it, by the gists of every block."""
        with closing(catalogue.connect(folder, read_only=True)) as db:
            rows = db.execute("SELECT encoding_id, body FROM encodings").fetchall()
        known = {json.loads(body)["gistnet_digest"]: encoding_id for encoding_id, body in rows}
        for encoding in ENCODINGS:
            digest = encoding.gistnet_digest
            promised = self.level_counts.get(digest, ())
            if digest == reader.version.encoding.gistnet_digest:
                continue
            if digest not in known:
                if promised:
                    findings.lost.append(f"encoding {digest}")
                continue
            with ContextReader(folder, CONTEXT, encoding_id=known[digest]) as other:
                counts = other.version.level_counts
                if any(have < want for have, want in zip((*counts, *[0] * len(promised)), promised, strict=False)):
                    findings.lost.append(f"nodes of encoding {digest}: {promised} promised, {counts} there")
                self._inspect_gists(other, findings)

    def _inspect_tags(self, folder: Path, findings: Findings) -> None:
        there = {tag.name: tag.seq for tag in History(folder, CONTEXT).tags()}
        for tag, curated in self.tags.values():
            if tag.num_blocks < 0:
                continue
            if there.get(tag.name) != tag.seq:
                findings.lost.append(f"tag {tag.name} of version {tag.seq}")
                continue
            with ContextReader(folder, CONTEXT, seq=tag.seq) as reader:
                states = _states(curated, tag.num_blocks)
                assert_holds(reader, expected_texts(tag.num_blocks), reader.version.encoding, states=states)

    def _inspect_events(self, folder: Path, findings: Findings) -> None:
        found = read_focus_events(folder)
        wanted = [event_number(number) for number in range(found.num_rows)]
        if found.num_rows < self.num_events:
            findings.lost.append(f"focus events {found.num_rows}-{self.num_events - 1}")
        for name in ("number", "num_tokens", "cost", "time"):
            if found[name].to_pylist() != [getattr(event, name) for event in wanted]:
                findings.torn.append(f"{name} of focus events")

    def _inspect_gists(self, reader: ContextReader, findings: Findings) -> None:
        texts: list[Text] = expected_texts(reader.version.num_blocks)
        for spec in reader.version.encoding.arrays if texts else ():
            wanted = torch.cat([text.gists(0, text.num_blocks, spec) for text in texts])
            read = reader.read(spec.name, 1, np.arange(reader.version.num_blocks))
            if not torch.equal(read.float().reshape(wanted.shape), wanted):
                findings.torn.append(f"{spec.name} of encoding {reader.version.encoding.gistnet_digest} differ")


def _states(curated: dict[int, CuratedBlock], num_blocks: int) -> np.ndarray:
    """`BlockState` of the first blocks."""
    states = np.zeros(num_blocks, np.int8)
    for number, block in curated.items():
        if number < num_blocks:
            states[number] = block.state
    return states
