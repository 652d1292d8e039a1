"""What counts as a term, and which block it belongs to."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.lexical.terms import MAX_TERM_CHARS, block_terms, settled_blocks, terms_of
from storage.memory_tree import MemoryTree
from tests.storage.lexical_support import ENCODING, decode, span, write


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Plain words, in prose.", "plain words in prose"),
        ("snake_case_name", "snake_case_name snake case name"),
        ("camelCase HTTPServer getHTTP", "camelcase camel case httpserver http server gethttp get http"),
        ("MAX_LEN __init__ _ __", "max_len max len __init__ init"),
        ("os.path.join(a)", "os.path.join os path join a"),
        ("torch.nnModule", "torch.nnmodule torch nnmodule nn module"),
        ("3.14 1,024 2024-01-05", "3.14 3 14 1 024 2024-01-05 2024 01 05"),
        ("well-known --config.key", "well-known well known config.key config key"),
        (
            "550E8400-e29b-41d4-a716-446655440000",
            "550e8400-e29b-41d4-a716-446655440000 550e8400 e29b 41d4 a716 446655440000",
        ),
        ("utf8 UTF8 SHA256", "utf8 utf8 sha256"),
        ("naïve Straße Änderung", "naïve strasse änderung"),
        ("記憶 tree", "記 憶 tree"),
        ("x == 'y' AND \"z\" OR (NEAR*) ^col: - +", "x y and z or near col"),
        (" \n\t#!?", ""),
    ],
)
def test_terms(text: str, terms: str) -> None:
    assert list(terms_of(text)) == terms.split()


def test_long_terms_are_cut_alike() -> None:
    assert list(terms_of("a" * 500)) == list(terms_of("a" * 400)) == ["a" * MAX_TERM_CHARS]


@given(st.text(), st.integers(0, 20), st.integers(0, 20))
def test_a_part_of_a_text_has_the_terms_that_overlap_it(text: str, start: int, size: int) -> None:
    inside = Counter(terms_of(text, start, start + size))
    assert inside <= Counter(terms_of(text))
    # No character of a term is left out: what two adjoining parts hold is all there is.
    rest = Counter(terms_of(text, 0, start)) | Counter(terms_of(text, start + size, len(text)))
    assert Counter(terms_of(text)) <= inside + rest + rest


@given(st.text())
def test_terms_need_no_quoting(text: str) -> None:
    for term in terms_of(text):
        assert term
        assert all(c.isalnum() or c in "_.-" or ord(c) > 127 for c in term)


def terms_per_block(*texts: str) -> list[Counter[str]]:
    tree = MemoryTree(ENCODING)
    write(tree, *texts)
    return block_terms(tree.reader(), decode, 0, tree.version().num_blocks)


def test_a_word_across_an_edge_counts_whole_with_both_blocks() -> None:
    left, right = terms_per_block("the launch code is in kept_in_vault_seven ok")
    assert left["kept_in_vault_seven"] == right["kept_in_vault_seven"] == 1
    # Of the parts only the cut one is in both.
    assert [(left[part], right[part]) for part in ("kept", "in", "vault", "seven")] == [(1, 0), (2, 0), (1, 1), (0, 1)]
    assert left["ok"] == 0
    assert right["launch"] == 0
    assert not {"va", "ult", "vau", "lt"} & (left.keys() | right.keys())


def test_documents_do_not_complete_each_others_words() -> None:
    first, second = terms_per_block("x" * 30 + " a", "b rest")
    assert first["a"] == 1
    assert second["b"] == 1
    assert "ab" not in first.keys() | second.keys()


def test_characters_cut_by_an_edge() -> None:
    text = "a" * 28 + " é" + "ü" * 6 + " b"  # byte 31 and 32 are the two halves of one ü
    left, right = terms_per_block(text)
    assert left["é" + "ü" * 6] == right["é" + "ü" * 6] == 1


def test_terms_do_not_depend_on_how_blocks_are_batched() -> None:
    tree = MemoryTree(ENCODING)
    write(tree, "one two three four five six seven eight nine ten eleven twelve", "thirteen " * 9, "fourteen")
    reader = tree.reader()
    num_blocks = reader.version.num_blocks
    alone = [block_terms(reader, decode, block, block + 1)[0] for block in range(num_blocks)]
    assert block_terms(reader, decode, 0, num_blocks) == alone
    assert block_terms(reader, decode, 2, 2) == []


def test_text_behind_the_stop_is_not_looked_at() -> None:
    tree = MemoryTree(ENCODING)
    write(tree, "0123456789 0123456789 01234 straddles the edge")
    cut = block_terms(tree.reader(), decode, 0, 1, text_stop=1)[0]
    assert "straddles" not in cut
    assert cut["stra"] == 1


def test_the_last_block_of_a_growing_document_is_not_settled() -> None:
    tree = MemoryTree(ENCODING)
    assert settled_blocks(tree.reader()) == 0
    text = "word " * 20
    tree.append([span("d", text, 0, 2)])
    assert settled_blocks(tree.reader()) == 1
    tree.append([span("d", text, 2)])
    assert settled_blocks(tree.reader()) == 4
