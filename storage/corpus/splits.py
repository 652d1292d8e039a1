"""Train, dev and held-out: a document's split is a function of its bytes, so it is the same everywhere and forever.

No list is kept, and a document added or taken away moves no other. Exact copies fall into one split wherever
they lie, so they cannot leak from train to held-out. Near copies can: a vendored file with one line changed, a licence
with another year, two versions of one package are different bytes and are drawn apart.

Shares hold in expectation over documents, not over bytes: of n documents a share p comes out as p ± √(p(1-p)/n).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from storage.corpus.document import CorpusItem, Document
from storage.corpus.shard import Part, ReadOptions, Shard

if TYPE_CHECKING:
    from storage.corpus.source import CorpusSource

Split = Literal["train", "dev", "held_out"]

SHARES: dict[Split, int] = {"train": 80, "dev": 10, "held_out": 10}
"""In percent."""

_SALT = b"megacontext split 1\0"
"""Another version draws all documents anew; results before and after are then not to be compared."""


def split_of(content_sha256: str) -> Split:
    """The split of a document with these bytes.

    Args:
        content_sha256: `Document.content_sha256`, hex.
    """
    # Hashed again with a salt, so that the draw is independent of anything else that is chosen by content hash.
    digest = hashlib.sha256(_SALT + content_sha256.encode()).digest()
    percentile = int.from_bytes(digest[:8]) * 100 >> 64
    for split, share in SHARES.items():
        percentile -= share
        if percentile < 0:
            return split
    raise AssertionError("the shares sum to 100")


@dataclass(frozen=True, slots=True)
class SplitPart:
    """The documents of another part that belong to a split. What cannot be read has no hash and is in every split."""

    part: Part
    split: Split

    @property
    def estimated_bytes(self) -> int:
        return self.part.estimated_bytes * SHARES[self.split] // 100

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        """Yield the split's documents, and every quarantined item."""
        for item in self.part.read(options):
            if not isinstance(item, Document) or split_of(item.content_sha256) == self.split:
                yield item


class SplitCorpus:
    """One split of another corpus, in its order. See `storage.corpus.source.CorpusSource`.

    A document's split is known only once its bytes are read, so reading a split costs reading the whole corpus (but
    no more than that: documents of other splits are dropped before they are tokenised, and reported nowhere).
    """

    def __init__(self, source: CorpusSource, split: Split) -> None:
        self._source = source
        self._split: Split = split

    @property
    def num_files(self) -> int:
        """Files to look into; those of other splits too."""
        return self._source.num_files

    @property
    def estimated_bytes(self) -> int | None:
        whole = self._source.estimated_bytes
        return None if whole is None else whole * SHARES[self._split] // 100

    def shards(self) -> Iterator[Shard]:
        for shard in self._source.shards():
            yield Shard(tuple(SplitPart(part, self._split) for part in shard.parts), shard.options)

    def digest(self) -> str:
        return hashlib.sha256(_SALT + f"{self._split}\0{self._source.digest()}".encode()).hexdigest()

    def describe(self) -> str:
        return f"the {self._split} split ({SHARES[self._split]}%) of {self._source.describe()}"
