"""A small WordNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Synset:
    """One meaning."""

    words: tuple[str, ...]
    gloss: str


SYNSETS = [
    Synset(("kettle",), 'a metal pot for boiling water; "put it on the stove"'),
    Synset(("lamp", "night light"), 'an artificial source of (visible) visible illumination; "switch it on"'),
    Synset(("vessel", "ship"), "a craft designed for transport over water"),
    Synset(("meadow",), "a field where grass is grown for hay"),
    Synset(("cobbler",), "a person who makes or repairs shoes"),
    Synset(("winter",), "the coldest season of the year"),
    Synset(("oven",), "kitchen appliance used for baking or roasting"),
    Synset(("ladder",), "steps consisting of two parallel members connected by rungs"),
]


def write_wordnet(folder: Path, synsets: Sequence[Synset] = SYNSETS) -> Path:
    """Its files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = ["  1 This is the licence.  "]
    senses = ["run%2:38:00:: 01926311 1 106"]
    for number, synset in enumerate(synsets):
        offset = f"{number + 1:08d}"
        words = " ".join(f"{word.replace(' ', '_')} 0" for word in synset.words)
        data.append(f"{offset} 06 n {len(synset.words):02x} {words} 000 | {synset.gloss}  ")
        for word in synset.words:
            key = f"{word.lower().replace(' ', '_')}%1:06:00::"
            # A synonym's most frequent meaning is another one.
            sense = 1 if word == synset.words[0] else 2
            senses.append(f"{key} {offset} {sense} {5 if word == 'lamp' else 1}")
    (folder / "data.noun").write_text("\n".join(data) + "\n")
    (folder / "index.sense").write_text("\n".join(sorted(senses)) + "\n")
    return folder
