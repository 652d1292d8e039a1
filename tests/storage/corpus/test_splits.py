import hashlib
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import CorpusConfig
from storage.corpus.document import CorpusItem
from storage.corpus.shard import ShardLimits
from storage.corpus.source import open_corpus
from storage.corpus.splits import SHARES, Split, split_of
from tests.storage.corpus.support import documents, read_all, reasons, write_tree

SPLITS: tuple[Split, ...] = ("train", "dev", "held_out")


def digest_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    files: dict[str, str | bytes] = {f"{number % 7}/{number}.txt": f"text {number}\n" for number in range(300)}
    files["rows.jsonl"] = "\n".join(json.dumps({"text": f"row {number}"}) for number in range(300))
    files |= {"bad.bin": b"\0", "copies/a.txt": "text 1\n", "copies/b.txt": "text 2\n"}
    return write_tree(tmp_path / "mixed", files)


@given(st.binary())
def test_a_split_is_where_the_salted_hash_falls(content: bytes) -> None:
    content_sha256 = hashlib.sha256(content).hexdigest()
    draw = int(hashlib.sha256(f"megacontext split 1\0{content_sha256}".encode()).hexdigest()[:16], 16) / 2**64
    assert split_of(content_sha256) == ("train" if draw < 0.8 else "dev" if draw < 0.9 else "held_out")


def test_splits_never_change() -> None:
    """Results are compared over years: these were drawn once and must stay so."""
    assert "".join(split_of(digest_of(number))[0] for number in range(40)) == "dthttttttttttthtdttttttttthtttttttdttttt"


def test_the_shares_are_those_given() -> None:
    drawn = [split_of(digest_of(number)) for number in range(20_000)]
    assert sum(SHARES.values()) == 100
    for split, share in SHARES.items():
        expected = share / 100
        assert drawn.count(split) / len(drawn) == pytest.approx(
            expected, abs=4 * (expected * (1 - expected) / 2e4) ** 0.5
        )


def test_the_splits_are_the_corpus_taken_apart(mixed: Path) -> None:
    whole = documents(read_all(mixed))
    assert len(whole) == 602
    for split in SPLITS:
        part = documents(read_all(mixed, split=split))
        assert part == [document for document in whole if split_of(document.content_sha256) == split]
        assert len(part) / len(whole) == pytest.approx(SHARES[split] / 100, abs=0.05)


def test_exact_copies_share_a_split_whatever_they_are_called(mixed: Path) -> None:
    for split in SPLITS:
        texts: list[str] = [document.text for document in documents(read_all(mixed, split=split))]
        assert texts.count("text 1\n") in (0, 2)
        assert texts.count("text 2\n") in (0, 2)


def test_a_document_stays_in_its_split_when_others_come_and_go(mixed: Path) -> None:
    before = {document.uri for document in documents(read_all(mixed, split="dev"))}
    (mixed / "0/0.txt").unlink()
    write_tree(mixed, {f"new/{number}.txt": f"new {number}\n" for number in range(50)})
    after = {document.uri for document in documents(read_all(mixed, split="dev"))}
    assert {uri for uri in after if "/new/" not in uri} == before - {"mixed/0/0.txt"}
    assert after - before


def test_documents_of_other_splits_are_not_quarantined_and_bad_files_are_in_every_split(mixed: Path) -> None:
    for split in SPLITS:
        assert reasons(read_all(mixed, split=split)) == {"mixed/bad.bin": "binary"}


def test_what_is_known_before_reading(mixed: Path) -> None:
    whole = open_corpus(CorpusConfig(paths=[str(mixed)]))
    digests = {whole.digest()}
    assert whole.estimated_bytes is not None
    for split in SPLITS:
        source = open_corpus(CorpusConfig(paths=[str(mixed)], split=split))
        digests.add(source.digest())
        assert source.estimated_bytes == whole.estimated_bytes * SHARES[split] // 100
        assert source.num_files == whole.num_files
        assert source.describe() == f"the {split} split ({SHARES[split]}%) of {whole.describe()}"
    assert len(digests) == 4


def test_shards_of_a_split_can_be_read_elsewhere(mixed: Path) -> None:
    config = CorpusConfig(paths=[str(mixed)], split="held_out")
    shards = [pickle.dumps(shard) for shard in open_corpus(config, ShardLimits(group_files=5)).shards()]
    read: list[CorpusItem] = [item for shard in shards for item in pickle.loads(shard).read()]
    assert read == read_all(mixed, split="held_out")
