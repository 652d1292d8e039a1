"""Words and their descriptions, out of WordNet's own format."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import CorpusError
from storage.corpus.wordnet import read_entries
from tests.storage.corpus.wordnet_files import SYNSETS, Synset, write_wordnet


def test_nouns_of_one_word_by_their_first_meaning(tmp_path: Path) -> None:
    entries = read_entries(write_wordnet(tmp_path))
    assert [entry.word for entry in entries] == sorted(synset.words[0] for synset in SYNSETS)
    lamp = next(entry for entry in entries if entry.word == "lamp")
    assert lamp.description == "an artificial source of visible illumination"  # no example, no aside
    assert lamp.synonyms == ("night light",)
    assert lamp.num_tagged == 5


@pytest.mark.parametrize(
    "synset",
    [
        Synset(("hammer",), "a tool for hammering nails"),  # names what it describes
        Synset(("cattle", "herd"), "a herd of cows or oxen"),
        Synset(("Paris",), "the capital and largest city of a country"),  # a name
        Synset(("egg",), "an oval thing that hens lay"),  # three letters
        Synset(("tool box",), "a chest that holds what mechanics need"),
        Synset(("chair",), "furniture"),  # says too little
    ],
    ids=lambda synset: synset.words[0],
)
def test_what_cannot_be_asked_for_is_left_out(tmp_path: Path, synset: Synset) -> None:
    words = [entry.word for entry in read_entries(write_wordnet(tmp_path, [*SYNSETS, synset]))]
    assert len(words) == len(SYNSETS)


def test_excluded_words_are_no_entry_and_no_synonym_of_one(tmp_path: Path) -> None:
    words = {entry.word for entry in read_entries(write_wordnet(tmp_path), excluded=["lamp", "ship"])}
    assert not words & {"lamp", "vessel"}  # "ship" is a synonym of it
    assert "kettle" in words


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"data\.noun"):
        read_entries(tmp_path)


@pytest.mark.parametrize(("name", "line"), [("data.noun", "00000001 06 n xx"), ("index.sense", "lamp%1:06:00:: 1")])
def test_a_damaged_line_is_named(tmp_path: Path, name: str, line: str) -> None:
    path = write_wordnet(tmp_path) / name
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(CorpusError, match=rf"{name}, line \d+ is no s"):
        read_entries(tmp_path)
