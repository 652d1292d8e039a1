"""Words and what they mean, from the files of WordNet 3 (Princeton University; `wndb(5WN)`, `senseidx(5WN)`).

data.noun…    a line a synset: its offset, file number, words, pointers, and behind `|` the gloss
index.sense   a line a sense: its key, the synset's offset, the sense's number, how often it was tagged in texts
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CorpusError

NOUN_FILES = "data.noun*"
SENSES_FILE = "index.sense"

NOUN = "1"
"""A noun's number in a sense key."""

MAX_DESCRIPTION_WORDS, MIN_DESCRIPTION_WORDS = 16, 3
MIN_WORD_LETTERS = 4
STEM_LETTERS = 5
"""Words that begin with as many equal letters are taken for forms of one word."""


@dataclass(frozen=True)
class Entry:
    """A noun by its most frequent meaning."""

    word: str
    description: str
    """What it means, in words none of which begins like it or a synonym of it."""
    synonyms: tuple[str, ...]
    num_tagged: int
    """How often the meaning came up in the texts that WordNet's authors read; 0 for most."""


def read_entries(folder: Path, excluded: Collection[str] = ()) -> list[Entry]:
    """All nouns of one word that are described without being named, in the order of the sense index.

    Args:
        folder: holds the files, at any depth.
        excluded: words that neither an entry nor a synonym of it may be.

    Raises:
        CorpusError: the files are not there, or say something else.
    """
    synsets = {offset: synset for path in _files(folder, NOUN_FILES) for offset, synset in _synsets(path)}
    unwanted = set(excluded)
    entries = []
    for path in _files(folder, SENSES_FILE):
        for number, line in enumerate(_lines(path), 1):
            try:
                key, offset, sense, tagged = line.split()
                word, _, rest = key.partition("%")
                num_tagged = int(tagged)
            except ValueError as error:
                raise CorpusError(f"{path}, line {number} is no sense of WordNet: {line[:60]!r}") from error
            if rest[:1] != NOUN or sense != "1" or not word.isalpha() or len(word) < MIN_WORD_LETTERS:
                continue
            words, gloss = synsets.get(offset, ((), ""))
            # Where the synset has it with a capital letter it is a name.
            if word not in words or unwanted & {word, *map(str.lower, words)}:
                continue
            if _describes(gloss, words):
                entries.append(Entry(word, gloss, tuple(w for w in words if w != word), num_tagged))
    return entries


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise CorpusError(f"{folder} holds no file {pattern} of WordNet; give the folder of its database files")
    return found


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


def _synsets(path: Path) -> Iterator[tuple[str, tuple[tuple[str, ...], str]]]:
    """Offset, words, and the gloss without examples and asides."""
    for number, line in enumerate(_lines(path), 1):
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition("|")
        fields = head.split()
        try:
            num_words = int(fields[3], 16)
            words = tuple(fields[4 + 2 * index].replace("_", " ") for index in range(num_words))
        except (IndexError, ValueError) as error:
            raise CorpusError(f"{path}, line {number} is no synset of WordNet: {line[:60]!r}") from error
        yield fields[0], (words, re.sub(r"\s*\([^)]*\)\s*", " ", gloss.partition(";")[0]).strip())


def _describes(gloss: str, words: tuple[str, ...]) -> bool:
    is_long_enough = MIN_DESCRIPTION_WORDS <= len(gloss.split()) <= MAX_DESCRIPTION_WORDS
    return is_long_enough and not _stems(gloss) & _stems(" ".join(words))


def _stems(text: str) -> set[str]:
    return {word[:STEM_LETTERS] for word in re.findall(r"[a-z]+", text.lower()) if len(word) >= MIN_WORD_LETTERS}
