"""What picked blocks have in common with a horizon, against counting by hand in a text of known words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.evaluation import names
from actors.evaluation.names import SharedNames
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from models.focus.history import History
from tests.actors.evaluation.support import StoredText, stored

STOP = 42
"""Blocks 0-9 are a document of their own; the horizon begins in block 42."""


def line(text: str) -> str:
    """Exactly one block: the tiny tokenizer's tokens are bytes."""
    assert len(text) < K
    return f"{text:<{K - 1}}\n"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[StoredText]:
    lines = [line(f"filler number{number}") for number in range(STOP)]
    lines[3] = line("the quokka and a cat")
    lines[12] = line("once more the Quokka")
    lines[20] = line("def parse_quagga(self):")
    for block in (15, 25, 35):
        lines[block] = line("ordinary things")
    horizon = [line("a quokka, parse_quagga, a cat"), line("ordinary zebra filler")]
    texts = ["".join(lines[:10]), "".join([*lines[10:], *horizon, line("the end"), line("of it")])]
    with stored(tiny_lm_config, tmp_path_factory.mktemp("names"), texts) as tree:
        yield tree


def shared(tree: StoredText, first: int = 0, stop: int = STOP) -> SharedNames:
    history = History.of(tree.reader, first, stop)
    tokens, _ = tree.reader.tokens(STOP, 2)
    return SharedNames(tree.reader, tree.plan.tokenizer, history, tokens.reshape(-1))


def test_names_are_rare_in_the_history_and_in_the_horizon(tree: StoredText) -> None:
    # 5% of 42 blocks are two: "ordinary" is in three, "filler" in most, "zebra" in none, "cat" is short.
    assert shared(tree).names == {"quokka", "parse_quagga", "quagga", "parse"}


def test_blocks_that_share_a_name_are_counted(tree: StoredText) -> None:
    found = shared(tree)
    sharing = [block for block in range(STOP) if found.num_sharing([block])]
    assert sharing == [3, 12, 20]
    assert found.num_sharing(range(STOP)) == 3
    assert found.num_sharing([12, 0, 20, 41]) == 2
    assert found.num_sharing([]) == 0


def test_what_is_rare_depends_on_the_history(tree: StoredText, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 32 blocks one may hold a name; of these "quokka" is in one.
    part = shared(tree, 10)
    assert part.names == {"quokka", "parse_quagga", "quagga", "parse"}
    assert [block for block in range(10, STOP) if part.num_sharing([block])] == [12, 20]
    assert shared(tree, 13).names == {"parse_quagga", "quagga", "parse"}
    assert shared(tree, 21).names == frozenset()
    monkeypatch.setattr(names, "NAME_SHARE", 0.1)
    assert shared(tree).names == {"quokka", "parse_quagga", "quagga", "parse", "ordinary"}
    monkeypatch.setattr(names, "MIN_NAME_CHARS", 3)
    assert shared(tree, 0, 13).names == {"cat"}, "at most one of 13 blocks; quokka is in two"


def test_blocks_of_the_horizons_document_are_counted(tree: StoredText) -> None:
    found = shared(tree)
    assert found.num_same_document([0, 9, 10, 41, 20]) == 3
    assert found.num_same_document([9]) == found.num_same_document([]) == 0
