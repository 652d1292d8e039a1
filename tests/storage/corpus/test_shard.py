import pickle
from collections.abc import Iterator
from dataclasses import dataclass

from storage.corpus.document import CorpusItem, QuarantinedItem
from storage.corpus.shard import ReadOptions, RefusedPart, ShardLimits, group_parts, refuse_size
from tests.storage.corpus.support import uris

OPTIONS = ReadOptions()


@dataclass(frozen=True)
class Piece:
    name: str
    estimated_bytes: int

    def read(self, options: ReadOptions) -> Iterator[CorpusItem]:
        yield QuarantinedItem(self.name, "empty", "", options.max_document_bytes)


def sizes(pieces: list[int], limits: ShardLimits) -> list[list[int]]:
    shards = group_parts([Piece(str(i), size) for i, size in enumerate(pieces)], OPTIONS, limits)
    return [[part.estimated_bytes for part in shard.parts] for shard in shards]


def test_small_parts_share_a_shard_up_to_both_limits_and_large_ones_stand_alone() -> None:
    limits = ShardLimits(group_bytes=10, group_files=3)
    assert sizes([4, 4, 4, 1, 1, 1, 1], limits) == [[4, 4], [4, 1, 1], [1, 1]]
    assert sizes([1, 50, 1, 10, 0, 1], limits) == [[1], [50], [1], [10, 0], [1]]
    assert sizes([0] * 7, limits) == [[0, 0, 0], [0, 0, 0], [0]]
    assert sizes([], limits) == []


def test_a_shard_reads_its_parts_in_order_with_its_own_options_after_pickling() -> None:
    parts = [Piece("a", 1), RefusedPart(QuarantinedItem("b", "binary", "why", 9)), Piece("c", 2)]
    (shard,) = group_parts(parts, ReadOptions(max_document_bytes=7), ShardLimits())
    copy = pickle.loads(pickle.dumps(shard))
    assert copy == shard
    assert copy.estimated_bytes == 3
    items = list(copy.read())
    assert uris(items) == ["a", "b", "c"]
    assert [item.size_bytes for item in items] == [7, 9, 7]


def test_shards_are_made_one_at_a_time() -> None:
    def endless() -> Iterator[Piece]:
        while True:
            yield Piece("x", 1)

    shards = group_parts(endless(), OPTIONS, ShardLimits(group_files=2))
    assert len(next(shards).parts) == 2


def test_the_size_limit() -> None:
    assert refuse_size("u", 5, ReadOptions(max_document_bytes=5)) is None
    item = refuse_size("u", 6, ReadOptions(max_document_bytes=5))
    assert item is not None
    assert (item.reason, item.size_bytes) == ("oversized", 6)
