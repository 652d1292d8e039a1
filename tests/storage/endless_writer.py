"""A writer that never ends by itself, for killing: documents follow one another for ever, every token known beforehand.

Its own module, so that a fork server can have it loaded: a fresh interpreter would need seconds for each kill.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from cluster.config import TOKENS_PER_BLOCK as K
from storage.bulk_writer import BulkWriter
from storage.contract import Ack, TreeWriter
from tests.storage.support import Text, encoding_of, follow, open_context

ENCODING = encoding_of("float16", width=6, rows=2, key_width=3)
Kind = Literal["streaming", "bulk"]


@dataclass(frozen=True)
class Acknowledged:
    """What a returned call promised to keep."""

    level_counts: tuple[int, ...]
    document: int
    num_tokens: int
    """Of the document, its tail included."""


def text_number(number: int) -> Text:
    """The endless sequence of documents: 1 to 3,000 tokens."""
    return Text(f"doc{number}", 1 + number * 7919 % 3001)


def first_unfinished(tree: TreeWriter, start: int = 0) -> int:
    """The document to go on with."""
    number = start
    while (mark := tree.marks([text_number(number).key]).get(text_number(number).key)) and mark.state == "complete":
        number += 1
    return number


def write_on(root: Path, kind: Kind, seed: int, acknowledge: Connection | None, last: int | None = None) -> None:
    """Go on from the marks; endless, or up to and with document `last`."""
    chance = random.Random(seed)
    context = open_context(root)
    tree: TreeWriter = BulkWriter(context) if kind == "bulk" else context

    def say(ack: Ack, document: int, num_tokens: int = 0) -> None:
        if acknowledge is not None:
            acknowledge.send(Acknowledged(ack.version.level_counts, document, num_tokens))

    number = first_unfinished(tree)
    while last is None or number <= last:
        text = text_number(number)
        mark = tree.marks([text.key]).get(text.key)
        done = mark.num_blocks if mark else 0
        while done < text.num_blocks:
            if kind == "streaming" and chance.random() < 0.3:
                stop = min(text.num_tokens, done * K + chance.randint(1, 3 * K))
                say(tree.append_tail(text.meta, done * K, text.tokens(done * K, stop)), number, stop)
            first = max(0, done - chance.choice([0, 0, 0, 4]))
            done = min(text.num_blocks, done + chance.randint(1, 12))
            ack = tree.append([text.span(ENCODING, first, done)], request_id=f"{number}/{done}")
            durable = min(done * K, text.num_tokens) if ack.pending_blocks == 0 else 0
            say(ack, number, durable)
        number += 1
        if chance.random() < 0.1:
            follow(tree, ENCODING)
            say(tree.flush(), number - 1, text.num_tokens)
    tree.flush()
    follow(tree, ENCODING)
    tree.close()
